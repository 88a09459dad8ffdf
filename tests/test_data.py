"""Reading labelled examples: every kind of file gives the same rows, and bad data is refused with a way to mend it."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from training import base_model, data
from training.errors import UserError
from training.options import Options
from training.tasks import Splits
from training.tasks.text_classification import TextClassification

ROWS = [
    ("A fine pair of boots.", "good"),
    ("NA", "bad"),
    ("null", "good"),
    ("None", "bad"),
    ("nan", "good"),
    ("007", "bad"),
    ("true", "good"),
    ('two\nlines, a comma and a "quote"', "bad"),
    ("Ünïcödé, 漢字, 🙂 and \u2028", "good"),
    ("\ttabs\t", "bad"),
]


def write(path: Path, rows: list[tuple[Any, Any]]) -> Path:
    """A file of the columns text and label, in the format its suffix names."""
    frame = pd.DataFrame(rows, columns=["text", "label"])
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".tsv":
            frame.to_csv(path, index=False, sep="\t")
        case ".jsonl":
            lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        case ".json":
            path.write_text(json.dumps([{"text": text, "label": label} for text, label in rows]), encoding="utf-8")
        case ".parquet":
            frame.to_parquet(path)
    return path


def splits(train: Path, seed: int = 42, **options: Any) -> Splits:
    return TextClassification().read(Options(train_file=str(train), **options), seed, base_model.resolve(None))


def read(path: Path, *, skip_bad_rows: bool = False) -> tuple[list[tuple[str, str]], int]:
    """The rows of a file as training sees them, and how many were left out."""
    rows = data.columns(data.read(path), path, {"text": "text", "label": "label"})
    checked, skipped = data.check_texts_and_labels(rows, path, skip_bad_rows=skip_bad_rows)
    return list(zip(checked["text"], checked["label"], strict=True)), skipped


def refusal(call: Callable[[], object]) -> str:
    """The one-line message of a UserError."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def csv(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a csv file from its text."""

    def make(content: str | bytes, name: str = "data.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


# --- What is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert read(write(tmp_path / f"rows{suffix}", ROWS)) == (ROWS, 0)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "labels",
    [[2, 0, 10, 0], [2.0, 0.0, 10.0, 0.0], ["2", "0", "10", "0"], ["2.0", "0.0", "10.0", "0.0"]],
    ids=["integers", "whole floats", "strings", "strings of floats"],
)
def test_integer_labels_in_every_guise(tmp_path: Path, suffix: str, labels: list[Any]) -> None:
    rows, _ = read(write(tmp_path / f"rows{suffix}", [(f"text {label}", label) for label in labels]))
    assert [label for _, label in rows] == ["2", "0", "10", "0"]
    assert data.label_names(["2", "0", "10", "0"]) == ["0", "2", "10"], "by value, not by alphabet"


def test_label_names_are_sorted_and_never_rewritten(csv: Callable[..., Path]) -> None:
    rows, _ = read(csv("text,label\na,true\nb,False\nc,007\nd,1e5\ne, padded \nf,None\n"))
    labels = [label for _, label in rows]
    assert labels == ["true", "False", "007", "1e5", "padded", "None"]
    assert read(csv("text,label\n007,true\n1e3,false\n"))[0] == [("007", "true"), ("1e3", "false")]
    assert data.label_names(["b", "a", "B", "a"]) == ["B", "a", "b"]
    assert data.label_names(["1", "-1", "0"]) == ["-1", "0", "1"]


def test_class_labels_of_a_parquet_file_keep_their_names(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    assert "row 3" in refusal(lambda: read(tmp_path / "rows.parquet"))  # -1 is the Hub's "not labelled"
    assert read(tmp_path / "rows.parquet", skip_bad_rows=True) == ([("a", "yes"), ("b", "no")], 1)


def test_a_byte_order_mark_and_windows_line_ends(csv: Callable[..., Path]) -> None:
    assert read(csv("\ufefftext,label\r\nfine,a\r\n\r\npoor,b\r\n"))[0] == [("fine", "a"), ("poor", "b")]


def test_columns_by_name(tmp_path: Path, csv: Callable[..., Path]) -> None:
    path = csv("id,mood,review\n" + "".join(f"{i},{'ab'[i % 2]},text {i}\n" for i in range(20)))
    found = splits(path, text_column="review", label_column="mood")
    assert found.labels == ["a", "b"]
    assert sorted(found.train["text"][:] + found.validation["text"][:]) == sorted(f"text {i}" for i in range(20))
    message = refusal(lambda: splits(path))
    assert "no column 'text'" in message
    assert "'id', 'mood', 'review'" in message
    assert "--text-column" in message
    message = refusal(lambda: splits(path, text_column="review", label_column="Mood"))
    assert "no column 'Mood'" in message
    assert "--label-column" in message
    assert "both" in refusal(lambda: splits(path, text_column="mood", label_column="mood"))


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [("old", "a")])
    assert read(path)[0] == [("old", "a")]
    assert read(write(path, [("new", "b")]))[0] == [("new", "b")]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_name_is_no_pattern(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"part1{suffix}", [("another file", "z")])
    assert read(write(tmp_path / f"part[1]{suffix}", [("this file", "a")]))[0] == [("this file", "a")]


