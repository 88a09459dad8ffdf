"""What is wrong with data as a whole: rows that repeat, rows of one split in another, one text under several labels.

Texts are the same if they are but for case and white space.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from transformers import PreTrainedTokenizerBase

SHOWN = 3
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

    duplicates: by split, rows whose texts an earlier row of the split has. leaks: by (earlier, later) split of train,
    validation and test, rows of the later one whose texts the earlier one has. conflicts: by text, how many rows of all
    splits have which label, where it is more than one; in the order of the data.
    """

    duplicates: Mapping[str, Finding]
    leaks: Mapping[tuple[str, str], Finding]
    conflicts: Mapping[tuple[str, ...], Mapping[str, int]]

    def counts(self) -> dict[str, dict[str, int] | int]:
        """The figures alone, as a JSON value."""
        return {
            "duplicates": {name: finding.rows for name, finding in self.duplicates.items()},
            "leaks": {f"{earlier} in {later}": finding.rows for (earlier, later), finding in self.leaks.items()},
            "conflicts": len(self.conflicts),
        }

    def sentence(self) -> str:
        """All of it in one line, empty if nothing was found."""
        said = [f"{finding.rows} row(s) of {name} repeat another" for name, finding in self.duplicates.items()]
        said += [f"{finding.rows} row(s) of {later} are in {first}" for (first, later), finding in self.leaks.items()]
        if self.conflicts:
            said.append(f"{len(self.conflicts)} text(s) have several labels")
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
    return Findings(duplicates, leaks, {written[key]: counts for key, counts in labels.items() if len(counts) > 1})


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
