"""Zero-shot classification: labels from the request, judged by a model of pairs; and the data to train one."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import transformers
from conftest import NO_CHECKPOINTS, ROOT, HubClient, Served, build_here, train_here
from text_models import (
    MAX_LENGTH,
    VERDICTS,
    answers,
    archive,
    converted,
    drift,
    labelled,
    naughty_strings,
    real_texts,
    refusal,
    write,
)

import marble_client
from handler.engine import Engine
from handler.tasks.zero_shot_classification import entailment
from training.base_model import resolve
from training.errors import UserError
from training.options import Options
from training.tasks.zero_shot_classification import ZeroShotClassification

TASK = "zero-shot-classification"
AUTO = transformers.AutoModelForSequenceClassification
TOPICS = ROOT / "examples" / "topics"
LABELS = ["money", "a film", "food and drink", "love"]


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[str]:
    return real_texts(shared, 34)


def judge(folder: Path, family: str, texts: list[str], *labels: str) -> Path:
    parameters = {"candidate_labels": LABELS, "multi_label": True}
    return write(folder, family, AUTO, TASK, texts[::6], parameters=parameters, **labelled(*labels))


@pytest.fixture(scope="module")
def model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judge(tmp_path_factory.mktemp("judge") / "judge", "bert", texts, *VERDICTS)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine(model)


def reference(folder: Path, texts: list[str], **options: Any) -> list[list[dict[str, Any]]]:
    """What the pipeline of transformers says, in the Inference API's shape."""
    pipeline = transformers.pipeline(TASK, model=str(folder))
    pipeline.tokenizer.model_max_length = MAX_LENGTH
    return [
        [{"label": label, "score": score} for label, score in zip(found["labels"], found["scores"], strict=True)]
        for found in pipeline(texts, **{"candidate_labels": LABELS, **options})
    ]


# --- Equal to the pipeline of transformers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "labels"),
    [
        ("bert", VERDICTS),
        ("roberta", ["ENTAILMENT", "NEUTRAL", "CONTRADICTION"]),
        ("distilbert", ["entailment", "not_entailment"]),
        ("gpt2", ["not_entailment", "Entailed"]),
    ],
)
def test_every_family_answers_as_its_pipeline(family: str, labels: list[str], texts: list[str], tmp_path: Path) -> None:
    folder = judge(tmp_path / family, family, texts, *labels)
    engines = [Engine(folder), Engine(converted(folder))]
    assert len(texts) >= 100
    for multi_label in (False, True):
        expected = reference(folder, texts, multi_label=multi_label)
        assert np.std([entries[0]["score"] for entries in expected]) > 0.01
        for engine in engines:
            assert drift(engine, texts, expected, candidate_labels=LABELS, multi_label=multi_label) < 1e-4
            [first] = answers(engine, texts[:1], candidate_labels=LABELS, multi_label=multi_label)
            assert [entry["label"] for entry in first] == [entry["label"] for entry in expected[0]]


@pytest.mark.parametrize(
    "options",
    [
        {"hypothesis_template": "Is it {}?"},
        {"hypothesis_template": "{}"},
        {"candidate_labels": ["only one"]},
        {"candidate_labels": "money, love ,a film"},
        {"candidate_labels": ["twice", "twice", "once"]},
        {"candidate_labels": ["one", "two"], "multi_label": True},
    ],
)
def test_parameters_mean_what_they_mean_to_the_pipeline(
    options: dict[str, Any], model: Path, engine: Engine, texts: list[str]
) -> None:
    expected = reference(model, texts[1:3], **options)
    found = answers(engine, texts[1:3], **{"candidate_labels": LABELS, **options})
    for old, new in zip(expected, found, strict=True):
        assert [entry["label"] for entry in new] == [entry["label"] for entry in old]
        assert [entry["score"] for entry in new] == pytest.approx([entry["score"] for entry in old], abs=1e-4)