# --- What is refused ------------------------------------------------------------------------------------------------


def test_missing_empty_and_unknown_files(tmp_path: Path) -> None:
    assert "no such file" in refusal(lambda: read(tmp_path / "nothing.csv"))
    assert "no such file" in refusal(lambda: read(tmp_path)), "a folder"
    (tmp_path / "empty.csv").touch()
    assert "empty" in refusal(lambda: read(tmp_path / "empty.csv"))
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    message = refusal(lambda: read(tmp_path / "rows.xlsx"))
    assert all(suffix in message for suffix in (".csv", ".tsv", ".jsonl", ".parquet"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("header.csv", "text,label\n"),
        ("header.tsv", "text\tlabel\n"),
        ("blank.jsonl", "\n\n"),
        ("none.json", "[]"),
    ],
)
def test_a_file_without_rows(csv: Callable[..., Path], name: str, content: str) -> None:
    assert "no rows" in refusal(lambda: read(csv(content, name)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("old.csv", "text,label\ncaf\xe9,a\n"),
        ("late.csv", "text,label\n" + "plain,a\n" * 50_000 + "caf\xe9,b\n"),
        ("old.tsv", "text\tlabel\ncaf\xe9\ta\n"),
        ("old.jsonl", '{"text": "caf\xe9", "label": "a"}\n'),
    ],
)
def test_a_file_that_is_not_utf_8(csv: Callable[..., Path], name: str, content: str) -> None:
    message = refusal(lambda: read(csv(content.encode("latin1"), name)))
    assert "not UTF-8 (byte 0xe9)" in message
    assert "iconv -f latin1 -t utf-8" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "a", "label": 1}\n\n{"text": nope}\n', "line 3 is not JSON"),
        ("text,label\n", "line 1 is not JSON"),
        ('["a", 1]\n', "line 1 is not an object"),
    ],
)
def test_broken_json_lines(csv: Callable[..., Path], content: str, words: str) -> None:
    assert words in refusal(lambda: read(csv(content, "broken.jsonl")))


def test_a_broken_parquet_file(csv: Callable[..., Path]) -> None:
    assert "cannot be read" in refusal(lambda: read(csv(b"PAR1 no more than that", "broken.parquet")))


@pytest.mark.parametrize(
    "content",
    [
        "text,label\nfine, really,good\npoor, truly,bad\n",  # all rows alike: pandas would take the first for an index
        "text,label\nfine,good\npoor, truly,bad\n",
        'text,label\n"fine,good\npoor,bad\n',
    ],
)
def test_commas_and_quotes_that_break_a_csv_file(csv: Callable[..., Path], content: str) -> None:
    """A text with a comma must never lose its beginning in silence."""
    warnings.simplefilter("ignore")  # pytest makes pandas' warning an error; training must do so by itself
    assert '"quotes"' in refusal(lambda: read(csv(content)))


BAD_TEXTS = [("fine", "a"), ("", "b"), (" \t\u3000", "a"), (None, "b"), ("poor", "b")]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_empty_and_blank_texts(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}", BAD_TEXTS)
    message = refusal(lambda: read(path))
    assert "3 row(s) with an empty text" in message
    assert "row 2, 3, 4" in message
    assert "--skip-bad-rows" in message
    assert read(path, skip_bad_rows=True) == ([("fine", "a"), ("poor", "b")], 3)


def test_a_text_that_is_no_string(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [(5, "a"), (6, "b")])
    assert "not a string: row 1, 2" in refusal(lambda: read(path))
    assert "no row has both" in refusal(lambda: read(path, skip_bad_rows=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.csv", "text,label\nx,a\ny,\nz, \n"),
        ("numbers.csv", "text,label\nx,1\ny,\nz,nan\n"),
        ("floats.csv", "text,label\nx,1.0\ny,NaN\nz,\n"),
        ("short.csv", "text,label\nx,a\ny\nz\n"),
        ("null.jsonl", '{"text":"x","label":"a"}\n{"text":"y","label":null}\n{"text":"z"}\n'),
        ("nan.jsonl", '{"text":"x","label":1}\n{"text":"y","label":NaN}\n{"text":"z","label":NaN}\n'),
    ],
)
def test_missing_labels(csv: Callable[..., Path], name: str, content: str) -> None:
    path = csv(content, name)
    message = refusal(lambda: read(path))
    assert "2 row(s) with no label (empty, null or NaN): row 2, 3" in message
    rows, skipped = read(path, skip_bad_rows=True)
    assert skipped == 2
    assert rows in ([("x", "a")], [("x", "1")]), "what is left of a column of floats are whole numbers"


