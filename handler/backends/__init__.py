"""Backends: arrays in, arrays out. One file per runtime; each imports its runtime only when it is loaded."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from handler.settings import Settings

BACKENDS = ("torch", "openvino")
PRECISIONS = ("fp32", "bf16")


class Backend(Protocol):
    """A loaded model."""

    def __call__(self, arrays: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float32]]:
        """Runs one micro-batch.

        arrays: int64 [batch, length] by input name; inputs the model does not have are ignored.
        Returns float32 arrays by output name, e.g. `logits` [batch, labels].
        """
        ...


def load(model_dir: Path, settings: Settings, auto_model: str) -> Backend:
    """Loads the backend named in the settings; `auto_model` is the transformers class for the torch backend.

    Raises ValueError for a backend or precision that does not exist, ImportError if its runtime is not installed.
    """
    if settings.precision not in PRECISIONS:
        raise ValueError(f"precision {settings.precision!r} is not one of {', '.join(PRECISIONS)}")
    threads = settings.threads or len(os.sched_getaffinity(0))
    if settings.backend == "torch":
        from handler.backends.torch import TorchBackend

        return TorchBackend(model_dir, settings.precision, threads, auto_model)
    if settings.backend == "openvino":
        from handler.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(model_dir, settings.precision, threads)
    raise ValueError(f"backend {settings.backend!r} is not one of {', '.join(BACKENDS)}")
