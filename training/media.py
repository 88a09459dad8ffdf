"""Reads data sets of files, such as images or sounds: an index with their paths, or a folder for each label."""

import base64
import errno
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from handler.errors import RequestError
from training import data
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options
from training.tasks import Splits

INDEX_NAME = "index.csv"
_SHOWN_ROWS = 5


class Listing(NamedTuple):
    """A data set of files.

    rows: those whose files can be read; `path` is a file's path as this process can open it. skipped: rows left out.
    sha256: of names and contents of all files (hex).
    """

    rows: Dataset
    skipped: int
    sha256: str


def read(source: Path, columns: Mapping[str, str], decode: Callable[[bytes], Any], *, skip_bad_rows: bool) -> Listing:
    """Reads a list of files, and looks into every one of them.

    source: an index (csv, tsv, jsonl or parquet) that names files relative to its own folder; a folder with an
    `index.csv`; or a folder that has one folder of files for each label. columns: standard name → column of the index,
    `path` and one more, e.g. `label`. decode: reads the bytes of a file, raising RequestError if it cannot.
    Raises UserError if there is no such data set, and, naming the row, for a file that is missing or cannot be decoded
    unless bad rows are to be skipped.
    """
    rows, index = _rows(source, dict(columns))
    digest = hashlib.sha256()
    kept, bad = [], []
    for number, name in enumerate(rows["path"]):
        file = index.parent / str(name or "")
        try:
            content = _content(name, file)
            decode(content)
        except (OSError, RequestError) as error:
            bad.append(f"row {number + 1} ({name}): {getattr(error, 'strerror', None) or error}")
        else:
            digest.update(f"{hashlib.sha256(content).hexdigest()}  {name}\n".encode())
            kept.append((number, str(file)))
    if bad and not skip_bad_rows:
        shown = "\n  ".join(bad[:_SHOWN_ROWS]) + ("\n  …" if len(bad) > _SHOWN_ROWS else "")
        raise UserError(f"{index}: {len(bad)} file(s) cannot be used; mend them, or add --skip-bad-rows:\n  {shown}")
    if not kept:
        raise UserError(f"{index}: none of its files can be used; the first: {bad[0]}")
    numbers, paths = zip(*kept, strict=True)
    rows = rows.select(numbers).remove_columns("path").add_column("path", list(paths))
    return Listing(rows, len(bad), digest.hexdigest())


def read_labelled(options: Options, seed: int, base: BaseModel, decode: Callable[[bytes], Any]) -> Splits:
    """The splits of a classifier of files: `path`, and class indices in `label`. decode: see `read`.

    Raises UserError for whatever in them would spoil the run.
    """
    skipped = 0
    raw: dict[str, Dataset] = {}
    digests: dict[str, str] = {}
    files = options.files()
    for name, source in files.items():
        columns = {"path": options.path_column, "label": options.label_column}
        listing = read(source, columns, decode, skip_bad_rows=options.skip_bad_rows)
        rows = listing.rows.rename_column("path", "text")
        rows, unlabelled = data.check_texts_and_labels(rows, source, skip_bad_rows=options.skip_bad_rows)
        raw[name], digests[name] = rows.rename_column("text", "path"), listing.sha256
        skipped += listing.skipped + unlabelled
    labels = data.label_names(raw["train"]["label"]) if "train" in raw else base.labels()
    if len(labels) < 2:
        raise UserError(f"{options.train_file}: all rows have the label {labels[0]!r}; a classifier needs two or more")
    encoded = {name: data.encode_labels(rows, labels, files[name]) for name, rows in raw.items()}
    train, validation = encoded.get("train"), encoded.get("validation")
    if train is not None and validation is None:
        train, validation = data.split_validation(train, options.validation_share, seed, files["train"])
    return Splits(train, validation, encoded.get("test"), labels, skipped, digests)


def as_input(path: str) -> str:
    """A file as JSON carries it to a model: base64."""
    return base64.b64encode(Path(path).read_bytes()).decode("ascii")


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


def _content(name: Any, file: Path) -> bytes:
    if not isinstance(name, str) or not name.strip():
        raise FileNotFoundError(errno.ENOENT, "no path")
    return file.read_bytes()
