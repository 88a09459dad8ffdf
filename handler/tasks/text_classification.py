"""Text classification: one score per label for each text or pair of texts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from handler.errors import InternalError, InvalidInput, InvalidParameter
from handler.explain import MOST_TARGETS, Target, Term
from handler.inputs.text import Text, TextInputs, read_text
from handler.parameters import CommonParameters, at_least, between
from handler.settings import Settings
from handler.tasks import EncoderTask, Part, largest_difference

Activation = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextClassificationParameters(CommonParameters):
    """top_k: keep the k most probable labels (None: all). function_to_apply: instead of the model's own activation.

    threshold: keep the labels with at least this score; "learned", for a model of several labels: each by the threshold
    that training found for it, or 0.5, for one of a single label: those above the score from which on it is as often
    right as was wished for, so that an answer may be empty. Absent, all labels are answered, as the pipeline of
    transformers does.
    temperature: the logits are divided by it instead of by what training found to make scores probabilities; 1: raw.
    """

    top_k: int | None = at_least(1)
    function_to_apply: Activation | None = None
    threshold: Literal["learned"] | float | None = None
    temperature: float | None = between(0.01, 100)


class TextClassification(EncoderTask):
    """Activation follows the model: softmax for single-label, sigmoid for multi-label, none for regression.

    Options of the archive: `thresholds`, a score by label; training writes it for several labels, and for one with
    --wished-precision. `temperature`: what training
    has divided the head's weights by, so that the scores of a single label are probabilities.
    """

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    Parameters: ClassVar[type[CommonParameters]] = TextClassificationParameters
    nests_single: ClassVar[bool] = True

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        self.inputs: TextInputs = TextInputs(model_dir, config, settings.max_length, settings.stride)
        self._labels = label_names(config)
        self._activation = own_activation(config)
        self.labels = () if self._activation == "none" else self._labels
        usual = dict.fromkeys(self._labels, 0.5) if self._activation == "sigmoid" else None
        self._temperature = float(settings.options.get("temperature", 1.0))
        self._thresholds = _thresholds(settings.options.get("thresholds", usual), self._labels)

    def read(self, value: Any, parameters: Any) -> Sequence[Text]:
        """A string, `{"text": …}`, or a pair `{"text": …, "text_pair": …}`."""
        if parameters.threshold == "learned" and self._thresholds is None:
            raise InvalidParameter('this model has no thresholds of its own; send a number as "threshold"')
        if parameters.temperature is not None and self._activation != "softmax":
            raise InvalidParameter("a temperature is for the scores of a single label, which this model does not give")
        expected = 'a string, {"text": string} or {"text": string, "text_pair": string}'
        if not isinstance(value, dict):
            return [read_text(value, expected)]
        if set(value) == {"text"}:
            return [read_text(value["text"], expected)]
        if set(value) == {"text", "text_pair"}:
            return [(read_text(value["text"], expected), read_text(value["text_pair"], expected))]
        raise InvalidInput(f"an input must be {expected}")

    def postprocess(self, parts: Sequence[Part], parameters: Any) -> list[dict[str, Any]]:
        """Scores of the labels, highest first."""
        [part] = parts
        logits = window_mean(part)
        if parameters.temperature is not None:
            logits = logits * (self._temperature / parameters.temperature)
        scores = activate(logits, parameters.function_to_apply or self._activation).tolist()
        limits = self._limits(parameters.threshold)
        chosen = [index for index, score in enumerate(scores) if limits is None or score >= limits[index]]
        order = sorted(chosen, key=scores.__getitem__, reverse=True)[: parameters.top_k]
        return [{"label": self._labels[index], "score": scores[index]} for index in order]

    def targets(self, part: Part, prediction: list[dict[str, Any]], parameters: Any) -> list[Target]:
        """The logit of each label in the answer, highest score first."""
        return label_targets(self._labels, part, prediction)

    def found(self, prediction: Any) -> Iterable[tuple[str, float]]:
        """The most probable label, if one is left over the threshold."""
        return [(entry["label"], entry["score"]) for entry in prediction[:1]]

    def _limits(self, threshold: float | str | None) -> Sequence[float] | None:
        """The lowest score of each label that is answered, None for all scores."""
        if isinstance(threshold, str):
            return self._thresholds
        return None if threshold is None else [threshold] * len(self._labels)

    @staticmethod
    def drift(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> float:
        """Largest difference of a label's score, relative to it where it is above 1; inf if the labels differ."""
        before, after = ({entry["label"]: entry["score"] for entry in entries} for entries in (expected, found))
        # Only a regression's values are above 1: they have a scale of their own.
        scale = max(1.0, *(abs(score) for score in before.values())) if before else 1.0
        return largest_difference(before, after) / scale


def label_names(config: Mapping[str, Any]) -> list[str]:
    """Label names in class order, from a model's `config.json`."""
    names = {int(index): str(name) for index, name in config["id2label"].items()}
    return [names[index] for index in range(len(names))]


def own_activation(config: Mapping[str, Any]) -> Activation:
    """How a model's logits become scores, from its `config.json`."""
    if config.get("problem_type") == "regression":
        return "none"
    if config.get("problem_type") == "multi_label_classification" or len(config["id2label"]) == 1:
        return "sigmoid"
    return "softmax"


def window_mean(part: Part) -> NDArray[np.float64]:
    """Logits [labels] of a text: the mean of its windows' by their share of the text.

    Raises InternalError if one is not a finite number.
    """
    logits = [output["logits"] for output in part.outputs]
    return finite(logits[0] if len(logits) == 1 else part.weights @ np.stack(logits))


def label_targets(labels: Sequence[str], part: Part, prediction: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The logit of each label of a prediction: the mean of its windows' as in `window_mean`."""
    weights = [1.0] if len(part.rows) == 1 else part.weights.tolist()
    places = {label: index for index, label in enumerate(labels)}
    return [
        Target(entry, [Term(row, "logits", (places[entry["label"]],), weight) for row, weight in enumerate(weights)])
        for entry in prediction[:MOST_TARGETS]
    ]


def finite(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The values in double precision. Raises InternalError if one is not a finite number."""
    if not np.isfinite(values).all():
        raise InternalError("the model gave a score that is not a number; its weights or precision are unsound")
    return values.astype(np.float64)


def activate(logits: NDArray[np.float64], function: Activation) -> NDArray[np.float64]:
    """Logits [labels] to scores [labels]."""
    if function == "softmax":
        exponentials = np.exp(logits - logits.max())
        return np.asarray(exponentials / exponentials.sum())
    if function == "sigmoid":
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -700, 700))))
    return logits


def _thresholds(option: Any, labels: Sequence[str]) -> list[float] | None:
    """The archive's thresholds in class order. Raises ValueError if they do not fit its labels."""
    if option is None:
        return None
    if not isinstance(option, dict) or sorted(map(str, option)) != sorted(labels):
        raise ValueError("options.thresholds must give one number for each of the model's labels")
    by_label = {str(label): float(value) for label, value in option.items()}
    return [by_label[label] for label in labels]
