"""Puts the model into the form its backend runs: the bundle's own weights, or OpenVINO IR."""

import inspect
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openvino

from archiver.source import Bundle
from handler import golden
from handler.engine import read_config
from handler.errors import RequestError
from handler.parameters import parse
from handler.tasks import EncoderTask
from training.errors import UserError

_EXAMPLE_ROWS = 2


def cpu_has_bf16() -> bool:
    """Whether this CPU computes in bf16 natively, as OpenVINO sees it."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def write(bundle: Bundle, backend: str, precision: str, stage: Path) -> None:
    """Writes the model files of an archive into `stage`. Raises UserError if the model cannot be converted."""
    files = bundle.model_files() | (bundle.weights() if backend == "torch" else {})
    for name, path in files.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, stage / name)
    if backend == "openvino":
        _export(bundle, precision, stage)


def _export(bundle: Bundle, precision: str, stage: Path) -> None:
    """OpenVINO IR; weights in half precision where the model computes in bf16 anyway."""
    import torch
    import transformers

    from handler.backends.openvino import MODEL_FILE

    task = bundle.task(bundle.path, bundle.settings, read_config(bundle.path))
    assert isinstance(task, EncoderTask)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = (
            getattr(transformers, task.auto_model)
            .from_pretrained(bundle.path, use_safetensors=True, local_files_only=True)
            .eval()
        )
        model.config.use_cache = False  # a decoder's cache cannot be traced, and one pass has no use for it
        names = inspect.signature(model.forward).parameters
        arrays = {name: array for name, array in example(bundle, task).items() if name in names}
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of every shape it fixes; the gate checks what comes out
            converted = openvino.convert_model(
                model, example_input={name: torch.from_numpy(array) for name, array in arrays.items()}
            )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"OpenVINO cannot convert this model ({reason}); build it with --backend torch") from error
    for port in converted.inputs:
        # Tracing may add a name of its own.
        [name] = port.get_names() & task.inputs.shapes.keys()
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(openvino.PartialShape(list(task.inputs.shapes[name])))
    converted.validate_nodes_and_infer_types()
    openvino.save_model(converted, stage / MODEL_FILE, compress_to_fp16=precision != "fp32")


def example(bundle: Bundle, task: EncoderTask) -> Mapping[str, Any]:
    """A batch to trace the model with: golden inputs of different lengths, so that padding and its mask are in it."""
    rows: dict[int, Any] = {}
    for entry in golden.read(bundle.path / golden.FILE_NAME):
        samples = task.read(entry["inputs"], parse(task.Parameters, entry.get("parameters", {})))
        for encoded in task.inputs.encode(samples):
            if not isinstance(encoded, RequestError):
                rows.setdefault(len(encoded.rows[0]), encoded.rows[0])
    # Short ones: long ones only make the tracing slow. Two rows, so that the batch is not taken for a constant 1.
    lengths = [length for length in sorted(rows) if length > 2] or sorted(rows)
    chosen = [rows[length] for length in lengths[:_EXAMPLE_ROWS]]
    return task.inputs.collate(chosen if len(chosen) > 1 else chosen * _EXAMPLE_ROWS)
