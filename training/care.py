"""What is wrong with data as a whole: rows that repeat or contradict each other, leaks, damage, odd lengths.

Texts are the same if they are but for case and white space.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

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


def examine(splits: Mapping[str, Sequence[Row]]) -> Findings:
    """Looks for repetitions within and between splits, which are in the order train, validation, test."""
    keys = {name: [normalised(row) for row in rows] for name, rows in splits.items()}
    duplicates, leaks = {}, {}
    for name, rows in splits.items():
        # In a dict the last entry of a key stays, and here that is its first place.
        firsts = {key: place for place, key in reversed(list(enumerate(keys[name])))}
        again = [row for place, (row, key) in enumerate(zip(rows, keys[name], strict=True)) if firsts[key] < place]
        if again:
            duplicates[name] = Finding(len(again), again[:SHOWN])
    for first, later in combinations(splits, 2):
        known = set(keys[first])
        shared = [row for row, key in zip(splits[later], keys[later], strict=True) if key in known]
        if shared:
            leaks[first, later] = Finding(len(shared), shared[:SHOWN])
    labels: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    written: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name, rows in splits.items():
        for row, key in zip(rows, keys[name], strict=True):
            if row.label is not None:
                labels[key][row.label] += 1
                written.setdefault(key, row.texts)
    damaged = {name: [row for row in rows if any(map(_DAMAGED.search, row.texts))] for name, rows in splits.items()}
    return Findings(
        duplicates,
        leaks,
        {written[key]: counts for key, counts in labels.items() if len(counts) > 1},
        {name: Finding(len(rows), rows[:SHOWN]) for name, rows in damaged.items() if rows},
        {name: writing(rows) for name, rows in splits.items() if rows},
    )


def writing(rows: Sequence[Row]) -> dict[str, int]:
    """How many of the first rows have most of their letters in which writing system, most frequent first."""
    systems: Counter[str] = Counter()
    for row in rows[:_ROWS]:
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


def lengths(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each row, special ones included, before anything is cut."""
    found: list[int] = []
    for start in range(0, len(rows), _TEXTS_PER_CALL):
        batch = [row.texts for row in rows[start : start + _TEXTS_PER_CALL]]
        columns = [list(column) for column in zip(*batch, strict=True)]
        found += map(len, tokenizer(*columns, truncation=False, verbose=False)["input_ids"])
    return found
