"""What train.py does where it is not told, each with its reason. docs/training.md has the measurements behind them."""

import math
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from handler import cpus

if TYPE_CHECKING:
    from training.options import Options, TrainerOptions

# Why those defaults are what they are that stand in training/options.py, being the same for all tasks and machines.
REASONS = {
    "gradient_accumulation_steps": "--most-tokens takes a large batch in parts as it is",
    "most_tokens": "bounds the memory, whatever the longest text is",
    "train_sampling_strategy": "batches of like length hold little padding",
    "optim": "AdamW's fastest kernel",
    "weight_decay": "usual; not on biases and norms",
    "warmup_steps": "the gradients of a fresh head are wild at first",
    "lr_scheduler_type": "the last steps are the smallest",
    "max_grad_norm": "one odd batch must not spoil the weights",
    "class_weights": "only without them are scores probabilities",
    "layers": "all of the base model's",
    "teacher": "the labels are what is to be learnt",
    "lora": "all weights learn, which small models have the memory for",
    "private_epsilon": "noise costs accuracy",
    "quantization_aware": "int8 is made after the training, and shipped if it answers as well",
}
GIVEN = "as asked for"
ELSEWHERE = "for encoders that are fine-tuned whole"  # of a setting that is off here
# Rows of an optimiser step, and why.
BATCH = (32, "usual for fine-tuning")
# Those that are chosen for a run, if they are None.
_CHOSEN = (
    *("learning_rate", "num_train_epochs", "per_device_train_batch_size", "early_stopping_patience"),
    *("bf16", "attention", "attention_dropout"),
    *("freeze_embeddings", "token_dropout", "ema_decay", "head_learning_rate_ratio"),
)
# Optimiser steps that a training of few epochs has at least.
_STEPS, _FEWEST_EPOCHS, _MOST_EPOCHS = 500, 4, 10
_PATIENCE = 2
# Tasks that an encoder is fine-tuned for, and what that is done with, what is done otherwise, and why.
_ENCODED = ("text-classification", "zero-shot-classification", "token-classification", "question-answering")
_FINE_TUNED: dict[str, tuple[bool | float, bool | float, str]] = {
    "freeze_embeddings": (True, False, "half the weights of a small encoder, and to learn them gains nothing"),
    "token_dropout": (0.1, 0.0, "a small encoder learns its rows by heart without"),
    "ema_decay": (0.99, 0.0, "the average of many steps is better than the last of them"),
    "head_learning_rate_ratio": (10.0, 1.0, "a fresh head has everything to learn"),
}
# Tasks whose inputs are so long that attention is faster fused, for models that have such a kernel.
_LONG_INPUTS = ("question-answering",)


@dataclass(frozen=True, slots=True)
class Choice:
    """One setting of a run. name: of its option, in Python. why: its reason, `GIVEN` for one that the user chose."""

    name: str
    value: Any
    why: str

    def __str__(self) -> str:
        if isinstance(self.value, float):
            value = f"{self.value:g}"
        else:
            value = "default" if self.value is None else str(self.value).lower()
        return f"{self.name.replace('_', '-')} {value} ({self.why})"


def bf16() -> tuple[bool, str]:
    """Whether to compute in bf16."""
    if torch.cuda.is_available():
        fast = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return fast, f"the GPU {'has' if fast else 'does not have'} it"
    return bf16_on_cpu()


def bf16_on_cpu() -> tuple[bool, str]:
    """The same, whether or not there is a GPU."""
    if torch.cpu._is_amx_tile_supported():
        return True, "the CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return True, "the CPU has AVX512-BF16"
    return False, "without AMX or AVX512-BF16 a CPU is slower at bf16 than at fp32"


def fill(options: "Options", arguments: "TrainerOptions") -> None:
    """Chooses what was not given, but for the epochs; the reasons go to `arguments.reasons`."""
    reasons = arguments.reasons
    if arguments.learning_rate is None:
        arguments.learning_rate, reasons["learning_rate"] = _learning_rate(options)
    if options.early_stopping_patience is None:
        asked = arguments.num_train_epochs is not None or arguments.max_steps > 0
        why = {
            "an extent was asked for": asked,
            "random weights may learn nothing for epochs, and then all": options.from_scratch is not None,
            "no best epoch is kept": not arguments.load_best_model_at_end,
        }
        against = [reason for reason, applies in why.items() if applies]
        options.early_stopping_patience = 0 if against else _PATIENCE
        reasons["early_stopping_patience"] = against[0] if against else "later epochs seldom make up for two bad ones"
    if options.private_epsilon is not None:
        arguments.train_sampling_strategy = "random"
        reasons["train_sampling_strategy"] = "each row enters each batch by a chance of its own, as privacy needs"
    on_cpu = not torch.cuda.is_available()
    if options.attention is None:
        plain = on_cpu and options.task not in _LONG_INPUTS
        options.attention = "eager" if plain else None
        reasons["attention"] = "on a CPU the fastest up to 256 tokens" if plain else "the model's own, fused if it can"
    if options.attention_dropout is None:
        options.attention_dropout = 0.0 if on_cpu else None
        reasons["attention_dropout"] = "on a CPU it costs more than attention itself" if on_cpu else "the model's own"
    usual = options.task in _ENCODED and options.from_scratch is None and options.lora is None
    for name, (value, otherwise, reason) in _FINE_TUNED.items():
        if getattr(options, name) is None:
            setattr(options, name, value if usual else otherwise)
            reasons[name] = reason if usual else ELSEWHERE


def _learning_rate(options: "Options") -> tuple[float, str]:
    """The peak learning rate, and why."""
    if options.from_scratch is not None:
        return 1e-3, "random weights are far from good ones"
    if options.lora is not None:
        return 5e-4, "adapters learn well at a higher rate than all weights do"
    if options.task == "question-answering":
        return 2e-4, "the two ends of an answer are learnt slowly"
    return 1e-4, "usual for small encoders"


def fill_epochs(arguments: "TrainerOptions", rows: int) -> None:
    """Chooses the number of epochs by the rows of the training data, if it was not given."""
    if arguments.max_steps > 0:
        arguments.num_train_epochs = arguments.num_train_epochs or 1.0
        arguments.reasons["num_train_epochs"] = "--max-steps decides"
    elif arguments.num_train_epochs is None:
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        wanted = math.ceil(_STEPS / math.ceil(rows / batch))
        arguments.num_train_epochs = float(min(max(wanted, _FEWEST_EPOCHS), _MOST_EPOCHS))
        arguments.reasons["num_train_epochs"] = (
            f"{_STEPS} steps of {batch} rows, at least {_FEWEST_EPOCHS} and at most {_MOST_EPOCHS} epochs"
        )


def use_physical_cores() -> None:
    """A thread for each core, unless OMP_NUM_THREADS says otherwise: what computes is shared by hyperthreads."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cpus.cores())


def choices(options: "Options", arguments: "TrainerOptions") -> list[Choice]:
    """The settings of a run that have a default of ours, each with its reason."""
    found = []
    for group in (options, arguments):
        for field in fields(group):
            value = getattr(group, field.name)
            usual = REASONS.get(field.name) if value == field.default else None
            if field.name in REASONS or field.name in _CHOSEN:
                found.append(Choice(field.name, value, arguments.reasons.get(field.name) or usual or GIVEN))
    threads = GIVEN if "OMP_NUM_THREADS" in os.environ else "one for each core"
    return [*found, Choice("threads", torch.get_num_threads(), threads)]
