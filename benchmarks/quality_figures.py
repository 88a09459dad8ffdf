"""What benchmarks/quality measures of a bundle, and the trivial baselines that it is compared with."""

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score

from benchmarks.quality_data import ROOT, SEED, Context, jsonl
from handler.engine import Engine
from handler.errors import RequestError
from handler.messages import Media, Request
from training import tasks


def metrics_of(place: Path) -> dict[str, Any]:
    """A bundle's metrics.json."""
    found: dict[str, Any] = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    return found


def metric(key: str, split: str = "test") -> Callable[[Context, Path], float]:
    """A figure of metrics.json."""
    return lambda _, place: float(metrics_of(place)["splits"][split][key])


def constant(value: float) -> Callable[[Context, Path], float]:
    """A baseline known without looking."""
    return lambda _, __: value


def majority(_: Context, place: Path) -> float:
    """Accuracy of always answering the most frequent label of the test split."""
    counts = metrics_of(place)["rows_per_label"]["test"]
    return float(max(counts.values()) / sum(counts.values()))


def always_neutral(context: Context, _: Path) -> float:
    """Micro-F1 of answering the most frequent emotion, and nothing else, to everything."""
    rows = [row["labels"] for row in jsonl(context.data / "goemotions" / "test.jsonl")]
    [(frequent, _count)] = Counter(label for labels in rows for label in labels).most_common(1)
    names = sorted({label for labels in rows for label in labels})
    expected = np.array([[name in labels for name in names] for labels in rows])
    return float(f1_score(expected, np.array([[name == frequent for name in names]] * len(rows)), average="micro"))


def random_span(_: Context, place: Path) -> float:
    """F1 of three words taken at random from the context."""
    chance = random.Random(SEED)
    examples = jsonl(place / "validation.jsonl")
    spans = []
    for example in examples:
        words = example["inputs"]["context"].split()
        start = chance.randrange(len(words))
        spans.append({"answer": " ".join(words[start : start + 3]), "score": 1.0})
    scores = tasks.load("question-answering").score(spans, [example["target"] for example in examples], [])
    return float(scores["f1"])


def last_perplexity(_: Context, place: Path) -> float:
    """Perplexity of the hidden tokens of the validation split, after the last epoch."""
    return float(metrics_of(place)["epochs"][-1]["eval_perplexity"])


def first_words(_: Context, __: Path) -> float:
    """ROUGE-L of the first words of each message as its summary: the best that any number of words up to 20 gives."""
    rows = pd.read_csv(ROOT / "examples" / "messages" / "test.csv")
    task = tasks.load("summarization")
    guesses = ([{"summary_text": " ".join(text.split()[:number])} for text in rows["text"]] for number in range(1, 21))
    return max(float(task.score(guess, rows["summary"].tolist(), [])["rouge_l"]) for guess in guesses)


def copied_source(_: Context, __: Path) -> float:
    """chrF of the English text in place of its translation."""
    rows = pd.read_csv(ROOT / "examples" / "phrases" / "test.csv")
    guess = [{"translation_text": text} for text in rows["source"]]
    return float(tasks.load("translation").score(guess, rows["target"].tolist(), [])["chrf"])


def without_neutral(context: Context, place: Path) -> float:
    """Accuracy on SST-2 dev of the more probable of negative and positive, of a model that knows neutral too."""
    rows = pd.read_csv(context.data / "sst2" / "dev.csv", keep_default_na=False)
    scores = [{entry["label"]: entry["score"] for entry in found} for found in ask(place, rows["text"].tolist())]
    found = ["positive" if entry["positive"] > entry["negative"] else "negative" for entry in scores]
    return float((pd.Series(found) == rows["label"]).mean())


def digits_named_rightly(context: Context, place: Path) -> float:
    """Share of 500 generated digits that the image classifier of this run names as they were asked for."""
    classifier = context.bundle("mnist-resnet")
    if not classifier.is_dir():
        sys.exit("benchmarks/quality: text-to-image is judged by mnist-resnet; run both with one --work")
    wanted = [str(number % 10) for number in range(20 if context.quick else 500)]
    engine = Engine(place)
    outcomes = engine.predict([Request([digit], {"seed": seed}) for seed, digit in enumerate(wanted)])
    images = []
    for outcome in outcomes:
        if isinstance(outcome, RequestError):
            raise outcome
        [image] = outcome.predictions
        assert isinstance(image, Media)
        images.append(image.content)
    named = [found[0]["label"] for found in ask(classifier, images)]
    return float(np.mean([name == digit for name, digit in zip(named, wanted, strict=True)]))


def ask(place: Path, inputs: Sequence[Any]) -> list[Any]:
    """A bundle's predictions."""
    [outcome] = Engine(place).predict([Request(inputs, many=True)])
    if isinstance(outcome, RequestError):
        raise outcome
    return list(outcome.predictions)
