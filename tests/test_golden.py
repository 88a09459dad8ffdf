"""The golden set: what was recorded is reproduced, and a model that drifts, or cannot prove itself, does not load."""

import json
from pathlib import Path
from typing import Any

import pytest

from handler import golden
from handler.engine import Engine
from handler.errors import InvalidInput, TooLarge
from handler.golden import GoldenMismatch
from handler.tasks.text_classification import TextClassification

INPUTS = [
    "",
    "A fine pair of boots.",
    "Утюг сломался \u2028 через день",
    'It said "yes"\r\n\x00 and no.',
    "good " * 400,
]


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return Engine(bundle)


@pytest.fixture
def recorded(engine: Engine, tmp_path: Path) -> Path:
    path = tmp_path / "golden.jsonl"
    path.write_text(golden.record(engine, [{"inputs": value} for value in INPUTS]), encoding="utf-8")
    return path


def edit(path: Path, number: int, **changes: Any) -> None:
    """Changes fields of the golden example of that number, counted from 1."""
    examples = golden.read(path)
    examples[number - 1] |= changes
    path.write_text("".join(f"{json.dumps(example)}\n" for example in examples), encoding="utf-8")


def shifted(path: Path, number: int, position: int, amount: float) -> list[dict[str, Any]]:
    """The predictions of an example with one score changed."""
    predictions: list[dict[str, Any]] = golden.read(path)[number - 1]["predictions"]
    predictions[position]["score"] += amount
    return predictions


def test_what_was_recorded_is_reproduced(engine: Engine, recorded: Path) -> None:
    assert [example["inputs"] for example in golden.read(recorded)] == INPUTS
    assert golden.replay(engine, recorded) < 1e-6


def test_the_bundles_golden_set_is_reproduced(engine: Engine, bundle: Path) -> None:
    assert len(golden.read(bundle / golden.FILE_NAME)) >= 3
    assert golden.replay(engine, bundle / golden.FILE_NAME) < 1e-4


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("amount", [0.01, -0.01])
def test_drift_is_refused_with_its_example_and_amount(
    engine: Engine, recorded: Path, position: int, amount: float
) -> None:
    edit(recorded, 3, predictions=shifted(recorded, 3, position, amount))
    with pytest.raises(GoldenMismatch) as caught:
        golden.replay(engine, recorded)
    assert str(caught.value).startswith(
        "golden example 3 of 5 drifts by 0.01, more than the tolerance 0.001 of torch fp32: "
    )


def test_drift_within_the_tolerance_is_measured(bundle: Path, recorded: Path) -> None:
    lenient = Engine(bundle, golden_tolerance=0.05)
    edit(recorded, 2, predictions=shifted(recorded, 2, 1, 0.03))
    edit(recorded, 4, predictions=shifted(recorded, 4, 0, -0.01))
    assert golden.replay(lenient, recorded) == pytest.approx(0.03, abs=1e-5)
    edit(recorded, 2, predictions=shifted(recorded, 2, 1, 0.03))
    with pytest.raises(GoldenMismatch, match=r"example 2 of 5 drifts by 0\.06, more than the tolerance 0\.05"):
        golden.replay(lenient, recorded)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_drift_that_is_not_a_number_is_refused(engine: Engine, recorded: Path, position: int) -> None:
    edit(recorded, 5, predictions=shifted(recorded, 5, position, float("nan")))
    with pytest.raises(GoldenMismatch, match="golden example 5 of 5 drifts by nan"):
        golden.replay(engine, recorded)


@pytest.mark.parametrize(
    "predictions",
    [
        [],
        [{"label": "negative", "score": 0.5}, {"label": "positive", "score": 0.5}],
        [{"label": label, "score": 1 / 3} for label in ("negative", "neutral", "Positive")],
    ],
    ids=["none", "one missing", "one renamed"],
)
def test_other_labels_are_refused(engine: Engine, recorded: Path, predictions: list[dict[str, Any]]) -> None:
    edit(recorded, 1, predictions=predictions)
    with pytest.raises(GoldenMismatch, match="golden example 1 of 5 drifts by inf"):
        golden.replay(engine, recorded)


def test_drift_is_the_largest_difference_of_a_label() -> None:
    task = TextClassification
    before = [{"label": "a", "score": 0.75}, {"label": "b", "score": 0.25}]
    after = [{"label": "b", "score": 0.5}, {"label": "a", "score": 0.625}]
    assert task.drift(before, after) == 0.25
    assert task.drift(before, before[::-1]) == 0.0
    assert task.drift([], []) == 0.0


def test_an_input_that_has_no_answer_is_not_recorded(bundle: Path, engine: Engine) -> None:
    with pytest.raises(InvalidInput):
        golden.record(engine, [{"inputs": "a"}, {"inputs": 7}])
    with pytest.raises(TooLarge):
        golden.record(Engine(bundle, overflow="error"), [{"inputs": "good " * 400}])


def test_an_example_that_can_no_longer_be_answered_is_refused(engine: Engine, recorded: Path) -> None:
    edit(recorded, 1, inputs=None)
    with pytest.raises(InvalidInput):
        golden.replay(engine, recorded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "golden.jsonl is missing: a model without a golden set cannot prove that it works"),
        (b"", "golden.jsonl is empty: a model without a golden set cannot prove that it works"),
        (b"\n\n", "golden.jsonl is empty"),
        (b'{"inputs": "a", "predic', "golden.jsonl is not JSON lines"),
        (b'{"inputs": "caf\xe9", "predictions": []}\n', "golden.jsonl is not JSON lines"),
        (b"[]\n", "golden.jsonl has a line without inputs and predictions"),
        (b'{"inputs": "a"}\n', "golden.jsonl has a line without inputs and predictions"),
        (b'{"predictions": []}\n', "golden.jsonl has a line without inputs and predictions"),
    ],
    ids=["missing", "empty", "blank", "cut off", "not utf-8", "no object", "no predictions", "no inputs"],
)
def test_a_file_that_proves_nothing_is_refused(
    engine: Engine, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "golden.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        golden.replay(engine, path)
