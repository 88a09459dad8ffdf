"""Writes the bundle: the folder that holds a fine-tuned model and all that is known about it.

It is put together in a folder beside its place and moved there as the last step, so an interrupted run never leaves a
bundle that looks whole.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from handler import golden
from handler.digests import sha256
from handler.engine import Engine
from handler.errors import TooLarge
from handler.messages import Request
from training.base_model import BaseModel
from training.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy", "scikit-learn")
_GOLDEN_PER_LABEL = 4
_CHARACTERS_PER_TOKEN = 20  # more than any language has on average
# Texts unlike any review: a model must answer them too, and the same way after every conversion.
_GOLDEN_ODD = ("", "?", "Ünïcödé, 漢字 and 🙂", "word " * 40)

_MODEL_CONFIG = """\
# TorchServe reads the keys up to `handler:`; that section is the handler's own (see handler/settings.py).
minWorkers: 1         # without it TorchServe starts one worker for each CPU
maxWorkers: 1
batchSize: 64         # requests that one worker answers together
maxBatchDelay: 2      # milliseconds to wait for them; 1 ends early and 0 means 100
responseTimeout: 60   # seconds for a batch before the worker counts as dead
startupTimeout: 120   # seconds for a worker to load and replay its golden set
handler:
  task: {task}
  backend: torch
  precision: fp32
  max_length: {max_length}
  stride: {stride}
  overflow: {overflow}
"""


@contextmanager
def staged(place: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to build in, which becomes `place` if the block succeeds and vanishes if not."""
    check_place(place, overwrite=overwrite)
    stage = place.with_name(f".{place.name}.partial-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        old = place.with_name(f".{place.name}.old-{os.getpid()}")
        if place.exists():
            place.rename(old)
        stage.rename(place)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_place(place: Path, *, overwrite: bool) -> None:
    """Raises UserError if `place` cannot be written, or holds something that must not be replaced."""
    if not place.name:
        raise UserError(f"--output-dir {place}: name a new folder for the bundle, e.g. artifacts/reviews")
    parent = next(folder for folder in place.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output-dir {place}: nothing can be written to {parent}; choose another folder")
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place / "provenance.json").is_file():
        raise UserError(f"--output-dir {place}: it exists and is not a bundle; choose another folder")
    if not overwrite:
        raise UserError(f"--output-dir {place}: there is a bundle already; add --overwrite, or choose another folder")


def write_model(stage: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Weights (safetensors, fp32), config and tokenizer, as `from_pretrained` loads them."""
    model.float().save_pretrained(stage)
    tokenizer.save_pretrained(stage)


def write_model_config(stage: Path, task: str, max_length: int, overflow: str) -> None:
    """`model-config.yaml`: TorchServe's keys and the handler's."""
    text = _MODEL_CONFIG.format(task=task, max_length=max_length, stride=max_length // 8, overflow=overflow)
    (stage / "model-config.yaml").write_text(text, encoding="utf-8")


def write_validation(stage: Path, rows: Dataset) -> None:
    """`validation.jsonl`: texts and label names, for the quality gate of the archiver."""
    names = rows.features["label"].names
    with (stage / "validation.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"text": row["text"], "label": names[row["label"]]}, ensure_ascii=False) + "\n")


def write_golden(stage: Path, engine: Engine, rows: Dataset, seed: int) -> int:
    """`golden.jsonl`: texts of each label, over-long and odd ones, with the engine's answers. Returns how many."""
    names = rows.features["label"].names
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    labels, all_texts = rows["label"], rows["text"]
    texts: list[str] = []
    for label in range(min(len(names), 16)):
        texts += [all_texts[index] for index in order if labels[index] == label][:_GOLDEN_PER_LABEL]
    longest = max(all_texts, key=len)
    enough = engine.settings.max_length * _CHARACTERS_PER_TOKEN
    too_long = (f"{longest} " * (1 + enough // len(longest)))[:enough]
    texts += [longest, too_long, *_GOLDEN_ODD]
    # What the overflow policy or a limit refuses has no answer to record.
    texts = [text for text in texts if not isinstance(engine.predict([Request([text])])[0], TooLarge)]
    (stage / golden.FILE_NAME).write_text(golden.record(engine, texts), encoding="utf-8")
    return len(texts)


def write_json(stage: Path, name: str, value: Any) -> None:
    """A JSON file with sorted keys."""
    (stage / name).write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def provenance(
    stage: Path, *, base: BaseModel, files: dict[str, str | None], arguments: dict[str, Any], command: Sequence[str]
) -> dict[str, Any]:
    """What went into the bundle: digests of data, base weights and code, versions, seed and arguments."""
    return {
        "command": list(command),
        "arguments": arguments,
        "data": {name: {"file": Path(path).name, "sha256": sha256(Path(path))} for name, path in files.items() if path},
        "base_model": {"name": base.name, "sha256": base.sha256, "licence": base.licence},
        "weights_sha256": sha256(stage / "model.safetensors"),
        "code": {"commit": _commit(), "sha256": _code_digest()},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cpus": os.cpu_count()},
    }


def _commit() -> str | None:
    """The commit the code is at, with "+changes" if it was edited since; None outside a git checkout."""
    try:
        run = ("git", "-C", str(ROOT))
        commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*run, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes.strip() else "")


def _code_digest() -> str:
    """SHA-256 over the Python files that trained and will serve the model."""
    files = sorted([ROOT / "train.py", *(ROOT / "training").rglob("*.py"), *(ROOT / "handler").rglob("*.py")])
    listing = "".join(f"{path.relative_to(ROOT).as_posix()} {sha256(path)}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()
