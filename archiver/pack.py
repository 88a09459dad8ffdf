"""Packs a model folder with torch-model-archiver and makes the result canonical: one bundle, one sequence of bytes."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from handler import digests
from training.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
HANDLER = ROOT / "handler"
MANIFEST = "MAR-INF/MANIFEST.json"
# Modules of `handler/` that belong in the archive's root, by the name they get there.
_ENTRY = "entry.py"
_PLACEHOLDER = "torch_placeholder.py"


def pack(model_dir: Path, name: str, version: str, *, without_torch: bool, work: Path, target: Path) -> None:
    """Writes the archive of `model_dir` to `target`.

    work: an empty folder for what lies between. without_torch: the worker shall not import torch. Raises UserError if
    torch-model-archiver fails.
    """
    extra = work / "extra"
    shutil.copytree(model_dir, extra, ignore=shutil.ignore_patterns("model-config.yaml"))
    shutil.copytree(HANDLER, extra / "handler", ignore=shutil.ignore_patterns("__pycache__", _ENTRY, _PLACEHOLDER))
    shutil.copyfile(ROOT / "LICENSE", extra / "LICENSE")
    if without_torch:
        shutil.copyfile(HANDLER / _PLACEHOLDER, extra / "torch.py")
    folder = _archive(extra, model_dir / "model-config.yaml", name, version, work)
    _write_canonical_manifest(folder / MANIFEST)
    (folder / digests.FILE_NAME).write_text(digests.render(members(folder)), encoding="utf-8")
    _zip(folder, target)


def members(folder: Path) -> dict[str, Path]:
    """Files of a folder by their name in the archive."""
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def manifest(archive: Path) -> dict[str, Any]:
    """The manifest of an archive. Raises UserError if it is not a readable archive."""
    try:
        with zipfile.ZipFile(archive) as file:
            value: dict[str, Any] = json.loads(file.read(MANIFEST))
            return value
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise UserError(f"{archive}: not a readable model archive ({error}); build it again") from None


def _archive(extra: Path, config: Path, name: str, version: str, work: Path) -> Path:
    """Runs torch-model-archiver; returns the folder it leaves."""
    (work / "tmp").mkdir()
    (work / "out").mkdir()
    command = [
        *(sys.executable, "-m", "model_archiver.model_packaging"),
        *("--model-name", name, "--version", version, "--handler", str(HANDLER / _ENTRY)),
        *("--extra-files", str(extra), "--config-file", str(config)),
        *("--archive-format", "no-archive", "--export-path", str(work / "out")),
    ]
    # It empties $TMPDIR/<name>, so builds of one name at the same time need a TMPDIR each.
    environment = {**os.environ, "TMPDIR": str(work / "tmp")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"torch-model-archiver failed: {done.stderr.strip().splitlines()[-1:]}")
    return work / "out" / name


def _write_canonical_manifest(path: Path) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    value["createdOn"] = time.strftime("%d/%m/%Y %H:%M:%S", _moment())
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _zip(folder: Path, target: Path) -> None:
    """Stored, not deflated: weights hardly shrink, and loading stays a copy. Sorted, with fixed times and modes."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, path in sorted(members(folder).items()):
            entry = zipfile.ZipInfo(name, _moment()[:6])
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _moment() -> time.struct_time:
    """SOURCE_DATE_EPOCH (https://reproducible-builds.org/specs/source-date-epoch), or zip's earliest time."""
    earliest, latest = 315532800, 4354819198
    given = os.environ.get("SOURCE_DATE_EPOCH", str(earliest))
    if not given.isdecimal():
        raise UserError(f"SOURCE_DATE_EPOCH={given}: must be a whole number of seconds")
    return time.gmtime(min(max(int(given), earliest), latest))
