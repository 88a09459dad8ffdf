"""The golden set: examples with their fp32 answers, recorded in training and replayed whenever a model is loaded.

A worker that does not reproduce them is not ready: readiness proves inference, on this machine, with these files.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handler.engine import Engine
from handler.errors import RequestError
from handler.messages import Request, Result, jsonable

FILE_NAME = "golden.jsonl"


class GoldenMismatch(Exception):
    """An answer differs from the golden one by more than the tolerance."""


def record(engine: Engine, examples: Sequence[Mapping[str, Any]]) -> str:
    """The text of a golden file: one JSON object a line, with the example and the engine's `predictions`.

    examples: `inputs` and, where the task needs them, `parameters`.
    """
    lines = [
        json.dumps({**example, "predictions": predict(engine, example)}, ensure_ascii=False) for example in examples
    ]
    return "".join(f"{line}\n" for line in lines)


def replay(engine: Engine, path: Path) -> float:
    """Answers every golden example and returns the largest drift of a score.

    Raises GoldenMismatch, saying which example and by how much, if one drifts by more than the tolerance in the
    engine's settings; ValueError if the file is missing or empty.
    """
    examples = read(path)
    tolerance, largest = engine.settings.golden_tolerance, 0.0
    for number, example in enumerate(examples, start=1):
        drift = engine.task.drift(example["predictions"], predict(engine, example))
        # Written so that a drift that is not a number fails as well.
        if not drift <= tolerance:
            raise GoldenMismatch(
                f"golden example {number} of {len(examples)} drifts by {drift:.4g}, more than the tolerance "
                f"{tolerance:g} of {engine.settings.backend} {engine.settings.precision}: the model does not give the "
                "answers it was trained to give; build the archive again, or choose another precision"
            )
        largest = max(largest, drift)
    return largest


def read(path: Path) -> list[dict[str, Any]]:
    """The examples of a golden file. Raises ValueError if it is missing, empty or not JSON lines of examples."""
    try:
        examples = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing: a model without a golden set cannot prove that it works") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON lines: {error}") from None
    if not all(isinstance(example, dict) and {"inputs", "predictions"} <= example.keys() for example in examples):
        raise ValueError(f"{path.name} has a line without inputs and predictions")
    if not examples:
        raise ValueError(f"{path.name} is empty: a model without a golden set cannot prove that it works")
    return examples


def predict(engine: Engine, example: Mapping[str, Any]) -> Any:
    """The engine's prediction for an example, as JSON values. Raises RequestError if it gives none."""
    [outcome] = engine.predict([Request([example["inputs"]], example.get("parameters", {}))])
    if isinstance(outcome, RequestError):
        raise outcome
    assert isinstance(outcome, Result)
    return json.loads(json.dumps(outcome.predictions[0], default=jsonable))
