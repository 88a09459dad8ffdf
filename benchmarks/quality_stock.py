"""The opponent in benchmarks/quality: the Hugging Face Trainer with its own defaults, on the rows of the same files.

It takes the arguments of train.py and writes a model that train.py can bundle. From --learning-rate, --num-train-epochs
and --from-scratch it takes what is given; the rest is the Trainer's: fp32, batches in random order, no warm-up, no
evaluation, the last weights. Batches have 32 rows, not 8, which would be slower. Prints the seconds of the training.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import transformers
from transformers import Trainer, TrainingArguments

import train
from training import base_model, defaults, models, tasks
from training.interrupts import INTERRUPTED

BATCH = 32
_TAKEN = ("learning_rate", "num_train_epochs", "max_steps")
# Kernel and dropout that a model has of its own, and all weights learn; what moves images and sounds is ours.
_MODEL = ("--attention", "sdpa", "--attention-dropout", "0.1", "--augment", "false", "--freeze-embeddings", "false")


def train_stock(argv: Sequence[str]) -> float:
    """Trains and saves a model; returns the seconds that the training took."""
    options, ours = train.parse([*argv, *_MODEL])
    transformers.set_seed(ours.seed)
    task, base = tasks.load(options.task), base_model.resolve(options.base_model, options.from_scratch)
    splits = task.read(options, ours.seed, base)
    ours.choose_by(splits.metrics or task.metrics)
    with patch.object(models, "set_bias"):  # by which train.py tells a head the frequencies of the labels
        model, processor = task.load(base, splits, options)
    defaults.fill_epochs(ours, 1)
    prepared = task.trainer(model, processor, splits, options, ours, task.settings(model, processor, options))
    given: dict[str, Any] = {name: getattr(ours, name) for name in _TAKEN if f"--{name.replace('_', '-')}" in argv}
    arguments = TrainingArguments(
        str(ours.output_dir),
        use_cpu=True,
        seed=ours.seed,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        dataloader_pin_memory=False,
        remove_unused_columns=prepared.args.remove_unused_columns,
        **given,
    )
    trainer = Trainer(model, arguments, prepared.data_collator, prepared.train_dataset, processing_class=processor)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    trainer.save_model()
    return round(seconds, 1)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    defaults.use_physical_cores()
    try:
        print(train_stock(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
