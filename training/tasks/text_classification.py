"""Fine-tunes an encoder to put one label on a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
)

from training import data
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.progress import Progress

_DEFAULT_MAX_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Splits:
    """Text and class-index label of each example; `skipped`: rows left out by --skip-bad-rows."""

    train: Dataset
    validation: Dataset
    test: Dataset | None
    skipped: int

    @property
    def labels(self) -> list[str]:
        """Label names in class order."""
        names: list[str] = self.train.features["label"].names
        return names


def read_splits(options: Options, seed: int) -> Splits:
    """Reads the files. Raises UserError for whatever in them would spoil the run."""
    skipped = 0
    raw: dict[str, Dataset] = {}
    paths = {"train": options.train_file, "validation": options.validation_file, "test": options.test_file}
    for name, given in paths.items():
        if given is None:
            continue
        path = Path(given)
        rows = data.columns(data.read(path), path, {"text": options.text_column, "label": options.label_column})
        raw[name], bad = data.check_texts_and_labels(rows, path, skip_bad_rows=options.skip_bad_rows)
        skipped += bad
    labels = data.label_names(raw["train"]["label"])
    if len(labels) < 2:
        raise UserError(f"{options.train_file}: all rows have the label {labels[0]!r}; a classifier needs two or more")
    encoded = {name: data.encode_labels(rows, labels, Path(str(paths[name]))) for name, rows in raw.items()}
    train = encoded["train"]
    if "validation" in encoded:
        validation = encoded["validation"]
    else:
        train, validation = data.split_validation(train, options.validation_share, seed, Path(options.train_file))
    return Splits(train, validation, encoded.get("test"), skipped)


def load_base(base: BaseModel, labels: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model with a fresh head for `labels`, and its tokenizer. Raises UserError if it cannot be loaded."""
    try:
        config = AutoConfig.from_pretrained(
            base.location,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            problem_type="single_label_classification",
            trust_remote_code=False,
            **_attention(),
        )
        tokenizer = AutoTokenizer.from_pretrained(base.location, trust_remote_code=False)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            base.location,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the head of a model with other labels is replaced
            output_loading_info=True,
        )
        encoder = f"{model.base_model_prefix}."
        if misfits := [str(name) for name, *_ in loading["mismatched_keys"] if str(name).startswith(encoder)]:
            raise ValueError(f"its weights do not fit its config.json: {misfits[0]}")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--base-model {base.name}: cannot be loaded as a text classifier: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"--base-model {base.name}: its tokenizer has no tokenizer.json, which serving needs")
    if tokenizer.pad_token_id is None:
        raise UserError(f"--base-model {base.name}: its tokenizer has no padding token; set one and save it first")
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _attention() -> dict[str, Any]:
    """On a CPU the plain kernel without dropout: the random numbers cost more than the attention itself."""
    if torch.cuda.is_available():
        return {}
    return {"attn_implementation": "eager", "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0}


def max_length(options: Options, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of one sequence: as asked for, or what the model can take, at most 256.

    Raises UserError for a length that the model cannot take.
    """
    # RoBERTa counts positions from behind its padding index.
    reserved = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    limit = min(positions - reserved, tokenizer.model_max_length)
    if options.max_length is None:
        return int(min(limit, _DEFAULT_MAX_LENGTH))
    if not 8 <= options.max_length <= limit:
        raise UserError(f"--max-length {options.max_length}: this model takes 8 to {limit} tokens")
    return options.max_length


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    options: Options,
    arguments: TrainerOptions,
    length: int,
) -> Trainer:
    """A Hugging Face Trainer over the tokenized splits."""

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(batch["text"], truncation=True, max_length=length)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    def features(rows: Dataset) -> Dataset:
        return rows.map(tokenize, batched=True, remove_columns=["text"], keep_in_memory=True)

    callbacks: list[Any] = [Progress()]
    if options.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=features(splits.train),
        eval_dataset=features(splits.validation),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        compute_metrics=_metrics,
        callbacks=callbacks,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    predicted = np.argmax(prediction.predictions, axis=-1)
    expected = prediction.label_ids
    return {
        "accuracy": float(accuracy_score(expected, predicted)),
        "macro_f1": float(f1_score(expected, predicted, average="macro", zero_division=0)),
    }
