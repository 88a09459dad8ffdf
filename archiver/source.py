"""The bundle an archive is made from, checked before any work is spent on it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from handler import golden
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
    """A checked bundle. metrics: the contents of `metrics.json`."""

    path: Path
    settings: Settings
    metrics: dict[str, Any]

    def validation(self) -> list[dict[str, str]]:
        """Rows of `validation.jsonl`: `text` and `label`."""
        lines = (self.path / "validation.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]


def check(path: Path) -> Bundle:
    """Reads a bundle. Raises UserError, naming the file, if one is missing or broken."""
    if not path.is_dir():
        raise UserError(f"--bundle {path}: there is no such folder; train one first: python train.py --help")
    for name, what in _REQUIRED.items():
        if not (path / name).is_file():
            raise UserError(f"--bundle {path}: {name} is missing ({what}); train the model again with train.py")
    try:
        with safe_open(path / "model.safetensors", framework="numpy") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(f"--bundle {path}: model.safetensors is broken ({error}); train the model again") from None
    try:
        settings = Settings.load(path)
        golden.read(path / golden.FILE_NAME)
        metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--bundle {path}: {error}") from None
    return Bundle(path, settings, metrics)
