"""Texts, or pairs of them, with what is to be learnt about them: one label, several labels, or a number."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import ClassLabel, Dataset, List, Value

from training import data
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options
from training.tasks import Splits

# As the `problem_type` of a transformers config.
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE: Problem = "single_label_classification"
MULTI: Problem = "multi_label_classification"
REGRESSION: Problem = "regression"

# Columns of pairs in data sets of the Hugging Face hub.
PAIRS = (
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
# What is measured, where it is not the accuracy of one label.
_METRICS: dict[str, tuple[str, ...]] = {MULTI: ("macro_f1", "micro_f1", "exact_match"), REGRESSION: ("r2", "pearson")}
_PRIMARY: dict[str, str] = {MULTI: "macro_f1", REGRESSION: "r2"}
_TEXT, _PAIR, _LABEL = "text", "text_pair", "label"
_LABELS = "labels"
_BATCH = 1000
_NUMBER = re.compile(r"-?\d+(\.\d+)?|nan|", re.IGNORECASE)


def read(options: Options, seed: int, base: BaseModel, labels: list[str] | None = None) -> Splits:
    """The splits: `text`, for pairs `text_pair`, and `label`.

    labels: names of the labels where there is no training file; those of the base model's own head if None.

    `label` is a class index, for several labels one number for each class, 1.0 where it applies, and for a regression
    the number itself; `problem` tells which. Raises UserError for whatever in the files would spoil the run.
    """
    raw: dict[str, Dataset] = {}
    titles: dict[str, str] = {}
    for name, path in options.files().items():
        rows = data.read(path)
        columns = _columns(rows.column_names, path, options)
        raw[name], titles[name] = data.columns(rows, path, columns), columns[_LABEL]
    if len({_PAIR in rows.column_names for rows in raw.values()}) > 1:
        raise UserError("some of the files hold pairs of texts and others single texts")
    kind = options.problem_type or (_guess(raw["train"]) if "train" in raw else own_problem(base))
    files, skipped = options.files(), 0
    for name, rows in raw.items():
        raw[name], bad = _checked(rows, files[name], kind, skip_bad_rows=options.skip_bad_rows)
        skipped += bad
    if "train" in raw:
        labels = _label_names(raw["train"], kind, titles["train"], files["train"])
    elif labels is None:
        labels = base.labels()
    encoded = {name: _encoded(rows, labels, kind, files[name]) for name, rows in raw.items()}
    train, validation = encoded.get("train"), encoded.get("validation")
    if train is not None and len(train) > 1 and all(_is_constant(train, name) for name in text_columns(train)):
        raise UserError(f"{files['train']}: all rows have the same text; there is nothing to tell apart")
    if train is not None and validation is None:
        train, validation = _split(train, kind, options.validation_share, seed, files["train"])
    return Splits(
        train,
        validation,
        encoded.get("test"),
        labels,
        skipped,
        metrics=_METRICS.get(kind),
        primary=_PRIMARY.get(kind),
    )


def problem(rows: Dataset) -> Problem:
    """What is to be learnt from rows that `read` gave: one of `Problem`."""
    feature = rows.features[_LABEL]
    return SINGLE if isinstance(feature, ClassLabel) else MULTI if isinstance(feature, List) else REGRESSION


def text_columns(rows: Dataset) -> list[str]:
    """The columns of texts: one, or two of pairs."""
    return [name for name in (_TEXT, _PAIR) if name in rows.column_names]


def inputs(rows: Dataset, longest: int) -> list[Any]:
    """Each row as a client asks about it: a text, or a pair as an object; each text cut to `longest` characters."""
    texts = [text[:longest] for text in rows[_TEXT]]
    if _PAIR not in rows.column_names:
        return texts
    return [{_TEXT: text, _PAIR: pair[:longest]} for text, pair in zip(texts, rows[_PAIR], strict=True)]


def targets(rows: Dataset, labels: Sequence[str]) -> list[Any]:
    """What is to be learnt of each row that `read` gave: the name of its label, a list of names, or a number."""
    return named(rows[_LABEL][:], problem(rows), labels)


def named(values: Sequence[Any], kind: Problem, labels: Sequence[str]) -> list[Any]:
    """`targets` of some values of the column `label`."""
    if kind == SINGLE:
        return [labels[label] for label in values]
    if kind == MULTI:
        return [[label for label, mark in zip(labels, marks, strict=True) if mark] for marks in values]
    return list(values)


def _columns(found: Sequence[str], path: Path, options: Options) -> dict[str, str]:
    """Standard name → column name in a file of the columns `found`."""
    text, pair, label = options.text_column, options.text_pair_column, options.label_column
    if pair is None and text == _TEXT:
        usual = [names for names in PAIRS if set(names) <= set(found)]
        if len(usual) > 1:
            raise UserError(f"{path}: which columns are the pair? name them with --text-column and --text-pair-column")
        if usual:
            [(text, pair)] = usual
    if label == _LABEL and _LABEL not in found and _LABELS in found:
        label = _LABELS
    return {_TEXT: text, **({_PAIR: pair} if pair else {}), _LABEL: label}


def _guess(rows: Dataset) -> str:
    """What the labels of the training data, as they are in the file, ask for."""
    nested = pa.types.is_nested(rows.data.schema.field(_LABEL).type)
    values = [value for value in (rows[_LABEL][:] if nested else rows.unique(_LABEL)) if value is not None]
    if any(_as_list(value) is not None for value in values):
        return MULTI
    if isinstance(rows.features[_LABEL], ClassLabel) or not all(_NUMBER.fullmatch(_written(value)) for value in values):
        return SINGLE
    numbers = [float(value) for value in values if _written(value)]
    return REGRESSION if any(number % 1 != 0 for number in numbers if math.isfinite(number)) else SINGLE


def own_problem(base: BaseModel) -> str:
    """What a model that is not to be trained was made for, as the pipeline of transformers takes it."""
    try:
        config = json.loads((Path(base.location) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return SINGLE
    return str(config.get("problem_type") or (SINGLE if len(base.labels()) > 1 else MULTI))


def _checked(rows: Dataset, path: Path, kind: str, *, skip_bad_rows: bool) -> tuple[Dataset, int]:
    """The rows that can be used, and how many were left out."""
    if kind == SINGLE:
        return data.check_texts_and_labels(rows, path, skip_bad_rows=skip_bad_rows)
    texts = text_columns(rows)

    def what_is_wrong(row: dict[str, Any]) -> str | None:
        if any(not isinstance(row[name], str) or not row[name].strip() for name in texts):
            return "an empty text, or one that is not a string"
        value = row[_LABEL]
        if kind == REGRESSION:
            return None if _as_number(value) is not None else "no number as its label"
        names = _as_list(value)
        if names is None:
            return "no list of labels"
        if any(isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip() for name in names):
            return "a label that is neither a name nor an integer"
        return None

    good, bad = data.good_rows(rows, path, what_is_wrong, skip_bad_rows=skip_bad_rows)
    values: list[Any] = [_as_number(value) for value in good[_LABEL]]
    if kind == MULTI:
        feature = getattr(rows.features[_LABEL], "feature", None)
        names = feature.names if isinstance(feature, ClassLabel) else None
        values = [_names(_as_list(value) or [], names) for value in good[_LABEL]]
    return Dataset.from_dict({**{name: good[name][:] for name in texts}, _LABEL: values}), bad


def _label_names(rows: Dataset, kind: str, column: str, path: Path) -> list[str]:
    """Names of the model's labels, from the training data; a regression's one is that of its column."""
    values = rows.unique(_LABEL) if kind == SINGLE else rows[_LABEL][:]
    if kind == REGRESSION:
        if len(set(values)) < 2:
            raise UserError(f"{path}: all rows have the value {values[0]:g}; there is nothing to learn")
        return [column]
    if kind == MULTI:
        names = data.label_names([name for row in values for name in row])
        if not names:
            raise UserError(f"{path}: no row has a label")
        return names
    names = data.label_names(values)
    if len(names) < 2:
        raise UserError(f"{path}: all rows have the label {names[0]!r}; a classifier needs two or more")
    return names


def _encoded(rows: Dataset, labels: Sequence[str], kind: str, path: Path) -> Dataset:
    """The rows with labels as `read` promises. Raises UserError for a label that training has not seen."""
    if kind == SINGLE:
        return data.encode_labels(rows, labels, path)
    if kind == REGRESSION:
        return rows.cast_column(_LABEL, Value("float64"))
    known = {name: index for index, name in enumerate(labels)}
    if unseen := sorted({name for row in rows[_LABEL] for name in row} - known.keys()):
        raise UserError(f"{path}: labels that the training data does not have: {', '.join(map(repr, unseen))}")
    marks = [[float(name in row) for name in labels] for row in map(set, rows[_LABEL])]
    kept = {name: rows[name][:] for name in rows.column_names}
    return Dataset.from_dict({**kept, _LABEL: marks}).cast_column(_LABEL, List(Value("float32")))


def _split(rows: Dataset, kind: str, share: float, seed: int, path: Path) -> tuple[Dataset, Dataset]:
    """Training and validation: stratified for single labels, at random otherwise."""
    if kind == SINGLE:
        return data.split_validation(rows, share, seed, path)
    size = max(round(len(rows) * share), 1)
    if size >= len(rows):
        raise UserError(f"{path}: {len(rows)} rows are too few to take a validation split; give a --validation-file")
    split = rows.train_test_split(test_size=size, seed=seed)
    return split["train"], split["test"]


def _as_list(value: Any) -> list[Any] | None:
    """A list of labels, also as JSON, which is how a csv file can hold one; None for anything else."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def _as_number(value: Any) -> float | None:
    """A finite number, also as it is written in a csv file; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _names(labels: Sequence[Any], names: Sequence[str] | None) -> list[str]:
    """The labels of one row as strings; `names`: those that integers stand for in a parquet file of the hub."""
    return [names[label] if names is not None else str(label).strip() for label in labels]


def _is_constant(rows: Dataset, name: str) -> bool:
    """Whether all rows have the same value in a column."""
    first = rows[0][name]
    return all(value == first for batch in rows.select_columns(name).iter(_BATCH) for value in batch[name])


def _written(value: Any) -> str:
    return str(value).strip()
