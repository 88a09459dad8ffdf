"""Backends: arrays in, arrays out. One file per runtime; each imports its runtime only when it is loaded."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from handler.settings import Settings

BACKENDS = ("torch", "openvino")
PRECISIONS = ("fp32", "bf16")


class Backend(Protocol):
    """A loaded model."""

    def __call__(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """Runs one micro-batch.

        arrays: [batch, …] by input name, e.g. `input_ids`, int64 [batch, length]; those the model has no input for
        are ignored. Returns float32 arrays by output name, e.g. `logits` [batch, labels].
        """
        ...


def load(model_dir: Path, settings: Settings, auto_model: str, output_names: Sequence[str]) -> Backend:
    """Loads the backend named in the settings.

    auto_model: the transformers class for the torch backend. output_names: the model outputs that are wanted.

    Raises ValueError for a backend or precision that does not exist, ImportError if its runtime is not installed.
    """
    threads = _threads(settings)
    if settings.backend == "torch":
        from handler.backends.torch import TorchBackend

        return TorchBackend(model_dir, settings.precision, threads, auto_model, output_names)
    if settings.backend == "openvino":
        from handler.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(model_dir, settings.precision, threads, output_names)
    raise ValueError(f"backend {settings.backend!r} is not one of {', '.join(BACKENDS)}")


def load_model(model_dir: Path, settings: Settings, auto_model: str) -> Any:
    """The transformers model of a task that runs it by itself; `auto_model`: its class.

    Raises ValueError for a precision that does not exist, ImportError if torch is not installed.
    """
    from handler.backends import torch

    return torch.load_model(model_dir, settings.precision, _threads(settings), auto_model)


def _threads(settings: Settings) -> int:
    """Threads to run on, once the precision is known to exist."""
    if settings.precision not in PRECISIONS:
        raise ValueError(f"precision {settings.precision!r} is not one of {', '.join(PRECISIONS)}")
    return settings.threads or len(os.sched_getaffinity(0))
