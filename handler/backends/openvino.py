"""The OpenVINO backend: the IR that `archiver` exported, compiled for this CPU; no torch, no transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

MODEL_FILE = "openvino_model.xml"


class OpenVinoBackend:
    """Runs an OpenVINO model on the CPU in fp32 or bf16."""

    def __init__(self, model_dir: Path, precision: str, threads: int, output_names: Sequence[str]) -> None:
        self._model = openvino.Core().compile_model(
            model_dir / MODEL_FILE,
            "CPU",
            {
                # Without the hint OpenVINO picks bf16 by itself where the CPU has it.
                "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
            },
        )
        self._request = self._model.create_infer_request()
        self._inputs = {port.get_any_name() for port in self._model.inputs}
        self._outputs = tuple(output_names)

    def __call__(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """See `handler.backends.Backend`."""
        results = self._request.infer({name: array for name, array in arrays.items() if name in self._inputs})
        # Copied, because the request's output memory is written again by its next call.
        return {name: np.array(results[name], dtype=np.float32) for name in self._outputs}
