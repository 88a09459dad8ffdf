"""Rows whose labels are probably wrong.

Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", 2021; by cleanlab.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cleanlab.filter import find_label_issues
from numpy.typing import NDArray

_FEWEST_ROWS = 20  # of fewer, no mean score of a label says anything


@dataclass(frozen=True, slots=True)
class Suspect:
    """row: its place. given: its label; likely: the one that the model holds for most probable, by `score`."""

    row: int
    given: str
    likely: str
    score: float


def suspects(scores: NDArray[np.float64], targets: NDArray[np.int64], labels: Sequence[str]) -> list[Suspect]:
    """The rows that confident learning holds for mislabelled, the least credible label first.

    scores: probabilities [rows, labels] from a model that has not been trained on these rows; targets: indices of the
    given labels [rows].
    """
    present, places = np.unique(targets, return_inverse=True)
    if len(targets) < _FEWEST_ROWS or len(present) < 2:
        return []
    # A label that no row has cannot be estimated.
    known = scores[:, present] + 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of each label with few rows
        ranked = find_label_issues(
            places, known / known.sum(axis=1, keepdims=True), return_indices_ranked_by="self_confidence", n_jobs=1
        )
    found = [(int(row), int(scores[row].argmax())) for row in ranked]
    return [
        Suspect(row, labels[targets[row]], labels[best], float(scores[row, best]))
        for row, best in found
        if best != targets[row]
    ]
