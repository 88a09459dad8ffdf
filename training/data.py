"""Reads labelled examples from csv, jsonl and parquet files, and refuses what would spoil a training run."""

import glob
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetInfo, Features
from datasets.fingerprint import generate_random_fingerprint

from training.errors import UserError

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_SHOWN_ROWS = 5
# Rows of a table that are in memory at once.
_CHUNK = 50_000

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said once, by us


def read(path: Path) -> Dataset:
    """One file as a data set.

    Raises UserError if the file is missing, empty, not UTF-8, of an unknown kind, or broken.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind = path.suffix.lower()
    if kind not in _SEPARATORS and kind not in _BUILDERS:
        raise UserError(f"{path}: a data file must end in {', '.join(sorted({**_SEPARATORS, **_BUILDERS}))}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        rows = _read_table(path, _SEPARATORS[kind]) if kind in _SEPARATORS else _read_records(path, _BUILDERS[kind])
    except Exception as error:
        raise UserError(f"{path}: {_cause(error)}") from error
    if len(rows) == 0:
        raise UserError(f"{path}: there are no rows in it")
    return rows


def _read_table(path: Path, separator: str) -> Dataset:
    """A csv or tsv file, every value as the string that is written there: "NA", "true" and "007" stay what they are."""
    with warnings.catch_warnings():
        # A row with more fields than the header, which would lose some of them.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        asis: dict[str, Any] = {"dtype": str, "keep_default_na": False, "index_col": False}
        with pd.read_csv(path, sep=separator, chunksize=_CHUNK, **asis) as frames:
            return _on_disk(pa.Table.from_pandas(frame, preserve_index=False) for frame in frames)


def _read_records(path: Path, builder: str) -> Dataset:
    """A jsonl, json or parquet file."""
    if path.suffix.lower() == ".jsonl":
        _check_lines(path)
    # A cache of its own: a changed file is never answered from an old one.
    with tempfile.TemporaryDirectory() as cache:
        rows = datasets.load_dataset(builder, data_files=glob.escape(str(path)), split="train", cache_dir=cache)
        return _made(rows.data.table, rows.features)


def mapped(rows: Dataset, function: Callable[[dict[str, Any]], dict[str, Any]], remove: Sequence[str]) -> Dataset:
    """What a function makes of batches of the rows. remove: columns that it has no more use for.

    Like what `read` gives it is a file that is mapped into memory and has no name any more: whatever ends the process
    then, nothing is left behind. TMPDIR says on which disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "rows.arrow")
        # Nothing is looked up by its fingerprint, for which all that the function refers to would be pickled.
        made = rows.map(
            function,
            batched=True,
            remove_columns=list(remove),
            cache_file_name=file,
            new_fingerprint=generate_random_fingerprint(),
        )
        return _made(made.data.table, made.features)


def _on_disk(tables: Iterable[pa.Table]) -> Dataset:
    """Tables of the same columns, one after the other, as `mapped` keeps them."""
    with tempfile.TemporaryDirectory() as folder:
        file, parts = str(Path(folder) / "rows.arrow"), iter(tables)
        first = next(parts)
        with pa.ipc.new_file(file, first.schema) as writer:
            for part in chain([first], parts):
                writer.write_table(part)
        return _made(pa.ipc.open_file(pa.memory_map(file)).read_all())


def _made(table: pa.Table, features: Features | None = None) -> Dataset:
    """A data set of a table, which takes it for one in memory, and so puts no file of its own beside a mapped one."""
    # A random one: else all the data would be copied to be hashed.
    fingerprint = generate_random_fingerprint()
    return Dataset(table.replace_schema_metadata(), DatasetInfo(features=features), fingerprint=fingerprint)


def _check_lines(path: Path) -> None:
    """Raises ValueError for the first line that is not an object; pyarrow takes bytes that are not UTF-8 unseen."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                value = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(value, dict):
                raise ValueError(f'line {number} is not an object such as {{"text": "…", "label": "…"}}')


def _cause(error: BaseException) -> str:
    """The innermost reason of a failed read, in the words a user needs."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return (
            f"not UTF-8 (byte {error.object[error.start]:#04x}): convert it first, "
            "e.g. iconv -f latin1 -t utf-8 old.csv > new.csv"
        )
    if isinstance(error, pd.errors.ParserWarning):
        return 'cannot be read: rows have more fields than the header; put texts that hold the separator in "quotes"'
    if "corresponds to no data" in str(error):
        return "there are no rows in it"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, pd.errors.ParserError):
        first_line += '; put texts that hold the separator or line breaks in "quotes"'
    return f"cannot be read: {first_line}"


def columns(data: Dataset, path: Path, wanted: dict[str, str]) -> Dataset:
    """Keeps the wanted columns under their standard names.

    wanted: standard name → column name in the file. Raises UserError, listing the columns there are, if one is missing.
    """
    if len(set(wanted.values())) < len(wanted):
        raise UserError(f"{path}: column {next(iter(wanted.values()))!r} cannot be both {' and '.join(wanted)}")
    for standard, name in wanted.items():
        if name not in data.column_names:
            raise UserError(
                f"{path}: there is no column {name!r}; the file has {', '.join(map(repr, data.column_names))}; "
                f"name the right one with --{standard.replace('_', '-')}-column"
            )
    return data.select_columns(list(wanted.values())).rename_columns(
        {name: standard for standard, name in wanted.items() if name != standard}
    )


