"""Quantization-aware training: linear layers compute as they will in int8, and the weights learn to bear it.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018.
Weights and inputs are rounded as NNCF rounds those of transformers for OpenVINO: weights to int8, symmetric, a scale
for each output; inputs to uint8, one range for all. The gradient passes a rounding as if there were none, and stops
at what is outside a range.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from training.errors import UserError

# Those whose models are encoders of texts that build_mar.sh makes int8 of.
TASKS = (
    *("fill-mask", "question-answering", "text-classification", "token-classification"),
    "zero-shot-classification",
)
# How far the range of a layer's inputs moves towards that of a batch.
_MOMENTUM = 0.01
_WEIGHT_LEVELS = 127  # on either side of 0
_INPUT_LEVELS = 255  # besides the lowest
_SMALLEST = torch.finfo(torch.float32).eps  # scale, of layers that are 0 throughout


class _Int8Linear(nn.Linear):
    """A linear layer with rounded weights and inputs.

    input_range: the least and the greatest input, float32 [2], a moving mean over batches of training; 0 and 0 before
    any. A buffer, so that checkpoints have it, besides the names of an ordinary model.
    """

    input_range: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        values = input.float()
        if self.training or not self.input_range.any():
            self._observe(values.detach())
        rounded = _rounded_input(values, self.input_range).to(self.weight.dtype)
        return functional.linear(rounded, _rounded_weight(self.weight), self.bias)

    @torch.no_grad()
    def _observe(self, values: torch.Tensor) -> None:
        # With 0 in it, which must stay what it is: it is padding, and what many activations give.
        found = torch.stack([values.min().clamp(max=0), values.max().clamp(min=0)])
        momentum = torch.where(self.input_range.any(), _MOMENTUM, 1.0)
        self.input_range.lerp_(found, momentum)


def add(model: Any, task: str) -> None:
    """Each linear layer of the model computes as in int8 from now on.

    Raises UserError for a task of other models, and for a model whose blocks have no such layers.
    """
    if task not in TASKS:
        raise UserError(f"--quantization-aware: it is for {', '.join(TASKS)}, not for {task}; leave it out")
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    # What is one of many has a number in its name: a head alone would be no quantized model.
    if not any(part.isdigit() for name in layers for part in name.split(".")):
        kind = model.config.model_type
        raise UserError(f"--quantization-aware: this model ({kind}) has no linear layers for it; leave it out")
    for layer in layers.values():
        # In its place, by its class alone: names, hooks and ties of the weights stay as they are.
        layer.__class__ = _Int8Linear
        layer.register_buffer("input_range", torch.zeros(2, device=layer.weight.device))


def remove(model: Any) -> None:
    """An ordinary model again, with the weights that were learnt; of one that is, nothing changes."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, _Int8Linear)]
    for layer in layers:
        del layer.input_range
        layer.__class__ = nn.Linear


def _rounded_input(values: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Values as uint8 has them; 0 stays 0. limits: the range, [2], with 0 in it."""
    low, high = limits
    scale = ((high - low) / _INPUT_LEVELS).clamp(min=_SMALLEST)
    zero = (-low / scale).round().int()
    return torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, _INPUT_LEVELS)


def _rounded_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weights [outputs, inputs] as int8 has them."""
    values = weight.float()
    scales = values.detach().abs().amax(dim=1).clamp(min=_SMALLEST) / _WEIGHT_LEVELS
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(values, scales, zeros, 0, -_WEIGHT_LEVELS, _WEIGHT_LEVELS)
    return rounded.to(weight.dtype)
