"""What the classification of images and of sounds have in common: scores of the most probable labels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from handler.inputs import Inputs
from handler.parameters import CommonParameters, at_least
from handler.tasks import EncoderTask, Part
from handler.tasks.text_classification import (
    Activation,
    TextClassification,
    activate,
    label_names,
    own_activation,
    window_mean,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaClassificationParameters(CommonParameters):
    """top_k: keep the k most probable labels (None: as the task does).

    function_to_apply: instead of the model's own activation.
    """

    top_k: int | None = at_least(1)
    function_to_apply: Activation | None = None


class MediaInputs(Inputs[Any], Protocol):
    """Inputs that can read a sample out of a request."""

    def read(self, value: Any) -> Any:
        """One sample. Raises RequestError if the value is none."""
        ...


class MediaClassification(EncoderTask):
    """A classifier of one modality; `inputs` is set by the task. Activation follows the model, as for texts.

    top_k: labels in an answer unless a request says, None for all; as in the pipeline of transformers.
    """

    top_k: ClassVar[int | None] = None
    Parameters: ClassVar[type[CommonParameters]] = MediaClassificationParameters
    inputs: MediaInputs

    def __init__(self, inputs: MediaInputs, config: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self._labels = label_names(config)
        self._activation = own_activation(config)
        self.labels = self._labels

    def read(self, value: Any, parameters: Any) -> Sequence[Any]:
        """See `handler.media.read_bytes`."""
        return [self.inputs.read(value)]

    def postprocess(self, parts: Sequence[Part], parameters: Any) -> list[dict[str, Any]]:
        """`[{"label": …, "score": …}, …]`, highest score first; windows of a long sound count by their length."""
        [part] = parts
        scores = activate(window_mean(part), parameters.function_to_apply or self._activation).tolist()
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[: parameters.top_k or self.top_k]
        return [{"label": self._labels[index], "score": scores[index]} for index in order]

    def found(self, prediction: Any) -> Iterable[tuple[str, float]]:
        """The most probable label."""
        return [(entry["label"], entry["score"]) for entry in prediction[:1]]

    drift = staticmethod(TextClassification.drift)
