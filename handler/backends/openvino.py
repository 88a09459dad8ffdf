"""The OpenVINO backend: the IR that `archiver` exported, compiled for this CPU; no torch, no transformers."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from handler.settings import Settings

MODEL_FILE = "openvino_model.xml"
# What is not quantized in an int8 model is computed in fp32.
_COMPUTE = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


class OpenVinoBackend:
    """Runs an OpenVINO model on the CPU in fp32, bf16 or int8.

    A lone micro-batch runs on all threads; of several, `streams` run at the same time, each on its share of them: no
    thread waits for another, and no core is idle while others are taken by the server.
    """

    def __init__(
        self,
        alone: openvino.CompiledModel,
        output_names: Sequence[str],
        together: openvino.CompiledModel | None = None,
        streams: int = 1,
    ) -> None:
        """alone: compiled for all threads; together: for `streams`, if they are more than one."""
        self.streams = streams
        self._alone = alone.create_infer_request()
        # Twice as many requests as streams: the next one is there when a stream is done.
        self._requests = [(together or alone).create_infer_request() for _ in range(2 * streams)]
        self._inputs = {port.get_any_name() for port in alone.inputs}
        self._outputs = tuple(output_names)

    @classmethod
    def load(cls, model_dir: Path, settings: Settings, output_names: Sequence[str]) -> "OpenVinoBackend":
        """Compiles the IR in `model_dir`."""
        threads = settings.cpu_threads()
        streams = min(settings.streams or threads, threads)
        core = openvino.Core()
        model = core.read_model(model_dir / MODEL_FILE)

        def compiled(streams: int) -> openvino.CompiledModel:
            return core.compile_model(
                model,
                "CPU",
                {
                    # Without the hint OpenVINO picks bf16 by itself where the CPU has it.
                    "INFERENCE_PRECISION_HINT": _COMPUTE[settings.precision],
                    "INFERENCE_NUM_THREADS": threads,
                    "NUM_STREAMS": streams,
                    # Pinned threads cannot leave a core that the server or another worker has taken.
                    "ENABLE_CPU_PINNING": False,
                },
            )

        counts = (1, streams) if streams > 1 else (1,)
        # Both at the same time: compiling is, for the most part, done on one thread.
        with ThreadPoolExecutor(len(counts)) as pool:
            alone, *together = pool.map(compiled, counts)
        return cls(alone, output_names, together[0] if together else None, streams)

    def run(self, batches: Iterable[Mapping[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[np.float32]]]:
        """See `handler.backends.Backend`."""
        batches = iter(batches)
        first = list(islice(batches, 2))
        if len(first) < 2:
            for arrays in first:
                self._alone.infer(self._wanted(arrays), share_inputs=True)
                yield self._results(self._alone)
            return
        idle, running = deque(self._requests), deque[openvino.InferRequest]()
        try:
            for arrays in chain(first, batches):
                if not idle:
                    idle.append(running.popleft())
                    yield self._results(idle[0])
                request = idle.popleft()
                request.start_async(self._wanted(arrays), share_inputs=True)
                running.append(request)
            while running:
                yield self._results(running.popleft())
        finally:  # where an error ends it early, the requests must be free for the next batch
            for request in running:
                request.wait()

    def _wanted(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {name: array for name, array in arrays.items() if name in self._inputs}

    def _results(self, request: openvino.InferRequest) -> dict[str, NDArray[np.float32]]:
        """Copies, because the request's output memory is written again by its next call."""
        request.wait()
        return {name: np.array(request.get_tensor(name).data, dtype=np.float32) for name in self._outputs}
