"""Puts the model into the form its backend runs: the bundle's own weights, or OpenVINO IR."""

import shutil
import warnings
from pathlib import Path

import openvino

from archiver.source import Bundle
from handler import tasks
from training.errors import UserError

# What every archive takes over from its bundle, besides the weights.
_KEPT = ("config.json", "tokenizer.json", "tokenizer_config.json", "golden.jsonl", "README.md")


def cpu_has_bf16() -> bool:
    """Whether this CPU computes in bf16 natively, as OpenVINO sees it."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def write(bundle: Bundle, backend: str, precision: str, stage: Path) -> None:
    """Writes the model files of an archive into `stage`. Raises UserError if the model cannot be converted."""
    for name in _KEPT:
        if (bundle.path / name).is_file():
            shutil.copyfile(bundle.path / name, stage / name)
    if backend == "torch":
        shutil.copyfile(bundle.path / "model.safetensors", stage / "model.safetensors")
    else:
        _export(bundle, precision, stage)


def _export(bundle: Bundle, precision: str, stage: Path) -> None:
    """OpenVINO IR with dynamic batch and length; weights in half precision where the model computes in bf16 anyway."""
    import torch
    import transformers

    from handler.backends.openvino import MODEL_FILE

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    auto_model = getattr(transformers, tasks.load(bundle.settings.task).auto_model)
    # Different batch and length, so that tracing does not take one for the other; a row with padding keeps the mask.
    texts = ["one text", "another, longer text"]
    try:
        model = auto_model.from_pretrained(
            bundle.path, use_safetensors=True, local_files_only=True, attn_implementation="sdpa"
        ).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(bundle.path, local_files_only=True)
        example = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of every shape it fixes; the gate checks what comes out
            converted = openvino.convert_model(model, example_input=dict(example))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"OpenVINO cannot convert this model ({reason}); build it with --backend torch") from error
    for port in converted.inputs:
        port.get_node().set_partial_shape(openvino.PartialShape([-1, -1]))
    converted.validate_nodes_and_infer_types()
    openvino.save_model(converted, stage / MODEL_FILE, compress_to_fp16=precision != "fp32")