def test_only_the_text_is_cut(model: Path, engine: Engine) -> None:
    long = "many words " * 60
    assert drift(engine, [long], reference(model, [long]), candidate_labels=LABELS, overflow="truncate") < 1e-4
    windows = answers(engine, [long], candidate_labels=LABELS, overflow="window")[0]
    assert sum(entry["score"] for entry in windows) == pytest.approx(1)
    assert windows != answers(engine, [long], candidate_labels=LABELS, overflow="truncate")[0]
    assert refusal(engine, long, candidate_labels=LABELS, overflow="error")[0] == 413
    code, message = refusal(engine, "short", candidate_labels=[long])
    assert code == 413
    assert "tokens" in message


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, "candidate_labels"),
        ({"candidate_labels": None}, "candidate_labels"),
        ({"candidate_labels": []}, "1 to 128"),
        ({"candidate_labels": " , "}, "1 to 128"),
        ({"candidate_labels": [str(i) for i in range(129)]}, "129 candidate_labels"),
        ({"candidate_labels": ["a", " "]}, "empty"),
        ({"candidate_labels": ["a", 5]}, "a list of strings"),
        ({"candidate_labels": LABELS, "hypothesis_template": "It is so."}, "no {}"),
        ({"candidate_labels": LABELS, "hypothesis_template": "{0.__class__}"}, "no {}"),
        ({"candidate_labels": LABELS, "hypothesis_template": "{:>999999999}"}, "no {}"),
        ({"candidate_labels": LABELS, "multi_label": "yes"}, "true or false"),
        ({"candidate_labels": LABELS, "top_k": 1}, "hypothesis_template"),
    ],
)
def test_parameters_that_are_refused(parameters: dict[str, Any], words: str, engine: Engine) -> None:
    code, message = refusal(engine, "a text", **parameters)
    assert code == 422
    assert words in message


@pytest.mark.parametrize("value", [5, None, {"text": "a", "text_pair": "b"}, {"sequences": "a"}, ["a"]])
def test_inputs_that_are_no_text(value: Any, engine: Engine) -> None:
    assert refusal(engine, value, candidate_labels=LABELS)[0] == 422


def test_half_a_surrogate_pair_anywhere(engine: Engine) -> None:
    assert refusal(engine, "\ud83d", candidate_labels=LABELS)[0] == 400
    assert refusal(engine, "a", candidate_labels=["\ud83d"])[0] == 400
    assert refusal(engine, "a", candidate_labels=LABELS, hypothesis_template="\ud83d {}")[0] == 400


def test_one_bad_input_hurts_no_other(engine: Engine, texts: list[str]) -> None:
    good, bad = answers(engine, [texts[0], 5], candidate_labels=LABELS)
    assert bad.code == 422
    assert [good] == answers(engine, [texts[0]], candidate_labels=LABELS)


def test_models_that_judge_nothing(texts: list[str], tmp_path: Path) -> None:
    assert entailment(["neutral", "Entailment"]) == (1, 0)
    assert entailment(["entailment", "b", "c"]) == (0, 2)
    for labels in (["yes", "no"], ["entailment"]):
        with pytest.raises(ValueError, match="entail"):
            judge(tmp_path / labels[0], "bert", texts, *labels)


# --- The data set and training --------------------------------------------------------------------------------------


