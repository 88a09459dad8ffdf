"""Zero-shot classification: labels that the request brings, judged by a model that tells whether one text entails
another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from handler.errors import InvalidParameter
from handler.inputs.text import TextInputs, read_text
from handler.parameters import CommonParameters
from handler.settings import Settings
from handler.tasks import EncoderTask, Part, largest_difference
from handler.tasks.text_classification import activate, label_names, window_mean

_BLANK = "{}"
_MAX_LABELS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShotClassificationParameters(CommonParameters):
    """candidate_labels: a list, or a string with commas. hypothesis_template: a sentence with {} for the label.

    multi_label: whether each label is judged by itself, so that several can be true, instead of one against the others.
    """

    candidate_labels: list[str] | str | None = None
    hypothesis_template: str = "This example is {}."
    multi_label: bool | None = False

    def __post_init__(self) -> None:
        """Raises InvalidParameter if there are no labels, too many, or no place for them."""
        if self.candidate_labels is None:
            raise InvalidParameter('the parameter "candidate_labels" is missing: send the labels to choose from')
        if not 0 < len(self.labels) <= _MAX_LABELS:
            raise InvalidParameter(f"{len(self.labels)} candidate_labels; send 1 to {_MAX_LABELS}")
        if not all(label.strip() for label in self.labels):
            raise InvalidParameter("a candidate label is empty; send words")
        if _BLANK not in self.hypothesis_template:
            raise InvalidParameter("hypothesis_template has no {} to put a label in")

    @property
    def labels(self) -> list[str]:
        """The labels, in the order given."""
        if isinstance(self.candidate_labels, str):
            return [label.strip() for label in self.candidate_labels.split(",") if label.strip()]
        return self.candidate_labels or []


class ZeroShotClassification(EncoderTask):
    """Scores of the labels, highest first. The model has a label that begins with "entail"."""

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    Parameters: ClassVar[type[CommonParameters]] = ZeroShotClassificationParameters

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        # Of a long input only the text itself is cut, never the sentence with the label.
        self.inputs = TextInputs(model_dir, config, settings.max_length, settings.stride, "only_first")
        self._entailment, self._contradiction = entailment(label_names(config))

    def read(self, value: Any, parameters: Any) -> Sequence[tuple[str, str]]:
        """The text with one hypothesis for each label."""
        text = read_text(value.get("text") if isinstance(value, dict) and set(value) == {"text"} else value)
        template = read_text(parameters.hypothesis_template)
        return [(text, template.replace(_BLANK, read_text(label))) for label in parameters.labels]

    def postprocess(self, parts: Sequence[Part], parameters: Any) -> list[dict[str, Any]]:
        """Label and score of each candidate."""
        logits = np.stack([window_mean(part) for part in parts])
        scores = label_scores(
            logits[:, [self._entailment, self._contradiction]],
            multi_label=bool(parameters.multi_label) or len(parts) == 1,
        )
        order = np.argsort(-scores, kind="stable")
        return [{"label": parameters.labels[index], "score": float(scores[index])} for index in order]

    @staticmethod
    def drift(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> float:
        """Largest difference of a label's score; inf if the labels differ."""
        before, after = ({entry["label"]: entry["score"] for entry in entries} for entries in (expected, found))
        return largest_difference(before, after)


def entailment(labels: Sequence[str]) -> tuple[int, int]:
    """Indices of a model's labels for "follows from the text" and "contradicts it".

    The latter is, as in the pipeline of transformers, the first label, or the last one where the first is the former.
    Raises ValueError for a model that is no judge of entailment.
    """
    found = [index for index, label in enumerate(labels) if label.lower().startswith("entail")]
    if not found or len(labels) < 2:
        raise ValueError(
            f"none of the model's labels ({', '.join(labels[:5])}) begins with 'entail': zero-shot classification "
            "needs a model trained on pairs labelled entailment and, say, contradiction"
        )
    return found[0], 0 if found[0] > 0 else len(labels) - 1


def label_scores(logits: NDArray[np.float64], *, multi_label: bool) -> NDArray[np.float64]:
    """Scores [labels] from the logits of entailment and contradiction, [labels, 2]."""
    if multi_label:
        return activate(logits[:, 0] - logits[:, 1], "sigmoid")
    return activate(logits[:, 0], "softmax")
