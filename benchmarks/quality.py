"""Quality on real data: what the models that train.py makes are worth on data they have not seen.

Each experiment trains one model through train.py, with the test split scored by the engine that serves it, and puts the
figure beside that of a trivial baseline. The data sets are those of ../shared/data, or of the folder named by --data.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from benchmarks.quality_data import ROOT, SEED, Context, example, files, mnist, shakespeare, spoken_digits
from benchmarks.quality_figures import (
    always_neutral,
    constant,
    copied_source,
    digits_named_rightly,
    first_words,
    last_perplexity,
    majority,
    metric,
    random_span,
    without_neutral,
)
from benchmarks.quality_texts import messages, phrases
from training.interrupts import INTERRUPTED

RESULTS = ROOT / "benchmarks" / "quality-results.json"
_EXAMPLES = """examples:
  benchmarks/quality                       # every experiment; after each, its figures are written
  benchmarks/quality --only sst2 wnut17    # these alone; the results of the others are kept
  benchmarks/quality --quick               # a few steps each, prints only: shows that it runs"""
DOCS = ROOT / "docs" / "quality.md"
QUICK = ("--max-steps", "2", "--eval-strategy", "no", "--save-strategy", "no", "--load-best-model-at-end", "false")


@dataclass(frozen=True)
class Experiment:
    """One model on one data set.

    arguments: those of train.py besides --output-dir and --seed. figure: the name of the figure and its value, from the
    bundle's metrics.json or by asking the bundle. baseline: what it is compared with, and its value. target: what the
    figure must reach at least (at most, where lower is better). goal: a target of its own.
    """

    name: str
    data: str
    arguments: Callable[[Context], Sequence[str]]
    figure: str
    measure: Callable[[Context, Path], float]
    baseline: str
    baseline_value: Callable[[Context, Path], float]
    lower_is_better: bool = False
    goal: float | None = None
    seed: int = SEED

    def target(self, baseline: float) -> float:
        """The goal, if one is set; else clearly better than the baseline: a quarter of the way to perfection."""
        if self.goal is not None:
            return self.goal
        return baseline * 0.75 if self.lower_is_better else baseline + (1 - baseline) / 4


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/quality",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few steps each, nothing written")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(e.name for e in EXPERIMENTS)}")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--work", type=Path, help="folder to keep the bundles in (default: a temporary one)")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse(sys.argv[1:])
    if not (arguments.data / "sst2").is_dir():
        sys.exit(f"benchmarks/quality: {arguments.data}/sst2 is missing; name the folder of the data sets with --data")
    names = [experiment.name for experiment in EXPERIMENTS]
    if unknown := set(arguments.only or ()) - set(names):
        sys.exit(f"benchmarks/quality: no experiment {', '.join(sorted(unknown))}; there are {', '.join(names)}")

    with tempfile.TemporaryDirectory() as folder:
        context = Context(arguments.data, (arguments.work or Path(folder)).absolute(), arguments.quick)
        context.work.mkdir(parents=True, exist_ok=True)
        for experiment in EXPERIMENTS:
            if arguments.only and experiment.name not in arguments.only:
                continue
            found = run(experiment, context)
            print(json.dumps(found), flush=True)
            if not arguments.quick:
                record(found)
    if not arguments.quick:
        print(table(json.loads(RESULTS.read_text(encoding="utf-8"))["rounds"]))


