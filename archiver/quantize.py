"""Post-training quantization to int8 with NNCF, calibrated on inputs of the bundle."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import openvino
from openvino import opset13

# NNCF would report its use to its makers; nothing leaves the machine that builds an archive.
os.environ["NNCF_CI"] = "1"
import nncf

_ATTENTION = {"ScaledDotProductAttention", "Softmax"}
# Layers that accuracy control may put back to floating point before it gives up.
_MOST_RESTORED = 12


def quantize(model: openvino.Model, batches: Sequence[Any]) -> openvino.Model:
    """The model with int8 weights and activations. batches: arrays by input name, as `Inputs.collate` gives them."""
    with _quiet():
        quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), model_type=_model_type(model))
    return look_up_in_int8(quantized)


def quantize_with_accuracy_control(
    model: openvino.Model,
    batches: Sequence[Any],
    metric: Callable[[openvino.CompiledModel], float],
    max_drop: float,
) -> openvino.Model:
    """Like `quantize`, but with those layers left in floating point that cost more than `max_drop` of the metric.

    metric: the validation metric of a compiled model, the higher the better; max_drop: in its units.
    """

    def validate(compiled: openvino.CompiledModel, _: Any) -> tuple[float, None]:
        return metric(compiled), None

    with _quiet():
        quantized = nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(batches),
            nncf.Dataset(batches),  # not looked at: `metric` has the validation set
            validate,
            max_drop=max_drop,
            subset_size=len(batches),
            model_type=_model_type(model),
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                max_num_iterations=_MOST_RESTORED
            ),
        )
    return look_up_in_int8(quantized)


def look_up_in_int8(model: openvino.Model) -> openvino.Model:
    """The model, changed in place, with int8 embeddings looked up first and dequantized then, to the same numbers.

    NNCF dequantizes the table. OpenVINO does that as it loads, so each compiled model would hold a table of fp32.
    """
    for gather in model.get_ops():
        if gather.get_type_name() != "Gather":
            continue
        multiply = gather.input_value(0).get_node()
        if multiply.get_type_name() != "Multiply":
            continue
        convert, scale = (multiply.input_value(port).get_node() for port in (0, 1))
        table = convert.input_value(0) if convert.get_type_name() == "Convert" else None
        if table is None or table.get_element_type() != openvino.Type.i8 or scale.get_type_name() != "Constant":
            continue
        indices, axis = gather.input_value(1), gather.input_value(2)
        if axis.get_node().get_type_name() != "Constant" or axis.get_node().data.item() != 0:
            continue
        rows = opset13.convert(opset13.gather(table, indices, axis), multiply.get_output_element_type(0).to_string())
        # One scale for each row of the table, or one for all.
        per_row = scale.get_output_shape(0)[:1] == table.get_shape()[:1]
        scales = opset13.gather(scale, indices, axis) if per_row else scale
        gather.output(0).replace(opset13.multiply(rows, scales).output(0))
    model.validate_nodes_and_infer_types()
    return model


def _model_type(model: openvino.Model) -> nncf.ModelType | None:
    """Transformers keep some patterns around attention in floating point; convolutional networks have none."""
    kinds = {operation.get_type_name() for operation in model.get_ops()}
    return nncf.ModelType.TRANSFORMER if kinds & _ATTENTION else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars in a terminal, and nothing else."""
    nncf.set_log_level(logging.ERROR)
    with contextlib.nullcontext() if sys.stdout.isatty() else contextlib.redirect_stdout(io.StringIO()):
        yield
