"""The bundle an archive is made from, checked before any work is spent on it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tokenizers import Tokenizer

from handler import golden, tasks
from handler.settings import Settings
from training.errors import UserError

_REQUIRED = {
    "config.json": "the model's configuration",
    "model.safetensors": "the weights",
    "tokenizer.json": "the tokenizer",
    "model-config.yaml": "the settings for serving",
    golden.FILE_NAME: "the golden set",
    "validation.jsonl": "the validation set",
    "metrics.json": "the metrics",
}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle. validation: rows with `text` and `label`; accuracy: that of torch fp32 on them."""

    path: Path
    settings: Settings
    labels: list[str]
    validation: list[dict[str, str]]
    accuracy: float


def check(path: Path) -> Bundle:
    """Reads a bundle. Raises UserError, naming the file, if one is missing or broken."""
    if not path.is_dir():
        raise UserError(f"--bundle {path}: there is no such folder; train one first: python train.py --help")
    for name, what in _REQUIRED.items():
        if not (path / name).is_file():
            raise UserError(f"--bundle {path}: {name} is missing ({what}); train the model again with train.py")
    with _reading(path / "model.safetensors") as weights, safe_open(weights, framework="numpy") as tensors:
        tensors.keys()
    with _reading(path / "tokenizer.json") as tokenizer:
        Tokenizer.from_file(str(tokenizer))
    with _reading(path / "model-config.yaml"):
        settings = Settings.load(path)
        task = tasks.load(settings.task)
    with _reading(path / "config.json") as config:
        task(json.loads(config.read_text(encoding="utf-8")))
    with _reading(path / golden.FILE_NAME) as examples:
        golden.read(examples)
    with _reading(path / "validation.jsonl") as validation:
        rows = [{"text": row["text"], "label": row["label"]} for row in _json_lines(validation)]
        if not rows:
            raise ValueError("it is empty")
    with _reading(path / "metrics.json") as file:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        labels, accuracy = list(metrics["labels"]), float(metrics["splits"]["validation"]["accuracy"])
    return Bundle(path, settings, labels, rows, accuracy)


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Turns whatever goes wrong while a file of the bundle is read into a UserError that names it."""
    try:
        yield path
    except Exception as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"--bundle {path.parent}: {path.name} is broken ({reason}); mend it, or train the model again"
        ) from error


def _json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
