"""A running average of the weights, which is what is evaluated and shipped.

Steps of one batch each go this way and that; their average generalises somewhat better than the last of them (Polyak &
Juditsky 1992; Morales-Brotons et al., "Exponential Moving Average of Weights in Deep Learning", 2024).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_FILE = "average.safetensors"  # in a checkpoint, beside the weights of its last step


class WeightAverage(TrainerCallback):
    """The exponential moving average of the weights that learn; when training ends, the model has it.

    decay: what is left of the average in a step, at most: (1 + steps) / (10 + steps) in the first ones.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: dict[str, torch.Tensor] = {}
        self._weights: dict[str, torch.Tensor] = {}  # of the model, while it is trained

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
        if not state.global_step or not self._average:
            self._average = {name: weight.clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        share = 1 - min(self._decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_([self._average[name] for name in self._weights], list(self._weights.values()), share)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._swap()
        self._weights, self._average = {}, {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the average as its weights meanwhile, if it is being trained."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save(self, folder: Path) -> None:
        """Writes the average into a checkpoint."""
        if self._average:
            save_file({name: weight.contiguous() for name, weight in self._average.items()}, folder / _FILE)

    def load(self, folder: Path, device: torch.device) -> None:
        """Goes on with the average in a checkpoint; with its weights, if it was made without an average."""
        file = folder / _FILE
        self._average = load_file(file, device=str(device)) if file.is_file() else {}

    def _swap(self) -> None:
        if not self._average:
            return
        for name, weight in self._weights.items():
            kept = weight.clone()
            weight.copy_(self._average[name])
            self._average[name] = kept
