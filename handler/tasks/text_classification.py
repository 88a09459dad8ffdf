"""Text classification: scores of all labels, highest first, as the Hugging Face Inference API gives them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from handler.errors import InternalError, InvalidInput, UnreadableRequest
from handler.parameters import CommonParameters, at_least

Activation = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextClassificationParameters(CommonParameters):
    """top_k: keep the k most probable labels (None: all). function_to_apply: instead of the model's own activation."""

    top_k: int | None = at_least(1)
    function_to_apply: Activation | None = None


class TextClassification:
    """Activation follows the model: softmax for single-label, sigmoid for multi-label, none for regression."""

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    Parameters: ClassVar[type[CommonParameters]] = TextClassificationParameters
    nests_single: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        names = {int(index): str(name) for index, name in config["id2label"].items()}
        self._labels = [names[index] for index in range(len(names))]
        self._activation: Activation = "softmax" if len(names) > 1 else "sigmoid"
        if config.get("problem_type") == "regression":
            self._activation = "none"
        elif config.get("problem_type") == "multi_label_classification":
            self._activation = "sigmoid"

    def read(self, item: Any) -> str:
        """The text of an input: a string, or an object `{"text": …}`."""
        text = item.get("text") if isinstance(item, dict) and set(item) == {"text"} else item
        if not isinstance(text, str):
            raise InvalidInput(f'an input must be a string or {{"text": string}}, not {type(text).__name__}')
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UnreadableRequest(
                f"the text has half of a surrogate pair at character {error.start}: send whole characters"
            ) from None
        return text

    def postprocess(
        self, logits: NDArray[np.float32], weights: NDArray[np.float32], parameters: CommonParameters
    ) -> list[dict[str, Any]]:
        """Averages the windows' logits by their share of the text, then applies the activation."""
        assert isinstance(parameters, TextClassificationParameters)
        values = logits[0] if len(logits) == 1 else weights @ logits
        if not np.isfinite(values).all():
            raise InternalError("the model gave a score that is not a number; its weights or precision are unsound")
        scores = activate(values.astype(np.float64), parameters.function_to_apply or self._activation)
        order = np.argsort(-scores, kind="stable")[: parameters.top_k]
        return [{"label": self._labels[index], "score": float(scores[index])} for index in order]

    def drift(self, expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> float:
        """Largest difference of a label's score, NaN if one is; inf if the labels differ."""
        before = {entry["label"]: entry["score"] for entry in expected}
        after = {entry["label"]: entry["score"] for entry in found}
        if before.keys() != after.keys():
            return float("inf")
        # Unlike max(), numpy's keeps a NaN wherever it stands.
        return float(np.max([abs(before[label] - after[label]) for label in before], initial=0.0))


def activate(logits: NDArray[np.float64], function: Activation) -> NDArray[np.float64]:
    """Logits [labels] to scores [labels]."""
    if function == "softmax":
        exponentials = np.exp(logits - logits.max())
        return np.asarray(exponentials / exponentials.sum())
    if function == "sigmoid":
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -700, 700))))
    return logits
