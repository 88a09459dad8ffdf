"""Data sets of files: indices and folders are read, and what would spoil a training run is refused by name."""

import json
from pathlib import Path

import pandas as pd
import pytest

from handler.errors import UnreadableRequest
from training import media
from training.base_model import BaseModel
from training.errors import UserError
from training.media import Listing
from training.options import Options

LABELS = {"path": "path", "label": "label"}
BASE = BaseModel("", "none", None, None)


def decode(content: bytes) -> None:
    if not content.startswith(b"good"):
        raise UnreadableRequest("the file is broken")


def read(source: Path, columns: dict[str, str] = LABELS, *, skip_bad_rows: bool = False) -> Listing:
    return media.read(source, columns, decode, skip_bad_rows=skip_bad_rows)


def write(folder: Path, *names: str, content: str = "good") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{content} {name}")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    write(folder, "one.png", "deep/two.png", "three.png")
    return folder


def test_every_kind_of_index_is_read(files: Path) -> None:
    table = pd.DataFrame(
        {"path": ["one.png", "deep/two.png", "one.png"], "label": ["a", "b", "a"], "speaker": ["x"] * 3}
    )
    table.to_csv(files / "list.csv", index=False)
    table.to_csv(files / "list.tsv", sep="\t", index=False)
    table.to_json(files / "list.jsonl", orient="records", lines=True)
    table.to_parquet(files / "list.parquet")
    table.to_csv(files / "index.csv", index=False)
    digests = set()
    for source in (*files.glob("list.*"), files):
        listing = read(source)
        assert set(listing.rows.column_names) == {"path", "label"}
        assert listing.rows["path"][:] == [str(files / name) for name in table["path"]]
        assert listing.rows["label"][:] == ["a", "b", "a"]
        assert listing.skipped == 0
        digests.add(listing.sha256)
    assert len(digests) == 1


def test_a_folder_for_each_label_is_read_in_a_fixed_order(tmp_path: Path) -> None:
    write(tmp_path, "dog/2.png", "cat/1.png", "cat/more/3.png", "cat/.DS_Store", ".git/config", "dog/0.png")
    listing = read(tmp_path)
    assert [Path(path).relative_to(tmp_path).as_posix() for path in listing.rows["path"]] == [
        *("cat/1.png", "cat/more/3.png", "dog/0.png", "dog/2.png"),
    ]
    assert listing.rows["label"][:] == ["cat", "cat", "dog", "dog"]


def test_other_columns_and_absolute_paths_are_taken(files: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, "four.wav")
    lines = [{"file_name": str(elsewhere / "four.wav"), "said": "four"}, {"file_name": "../set/one.png", "said": "one"}]
    index = files / "said.jsonl"
    index.write_text("\n".join(map(json.dumps, lines)))
    listing = read(index, {"path": "file_name", "text": "said"})
    assert listing.rows["text"][:] == ["four", "one"]
    assert [Path(path).read_text() for path in listing.rows["path"]] == ["good four.wav", "good one.png"]


def test_the_digest_tells_names_and_contents(files: Path) -> None:
    pd.DataFrame({"path": ["one.png", "three.png"], "label": ["a", "b"]}).to_csv(files / "index.csv", index=False)
    before = read(files).sha256
    assert read(files).sha256 == before
    write(files, "deep/two.png", content="good for another reason")
    assert read(files).sha256 == before  # not in the list
    write(files, "three.png", content="good again")
    assert read(files).sha256 != before


def test_files_that_cannot_be_used_are_named_with_their_rows(files: Path) -> None:
    write(files, "bad.png", content="bad")
    names = ["one.png", "missing.png", "bad.png", "", "deep", "three.png"]
    index = files / "index.csv"
    pd.DataFrame({"path": names, "label": list("abcdef")}).to_csv(index, index=False)
    with pytest.raises(UserError) as caught:
        read(files)
    assert str(caught.value).splitlines() == [
        f"{index}: 4 file(s) cannot be used; mend them, or add --skip-bad-rows:",
        "  row 2 (missing.png): No such file or directory",
        "  row 3 (bad.png): the file is broken",
        "  row 4 (): no path",
        "  row 5 (deep): Is a directory",
    ]
    listing = read(files, skip_bad_rows=True)
    assert listing.rows["label"][:] == ["a", "f"]
    assert listing.skipped == 4


def test_many_bad_files_are_counted(files: Path) -> None:
    names = [f"missing-{number}.png" for number in range(100)]
    pd.DataFrame({"path": ["one.png", *names], "label": ["a"] * 101}).to_csv(files / "index.csv", index=False)
    with pytest.raises(UserError, match=r"100 file\(s\)") as caught:
        read(files)
    assert len(str(caught.value).splitlines()) == 7


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="there are no files in it"):
        read(tmp_path)
    write(tmp_path, "a/1.png", "loose.png")
    with pytest.raises(UserError, match=r"loose\.png is in no folder of a label"):
        read(tmp_path)
    with pytest.raises(UserError, match=r"there is no index\.csv in this folder"):
        read(tmp_path, {"path": "path", "text": "text"})
    (tmp_path / "index.csv").write_text("file,label\na/1.png,a\n")
    with pytest.raises(UserError, match=r"there is no column 'path'.*--path-column"):
        read(tmp_path)
    (tmp_path / "index.csv").write_text("path,label\nb/1.png,a\n")
    with pytest.raises(UserError, match=r"none of its files can be used; the first: row 1 \(b/1\.png\)"):
        read(tmp_path, skip_bad_rows=True)


def test_labelled_files_are_split_and_counted(tmp_path: Path) -> None:
    write(tmp_path, *(f"{label}/{number}.png" for label in ("10", "9") for number in range(10)))
    write(tmp_path, "9/bad.png", content="bad")
    options = Options(train_file=str(tmp_path), skip_bad_rows=True)
    splits = media.read_labelled(options, 7, BASE, decode)
    assert splits.train is not None
    assert splits.validation is not None
    assert splits.labels == ["9", "10"]
    assert (len(splits.train), len(splits.validation), splits.skipped) == (18, 2, 1)
    assert set(splits.digests) == {"train"}
    for rows in (splits.train, splits.validation):
        for path, label in zip(rows["path"], rows["label"], strict=True):
            assert Path(path).parent.name == splits.labels[label]
    again = media.read_labelled(options, 7, BASE, decode)
    assert again.validation is not None
    assert again.validation["path"][:] == splits.validation["path"][:]


def test_one_label_alone_and_unseen_labels_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train/a/1.png", "train/a/2.png", "test/b/1.png")
    with pytest.raises(UserError, match="all rows have the label 'a'"):
        media.read_labelled(Options(train_file=str(tmp_path / "train")), 7, BASE, decode)
    write(tmp_path, *(f"train/c/{number}.png" for number in range(20)))
    options = Options(train_file=str(tmp_path / "train"), test_file=str(tmp_path / "test"))
    with pytest.raises(UserError, match="labels that the training data does not have: 'b'"):
        media.read_labelled(options, 7, BASE, decode)


def test_files_travel_as_base64(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)))
    text = media.as_input(str(tmp_path / "a"))
    assert text.startswith("AAECAwQF")
    assert text.isascii()
