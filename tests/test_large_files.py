"""Files of many rows: they are mapped from disk, not held in memory, and nothing is left on the disk."""

import csv
import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from training import base_model, care, data
from training.care import Made, Row
from training.errors import UserError
from training.options import Options
from training.tasks.text_classification import TextClassification

# Bytes of Python, numpy and Arrow together that a row of some hundred bytes may cost at most, where it is most.
MOST = 300


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def write(path: Path, count: int) -> Path:
    rows = [{"text": f"row {n} {'of many words ' * 9}", "label": ("good", "bad")[n % 2]} for n in range(count)]
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    return path


def tokenized(batch: dict[str, Any]) -> dict[str, Any]:
    return {"input_ids": [list(range(len(text) // 4)) for text in batch["text"]]}


def prepare(path: Path) -> int:
    """All that is done with each row before a training; the most memory that it took, in bytes."""
    task, before = TextClassification(), pa.total_allocated_bytes()
    tracemalloc.start()
    options = Options(train_file=str(path), validation_file=str(path))
    splits = task.read(options, 42, base_model.resolve(None))
    task.counts(splits.train, splits.labels)
    found = care.examine({name: task.compared(rows, splits.labels) for name, rows in splits.named().items()})
    assert found.leaks["train", "validation"].rows == len(splits.train)
    features = data.mapped(splits.train, tokenized, ["text"])
    held = pa.total_allocated_bytes() - before
    peak = tracemalloc.get_traced_memory()[1] + held
    tracemalloc.stop()
    assert len(features) == len(splits.train)
    return peak


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_memory_grows_little_with_the_rows(
    suffix: str, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's text alone is 130 bytes, and once was there as one of several objects; two splits have it here."""
    monkeypatch.setattr(data, "_CHUNK", 500)
    few, many = (write(tmp_path / f"{count}{suffix}", count) for count in (1000, 11_000))
    prepare(few)  # what is loaded once
    growth = (prepare(many) - prepare(few)) / 10_000
    assert growth < MOST
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_is_mapped_has_no_file_and_can_be_used_as_ever(
    suffix: str, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken apart, shuffled and made into something else: none of that needs the files that were there."""
    monkeypatch.setattr(data, "_CHUNK", 7)
    rows = data.read(write(tmp_path / f"rows{suffix}", 30))
    assert list(disk.iterdir()) == []
    assert rows.cache_files == []
    assert [text.split()[1] for text in rows["text"]] == [str(number) for number in range(30)]
    part = rows.shuffle(seed=1).select(range(5)).train_test_split(test_size=2, seed=1)["train"]
    made = data.mapped(part, tokenized, ["text"])
    assert made.column_names == ["label", "input_ids"]
    assert [len(ids) for ids in made["input_ids"]] == [len(text) // 4 for text in part["text"]]
    assert list(disk.iterdir()) == []


def test_nothing_is_left_of_what_was_interrupted(tmp_path: Path, disk: Path) -> None:
    rows = data.read(write(tmp_path / "rows.csv", 10))

    def interrupted(batch: dict[str, Any]) -> dict[str, Any]:
        assert list(disk.iterdir()), "in the middle of it"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.mapped(rows, interrupted, ["text"])
    assert list(disk.iterdir()) == []


def test_a_table_is_read_in_chunks(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a text over several lines across a border, and what is wrong in the last of them."""
    monkeypatch.setattr(data, "_CHUNK", 2)
    path = tmp_path / "rows.csv"
    path.write_text('text,label\na,1\nb,2\n"c\n\nd",3\nNA,007\ne,\n', encoding="utf-8")
    rows = data.read(path)
    assert rows.to_dict() == {"text": ["a", "b", "c\n\nd", "NA", "e"], "label": ["1", "2", "3", "007", ""]}
    with pytest.raises(UserError, match=r"1 row\(s\) with no label .* row 5"):
        data.check_texts_and_labels(rows, path, skip_bad_rows=False)
    checked, skipped = data.check_texts_and_labels(rows, path, skip_bad_rows=True)
    assert (checked["label"][:], skipped) == (["1", "2", "3", "007"], 1)
    path.write_text("text,label\n" + "a,b\n" * 5 + "a,b,c\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"more fields than the header|Expected 2 fields"):
        data.read(path)
    assert list(disk.iterdir()) == []


def test_rows_are_made_anew_each_time() -> None:
    made = Made(
        Dataset.from_dict({"a": [f"text {number}" for number in range(2500)]}),
        lambda batch: [Row((text,), "x") for text in batch["a"]],
    )
    listed = [Row((f"text {number}",), "x") for number in range(2500)]
    assert len(made) == 2500
    assert list(made) == list(made) == listed
    assert care.examine({"train": made, "test": []}) == care.examine({"train": listed, "test": []})


def test_a_conflict_between_splits_keeps_the_order_and_the_writing_of_the_data() -> None:
    rows = {
        "train": [Row(("Z",), "one"), Row(("a",), "two"), Row(("B",), "one"), Row(("none",), None)],
        "test": [Row(("b",), "two"), Row(("z",), "two"), Row(("Z",), "one"), Row(("None",), "x")],
    }
    found = care.examine(rows).conflicts
    assert list(found.items()) == [(("Z",), {"one": 2, "two": 1}), (("B",), {"one": 1, "two": 1})]
