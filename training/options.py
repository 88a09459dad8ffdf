"""The command line of `train.py`: options of ours, and every argument of the Hugging Face Trainer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import TrainingArguments

from training import defaults
from training.errors import UserError

_NO_CLIPPING = 1e30  # an infinity is no JSON


@dataclass
class Options:
    """What to train on and what to start from."""

    task: str = field(default="text-classification", metadata={"help": "what the model shall do"})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "csv, tsv, jsonl or parquet file of examples, for images and sounds a folder, too; without it the "
            "base model is bundled as it is"
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "examples to choose the best epoch by; taken from the training file if absent"}
    )
    test_file: str | None = field(default=None, metadata={"help": "examples for the final figure only"})
    base_model: str | None = field(
        default=None, metadata={"help": "local folder or hub id; the bundled all-MiniLM-L6-v2 if absent"}
    )
    from_scratch: str | None = field(
        default=None,
        metadata={
            "help": "instead of a base model: a model type and sizes, e.g. 'bert hidden_size=128 num_hidden_layers=4'; "
            "weights start at random, and a tokenizer is trained on the texts"
        },
    )
    layers: int | None = field(
        default=None,
        metadata={"help": "of the base model to keep, evenly spaced, the first and the last among them; all if absent"},
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "folder of a fine-tuned model, of the same task and labels, to learn from besides the labels"
        },
    )
    lora: int | None = field(
        default=None,
        metadata={
            "help": "rank of adapters (LoRA), e.g. 8, that learn in place of the base model's weights and are added to "
            "these in the end"
        },
    )
    private_epsilon: float | None = field(
        default=None,
        metadata={
            "help": "differential privacy: the epsilon of the guarantee that the weights tell little about any one row "
            "of training, e.g. 8; noise costs accuracy"
        },
    )
    quantization_aware: bool = field(
        default=False,
        metadata={
            "help": "train encoders of texts as they will compute in the int8 of build_mar.sh, and so bear it better"
        },
    )
    text_column: str = field(default="text", metadata={"help": "column of the texts"})
    text_pair_column: str | None = field(
        default=None, metadata={"help": "column of the second texts of pairs; found by its name if it has a usual one"}
    )
    label_column: str = field(
        default="label", metadata={"help": "column of the labels: names, integers, lists of them, or numbers"}
    )
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = field(
        default=None,
        metadata={"help": "if absent, lists of labels are several labels, numbers with a fraction a regression"},
    )
    target_column: str | None = field(
        default=None, metadata={"help": "column of summaries or translations; found by its name if it has a usual one"}
    )
    source_lang: str | None = field(
        default=None, metadata={"help": "code of the texts' language, where files have a column, or a key, for each"}
    )
    target_lang: str | None = field(default=None, metadata={"help": "code of the language to translate to"})
    source_prefix: str | None = field(
        default=None, metadata={"help": "put before each text, in training and serving, e.g. 'summarize: ' for T5"}
    )
    path_column: str = field(default="path", metadata={"help": "column of the paths of images or sounds"})
    augment: bool = field(default=False, metadata={"help": "shift and turn training images a little, at random"})
    mlm_probability: float = field(
        default=0.15, metadata={"help": "share of tokens that masked language modelling hides"}
    )
    line_by_line: bool = field(
        default=False, metadata={"help": "a corpus is learnt in lines, not packed into sequences of full length"}
    )
    validation_share: float = field(default=0.1, metadata={"help": "share of rows taken for validation, stratified"})
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "leave out rows without a text or a label instead of stopping"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of one sequence; if absent what suits the model and the task"}
    )
    overflow: Literal["error", "truncate", "window"] | None = field(
        default=None, metadata={"help": "what the served model does with a longer text unless a request says"}
    )
    class_weights: Literal["balanced"] | None = field(
        default=None,
        metadata={"help": "balanced: all rows of a class weigh together as much as those of any other, however few"},
    )
    attention: Literal["eager", "sdpa"] | None = field(
        default=None,
        metadata={"help": "kernel of attention in training; if absent eager on a CPU, on a GPU the model's own"},
    )
    attention_dropout: float | None = field(
        default=None, metadata={"help": "if absent none on a CPU, on a GPU the model's own"}
    )
    freeze_embeddings: bool | None = field(
        default=None,
        metadata={
            "help": "leave the base model's embeddings of tokens as they are; if absent for the tasks that label "
            "texts, pairs and tokens, or answer questions"
        },
    )
    token_dropout: float | None = field(
        default=None,
        metadata={
            "help": "share of the tokens that training hides at random behind the mask token; if absent 0.1 for "
            "the same tasks, unless the tokenizer has none"
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "decay of a running average of the weights, which is evaluated and shipped in their place, 0 for "
            "none; if absent 0.99 for the same tasks"
        },
    )
    head_learning_rate_ratio: float | None = field(
        default=None,
        metadata={"help": "how many times as fast as the rest a fresh head learns; if absent 10 for the same tasks"},
    )
    most_tokens: int = field(
        default=8192,
        metadata={
            "help": "tokens, padding included, that go through the model at once; a batch of more is taken in parts, "
            "which costs less memory and changes no result"
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "stop after so many evaluations without a better one, 0 for never; if absent 2, but 0 from scratch "
            "and where the extent is given"
        },
    )
    wished_precision: float | None = field(
        default=None,
        metadata={
            "help": "share of right answers that is wished for, e.g. 0.95: finds the score below which a model of one "
            'label rather gives no answer, for requests with "threshold": "learned"'
        },
    )
    strict: bool = field(
        default=False,
        metadata={"help": "stop where rows repeat, leak, contradict each other, are damaged or too long"},
    )
    search: int | None = field(
        default=None,
        metadata={
            "help": "trials to find the best learning rate, number of epochs and batch size by, on validation, before "
            "the training; those that are given are not searched"
        },
    )
    folds: int | None = field(
        default=None,
        metadata={"help": "cross-validate the training file in so many parts, before the training, for small data"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace a bundle that is already in --output-dir"})

    def __post_init__(self) -> None:
        """Raises UserError for what cannot be, or not together."""
        for name in ("layers", "lora"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: give 1 or more, e.g. {8 if name == 'lora' else 3}")
            if value is not None and self.from_scratch is not None:
                raise UserError(
                    f"--{name} needs a base model: weights from scratch have learnt nothing that could be kept"
                )
        if self.token_dropout is not None and not 0 <= self.token_dropout < 1:
            raise UserError(f"--token-dropout {self.token_dropout:g}: give a share below 1, e.g. 0.1, or 0 for none")
        if self.head_learning_rate_ratio is not None and not self.head_learning_rate_ratio > 0:
            raise UserError(
                f"--head-learning-rate-ratio {self.head_learning_rate_ratio:g}: give a number above 0, e.g. 10"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema-decay {self.ema_decay:g}: give a number below 1, e.g. 0.99, or 0 for none")
        for name in ("layers", "teacher", "lora", "wished_precision", "quantization_aware"):
            if getattr(self, name) not in (None, False) and self.train_file is None:
                raise UserError(f"--{name.replace('_', '-')} needs a --train-file: without one nothing is learnt")
        if self.quantization_aware and self.lora is not None:
            raise UserError(
                "--quantization-aware and --lora exclude each other: what int8 rounds are the weights that adapters "
                "leave as they are; leave out one of them"
            )

    def files(self) -> dict[str, Path]:
        """The data files that were given, by split."""
        given = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {name: Path(path) for name, path in given.items() if path is not None}


@dataclass
class TrainerOptions(TrainingArguments):
    """Arguments of `transformers.TrainingArguments`, with defaults for fine-tuning a small encoder."""

    output_dir: str | None = field(default=None, metadata={"help": "folder to write the bundle to"})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "peak learning rate; if absent 1e-4, for questions 2e-4, with --lora 5e-4, from scratch 1e-3"
        },
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "passes over the training data, at most; if absent 4 to 10, the more the fewer rows there are"
        },
    )
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "examples of one optimiser step; if absent 32"}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "examples of one evaluation step"})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "steps of linear warm-up; below 1: a share of all steps"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's decay, not on biases and norms"})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "batches of like length hold less padding"}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate on the validation data"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint"})
    logging_strategy: str = field(default="epoch", metadata={"help": "when to log the training loss"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "ship the best epoch, not the last"})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "what an epoch is judged by: loss, or a metric of the task"}
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "mixed precision; if absent, on where the processor is fast at it"}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide losses that are no numbers in the log"})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "pin batches; of use on a GPU only"})

    def __post_init__(self) -> None:
        """Raises UserError for values that would end the run later on, when work has been done."""
        if self.output_dir is None:
            raise UserError("--output-dir is missing: name the folder to write the bundle to, e.g. artifacts/reviews")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UserError(f"--learning-rate {self.learning_rate:g}: give a number above 0, e.g. 1e-4")
        if not torch.cuda.is_available():
            self.use_cpu = True
        self.reasons: dict[str, str] = {}  # of what is chosen for this run, see training/defaults.py
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size, self.reasons["per_device_train_batch_size"] = defaults.BATCH
        if self.bf16 is None:
            self.bf16, self.reasons["bf16"] = defaults.bf16()
        if self.max_grad_norm == 0:  # no clipping; but that the gradients are numbers is checked where they are clipped
            self.max_grad_norm = _NO_CLIPPING
        chosen = self.metric_for_best_model
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]  # transformers has not annotated it
        except ValueError as error:
            raise UserError(" ".join(str(error).split())) from error
        self.metric_for_best_model = chosen  # where none was given it says "loss" now, whatever the task

    def choose_by(self, metrics: tuple[str, ...]) -> None:
        """Settles what the best epoch is chosen by; `metrics`: those of the task, the first is the default.

        Raises UserError for a metric that the task does not have.
        """
        wanted = (self.metric_for_best_model or (*metrics, "loss")[0]).removeprefix("eval_")
        if self.metric_for_best_model and wanted not in (*metrics, "loss"):
            raise UserError(f"--metric-for-best-model {wanted}: choose {' or '.join((*metrics, 'loss'))}")
        self.metric_for_best_model, self.greater_is_better = wanted, wanted != "loss"
