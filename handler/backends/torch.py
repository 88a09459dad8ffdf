"""The torch backend: the bundle's own weights through transformers. The reference for every other backend."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from handler.settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device(wanted: str) -> torch.device:
    """The device to run on; "auto" is a CUDA GPU where there is one, else the CPU.

    Raises ValueError for "cuda" on a machine, or with a build of torch, that has none.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {wanted!r} is not one of auto, cpu, cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        build = torch.version.cuda or "for the CPU only"
        raise ValueError(
            f"device cuda: torch {torch.__version__} (CUDA {build}) finds no GPU; check the driver with nvidia-smi and "
            "the build of torch, or set the device to auto or cpu"
        )
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def load_model(model_dir: Path, settings: Settings, auto_model: str) -> Any:
    """A transformers model in the precision, on the device and on as many threads as the settings say, ready to run.

    Raises ValueError for fp16 on a CPU, which computes it slowly if at all.
    """
    place = device(settings.device)
    if settings.precision == "fp16" and place.type == "cpu":
        raise ValueError("precision fp16 needs a GPU (device cuda); on a CPU take bf16 or fp32")
    torch.set_num_threads(settings.cpu_threads())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = getattr(transformers, auto_model).from_pretrained(
        model_dir,
        dtype=DTYPES[settings.precision],
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return model.eval().to(place)


class TorchBackend:
    """Runs a transformers model in fp32 or bf16, on a GPU in fp16 too.

    Attention is scaled dot-product attention (SDPA), the default of transformers. With `settings.compile`, the model
    goes through torch.compile, which takes a minute when the first shapes come: while the golden set is replayed.
    """

    streams = 1

    def __init__(self, model_dir: Path, settings: Settings, auto_model: str, output_names: Sequence[str]) -> None:
        model = load_model(model_dir, settings, auto_model)
        self._device, self._dtype = model.device, model.dtype
        self._inputs = set(inspect.signature(model.forward).parameters)
        self._outputs = tuple(output_names)
        self._plain = model
        self._model = torch.compile(model, dynamic=True) if settings.compile else model

    @torch.inference_mode()
    def run(self, batches: Iterable[Mapping[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[np.float32]]]:
        """See `handler.backends.Backend`."""
        for arrays in batches:
            outputs = self._model(
                **{name: self._tensor(array) for name, array in arrays.items() if name in self._inputs}
            )
            yield {name: outputs[name].float().cpu().numpy() for name in self._outputs}

    def integrated_gradients(
        self,
        arrays: Mapping[str, NDArray[Any]],
        baselines: Mapping[str, NDArray[Any]],
        terms: Sequence[Sequence[tuple[str, tuple[int, ...], float]]],
        steps: int,
        tokens: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `handler.backends.gradients`."""
        from handler.backends import gradients  # captum takes a second to import

        inputs, hidden = (
            {name: self._tensor(array) for name, array in given.items() if name in self._inputs}
            for given in (arrays, baselines)
        )
        return gradients.integrated_gradients(self._plain, inputs, hidden, terms, steps, tokens)

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        """On the device; floating-point inputs, i.e. media, in the precision of the weights."""
        tensor = torch.from_numpy(array)
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None, non_blocking=True)
