"""Stands in for torch in the worker of an archive that does not need it: packed as `torch.py` in the archive's root.

TorchServe's worker imports torch for a single `isinstance(answer, torch.Tensor)`. That import takes longer and more
memory than an OpenVINO model; Marble answers with bytes, so the name is all it takes.
"""

from typing import Any


class Tensor:
    """No answer is an instance of it."""


def __getattr__(name: str) -> Any:
    raise AttributeError(f"torch.{name}: this archive runs without torch; build it with --backend torch to have it")
