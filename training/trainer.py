"""The Hugging Face Trainer as every task uses it."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, PrinterCallback, ProgressCallback, Trainer

from training.options import Options, TrainerOptions
from training.progress import Progress


def build(
    model: Any,
    processor: Any,
    arguments: TrainerOptions,
    options: Options,
    *,
    train: Dataset | Any,
    validation: Dataset | Any,
    collator: Callable[[list[Any]], dict[str, Any]],
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    kind: type[Trainer] = Trainer,
    **more: Any,
) -> Trainer:
    """A Trainer with our progress output and early stopping; `more` goes to the Trainer as it is."""
    callbacks: list[Any] = [Progress()]
    if options.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        data_collator=collator,
        compute_metrics=metrics,
        callbacks=callbacks,
        **more,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer
