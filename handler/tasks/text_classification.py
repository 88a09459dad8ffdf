"""Text classification: one score per label for each text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from handler.errors import InternalError
from handler.inputs.text import TextInputs, read_text
from handler.parameters import CommonParameters, at_least
from handler.settings import Settings
from handler.tasks import EncoderTask, Part, largest_difference

Activation = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextClassificationParameters(CommonParameters):
    """top_k: keep the k most probable labels (None: all). function_to_apply: instead of the model's own activation."""

    top_k: int | None = at_least(1)
    function_to_apply: Activation | None = None


class TextClassification(EncoderTask):
    """Activation follows the model: softmax for single-label, sigmoid for multi-label, none for regression."""

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    Parameters: ClassVar[type[CommonParameters]] = TextClassificationParameters
    nests_single: ClassVar[bool] = True

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        self.inputs = TextInputs(model_dir, config, settings.max_length, settings.stride)
        self._labels = label_names(config)
        self._activation: Activation = "softmax" if len(self._labels) > 1 else "sigmoid"
        if config.get("problem_type") == "regression":
            self._activation = "none"
        elif config.get("problem_type") == "multi_label_classification":
            self._activation = "sigmoid"

    def read(self, value: Any, parameters: Any) -> Sequence[str]:
        """The text of an input: a string, or an object `{"text": …}`."""
        text = value.get("text") if isinstance(value, dict) and set(value) == {"text"} else value
        return [read_text(text, 'a string or {"text": string}')]

    def postprocess(self, parts: Sequence[Part], parameters: Any) -> list[dict[str, Any]]:
        """Averages the windows' logits by their share of the text, then applies the activation."""
        [part] = parts
        logits = [output["logits"] for output in part.outputs]
        values = logits[0] if len(logits) == 1 else part.weights @ np.stack(logits)
        scores = activate(finite(values), parameters.function_to_apply or self._activation)
        order = np.argsort(-scores, kind="stable")[: parameters.top_k]
        return [{"label": self._labels[index], "score": float(scores[index])} for index in order]

    @staticmethod
    def drift(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> float:
        """Largest difference of a label's score; inf if the labels differ."""
        return largest_difference(
            {entry["label"]: entry["score"] for entry in expected}, {entry["label"]: entry["score"] for entry in found}
        )


def label_names(config: Mapping[str, Any]) -> list[str]:
    """Label names in class order, from a model's `config.json`."""
    names = {int(index): str(name) for index, name in config["id2label"].items()}
    return [names[index] for index in range(len(names))]


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
