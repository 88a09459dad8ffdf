"""The torch backend: the bundle's own weights through transformers. The reference for every other backend."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray


def load_model(model_dir: Path, precision: str, threads: int, auto_model: str) -> Any:
    """A transformers model in fp32 or bf16, ready to run on so many threads."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return (
        getattr(transformers, auto_model)
        .from_pretrained(
            model_dir,
            dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        .eval()
    )


class TorchBackend:
    """Runs a transformers model on the CPU in fp32 or bf16."""

    def __init__(
        self, model_dir: Path, precision: str, threads: int, auto_model: str, output_names: Sequence[str]
    ) -> None:
        self._model = load_model(model_dir, precision, threads, auto_model)
        self._outputs = tuple(output_names)
        self._inputs = set(inspect.signature(self._model.forward).parameters)

    @torch.inference_mode()
    def __call__(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """See `handler.backends.Backend`."""
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items() if name in self._inputs}
        # Floating-point inputs, i.e. media, come in the precision of the weights.
        inputs = {name: t.to(self._model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        outputs = self._model(**inputs)
        return {name: outputs[name].float().numpy() for name in self._outputs}
