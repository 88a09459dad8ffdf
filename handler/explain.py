"""Explanations: how much each word of a text, or each square of an image, speaks for what the model answered.

What is explained is the number behind an answer, see `Target`: a logit, or a sum of several. The attribution of a part
of the input is in the same unit. There are two ways to it:

occlusion: each part is hidden by itself and the model asked again; a part counts for as much as the number falls. On
every backend. (Zeiler and Fergus 2014; for texts Li, Monroe and Jurafsky 2016.)
integrated_gradients: the gradients on the way from an input of mask tokens to the input as it is; what all parts count
adds up to the difference of the two numbers. On torch. (Sundararajan, Taly and Yan 2017.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from handler.errors import InternalError
from handler.inputs import Feature, HidableInputs
from handler.parameters import between
from handler.tasks import Outputs, Part

Method = Literal["occlusion", "integrated_gradients"]

# Answers of one input that are explained: the first ones.
MOST_TARGETS = 10
# Passes through the model that integrated gradients take unless a request says; fewer where the budget is smaller.
_STEPS, _FEWEST_STEPS = 32, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplanationParameters:
    """method: "occlusion" if None. steps: of integrated gradients; None: 32, or fewer where the budget is smaller."""

    method: Method | None = None
    steps: int | None = between(1, 1024)


NAMES = tuple(field.name for field in fields(ExplanationParameters))


@dataclass(frozen=True, slots=True)
class Term:
    """One of a model's outputs: of which row of the input, by its name and its index in that row's outputs."""

    row: int
    output: str
    index: tuple[int, ...]
    weight: float


@dataclass(frozen=True, slots=True)
class Target:
    """A number that is explained: a weighted sum of outputs. answer: what it stands behind, of the prediction."""

    answer: Mapping[str, Any]
    terms: Sequence[Term]

    def of_row(self, row: int) -> list[Term]:
        """The terms of one row."""
        return [term for term in self.terms if term.row == row]

    def value(self, row: int, outputs: Outputs) -> float:
        """What one row adds to it."""
        return sum(term.weight * float(outputs[term.output][term.index]) for term in self.of_row(row))


@runtime_checkable
class Explainable(Protocol):
    """A task whose answers can be explained."""

    @property
    def inputs(self) -> HidableInputs[Any]:
        """Those whose parts can be hidden."""
        ...

    def targets(self, part: Part, prediction: Any, parameters: Any) -> list[Target]:
        """The number behind each answer of a prediction.

        part: the sample that it was made of, and its outputs; parameters: the task's.
        """
        ...


@dataclass(frozen=True, slots=True)
class Hidden:
    """A row with features hidden. number: of the row it was made of."""

    number: int
    features: Sequence[Feature]
    row: Any


@dataclass(frozen=True, slots=True)
class Path:
    """From a row that is hidden as a whole to the row as it is. place: of the target; terms: those of this row."""

    place: int
    row: Any
    hidden: Hidden
    terms: Sequence[Term]


class Explanation:
    """One input's on the way: what is to be run through the model, and what came of it."""

    def __init__(
        self,
        inputs: HidableInputs[Any],
        parameters: ExplanationParameters,
        part: Part,
        prediction: Any,
        targets: Sequence[Target],
        budget: int,
    ) -> None:
        """budget: tokens (patches) that may go through the model for it."""
        self._inputs = inputs
        self._part = part
        self._prediction = prediction
        self.targets = targets
        self.method: Method = parameters.method or "occlusion"
        # Only these rows have anything to do with the answers.
        self._numbers = sorted({term.row for target in self.targets for term in target.terms})
        tokens = sum(len(part.rows[number]) for number in self._numbers)
        most = max(1, budget // max(1, tokens))
        found = self._inputs.features(part.sample, part.rows, most)
        self.features = {number: found[number] for number in self._numbers}
        self.steps = parameters.steps or max(_FEWEST_STEPS, min(_STEPS, most // max(1, len(self.targets))))
        # Of each target, the attributions of each row's features.
        self._scores: list[list[tuple[Feature, float]]] = [[] for _ in self.targets]
        self._deltas = [0.0 for _ in self.targets]

    @property
    def cost(self) -> int:
        """Tokens that go through the model for it."""
        if self.method == "integrated_gradients":
            rows = {(term.row, place) for place, target in enumerate(self.targets) for term in target.terms}
            return self.steps * sum(len(self._part.rows[row]) for row, _ in rows)
        return sum(len(self._part.rows[number]) * len(found) for number, found in self.features.items())

    def occluded(self) -> Iterator[Hidden]:
        """Each row with each of its features hidden by itself."""
        for number, features in self.features.items():
            for feature in features:
                yield Hidden(number, [feature], self._inputs.hide(self._part.rows[number], [feature]))

    def take_occluded(self, hidden: Hidden, outputs: Outputs) -> None:
        """Takes what the model said of one of them."""
        [feature] = hidden.features
        whole = self._part.outputs[hidden.number]
        for target, scores in zip(self.targets, self._scores, strict=True):
            if target.of_row(hidden.number):
                fall = target.value(hidden.number, whole) - target.value(hidden.number, outputs)
                scores.append((feature, fall))

    def paths(self) -> Iterator[Path]:
        """What integrated gradients go along."""
        for place, target in enumerate(self.targets):
            for number, features in self.features.items():
                if terms := target.of_row(number):
                    row = self._part.rows[number]
                    yield Path(place, row, Hidden(number, features, self._inputs.hide(row, features)), terms)

    def take_gradients(self, path: Path, attributions: NDArray[np.float32], delta: float) -> None:
        """Takes the attributions of one path's positions, and by how much their sum is off."""
        features = path.hidden.features
        self._scores[path.place] += [(feature, float(attributions[feature.place].sum())) for feature in features]
        self._deltas[path.place] += delta

    def answer(self) -> dict[str, Any]:
        """The explanation as a JSON value. Raises InternalError if a number in it is not finite."""
        if not np.isfinite([score for scores in self._scores for _, score in scores] + self._deltas).all():
            raise InternalError("the model gave a number that is not finite for a part of the input")
        explanations = []
        for target, scores, delta in zip(self.targets, self._scores, self._deltas, strict=True):
            value = sum(target.value(number, self._part.outputs[number]) for number in self._numbers)
            shown = self._inputs.shown(self._part.sample, self._part.rows, scores) if scores else []
            entry = {**target.answer, "value": value}
            if self.method == "integrated_gradients":
                entry["convergence_delta"] = delta
            explanations.append(entry | (shown if isinstance(shown, dict) else {"attributions": shown}))
        return {"method": self.method, "prediction": self._prediction, "explanations": explanations}
