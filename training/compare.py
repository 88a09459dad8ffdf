"""Says which of two bundles is better, and where: `python -m training.compare A B`.

Both are asked about the validation rows that they hold, which must be the same. Whether one is right more often is told
by McNemar's exact test (McNemar 1947) on the rows where just one is right; how sure a difference in F1 is by the paired
bootstrap over rows (Efron and Tibshirani 1993). For text-classification, of one label or several, and for
token-classification.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from handler.engine import Engine
from training import evaluation, tasks
from training.errors import UserError
from training.interrupts import INTERRUPTED

TASKS = ("text-classification", "token-classification")
_RESAMPLES, _SEED = 1000, 0
_SHOWN = 10  # labels, and rows, each way
_TITLE, _CHARACTERS = 36, 160
# What a row has or should have: a label, and of an entity its start and end.
Mark = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class Side:
    """A bundle: its metrics.json, its validation rows, the digest of its test file, if it had one, and the model."""

    path: Path
    metrics: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    test_digest: str | None
    engine: Engine


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of each row. right: [rows]; hits, claims, marks: [rows, labels], what F1 is made of.

    Of a row and a label: marks that were found, that were given, and that there are.
    """

    right: NDArray[np.bool_]
    hits: NDArray[np.int64]
    claims: NDArray[np.int64]
    marks: NDArray[np.int64]

    def label_f1(self, rows: Any = slice(None)) -> NDArray[np.float64]:
        """F1 of each label over the rows chosen, 0 for one that is neither there nor given."""
        hits, both = self.hits[rows].sum(axis=0), (self.claims[rows] + self.marks[rows]).sum(axis=0)
        return np.asarray(2 * hits / np.maximum(both, 1))

    def micro_f1(self, rows: Any = slice(None)) -> float:
        """F1 over all labels together."""
        hits, both = self.hits[rows].sum(), (self.claims[rows] + self.marks[rows]).sum()
        return float(2 * hits / max(both, 1))


def read(path: Path) -> Side:
    """A bundle that can be compared. Raises UserError if it is none, or of another task."""
    try:
        metrics, provenance = (
            json.loads((path / name).read_text(encoding="utf-8")) for name in ("metrics.json", "provenance.json")
        )
        lines = (path / "validation.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        engine = Engine(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this is no bundle of train.py: {error}") from None
    task = metrics["task"]
    if task not in TASKS:
        raise UserError(f"{path}: bundles of {task} are not compared; those of {' and '.join(TASKS)} are")
    if not rows:
        raise UserError(f"{path}: it holds no validation rows to compare by; make it with a --validation-file")
    if isinstance(rows[0]["target"], float):
        raise UserError(f"{path}: a regression is neither right nor wrong, so it is not compared; see its metrics.json")
    return Side(path, metrics, rows, provenance["data"].get("test", {}).get("sha256"), engine)


def check(one: Side, other: Side) -> None:
    """Raises UserError if two bundles have not the same task, labels and validation rows."""
    pair = f"{one.path} and {other.path}"
    if one.metrics["task"] != other.metrics["task"]:
        raise UserError(f"{pair} are for different tasks: {one.metrics['task']} and {other.metrics['task']}")
    if unshared := sorted(set(one.metrics["labels"]) ^ set(other.metrics["labels"])):
        raise UserError(f"{pair} have different labels: just one of them has {', '.join(map(repr, unshared[:_SHOWN]))}")
    ours, theirs = ([json.dumps([row["inputs"], row["target"]]) for row in side.rows] for side in (one, other))
    if sorted(ours) != sorted(theirs):
        shared = len(set(ours) & set(theirs))
        raise UserError(
            f"{pair} have different validation rows ({shared} in both); train both with the same --validation-file"
        )


