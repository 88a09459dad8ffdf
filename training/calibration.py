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


def _logits(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logits of probabilities, but for a constant in each row, which changes nothing."""
    return np.asarray(np.log(np.maximum(scores, _SMALLEST)))
