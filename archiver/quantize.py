"""Post-training quantization to int8 with NNCF, calibrated on inputs of the bundle."""

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import nncf
import openvino

from archiver.rewrite import look_up_in_int8

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
            # Not looked at: `metric` has the validation set. One, because it is called for each.
            nncf.Dataset(batches[:1]),
            validate,
            max_drop=max_drop,
            subset_size=len(batches),
            model_type=_model_type(model),
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                max_num_iterations=_MOST_RESTORED
            ),
        )
    return look_up_in_int8(quantized)


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
