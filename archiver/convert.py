"""Puts the model into the form its backend runs: the bundle's own weights, or OpenVINO IR."""

import inspect
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archiver.source import Bundle
from handler import golden
from handler.engine import Engine, read_config
from handler.errors import RequestError
from handler.parameters import parse
from handler.service import SHARES
from handler.tasks import EncoderTask
from training import evaluation, tasks
from training.errors import UserError

if TYPE_CHECKING:
    import openvino

_EXAMPLE_ROWS = 2
# More than this teaches NNCF little and takes time.
_CALIBRATION_ROWS = 300


class Converter:
    """Writes the model files of one bundle for any backend and precision. The model is traced once for all of them."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def write(self, backend: str, precision: str, stage: Path) -> None:
        """Writes the model files of an archive into `stage`. Raises UserError if the model cannot be converted."""
        files = self._bundle.model_files() | (self._bundle.weights() if backend == "torch" else {})
        for name, path in files.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, stage / name)
        if self._bundle.shares:
            text = json.dumps(self._bundle.shares, indent=1, sort_keys=True) + "\n"
            (stage / SHARES).write_text(text, encoding="utf-8")
        if backend == "openvino":
            # Weights in half precision where the model computes in bf16 or int8 anyway.
            self._save(self._quantized if precision == "int8" else self._exported, stage, half=precision != "fp32")

    def write_accurate_int8(self, max_drop: float, stage: Path) -> None:
        """Puts into `stage`, in place of its int8 model, one whose validation metric drops by at most `max_drop`.

        max_drop: in units of the metric. Layer after layer is put back into floating point, which takes minutes.
        """
        from archiver import quantize
        from handler.backends.openvino import OpenVinoBackend

        engine, task = Engine(stage), tasks.load(self._bundle.settings.task)
        names = self._task.output_names

        def metric(compiled: "openvino.CompiledModel") -> float:
            engine.backend = OpenVinoBackend(compiled, names)
            found = evaluation.measure(engine, task, self._bundle.validation, self._bundle.labels)
            return float(found[self._bundle.metric])

        model = quantize.quantize_with_accuracy_control(self._exported, self._calibration, metric, max_drop)
        self._save(model, stage, half=True)

    @property
    def calibration_inputs(self) -> int:
        """How many inputs int8 is calibrated on."""
        return len(self._calibration)

    @cached_property
    def _task(self) -> EncoderTask:
        task = self._bundle.task(self._bundle.path, self._bundle.settings, read_config(self._bundle.path))
        assert isinstance(task, EncoderTask)
        return task

    @cached_property
    def _calibration(self) -> list[Mapping[str, Any]]:
        """The calibration set as batches of one row each, as short as they are: padding would count as activations."""
        rows = self._rows(self._bundle.calibration)
        return [self._fitting(self._task.inputs.collate([row])) for row in rows[:_CALIBRATION_ROWS]]

    @cached_property
    def _quantized(self) -> "openvino.Model":
        from archiver import quantize

        return quantize.quantize(self._exported, self._calibration)

    @cached_property
    def _exported(self) -> "openvino.Model":
        """The traced model in fp32."""
        import openvino
        import torch

        from archiver import rewrite

        try:
            with torch.inference_mode(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracing warns of every shape it fixes; the gate checks what comes out
                converted = openvino.convert_model(
                    self._model,
                    example_input={
                        name: torch.from_numpy(array) for name, array in self._fitting(self._example()).items()
                    },
                )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"OpenVINO cannot convert this model ({reason}); build it with --backend torch") from error
        shapes = self._task.inputs.shapes
        for port in converted.inputs:
            # Tracing may add a name of its own.
            [name] = port.get_names() & shapes.keys()
            port.get_tensor().set_names({name})
            port.get_node().set_partial_shape(openvino.PartialShape(list(shapes[name])))
        converted.validate_nodes_and_infer_types()
        return rewrite.select_early(converted)

    @cached_property
    def _model(self) -> Any:
        """The model in transformers."""
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        auto_model = getattr(transformers, self._task.auto_model)
        model = auto_model.from_pretrained(self._bundle.path, use_safetensors=True, local_files_only=True).eval()
        model.config.use_cache = False  # a decoder's cache cannot be traced, and one pass has no use for it
        return model

    def _fitting(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Those arrays that the model has an input for."""
        names = inspect.signature(self._model.forward).parameters
        return {name: array for name, array in arrays.items() if name in names}

    def _example(self) -> Mapping[str, Any]:
        """A batch to trace the model with: golden inputs of different lengths, so that padding and its mask are in."""
        rows = {len(row): row for row in reversed(self._rows(golden.read(self._bundle.path / golden.FILE_NAME)))}
        # Short ones: long ones only make the tracing slow. Two rows, so that the batch is not taken for a constant 1.
        lengths = [length for length in sorted(rows) if length > 2] or sorted(rows)
        chosen = [rows[length] for length in lengths[:_EXAMPLE_ROWS]]
        return self._task.inputs.collate(chosen if len(chosen) > 1 else chosen * _EXAMPLE_ROWS)

    def _rows(self, examples: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The first row of each sample of the examples."""
        rows = []
        for example in examples:
            samples = self._task.read(example["inputs"], parse(self._task.Parameters, example.get("parameters", {})))
            encoded = self._task.inputs.encode(samples)
            rows += [entry.rows[0] for entry in encoded if not isinstance(entry, RequestError)]
        return rows

    @staticmethod
    def _save(model: "openvino.Model", stage: Path, *, half: bool) -> None:
        """Saves under names that depend on the model alone: OpenVINO numbers them in the order a process makes them."""
        import openvino

        from handler.backends.openvino import MODEL_FILE

        model.set_friendly_name("model")
        for number, operation in enumerate(model.get_ordered_ops()):
            operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
        openvino.save_model(model, stage / MODEL_FILE, compress_to_fp16=half)
