"""Dropout that is fast on a CPU.

torch draws a random number for each value there, on one thread. Here a number of 64 bits decides on eight values.
"""

import torch
from torch import nn

_STEPS = 2**8  # a probability is a multiple of 1/256
_LOWEST = -(2**7)  # of the numbers of 8 bits that are compared


class Dropout(nn.Dropout):
    """As torch's, from the same generator but not with the same values."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The input, each value 0 with probability p and the others divided by 1 - p, in training; else as it is."""
        dropped = round(self.p * _STEPS)
        if not self.training or dropped in (0, _STEPS) or input.device.type != "cpu":
            return super().forward(input)
        count = input.numel()
        numbers = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.int8)
        # In place, because to compare into booleans and to multiply by these takes several times as long.
        kept = numbers[:count].view(input.shape).ge_(_LOWEST + dropped)
        return input * kept.to(input.dtype).mul_(_STEPS / (_STEPS - dropped))


def replace(model: nn.Module) -> None:
    """Puts it in the place of torch's."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
