"""Writes the bundle: the folder that holds a fine-tuned model and all that is known about it.

It is put together in a folder beside its place and moved there as the last step, so an interrupted run never leaves a
bundle that looks whole.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from handler import golden
from handler.digests import sha256
from handler.engine import Engine
from handler.errors import InvalidInput, TooLarge
from handler.messages import Request
from training.base_model import BaseModel, weights_sha256
from training.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy", "scikit-learn")
_CALIBRATION_BYTES = 8_000_000
# TorchServe's keys of model-config.yaml.
_SERVING = """\
# TorchServe reads the keys up to `handler:`; that section is the handler's own (see handler/settings.py).
minWorkers: 1         # without it TorchServe starts one worker for each CPU
maxWorkers: 1
batchSize: 64         # requests that one worker answers together
maxBatchDelay: 2      # milliseconds to wait for them; 1 ends early and 0 means 100
responseTimeout: 60   # seconds for a batch before the worker counts as dead
startupTimeout: 120   # seconds for a worker to load and replay its golden set
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


def write_model(stage: Path, model: Any, processor: Any) -> None:
    """Weights (safetensors, fp32), config and tokenizer or other processor, if any, as `from_pretrained` loads them."""
    model.float().save_pretrained(stage)
    if type(model).__name__.endswith("Classification"):
        config = json.loads((stage / "config.json").read_text(encoding="utf-8"))
        if "id2label" not in config:  # transformers leaves out two labels that are called LABEL_0 and LABEL_1
            write_json(stage, "config.json", config | {"id2label": model.config.id2label})
    if processor is not None:
        processor.save_pretrained(stage)


def write_model_config(stage: Path, task: str, settings: Mapping[str, Any]) -> None:
    """`model-config.yaml`: TorchServe's keys and the handler's. settings: entries of its section, besides these."""
    section = {"task": task, "backend": "torch", "precision": "fp32", **settings}
    text = _SERVING + yaml.safe_dump({"handler": section}, sort_keys=False, allow_unicode=True)
    (stage / "model-config.yaml").write_text(text, encoding="utf-8")


def write_lines(stage: Path, name: str, rows: Iterable[Any]) -> None:
    """A file of JSON lines."""
    with (stage / name).open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_calibration(stage: Path, examples: Iterable[Mapping[str, Any]]) -> None:
    """`calibration.jsonl`: training examples without their targets, as many as fit 8 MB (media are large)."""
    lines: list[dict[str, Any]] = []
    size = 0
    for example in examples:
        line = {name: value for name, value in example.items() if name != "target"}
        size += len(json.dumps(line))
        if lines and size > _CALIBRATION_BYTES:
            break
        lines.append(line)
    write_lines(stage, "calibration.jsonl", lines)


def write_golden(stage: Path, engine: Engine, examples: Sequence[Mapping[str, Any]]) -> int:
    """`golden.jsonl`: examples with the engine's answers. Returns how many.

    What the overflow policy, a limit or the model refuses has no answer to record, and is left out.
    """
    requests = [Request([example["inputs"]], example.get("parameters", {})) for example in examples]
    answered = [
        example
        for example, request in zip(examples, requests, strict=True)
        if not isinstance(engine.predict([request])[0], InvalidInput | TooLarge)
    ]
    (stage / golden.FILE_NAME).write_text(golden.record(engine, answered), encoding="utf-8")
    return len(answered)


def write_json(stage: Path, name: str, value: Any) -> None:
    """A JSON file with sorted keys."""
    (stage / name).write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def provenance(
    stage: Path,
    *,
    base: BaseModel,
    files: Mapping[str, Path],
    digests: Mapping[str, str],
    arguments: dict[str, Any],
    command: Sequence[str],
    threads: int,
) -> dict[str, Any]:
    """What went into the bundle: digests of data, base weights and code, versions, seed and arguments.

    digests: those of data that are more than one file. threads: that torch trained on.
    """
    return {
        "command": list(command),
        "arguments": arguments,
        "data": {
            name: {"file": path.name, "sha256": digests.get(name) or sha256(path)}
            for name, path in files.items()
            if name in digests or path.is_file()
        },
        "base_model": {"name": base.name, "sha256": base.sha256, "licence": base.licence},
        **({"teacher": _teacher(Path(arguments["teacher"]))} if arguments.get("teacher") else {}),
        "weights_sha256": weights_sha256(stage),
        "code": {"commit": _commit(), "sha256": _code_digest()},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": threads,
        },
    }


def _teacher(folder: Path) -> dict[str, str | None]:
    """The model that was learnt from."""
    return {"name": folder.resolve().name, "sha256": weights_sha256(folder)}


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
