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
from handler.engine import read_config
from handler.settings import Settings
from handler.tasks import EncoderTask, Task
from training.errors import UserError

_REQUIRED = {
    "model-config.yaml": "the settings for serving",
    golden.FILE_NAME: "the golden set",
    "validation.jsonl": "the validation set",
    "metrics.json": "the metrics",
}
# What a bundle holds for people and for the gate, and an archive does not need.
_LEFT_OUT = {
    *("model-config.yaml", "validation.jsonl", "calibration.jsonl", "candidates.json"),
    *("metrics.json", "provenance.json", "report.html"),
}
# A model's files besides its weights: configurations, vocabularies, tokenizer models and the model card.
_KEPT_SUFFIXES = {".json", ".jsonl", ".txt", ".md", ".model", ".spm", ".jinja"}
_WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A checked bundle.

    validation: examples with `inputs`, `target` and perhaps `parameters`. metric: what is measured on them, e.g.
    "accuracy"; reference: its value for torch fp32, None if there are no examples. calibration: what int8 is calibrated
    on, training inputs where there are any: as `validation`, without targets. shares: of each label among the
    validation set's predictions, {} where an example has not just one label.
    """

    path: Path
    settings: Settings
    task: type[Task]
    labels: list[str]
    validation: list[dict[str, Any]]
    metric: str
    reference: float | None
    calibration: list[dict[str, Any]]
    shares: dict[str, float]

    @property
    def runs_on_openvino(self) -> bool:
        """Whether the task is one forward pass for each input, which is what OpenVINO is used for."""
        return issubclass(self.task, EncoderTask)

    def model_files(self) -> dict[str, Path]:
        """What every archive takes over, besides weights, by name relative to the bundle."""
        return {name: path for name, path in self._files().items() if path.suffix in _KEPT_SUFFIXES}

    def weights(self) -> dict[str, Path]:
        """The weights, by name relative to the bundle."""
        return {name: path for name, path in self._files().items() if path.suffix == _WEIGHTS}

    def _files(self) -> dict[str, Path]:
        files = {path.relative_to(self.path).as_posix(): path for path in self.path.rglob("*") if path.is_file()}
        return {name: path for name, path in sorted(files.items()) if name not in _LEFT_OUT}


def check(path: Path) -> Bundle:
    """Reads a bundle. Raises UserError, naming the file, if one is missing or broken."""
    if not path.is_dir():
        raise UserError(f"--bundle {path}: there is no such folder; train one first: python train.py --help")
    required = dict(_REQUIRED)
    if not (path / "model_index.json").exists():  # else a pipeline of several models, each in a folder of its own
        required |= {"config.json": "the model's configuration", "model.safetensors": "the weights"}
    for name, what in required.items():
        if not (path / name).is_file():
            raise UserError(f"--bundle {path}: {name} is missing ({what}); train the model again with train.py")
    for file in path.rglob(f"*{_WEIGHTS}"):
        with _reading(file) as weights, safe_open(weights, framework="numpy") as tensors:
            tensors.keys()
    if (path / "tokenizer.json").exists():
        with _reading(path / "tokenizer.json") as tokenizer:
            Tokenizer.from_file(str(tokenizer))
    with _reading(path / "model-config.yaml"):
        settings = Settings.load(path)
        task = tasks.load(settings.task)
    with _reading(path / "config.json"):
        config = read_config(path)
        if issubclass(task, EncoderTask):
            task(path, settings, config)
    with _reading(path / golden.FILE_NAME) as file:
        examples = golden.read(file)
    with _reading(path / "metrics.json") as file:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        labels, scores = list(metrics["labels"]), metrics["splits"].get("validation")
        metric = str(metrics["primary"])
        reference = float(scores[metric]) if scores else None
        shares = _shares(labels, (scores or {}).get("confusion_matrix", []))
    with _reading(path / "validation.jsonl") as validation:
        rows = _json_lines(validation)
        if any(not {"inputs", "target"} <= row.keys() for row in rows):
            raise ValueError("a line has no inputs or no target")
        if bool(rows) != (reference is not None):
            raise ValueError("it does not belong to the validation scores in metrics.json")
    calibration = rows
    if (path / "calibration.jsonl").exists():
        with _reading(path / "calibration.jsonl") as file:
            calibration = _json_lines(file)
            if any("inputs" not in row for row in calibration):
                raise ValueError("a line has no inputs")
    return Bundle(path, settings, task, labels, rows, metric, reference, calibration or examples, shares)


def _shares(labels: list[str], confusion: list[list[int]]) -> dict[str, float]:
    """Each label's share of the predictions that a confusion matrix (rows: true label) counts; {} if it has none."""
    counts = [sum(column) for column in zip(*confusion, strict=True)]
    return {label: count / sum(counts) for label, count in zip(labels, counts, strict=True)} if sum(counts) else {}


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
