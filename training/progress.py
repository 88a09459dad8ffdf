"""Progress of a training run: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training import adapters
from training.interrupts import end_if_interrupted

_SECONDS_BETWEEN_LINES = 10.0
_NOT_SCORES = ("eval_loss", "eval_runtime")


class Steps(TrainerCallback):
    """Says how far a training is, and ends it after a Ctrl-C."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._last_line = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._last_line = time.monotonic()
        if state.is_world_process_zero and (learnt := adapters.learnt(model)) is not None:
            everything = sum(weight.numel() for weight in model.parameters())
            learning = sum(weight.numel() for weight in learnt.values())
            print(f"  {learning:,} of {everything:,} weights learn", flush=True)
        if state.is_world_process_zero and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        end_if_interrupted()
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        elif state.is_world_process_zero and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"  step {state.global_step} of {state.max_steps}", flush=True)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        end_if_interrupted()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class Progress(Steps):
    """Replaces the Trainer's own progress output: says what each evaluation finds, too."""

    def __init__(self) -> None:
        super().__init__()
        self._loss = float("nan")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self._loss = float(logs["loss"])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not metrics or "eval_loss" not in metrics:
            return
        scores = [
            f"{name.removeprefix('eval_').replace('_', '-')} {value:.4f}"
            for name, value in metrics.items()
            if name.startswith("eval_") and name not in _NOT_SCORES and not name.endswith("_per_second")
        ]
        losses = f"training loss {self._loss:.3f}, validation loss {metrics['eval_loss']:.3f}"
        line = f"  epoch {state.epoch:g}: {', '.join([losses, *scores])}"
        tqdm.write(line) if self._bar is not None else print(line, flush=True)
