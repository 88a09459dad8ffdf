"""What is wrong with data as a whole: rows that repeat or contradict each other, leaks, damage, odd lengths.

Texts are the same if they are but for case and white space.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import combinations, compress, islice
from typing import Any, NamedTuple, Protocol

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

SHOWN = 3
# Rows and characters of each by which a split's writing systems are told.
_ROWS, _START = 10_000, 200
# What reading a text in another encoding than it was written in leaves behind, and characters that no text has.
_DAMAGED = re.compile(
    "\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|Ã[\u0080-\u00bf\u20ac\u0192\u2030\u0152]|â€|Â[\u00a0-\u00bf]"
)
_TEXTS_PER_CALL = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """texts: one, or two of a pair. label: what is to be learnt about it, None where several answers may be right."""

    texts: tuple[str, ...]
    label: str | None = None


class Rows(Sized, Iterable[Row], Protocol):
    """Rows of a split, a list of them or `Made`."""


class Made:
    """Rows of a data set that are made anew whenever they are gone through: lists of millions would fill the memory.

    make: the rows of a batch, which has the values of each column.
    """

    def __init__(self, rows: Dataset, make: Callable[[Mapping[str, Sequence[Any]]], Iterable[Row]]) -> None:
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        for batch in self._rows.iter(_TEXTS_PER_CALL):
            yield from self._make(batch)


@dataclass(frozen=True, slots=True)
class Finding:
    """rows: how many it is about; examples: the first of them, each as it is written in the data."""

    rows: int
    examples: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found, where something was.

    damaged: by split, rows with characters of a wrong encoding, or that control terminals. writing: by split, how many
    of its first rows are mostly in which writing system ("latin", "cyrillic", "cjk", …), most frequent first.

    duplicates: by split, rows whose texts an earlier row of the split has. leaks: by (earlier, later) split of train,
    validation and test, rows of the later one whose texts the earlier one has. conflicts: by text, how many rows of all
    splits have which label, where it is more than one; in the order of the data.
    """

    duplicates: Mapping[str, Finding]
    leaks: Mapping[tuple[str, str], Finding]
    conflicts: Mapping[tuple[str, ...], Mapping[str, int]]
    damaged: Mapping[str, Finding]
    writing: Mapping[str, Mapping[str, int]]

    def counts(self) -> dict[str, Any]:
        """The figures alone, as a JSON value."""
        return {
            "duplicates": {name: finding.rows for name, finding in self.duplicates.items()},
            "leaks": {f"{earlier} in {later}": finding.rows for (earlier, later), finding in self.leaks.items()},
            "conflicts": len(self.conflicts),
            "damaged": {name: finding.rows for name, finding in self.damaged.items()},
            "writing": {name: dict(systems) for name, systems in self.writing.items()},
        }

    def sentence(self, lengths: Mapping[str, Sequence[int]], limit: int | None) -> str:
        """What is wrong, in one line; empty if nothing is.

        lengths: tokens of each row by split; limit: that the model takes, None if it has none.
        """
        said = [f"{finding.rows} row(s) of {name} repeat another" for name, finding in self.duplicates.items()]
        said += [f"{finding.rows} row(s) of {later} are in {first}" for (first, later), finding in self.leaks.items()]
        if self.conflicts:
            said.append(f"{len(self.conflicts)} text(s) have several labels")
        said += [f"{finding.rows} row(s) of {name} have damaged characters" for name, finding in self.damaged.items()]
        for name, counts in lengths.items():
            if limit is not None and (over := sum(count > limit for count in counts)):
                said.append(f"{over} row(s) of {name} have more than {limit} tokens")
        return "; ".join(said)


class _Marks(NamedTuple):
    """What is kept of the rows of a split, each [rows]: digests of texts and label, and what is known about both."""

    texts: NDArray[np.uint64]
    labels: NDArray[np.uint64]
    labelled: NDArray[np.bool_]
    damaged: NDArray[np.bool_]