def check_texts_and_labels(data: Dataset, path: Path, *, skip_bad_rows: bool) -> tuple[Dataset, int]:
    """The rows with a text (or both texts of a pair) and a label as a string; and how many rows were left out.

    Raises UserError, naming the rows, for empty texts and missing labels unless they are to be skipped; and for
    labels that are numbers with a fraction, lists or objects.
    """
    texts = [name for name in ("text", "text_pair") if name in data.column_names]
    frame = data.select_columns("label").to_pandas()
    assert isinstance(frame, pd.DataFrame)
    if frame["label"].map(pd.api.types.is_list_like).any():
        raise UserError(f"{path}: labels are lists or objects; text-classification needs names or integers")
    feature = data.features["label"]
    if isinstance(feature, ClassLabel):
        frame["label"] = [None if value < 0 else feature.names[value] for value in frame["label"]]
    bad_text = pd.Series(
        [
            not all(isinstance(text, str) and text.strip() for text in row)
            for batch in data.select_columns(texts).iter(_CHUNK)
            for row in zip(*batch.values(), strict=True)
        ]
    )
    written = frame["label"].map(lambda value: "" if pd.isna(value) else str(value).strip())
    # In a csv file labels are strings: numbers may be nan, and 1.0 where 1 is meant.
    numbers = bool(written.str.fullmatch(r"(-?\d+(\.\d+)?|nan)?", case=False).all())
    bad_label = (written == "") | (numbers & (written.str.lower() == "nan"))
    if not skip_bad_rows:
        _refuse(path, bad_text, "an empty text, or one that is not a string")
        _refuse(path, bad_label, "no label (empty, null or NaN)")
    bad = bad_text | bad_label
    if bad.all():
        raise UserError(f"{path}: no row has both a text and a label")
    labels = frame["label"][~bad]
    if pd.api.types.is_float_dtype(labels) or (numbers and written.str.contains(".", regex=False).any()):
        labels = labels.astype(float)
        if not (labels % 1 == 0).all():  # infinities fail as well
            raise UserError(f"{path}: labels are numbers with a fraction; text-classification needs names or integers")
        labels = labels.astype(int)
    table = data.data.table.select(texts)
    if bad.any():
        table = table.filter(pa.array(~bad))
    names = pa.array(labels.map(lambda value: str(value).strip()), pa.string())
    return _made(table.append_column("label", names)), int(bad.sum())


def good_rows(
    data: Dataset, path: Path, problem: Callable[[Any], str | None], *, skip_bad_rows: bool
) -> tuple[Dataset, int]:
    """The rows without a problem, and how many were left out. problem: what is wrong with a row, None if nothing is.

    Raises UserError, naming the rows, if there are problems that are not to be skipped, or nothing is left.
    """
    problems = pd.Series([problem(row) for row in data], dtype=object)
    if not skip_bad_rows:
        for what in problems.dropna().unique():
            _refuse(path, problems == what, what)
    good = np.flatnonzero(problems.isna())
    if len(good) == 0:
        raise UserError(f"{path}: no row is left; the last one has {problems.iloc[-1]}")
    return data.select(good), len(data) - len(good)


def _refuse(path: Path, bad: "pd.Series[bool]", what: str) -> None:
    rows = [int(index) + 1 for index in bad[bad].index]
    if rows:
        shown = ", ".join(map(str, rows[:_SHOWN_ROWS])) + (", …" if len(rows) > _SHOWN_ROWS else "")
        raise UserError(
            f"{path}: {len(rows)} row(s) with {what}: row {shown} (the first after the header is 1); "
            "mend them, or leave them out with --skip-bad-rows"
        )


def label_names(labels: Sequence[str]) -> list[str]:
    """The distinct labels in a stable order: numbers by value, names by alphabet."""
    distinct = set(labels)
    if all(label.lstrip("-").isdecimal() for label in distinct):
        return sorted(distinct, key=int)
    return sorted(distinct)


def encode_labels(data: Dataset, names: Sequence[str], path: Path) -> Dataset:
    """Labels as class indices. Raises UserError for a label that training has not seen."""
    if unseen := sorted(set(data.unique("label")) - set(names)):
        raise UserError(f"{path}: labels that the training data does not have: {', '.join(map(repr, unseen))}")
    # `cast_column` would copy the texts, too.
    table, features = data.data.table, Features({**data.features, "label": ClassLabel(names=list(names))})
    column = table.column("label")
    places = pc.index_in(column, pa.array(names, column.type)).cast(pa.int64())
    return _made(table.set_column(table.column_names.index("label"), "label", places), features)


def split_validation(data: Dataset, share: float, seed: int, path: Path) -> tuple[Dataset, Dataset]:
    """Takes a stratified validation split from the training data: (training, validation).

    Raises UserError if a class is too small to be in both.
    """
    names = data.features["label"].names
    counts = Counter(data["label"][:])
    if single := [names[index] for index, count in counts.items() if count < 2]:
        raise UserError(
            f"{path}: only one example of {', '.join(map(repr, sorted(single)))}, so it cannot be in both training and "
            "validation; add examples, drop the class, or give a --validation-file"
        )
    size = max(round(len(data) * share), len(names))
    if len(data) - size < len(names):
        raise UserError(
            f"{path}: {len(data)} rows are too few to take a validation split for {len(names)} labels; "
            "add examples or give a --validation-file"
        )
    split = data.train_test_split(test_size=size, stratify_by_column="label", seed=seed)
    return split["train"], split["test"]


def balance(data: Dataset) -> dict[str, int]:
    """Rows per label name, in label order."""
    names = data.features["label"].names
    counts = Counter(data["label"][:])
    return {name: counts[index] for index, name in enumerate(names)}
