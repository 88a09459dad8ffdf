"""What is served: one fine-tuned model, its archive, and that archive with other settings."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.speed.peers import OFFLINE, ROOT
from handler import digests
from handler.settings import Settings

MAX_LENGTH = 512


@dataclass(frozen=True)
class Model:
    """bundle: as train.py wrote it; archive: as build_mar.sh did; unpacked: the archive's content."""

    name: str
    bundle: Path
    archive: Path
    unpacked: Path

    @property
    def settings(self) -> Settings:
        """Those of the archive."""
        return Settings.load(self.unpacked)


def training(name: str, data: Path, quick: bool) -> list[str]:
    """Arguments of train.py for one of the models."""
    task, suffix, more = {
        "sst2": ("text-classification", "csv", ["--max-length", str(MAX_LENGTH)]),
        "wnut17": ("token-classification", "jsonl", ["--num-train-epochs", "4", "--learning-rate", "2e-4"]),
    }[name]
    files = [
        f"--{split}-file={data / name / file}.{suffix}" for split, file in (("train", "train"), ("validation", "dev"))
    ]
    steps = ["--max-steps", "20", "--eval-strategy", "no", "--save-strategy", "no", "--load-best-model-at-end", "false"]
    return ["--task", task, *files, "--seed", "42", *more, *(steps if quick else [])]


def prepare(name: str, data: Path, work: Path, quick: bool) -> Model:
    """Trains the model, unless its bundle is in `work`, and builds its archive.

    Raises subprocess.CalledProcessError if train.py or build_mar.sh fails, which then have said why.
    """
    bundle, store = work / name, work / "store"
    environment = {**os.environ, **OFFLINE}
    if not (bundle / "model-config.yaml").exists():
        command = [sys.executable, "train.py", *training(name, data, quick), "--output-dir", str(bundle), "--overwrite"]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    build = ["./build_mar.sh", "--bundle", str(bundle), "--backend", "auto", "--precision", "auto", "--force"]
    subprocess.run([*build, "--store", str(store)], cwd=ROOT, env=environment, check=True)
    archive, unpacked = store / f"{name}.mar", work / "unpacked" / name
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(archive) as file:
        file.extractall(unpacked)
    return Model(name, bundle, archive, unpacked)


def variant(model: Model, name: str, **settings: Any) -> Path:
    """The archive with other settings in `model-config.yaml`, beside it in the store as `<name>.mar`.

    settings: keys of TorchServe, and under "handler" those of the handler that change.
    """
    folder = model.unpacked.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model.unpacked, folder)
    path = folder / "model-config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump(merged(config, settings), sort_keys=False), encoding="utf-8")
    (folder / digests.FILE_NAME).unlink()
    files = {entry.relative_to(folder).as_posix(): entry for entry in folder.rglob("*") if entry.is_file()}
    (folder / digests.FILE_NAME).write_text(digests.render(files), encoding="utf-8")
    archive = model.archive.with_name(f"{name}.mar")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for member in (*files, digests.FILE_NAME):
            file.write(folder / member, member)
    archive.with_name(f"{name}.mar.sha256").write_text(f"{digests.sha256(archive)}  {archive.name}\n")
    return archive


def merged(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with changes, section by section."""
    result = dict(config)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, Mapping) else value
    return result