def examine(splits: Mapping[str, Rows]) -> Findings:
    """Looks for repetitions within and between splits, which are in the order train, validation, test."""
    marks = {name: _marks(rows) for name, rows in splits.items()}
    duplicates, leaks = {}, {}
    for name, rows in splits.items():
        again = np.ones(len(rows), dtype=bool)
        again[np.unique(marks[name].texts, return_index=True)[1]] = False  # the first place of each text
        if again.any():
            duplicates[name] = _finding(rows, again)
    for first, later in combinations(splits, 2):
        shared = np.isin(marks[later].texts, marks[first].texts)
        if shared.any():
            leaks[first, later] = _finding(splits[later], shared)
    return Findings(
        duplicates,
        leaks,
        _conflicts(splits, marks),
        {name: _finding(rows, marks[name].damaged) for name, rows in splits.items() if marks[name].damaged.any()},
        {name: writing(rows) for name, rows in splits.items() if rows},
    )


def _marks(rows: Rows) -> _Marks:
    """Goes through the rows once."""
    size = len(rows)
    marks = _Marks(np.zeros(size, np.uint64), np.zeros(size, np.uint64), np.zeros(size, bool), np.zeros(size, bool))
    for place, row in enumerate(rows):
        marks.texts[place] = _digest(normalised(row))
        marks.damaged[place] = any(map(_DAMAGED.search, row.texts))
        if row.label is not None:
            marks.labels[place], marks.labelled[place] = _digest((row.label,)), True
    return marks


def _digest(words: tuple[str, ...]) -> int:
    """64 bits: of a million texts two that differ have the same with a probability of 3e-8."""
    whole = "\n".join(words).encode(errors="surrogatepass")  # no line break is in a normalised text
    return int.from_bytes(blake2b(whole, digest_size=8).digest())


def _finding(rows: Rows, found: NDArray[np.bool_]) -> Finding:
    """found: whether it is about a row, [rows]."""
    return Finding(int(found.sum()), list(islice(compress(rows, found), SHOWN)))


def _conflicts(splits: Mapping[str, Rows], marks: Mapping[str, _Marks]) -> dict[tuple[str, ...], Counter[str]]:
    """By text, as it is first written, how many rows have which label, where it is more than one."""
    pairs = [np.stack([some.texts, some.labels], axis=1)[some.labelled] for some in marks.values()]
    texts, labels = np.unique(np.concatenate(pairs or [np.zeros((0, 2), np.uint64)]), axis=0).T
    known, counts = np.unique(texts, return_counts=True)
    found: dict[int, tuple[tuple[str, ...], Counter[str]]] = {}
    for name, rows in splits.items() if len(known) < len(labels) else ():
        several = marks[name].labelled & np.isin(marks[name].texts, known[counts > 1])
        for row, text in zip(compress(rows, several), marks[name].texts[several].tolist(), strict=True):
            found.setdefault(text, (row.texts, Counter()))[1][str(row.label)] += 1
    return dict(found.values())


def writing(rows: Rows) -> dict[str, int]:
    """How many of the first rows have most of their letters in which writing system, most frequent first."""
    systems: Counter[str] = Counter()
    for row in islice(rows, _ROWS):
        letters = Counter(_system(letter) for text in row.texts for letter in text[:_START] if letter.isalpha())
        systems[letters.most_common(1)[0][0] if letters else "no letters"] += 1
    return dict(systems.most_common())


@cache
def _system(letter: str) -> str:
    """Unicode names begin with it: "LATIN SMALL LETTER A"."""
    return unicodedata.name(letter, "unknown").split()[0].lower()


def normalised(row: Row) -> tuple[str, ...]:
    """The row's texts as they are compared."""
    return tuple(" ".join(text.casefold().split()) for text in row.texts)


def lengths(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each row, special ones included, before anything is cut."""
    found: list[int] = []
    texts = (row.texts for row in rows)
    while batch := list(islice(texts, _TEXTS_PER_CALL)):
        columns = [list(column) for column in zip(*batch, strict=True)]
        encoded = tokenizer(
            *columns, truncation=False, verbose=False, return_attention_mask=False, return_token_type_ids=False
        )
        found += map(len, encoded["input_ids"])
    return found