def test_many_bad_rows_are_named_by_the_first_five(csv: Callable[..., Path]) -> None:
    message = refusal(lambda: read(csv("text,label\n" + ",a\n" * 9)))
    assert "9 row(s)" in message
    assert "row 1, 2, 3, 4, 5, … (" in message


@pytest.mark.parametrize(
    ("labels", "words"),
    [([0.5, 1.0], "fraction"), ([1.0, float("inf")], "fraction"), ([["a", "b"], ["c"]], "lists"), ([{}, {}], "lists")],
)
def test_labels_that_are_no_classes(tmp_path: Path, labels: list[Any], words: str) -> None:
    path = write(tmp_path / "rows.jsonl", list(zip("ab", labels, strict=True)))
    assert words in refusal(lambda: read(path))


def test_skipped_rows_are_counted_over_all_files(tmp_path: Path) -> None:
    good = [(f"text {i}", "ab"[i % 2]) for i in range(10)]
    train = write(tmp_path / "train.csv", [*good, ("", "a"), ("x", None)])
    validation = write(tmp_path / "validation.jsonl", [*good, (None, "a")])
    files = {"validation_file": str(validation), "test_file": str(validation)}
    found = splits(train, skip_bad_rows=True, **files)
    assert found.test is not None
    assert (len(found.train), len(found.validation), len(found.test), found.skipped) == (10, 10, 10, 4)
    assert str(train) in refusal(lambda: splits(train, **files))


# --- Classes and splits ---------------------------------------------------------------------------------------------


def of_classes(path: Path, **counts: int) -> Path:
    return write(path, [(f"{label} {i}", label) for label, count in counts.items() for i in range(count)])


@pytest.mark.parametrize("option", ["validation_file", "test_file"])
def test_a_label_that_training_has_not_seen(tmp_path: Path, option: str) -> None:
    train = of_classes(tmp_path / "train.csv", a=10, b=10)
    other = of_classes(tmp_path / "other.csv", a=2, zebra=1, c=1)
    message = refusal(lambda: splits(train, **{option: str(other)}))
    assert message.startswith(str(other))
    assert "'c', 'zebra'" in message


def test_one_class_only(tmp_path: Path) -> None:
    path = of_classes(tmp_path / "train.csv", lonely=20)
    assert "'lonely'" in refusal(lambda: splits(path))
    assert "'lonely'" in refusal(lambda: splits(path, validation_file=str(path)))


def test_a_class_with_one_example(tmp_path: Path) -> None:
    path = of_classes(tmp_path / "train.csv", many=20, single=1)
    message = refusal(lambda: splits(path))
    assert "only one example of 'single'" in message
    assert "--validation-file" in message
    validation = of_classes(tmp_path / "validation.csv", many=2)
    assert data.balance(splits(path, validation_file=str(validation)).train) == {"many": 20, "single": 1}


def test_too_few_rows_to_split(tmp_path: Path) -> None:
    path = of_classes(tmp_path / "train.csv", a=2, b=2)
    assert len(splits(path).train) == len(splits(path).validation) == 2
    assert "too few" in refusal(lambda: splits(path, validation_share=0.9))


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_the_split_is_stratified_disjoint_and_seeded(tmp_path: Path, share: float) -> None:
    path = of_classes(tmp_path / "train.csv", a=120, b=60, c=20)
    found = splits(path, validation_share=share)
    assert data.balance(found.validation) == {"a": 120 * share, "b": 60 * share, "c": 20 * share}
    train, validation = found.train["text"][:], found.validation["text"][:]
    assert Counter(train + validation) == Counter(data.read(path)["text"][:]), "each row is in one of the two, once"
    assert splits(path, validation_share=share).validation["text"][:] == validation
    assert splits(path, seed=7, validation_share=share).validation["text"][:] != validation


def test_every_class_is_in_both_parts(tmp_path: Path) -> None:
    path = of_classes(tmp_path / "train.csv", **{f"class{i}": 2 for i in range(15)})
    found = splits(path)
    assert set(data.balance(found.train).values()) == set(data.balance(found.validation).values()) == {1}
