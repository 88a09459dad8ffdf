"""Tasks: what is asked of a model and what it answers. One file per task, one line in the registry."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from handler.parameters import CommonParameters

REGISTRY = {
    "text-classification": "handler.tasks.text_classification:TextClassification",
}


class Task(Protocol):
    """Preprocessing, postprocessing and parameters of one task; built from the model's `config.json`.

    auto_model: the transformers class that loads the model.
    Parameters: dataclass of the parameters a request may carry.
    nests_single: whether the Inference API answers a single input with a list of one.
    """

    auto_model: ClassVar[str]
    Parameters: ClassVar[type[CommonParameters]]
    nests_single: ClassVar[bool]

    def __init__(self, config: Mapping[str, Any]) -> None: ...

    def read(self, item: Any) -> str:
        """The text of one input. Raises RequestError if the input is not one this task takes."""
        ...

    def postprocess(
        self, logits: NDArray[np.float32], weights: NDArray[np.float32], parameters: CommonParameters
    ) -> Any:
        """The prediction for one text, as JSON values.

        logits: float32 [windows, labels]; weights: float32 [windows], each window's share of the text, sums to 1.
        """
        ...

    def drift(self, expected: Any, found: Any) -> float:
        """How far two predictions for one input are apart: the largest difference of a score, or inf."""
        ...


def load(name: str) -> type[Task]:
    """The class of a registered task. Raises ValueError, naming the tasks there are, for another name."""
    if name not in REGISTRY:
        raise ValueError(f"task {name!r} is not one of: {', '.join(REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    task: type[Task] = getattr(import_module(module), attribute)
    return task
