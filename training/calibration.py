"""Whether a classifier's scores are probabilities: reliability diagrams, their error, and a temperature to mend it.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", 2017.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

BINS = 15
_SMALLEST = 1e-300  # a score that has underflowed has no logarithm
_TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True, slots=True)
class Bin:
    """Answers with a score above `low` and at most `high`: how many, their mean score, the share that is right."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


def reliability(scores: NDArray[np.float64], targets: NDArray[np.int64]) -> list[Bin]:
    """The answers (most probable labels) in 15 bins of equal width, by their score; empty bins are left out.

    scores: probabilities [rows, labels]; targets: indices of the true labels [rows].
    """
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == targets
    edges = np.linspace(0, 1, BINS + 1)
    places = np.digitize(confidence, edges[1:-1], right=True)
    return [
        Bin(
            float(edges[place]),
            float(edges[place + 1]),
            int((places == place).sum()),
            float(confidence[places == place].mean()),
            float(right[places == place].mean()),
        )
        for place in np.unique(places)
    ]


def expected_error(bins: list[Bin]) -> float:
    """The expected calibration error: the mean gap of score and accuracy, each bin by its rows; 0 is best."""
    return sum(entry.rows * abs(entry.accuracy - entry.confidence) for entry in bins) / sum(b.rows for b in bins)


def fit_temperature(scores: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    """The temperature, from 0.05 to 20, by which the logits are divided for the least negative log-likelihood.

    Of n rows each counts as 1 / (n + 2) wrong (Platt 1999): a few that are all right make no model sure of everything.
    Shapes as in `reliability`.
    """
    logits, (rows, labels) = _logits(scores), scores.shape
    wrong = 1 / (rows + 2)
    wanted = np.full((rows, labels), wrong / max(1, labels - 1))
    wanted[np.arange(rows), targets] = 1 - wrong

    def loss(log_temperature: float) -> float:
        return float(-(wanted * log_softmax(logits / np.exp(log_temperature), axis=1)).sum())

    return float(np.exp(minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded").x))


def tempered(scores: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """The scores [rows, labels] that logits divided by the temperature give."""
    return np.asarray(softmax(_logits(scores) / temperature, axis=1))


@dataclass(frozen=True, slots=True)
class Abstention:
    """threshold: the lowest score that is an answer. coverage: share of rows answered; precision: that is right."""

    threshold: float
    coverage: float
    precision: float


def precision_by_coverage(scores: NDArray[np.float64], targets: NDArray[np.int64]) -> list[Abstention]:
    """Each threshold that tells rows apart, from the one that answers all rows to the one that answers the surest.

    El-Yaniv and Wiener, "On the Foundations of Noise-free Selective Classification", 2010. Shapes as in `reliability`.
    """
    confidence = scores.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    confidence, right = confidence[order], (scores.argmax(axis=1) == targets)[order]
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    # Halfway to the next score, so that a score may change a little without changing sides.
    limits = (confidence + np.append(confidence[1:], 0.0)) / 2
    ends = np.flatnonzero(np.append(confidence[:-1] > confidence[1:], True))
    return [
        Abstention(float(limits[end]), (int(end) + 1) / len(right), float(precision[end])) for end in reversed(ends)
    ]


def abstention(scores: NDArray[np.float64], targets: NDArray[np.int64], wished: float) -> Abstention | None:
    """The threshold that answers most rows of those with at least the wished precision; None if there is none."""
    return next((entry for entry in precision_by_coverage(scores, targets) if entry.precision >= wished), None)


def _logits(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logits of probabilities, but for a constant in each row, which changes nothing."""
    return np.asarray(np.log(np.maximum(scores, _SMALLEST)))
