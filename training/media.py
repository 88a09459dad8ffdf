"""Reads data sets of files, such as images or sounds: an index with their paths, or a folder for each label."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from handler.digests import sha256
from handler.errors import RequestError
from training import data
from training.errors import UserError

INDEX_NAME = "index.csv"
_SHOWN_ROWS = 5


def read(
    source: Path, columns: Mapping[str, str], decode: Callable[[bytes], Any], *, skip_bad_rows: bool
) -> tuple[Dataset, int]:
    """The rows of a data set whose files can be read, and how many others were left out.

    source: an index (csv, tsv, jsonl or parquet) that names files relative to its own folder; a folder with an
    `index.csv`; or a folder that has one folder of files for each label. columns: standard name → column of the index,
    `path` and one more, e.g. `label`. decode: reads the bytes of a file, raising RequestError if it cannot.
    In the rows, `path` is the path of a file as this process can open it. Raises UserError if there is no such data
    set, and, naming the row, for a file that is missing or cannot be decoded unless bad rows are to be skipped.
    """
    rows, listing = _rows(source, dict(columns))
    kept, bad = [], []
    for number, name in enumerate(rows["path"], start=1):
        file = listing.parent / str(name or "")
        if (problem := _problem(name, file, decode)) is None:
            kept.append((number - 1, str(file)))
        else:
            bad.append(f"row {number} ({name}): {problem}")
    if bad and not skip_bad_rows:
        shown = "\n  ".join(bad[:_SHOWN_ROWS]) + ("\n  …" if len(bad) > _SHOWN_ROWS else "")
        raise UserError(f"{listing}: {len(bad)} file(s) cannot be used; mend them, or add --skip-bad-rows:\n  {shown}")
    if not kept:
        raise UserError(f"{listing}: none of its files can be read; the first: {bad[0]}")
    indices, paths = zip(*kept, strict=True)
    return rows.select(indices).remove_columns("path").add_column("path", list(paths)), len(bad)


def digest(source: Path) -> str:
    """SHA-256 (hex) over the names and contents of all files in a folder, or of one file."""
    if source.is_file():
        return sha256(source)
    lines = [f"{sha256(file)}  {file.relative_to(source).as_posix()}\n" for file in _files(source)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _rows(source: Path, columns: dict[str, str]) -> tuple[Dataset, Path]:
    """Rows with the standard columns, and the index, there or not, that their paths are relative to."""
    index = source / INDEX_NAME
    if source.is_dir() and not index.is_file():
        if set(columns) != {"path", "label"}:
            raise UserError(
                f"{source}: there is no {INDEX_NAME} in this folder; name the files and what is in them there"
            )
        return _labelled_folders(source), index
    index = index if source.is_dir() else source
    return data.columns(data.read(index), index, columns), index


def _labelled_folders(source: Path) -> Dataset:
    """A row for each file, its `label` the folder below `source` that it is in."""
    paths = [file.relative_to(source) for file in _files(source)]
    if loose := [path.name for path in paths if len(path.parts) == 1]:
        raise UserError(f"{source}: {loose[0]} is in no folder of a label; move it into one, or write an {INDEX_NAME}")
    if not paths:
        raise UserError(f"{source}: there are no files in it; put them into one folder for each label")
    return Dataset.from_dict({"path": [path.as_posix() for path in paths], "label": [path.parts[0] for path in paths]})


def _files(folder: Path) -> list[Path]:
    """All files in it and below, by name; not the hidden ones that desktops leave everywhere."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _problem(name: Any, file: Path, decode: Callable[[bytes], Any]) -> str | None:
    """Why a file cannot be used, None if it can."""
    if not isinstance(name, str) or not name.strip():
        return "no path"
    try:
        decode(file.read_bytes())
    except FileNotFoundError:
        return "there is no such file"
    except OSError as error:
        return str(error.strerror)
    except RequestError as error:
        return str(error)
    return None
