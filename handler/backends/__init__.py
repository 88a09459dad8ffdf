"""Backends: arrays in, arrays out. One file per runtime; each imports its runtime only when it is loaded."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from handler.settings import Settings

# Where it can be imported, OpenVINO and NNCF tell Intel and Google of each model that they convert. Nothing leaves the
# machine that builds an archive.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
# The precisions that each backend runs.
PRECISIONS = {"torch": ("fp32", "bf16", "fp16"), "openvino": ("fp32", "bf16", "int8")}


class Backend(Protocol):
    """A loaded model. streams: micro-batches that it runs at the same time."""

    streams: int

    def run(self, batches: Iterable[Mapping[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[np.float32]]]:
        """Runs micro-batches, in order. Takes the next one while it computes, where the runtime can do both at a time.

        batches: arrays [batch, …] by input name, e.g. `input_ids`, int64 [batch, length]; those the model has no input
        for are ignored. Yields for each float32 arrays by output name, e.g. `logits` [batch, labels].
        """
        ...


def load(model_dir: Path, settings: Settings, auto_model: str, output_names: Sequence[str]) -> Backend:
    """Loads the backend named in the settings.

    auto_model: the transformers class for the torch backend. output_names: the model outputs that are wanted.

    Raises ValueError for a backend or precision that does not exist, ImportError if its runtime is not installed.
    """
    _check(settings)
    if settings.backend == "torch":
        from handler.backends.torch import TorchBackend

        return TorchBackend(model_dir, settings, auto_model, output_names)
    from handler.backends.openvino import OpenVinoBackend

    return OpenVinoBackend.load(model_dir, settings, output_names)


def load_model(model_dir: Path, settings: Settings, auto_model: str) -> Any:
    """The transformers model of a task that runs it by itself; `auto_model`: its class.

    Raises ValueError for a precision that does not exist, ImportError if torch is not installed.
    """
    from handler.backends import torch

    _check(settings)
    return torch.load_model(model_dir, settings, auto_model)


def _check(settings: Settings) -> None:
    if settings.backend not in PRECISIONS:
        raise ValueError(f"backend {settings.backend!r} is not one of {', '.join(PRECISIONS)}")
    if settings.precision not in PRECISIONS[settings.backend]:
        raise ValueError(
            f"precision {settings.precision!r} is not one of those of the {settings.backend} backend: "
            f"{', '.join(PRECISIONS[settings.backend])}"
        )
