"""Fine-tunes an encoder to put one label on a text."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from training import data, evaluation, models, trainer
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

_USUAL_MAX_LENGTH = 256
_GOLDEN_PER_LABEL = 4
_CHARACTERS_PER_TOKEN = 20  # more than any language has on average
_LONGEST_EXAMPLE = 1_000_000  # characters; a longer request is refused
# Texts unlike any in training: a model must answer them too, and the same way after every conversion.
_GOLDEN_ODD = ("", "?", "Ünïcödé, 漢字 and 🙂", "word " * 40)


class TextClassification(TrainingTask):
    """One label for a text."""

    metrics: ClassVar[tuple[str, ...]] = ("macro_f1", "accuracy")
    primary: ClassVar[str] = "accuracy"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Texts in the column `text`, class indices in `label`."""
        skipped = 0
        raw: dict[str, Dataset] = {}
        for name, path in options.files().items():
            rows = data.columns(data.read(path), path, {"text": options.text_column, "label": options.label_column})
            raw[name], bad = data.check_texts_and_labels(rows, path, skip_bad_rows=options.skip_bad_rows)
            skipped += bad
        labels = data.label_names(raw["train"]["label"]) if "train" in raw else base.labels()
        if len(labels) < 2:
            raise UserError(
                f"{options.train_file}: all rows have the label {labels[0]!r}; a classifier needs two or more"
            )
        encoded = {name: data.encode_labels(rows, labels, options.files()[name]) for name, rows in raw.items()}
        train, validation = encoded.get("train"), encoded.get("validation")
        if train is not None and validation is None:
            path = Path(str(options.train_file))
            train, validation = data.split_validation(train, options.validation_share, seed, path)
        return Splits(train, validation, encoded.get("test"), labels, skipped)

    def counts(self, rows: Dataset, labels: Sequence[str]) -> dict[str, int]:
        """Rows per label."""
        return data.balance(rows)

    def load(
        self, base: BaseModel, splits: Splits, options: Options
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A sequence classifier with the labels of the data."""
        purpose = "a text classifier"
        tokenizer = models.load_tokenizer(base, purpose, splits.train["text"] if splits.train else ())
        model = models.load(
            base,
            AutoModelForSequenceClassification,
            purpose,
            tokenizer,
            num_labels=len(splits.labels),
            id2label=dict(enumerate(splits.labels)),
            label2id={label: index for index, label in enumerate(splits.labels)},
            problem_type="single_label_classification",
            **models.attention(),
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Length and overflow policy."""
        length = models.longest_input(model, processor, options.max_length, _USUAL_MAX_LENGTH)
        return {"max_length": length, "stride": length // 8, "overflow": options.overflow or "truncate"}

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer over the tokenized texts."""

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            encoded = processor(batch["text"], truncation=True, max_length=settings["max_length"])
            return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

        def features(rows: Dataset | None) -> Dataset | None:
            return rows and rows.map(tokenize, batched=True, remove_columns=["text"], keep_in_memory=True)

        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=features(splits.train),
            validation=features(splits.validation),
            collator=DataCollatorWithPadding(processor, pad_to_multiple_of=8),
            metrics=_metrics,
        )

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """A text and its label's name."""
        return [
            {"inputs": text[:_LONGEST_EXAMPLE], "parameters": {"overflow": "truncate"}, "target": labels[label]}
            for text, label in zip(rows["text"], rows["label"], strict=True)
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Texts of each label, over-long and odd ones."""
        shuffled = random.Random(seed).sample(list(examples), len(examples))
        texts: list[str] = []
        for label in sorted({example["target"] for example in examples})[:16]:
            texts += [e["inputs"] for e in shuffled if e["target"] == label][:_GOLDEN_PER_LABEL]
        longest = max((example["inputs"] for example in examples), key=len, default="a text")
        enough = max_length * _CHARACTERS_PER_TOKEN
        too_long = (f"{longest} " * (1 + enough // len(longest)))[:enough]
        return [{"inputs": text} for text in (*texts, longest, too_long, *_GOLDEN_ODD)]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Accuracy, macro-F1 and the confusion matrix of the most probable labels."""
        return evaluation.classification_metrics(targets, [entries[0]["label"] for entries in predictions], labels)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    predicted = np.argmax(prediction.predictions, axis=-1)
    expected = prediction.label_ids
    return {
        "macro_f1": float(f1_score(expected, predicted, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(expected, predicted)),
    }