def judge(predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> Outcome:
    """Counts what was found. A row is right if its marks are just those of its target."""
    places = {label: index for index, label in enumerate(labels)}
    tables = np.zeros((3, len(targets), len(labels)), dtype=np.int64)
    right = []
    for row, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        given, there = set(_marks(_answer(prediction, target))), set(_marks(target))
        right.append(given == there)
        for table, found in zip(tables, (given & there, given, there), strict=True):
            for label, _ in found:
                table[row, places[label]] += 1
    return Outcome(np.array(right), *tables)


def mcnemar(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> tuple[int, int, float]:
    """Rows that only the first, and only the second, has right; and the two-sided exact p-value that this is chance."""
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    if only_ours + only_theirs == 0:
        return 0, 0, 1.0
    return only_ours, only_theirs, float(binomtest(only_ours, only_ours + only_theirs).pvalue)


def bootstrap(ours: Outcome, theirs: Outcome, *, micro: bool) -> tuple[float, float, float]:
    """The second's F1, micro or else macro, minus the first's; and the ends of the difference's 95 % interval."""

    def gain(rows: Any) -> float:
        if micro:
            return theirs.micro_f1(rows) - ours.micro_f1(rows)
        return float((theirs.label_f1(rows) - ours.label_f1(rows)).mean())

    chance = np.random.default_rng(_SEED)
    count = len(ours.right)
    gains = [gain(chance.integers(0, count, count)) for _ in range(_RESAMPLES)]
    low, high = np.percentile(gains, [2.5, 97.5])
    return gain(slice(None)), float(low), float(high)


def compare(one: Path, other: Path) -> str:
    """The comparison as plain text. Raises UserError if the two cannot be compared."""
    a, b = read(one), read(other)
    check(a, b)
    task, targets = tasks.load(a.metrics["task"]), [row["target"] for row in a.rows]
    found = [evaluation.predict(side.engine, a.rows) for side in (a, b)]
    scores = [task.score(predictions, targets, a.metrics["labels"]) for predictions in found]
    labels = a.engine.task.labels
    ours, theirs = (judge(predictions, targets, labels) for predictions in found)
    parts = [
        [f"A  {one}", f"B  {other}"],
        [_line(f"validation, {len(targets)} rows", "A", "B", "B - A"), *_figures(*scores)],
        _recorded(a, b),
        _tests(ours, theirs, micro=a.metrics["task"] == "token-classification"),
        *_by_label(ours, theirs, labels),
        *_flips(a.rows, found, ours.right, theirs.right),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _answer(prediction: Any, target: Any) -> Any:
    """What of a prediction is compared with a target: of a single label the first one."""
    return prediction[:1] if isinstance(target, str) else prediction


def _marks(value: Any) -> list[Mark]:
    """The marks in a target or a prediction: a label, labels, answers of a classifier, or entities."""
    return [_mark(entry) for entry in ([value] if isinstance(value, str) else value)]


def _mark(entry: Any) -> Mark:
    if isinstance(entry, str):
        return entry, None
    return (entry["label"], None) if "label" in entry else (entry["entity_group"], (entry["start"], entry["end"]))


def _line(title: str, *cells: str) -> str:
    return (_shown(title, _TITLE).ljust(_TITLE) + "".join(cell.rjust(10) for cell in cells)).rstrip()


def _difference(title: str, ours: float, theirs: float) -> str:
    return _line(title, f"{ours:.4f}", f"{theirs:.4f}", f"{theirs - ours:+.4f}")


def _figures(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The single figures among metrics, side by side."""
    return [
        _difference(name.replace("_", "-"), value, theirs[name])
        for name, value in ours.items()
        if isinstance(value, float)
    ]


def _recorded(a: Side, b: Side) -> list[str]:
    """The metrics of the test split, whose rows a bundle does not hold, if it was the same file."""
    ours, theirs = (side.metrics["splits"].get("test") for side in (a, b))
    if not ours or not theirs or a.test_digest != b.test_digest:
        return []
    return [_line(f"test, {ours['rows']} rows, as recorded"), *_figures(ours, theirs)]


def _tests(ours: Outcome, theirs: Outcome, *, micro: bool) -> list[str]:
    """How sure the difference is."""
    alone, others, chance = mcnemar(ours.right, theirs.right)
    both = int((ours.right & theirs.right).sum())
    gain, low, high = bootstrap(ours, theirs, micro=micro)
    return [
        f"rows that are right: both {both}, A alone {alone}, B alone {others}, neither "
        f"{len(ours.right) - both - alone - others}; McNemar's exact test: p = {chance:.4g}",
        f"{'micro' if micro else 'macro'}-F1: B - A = {gain:+.4f}, 95 % interval {low:+.4f} to {high:+.4f} "
        f"(paired bootstrap, {_RESAMPLES} resamplings)",
    ]


def _by_label(ours: Outcome, theirs: Outcome, labels: Sequence[str]) -> list[list[str]]:
    """The labels whose F1 rose most, and those whose F1 fell most."""
    before, after = ours.label_f1(), theirs.label_f1()
    order = np.argsort(before - after, kind="stable")
    better = [index for index in order if after[index] > before[index]]
    worse = [index for index in order[::-1] if after[index] < before[index]]
    return [
        [_line(f"F1 is {how} in B: {len(chosen)} labels", "A", "B", "B - A")]
        + [_difference(labels[index], before[index], after[index]) for index in chosen[:_SHOWN]]
        for how, chosen in (("higher", better), ("lower", worse))
    ]


def _flips(
    rows: Sequence[Mapping[str, Any]],
    found: Sequence[Sequence[Any]],
    ours: NDArray[np.bool_],
    theirs: NDArray[np.bool_],
) -> list[list[str]]:
    """The first rows that only B has right, and those that only A has right."""
    parts = []
    for name, chosen in (("B", theirs & ~ours), ("A", ours & ~theirs)):
        lines = [f"right in {name} alone: {chosen.sum()} rows"]
        for index in np.flatnonzero(chosen)[:_SHOWN]:
            given, target = rows[index]["inputs"], rows[index]["target"]
            answers = [_written(given, _answer(predictions[index], target)) for predictions in found]
            lines.append(f"  {_shown(given if isinstance(given, str) else ' ‖ '.join(given.values()), _CHARACTERS)}")
            lines.append(f"    true: {_written(given, target)}; A: {answers[0]}; B: {answers[1]}")
        parts.append(lines)
    return parts


def _written(given: Any, value: Any) -> str:
    """A target or an answer as people read it: names of labels, or entities with their words."""
    names = [label if place is None else f"{given[slice(*place)]} ({label})" for label, place in _marks(value)]
    return _shown(", ".join(names), _CHARACTERS) or "none"


def _shown(text: str, most: int) -> str:
    """A text in one line, at most so long, with nothing in it that a terminal obeys."""
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def main(argv: Sequence[str]) -> None:
    """Prints the comparison of two bundles."""
    given = parse(argv)
    print(compare(given.a, given.b))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.compare",
        description="Says which of two bundles is better, where, and how sure that is.",
        epilog="example:\n  python -m training.compare artifacts/reviews artifacts/reviews-2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A", help="the folder of a bundle")
    parser.add_argument("b", type=Path, metavar="B", help="the folder of another one, for the same task and data")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"training.compare: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