def rows(name: str) -> list[dict[str, str]]:
    with (TOPICS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_pairs_of_the_topics() -> None:
    premises: dict[str, set[str]] = {}
    for name in ("train", "validation", "test"):
        found = rows(name)
        count = Counter(row["label"] for row in found)
        assert count["entailment"] == count["not_entailment"] == len(found) / 2
        assert len({(row["premise"], row["hypothesis"]) for row in found}) == len(found)
        premises[name] = {row["premise"] for row in found}
        assert all(text.strip() == text and text for row in found for text in row.values())
    assert len(premises["train"] | premises["validation"] | premises["test"]) == sum(map(len, premises.values()))
    topics = rows("topics")
    assert {row["text"] for row in topics} == premises["test"]
    assert set(Counter(row["label"] for row in topics).values()) == {4}
    names = re.compile(rf"\b({'|'.join({row['label'] for row in topics})})\b", re.IGNORECASE)
    assert not [row["hypothesis"] for row in rows("train") + rows("validation") if names.search(row["hypothesis"])]


def read(path: Path, **options: Any) -> Any:
    return ZeroShotClassification().read(Options(task=TASK, train_file=str(path), **options), 42, resolve(None))


def test_the_pairs_as_training_sees_them() -> None:
    splits = read(TOPICS / "train.csv", validation_file=str(TOPICS / "validation.csv"))
    assert splits.labels == ["entailment", "not_entailment"]
    task = ZeroShotClassification()
    examples = task.examples(splits.validation, splits.labels)
    first = rows("validation")[0]
    assert examples[0] == {
        "inputs": first["premise"],
        "parameters": {
            "candidate_labels": [first["hypothesis"]],
            "hypothesis_template": "{}",
            "overflow": "truncate",
        },
        "target": first["label"] == "entailment",
    }
    perfect = [[{"label": "x", "score": float(example["target"])}] for example in examples]
    targets = [example["target"] for example in examples]
    assert task.score(perfect, targets, splits.labels)["accuracy"] == 1.0
    wrong = [[{"label": "x", "score": 0.7}] for _ in examples]
    assert task.score(wrong, targets, splits.labels)["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("columns", "labels", "words"),
    [
        (("text",), ["entailment", "other"], "pairs of texts"),
        (("premise", "hypothesis"), ["yes", "no"], "entail"),
        (("premise", "hypothesis"), [0.5, 1.5], "pairs of texts with one label"),
    ],
)
def test_data_for_something_else(columns: tuple[str, ...], labels: list[Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(dict.fromkeys(columns, f"text {i}") | {"label": labels[i % 2]}) for i in range(12)]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that has learnt from scratch which of two topics a text has."""
    folder = tmp_path_factory.mktemp("trained")
    topics = {"music": ("song", "choir"), "sport": ("goal", "race")}
    pairs = [
        {"premise": f"{lead} {word}", "hypothesis": topic, "label": "entailment" if word in words else "other"}
        for lead in ("a", "the", "this", "my", "one", "no", "our", "that")
        for topic, words in topics.items()
        for word in ("song", "choir", "goal", "race")
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    spec = "bert hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64 vocab_size=200"
    train_here(
        *("--task", TASK, "--train-file", path, "--validation-file", path, "--output-dir", folder / "topics"),
        *("--from-scratch", spec, "--max-steps", 400, "--learning-rate", 1e-3, *NO_CHECKPOINTS),
    )
    return folder / "topics"


def test_what_is_learnt_from_pairs_chooses_labels(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["splits"]["validation"]["accuracy"] > 0.9  # always the same: 0.5
    for text, topic in (("my choir", "music"), ("that race", "sport")):
        [found] = answers(
            Engine(trained), [text], candidate_labels=["sport", "music"], hypothesis_template="{}", multi_label=True
        )
        assert found[0]["label"] == topic
        assert found[0]["score"] > 0.5 > found[1]["score"]


# --- Through a server -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(model: Path, trained: Path, shared_store: Path, serve_models: Callable[..., Served]) -> Served:
    """A TorchServe with `judge` (random weights, openvino) and `topics` (trained, torch)."""
    archive(model, shared_store)
    build_here(trained, shared_store, "topics", "torch")
    return serve_models("judge", "topics")


def test_inference_client(inference_client: HubClient, engine: Engine, texts: list[str]) -> None:
    client = inference_client("judge")
    for multi_label in (False, True):
        found = client.zero_shot_classification(texts[0], LABELS, multi_label=multi_label)
        [expected] = answers(engine, texts[:1], candidate_labels=LABELS, multi_label=multi_label)
        assert [entry.label for entry in found] == [entry["label"] for entry in expected]
        assert [entry.score for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-4)
    assert len(client.zero_shot_classification(texts[0], LABELS, hypothesis_template="It is {}.")) == 4
    learnt = inference_client("topics").zero_shot_classification("a song", ["sport", "music"], hypothesis_template="{}")
    assert [entry.label for entry in learnt] == ["music", "sport"]


def test_marble_clients(served: Served, engine: Engine, texts: list[str]) -> None:
    [expected] = answers(engine, texts[:1], candidate_labels=LABELS)
    with served.rest_client() as rest, served.grpc_client() as grpc:
        for client in (rest, grpc):
            found = client.predict("judge", texts[0], {"candidate_labels": LABELS}).predictions
            assert engine.task.drift(expected, found) < 1e-4
            with pytest.raises(marble_client.MarbleError, match="candidate_labels"):
                client.predict("judge", texts[0])


def test_naughty_strings_end_no_worker(served: Served, shared: Path, same_workers: None) -> None:
    strings = naughty_strings(shared)

    def ask(inputs: Any, **parameters: Any) -> requests.Response:
        return served.post("/predictions/judge", {"inputs": inputs, "parameters": parameters})

    answer = ask(strings, candidate_labels=["a", "b"])
    assert answer.status_code == 200
    assert len(answer.json()) == len(strings)
    labels = [string for string in strings if string.strip()]
    for start in range(0, len(labels), 128):
        # A label that alone fills the model is refused.
        assert ask("a text", candidate_labels=labels[start : start + 128]).status_code in (200, 413)
    for string in strings[::20]:
        assert ask("a text", candidate_labels=LABELS, hypothesis_template=f"{string} {{}}").status_code in (200, 413)
        assert ask("a text", candidate_labels=LABELS, multi_label=string).status_code == 422