def run(experiment: Experiment, context: Context) -> dict[str, Any]:
    """Trains one model through train.py and measures it."""
    place = context.bundle(experiment.name)
    shutil.rmtree(place, ignore_errors=True)
    given = [*experiment.arguments(context), "--seed", str(experiment.seed)]
    command = ["train.py", *given, "--output-dir", str(place), *(QUICK if context.quick else ())]
    print(f"== {experiment.name}", flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    seconds = time.monotonic() - started
    metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    value, baseline = experiment.measure(context, place), experiment.baseline_value(context, place)
    target = experiment.target(baseline)
    epochs = [entry["epoch"] for entry in metrics.get("epochs", [])]
    return {
        "name": experiment.name,
        "data": experiment.data,
        "task": metrics["task"],
        "command": portable(" ".join(["python", *command[: len(given) + 1]]), context),
        "seed": experiment.seed,
        "epochs": round(epochs[-1], 2) if epochs else None,
        "seconds": round(seconds, 1),
        "figure": experiment.figure,
        "value": round(value, 4),
        "baseline": experiment.baseline,
        "baseline_value": round(baseline, 4),
        "target": round(target, 4),
        "lower_is_better": experiment.lower_is_better,
        "met": value <= target if experiment.lower_is_better else value >= target,
    }


def portable(command: str, context: Context) -> str:
    """A command without the folders of this machine."""
    return command.replace(str(context.work), "WORK").replace(str(context.data), "DATA")


def record(found: Mapping[str, Any]) -> None:
    """Writes quality-results.json and the table in the docs, this experiment's figures in place of its older ones."""
    rounds = json.loads(RESULTS.read_text(encoding="utf-8"))["rounds"] if RESULTS.exists() else []
    rounds = [entry for entry in rounds if entry["name"] != found["name"]] + [found]
    order = [experiment.name for experiment in EXPERIMENTS]
    rounds.sort(key=lambda entry: order.index(entry["name"]))
    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate")
    RESULTS.write_text(
        json.dumps(
            {
                "command": "benchmarks/quality",
                "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "system": platform.platform()},
                "versions": {name: importlib.metadata.version(name) for name in packages},
                "rounds": rounds,
                "targets": [
                    {
                        "id": entry["name"],
                        "what": f"{entry['figure']} on {entry['data']}, against {entry['baseline']}",
                        "value": entry["value"],
                        "target": entry["target"],
                        "met": entry["met"],
                    }
                    for entry in rounds
                ],
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    text = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(text.replace(table_in(text), table(rounds)), encoding="utf-8")


def table_in(text: str) -> str:
    """The first Markdown table of a text."""
    return "\n".join(takewhile(lambda line: line.startswith("|"), text[text.index("\n|") + 1 :].splitlines()))


def table(rounds: Sequence[Mapping[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model and data | task | seed | epochs | time | figure | value | baseline | its value | at least |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in rounds:
        epochs = "-" if entry["epochs"] is None else f"{entry['epochs']:g}"
        missed = "" if entry["met"] else " (missed)"
        at_least = f"{'at most ' if entry['lower_is_better'] else ''}{entry['target']:.3f}"
        lines.append(
            f"| {entry['data']} | {entry['task']} | {entry['seed']} | {epochs} | {entry['seconds']:.0f} s | "
            f"{entry['figure']} | **{entry['value']:.3f}**{missed} | {entry['baseline']} | "
            f"{entry['baseline_value']:.3f} | {at_least} |"
        )
    return "\n".join(lines)


EXPERIMENTS = (
    Experiment(
        "reviews-to-sst2",
        "MiniLM trained on examples/reviews, asked about SST-2 dev",
        lambda _: ["--task", "text-classification", *example("reviews"), "--num-train-epochs", "4"],
        "accuracy, neutral left out",
        without_neutral,
        "majority class",
        constant(444 / 872),
        goal=0.8,
    ),
    Experiment(
        "reviews-to-sst2-again",
        "the same with another seed",
        lambda _: ["--task", "text-classification", *example("reviews"), "--num-train-epochs", "4"],
        "accuracy, neutral left out",
        without_neutral,
        "majority class",
        constant(444 / 872),
        goal=0.8,
        seed=43,
    ),
    Experiment(
        "sst2",
        "MiniLM on SST-2",
        lambda c: [*files(c, "text-classification", "sst2", "train.csv", "dev.csv", "test.csv")],
        "accuracy",
        metric("accuracy"),
        "majority class",
        majority,
    ),
    Experiment(
        "banking77",
        "MiniLM on banking77",
        lambda c: [
            *("--task", "text-classification", "--train-file", str(c.data / "banking77" / "train.csv")),
            *("--test-file", str(c.data / "banking77" / "test.csv"), "--learning-rate", "3e-4"),
        ],
        "accuracy",
        metric("accuracy"),
        "majority class",
        majority,
    ),
    Experiment(
        "goemotions",
        "MiniLM on GoEmotions (8,000 rows, several labels a text)",
        lambda c: [*files(c, "text-classification", "goemotions", "train.jsonl", "dev.jsonl", "test.jsonl")],
        "micro-F1",
        metric("micro_f1"),
        "always the most frequent emotion",
        always_neutral,
    ),
    Experiment(
        "wnut17",
        "MiniLM on WNUT 2017",
        lambda c: [
            *files(c, "token-classification", "wnut17", "train.jsonl", "dev.jsonl", "test.jsonl"),
            *("--num-train-epochs", "4", "--learning-rate", "2e-4"),
        ],
        "entity F1",
        metric("f1"),
        "no entity anywhere",
        constant(0.0),
    ),
    Experiment(
        "squad",
        "MiniLM on the SQuAD subset (3,000 questions)",
        lambda c: [
            *files(c, "question-answering", "squad", "train.jsonl", "dev.jsonl", "dev.jsonl"),
            *("--num-train-epochs", "2", "--learning-rate", "2e-4"),
        ],
        "F1 (on the set that chose the epoch)",
        metric("f1"),
        "three words at random",
        random_span,
    ),
    Experiment(
        "topics",
        "MiniLM trained on the pairs of examples/topics, asked zero-shot",
        lambda _: ["--task", "zero-shot-classification", *example("topics"), "--num-train-epochs", "6"],
        "accuracy of entailment",
        metric("accuracy"),
        "majority class",
        majority,
    ),
    Experiment(
        "messages",
        "T5 from scratch on examples/messages",
        lambda c: [
            *("--task", "summarization", *messages(c), "--from-scratch", "t5 vocab_size=1000"),
            *("--num-train-epochs", "15"),
        ],
        "ROUGE-L",
        metric("rouge_l"),
        "the first words, as many as score best",
        first_words,
    ),
    Experiment(
        "phrases",
        "T5 from scratch on examples/phrases, English to German",
        lambda c: [
            *("--task", "translation", *phrases(c), "--from-scratch", "t5 vocab_size=800 dropout_rate=0.2"),
            *("--num-train-epochs", "30", "--learning-rate", "1e-3"),
        ],
        "chrF",
        metric("chrf"),
        "the English text as it is",
        copied_source,
    ),
    Experiment(
        "shakespeare-bert",
        "BERT from scratch on Shakespeare, masked",
        lambda c: ["--task", "fill-mask", *shakespeare(c), "--from-scratch", "bert", "--num-train-epochs", "6"],
        "perplexity of hidden tokens",
        last_perplexity,
        "all 4,096 tokens alike",
        constant(4096),
        lower_is_better=True,
    ),
    Experiment(
        "shakespeare-gpt2",
        "GPT-2 from scratch on Shakespeare",
        lambda c: [
            *("--task", "text-generation", *shakespeare(c), "--num-train-epochs", "6", "--learning-rate", "2e-3"),
            *("--from-scratch", "gpt2 n_layer=4 n_embd=256 n_head=4 n_positions=256 vocab_size=1024"),
        ],
        "nats per character",
        metric("nats_per_character"),
        "all 65 characters alike",
        constant(math.log(65)),
        lower_is_better=True,
    ),
    Experiment(
        "mnist-vit",
        "ViT from scratch on MNIST (3,000 images)",
        lambda c: [
            *("--task", "image-classification", *mnist(c), "--augment", "true", "--num-train-epochs", "30"),
            *("--learning-rate", "2e-3", "--from-scratch", "vit"),
        ],
        "accuracy",
        metric("accuracy"),
        "majority class",
        majority,
    ),
    Experiment(
        "mnist-resnet",
        "ResNet from scratch on MNIST (3,000 images)",
        lambda c: [
            *("--task", "image-classification", *mnist(c), "--num-train-epochs", "8"),
            *("--learning-rate", "2e-3", "--from-scratch", "resnet"),
        ],
        "accuracy",
        metric("accuracy"),
        "majority class",
        majority,
    ),
    Experiment(
        "fsdd-ast",
        "Audio Spectrogram Transformer from scratch on spoken digits (480 sounds)",
        lambda c: [
            *("--task", "audio-classification", *spoken_digits(c, "label"), "--augment", "true"),
            *("--num-train-epochs", "40", "--learning-rate", "1e-3"),
            *("--from-scratch", "audio-spectrogram-transformer max_length=128"),
        ],
        "accuracy",
        metric("accuracy"),
        "majority class",
        majority,
    ),
    Experiment(
        "fsdd-wav2vec2",
        "Wav2Vec2 from scratch on spoken digits, written down",
        lambda c: [
            *("--task", "automatic-speech-recognition", *spoken_digits(c, "text"), "--augment", "true"),
            *("--num-train-epochs", "120", "--learning-rate", "1e-3", "--from-scratch", "wav2vec2"),
        ],
        "word accuracy",
        metric("word_accuracy"),
        "the same word always",
        constant(0.1),
    ),
    Experiment(
        "mnist-vae",
        "variational autoencoder on MNIST (3,000 images)",
        lambda c: [
            *("--task", "text-to-image", *mnist(c), "--from-scratch", "marble-vae latent_size=32"),
            *("--learning-rate", "2e-3", "--num-train-epochs", "60"),
        ],
        "digits that mnist-resnet names as asked for",
        digits_named_rightly,
        "any digit",
        constant(0.1),
        goal=0.8,
    ),
    Experiment(
        "mnist-gan",
        "generative adversarial network on MNIST (3,000 images)",
        lambda c: [
            *("--task", "text-to-image", *mnist(c), "--from-scratch", "marble-gan latent_size=32"),
            *("--learning-rate", "1e-3", "--num-train-epochs", "60"),
        ],
        "digits that mnist-resnet names as asked for",
        digits_named_rightly,
        "any digit",
        constant(0.1),
        goal=0.8,
    ),
)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
