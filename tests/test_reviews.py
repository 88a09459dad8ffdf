"""The shipped reviews are what examples/reviews says they are: distinct, varied, and split without leaks."""

import csv
import re
from collections import Counter, defaultdict

import pytest
from conftest import REVIEWS

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def reviews() -> list[dict[str, str]]:
    """All rows, each with its split and its line for messages."""
    rows = []
    for split in SPLITS:
        # utf-8, not utf-8-sig: a byte order mark would end up in the name of the first column.
        with (REVIEWS / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            assert reader.fieldnames == ["text", "label", "domain"], split
            rows += [{**row, "split": split, "where": f"{split}:{reader.line_num}"} for row in reader]
    return rows


def trigrams(text: str) -> set[tuple[str, ...]]:
    """Runs of three words; of a shorter text, the text itself."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def test_there_are_enough_texts_and_none_twice(reviews: list[dict[str, str]]) -> None:
    texts = [row["text"] for row in reviews]
    assert len(set(texts)) >= 1200
    assert [text for text, count in Counter(texts).items() if count > 1] == []
    folded = Counter(" ".join(re.findall(r"\w+", text.lower())) for text in texts)
    assert [text for text, count in folded.items() if count > 1] == [], "the same words, written differently"


def test_labels_and_domains(reviews: list[dict[str, str]]) -> None:
    for split in SPLITS:
        rows = [row for row in reviews if row["split"] == split]
        counts = Counter(row["label"] for row in rows)
        assert counts.keys() == {"negative", "neutral", "positive"}, split
        assert min(counts.values()) / len(rows) > 0.1, f"{split}: a label is rare: {counts}"
    domains = {split: {row["domain"] for row in reviews if row["split"] == split} for split in SPLITS}
    assert len(domains["train"]) >= 12
    assert domains["train"] == domains["validation"] == domains["test"]


def test_texts_are_clean_and_of_every_length(reviews: list[dict[str, str]]) -> None:
    lengths = [len(row["text"].split()) for row in reviews]
    assert [row["where"] for row, words in zip(reviews, lengths, strict=True) if not 3 <= words <= 150] == []
    assert min(lengths) <= 5
    assert max(lengths) >= 100
    outer = [row["where"] for row in reviews for name in ("text", "label", "domain") if row[name] != row[name].strip()]
    assert outer == [], "blanks at an end"
    odd = [row["where"] for row in reviews if re.search(r"[\x00-\x1f\x7f\ufffd]|Ã.|â€", row["text"])]
    assert odd == [], "control characters, or UTF-8 that was read as Latin-1"


def test_no_review_is_nearly_another(reviews: list[dict[str, str]]) -> None:
    """Jaccard similarity of the word trigrams, of all pairs that share one, within and across the splits."""
    grams = [trigrams(row["text"]) for row in reviews]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    near = []
    for index, own in enumerate(grams):
        shared = Counter(other for gram in own for other in holders[gram])
        for other, count in shared.items():
            if count / (len(own) + len(grams[other]) - count) > 0.5:
                near.append((reviews[other]["where"], reviews[index]["where"], reviews[index]["text"]))
        for gram in own:
            holders[gram].append(index)
    assert near == []
