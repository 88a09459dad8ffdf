"""What training to put one label on an image and on a sound have in common."""

import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datasets import Dataset
from transformers import PreTrainedModel

from training import data, evaluation, media, models
from training.base_model import BaseModel
from training.tasks import Splits, TrainingTask

_GOLDEN_PER_LABEL = 2
_GOLDEN_LABELS = 16
_ALL_LABELS = 100_000


class MediaClassification(TrainingTask):
    """A classifier of files. auto_model: the transformers class that loads it; purpose: what it is, for messages."""

    metrics: ClassVar[tuple[str, ...]] = ("macro_f1", "accuracy")
    primary: ClassVar[str] = "accuracy"
    auto_model: ClassVar[Any]
    purpose: ClassVar[str]

    @abstractmethod
    def odd_inputs(self) -> list[str]:
        """base64 of files unlike any in training, which a model must answer, too."""

    def counts(self, rows: Dataset, labels: Sequence[str]) -> dict[str, int]:
        """Rows per label."""
        return data.balance(rows)

    def load_model(self, base: BaseModel, splits: Splits) -> PreTrainedModel:
        """A classifier with the labels of the data."""
        return models.load(
            base,
            self.auto_model,
            self.purpose,
            num_labels=len(splits.labels),
            id2label=dict(enumerate(splits.labels)),
            label2id={label: index for index, label in enumerate(splits.labels)},
            problem_type="single_label_classification",
        )

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """A file and its label's name."""
        parameters = {"top_k": len(labels), "overflow": "truncate"}
        return [
            {"inputs": media.as_input(path), "parameters": parameters, "target": labels[label]}
            for path, label in zip(rows["path"], rows["label"], strict=True)
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Files of each label and odd ones, with the scores of all labels: which few of them lead may well change."""
        shuffled = random.Random(seed).sample(list(examples), len(examples))
        chosen: list[str] = []
        for label in sorted({example["target"] for example in examples})[:_GOLDEN_LABELS]:
            chosen += [e["inputs"] for e in shuffled if e["target"] == label][:_GOLDEN_PER_LABEL]
        return [{"inputs": value, "parameters": {"top_k": _ALL_LABELS}} for value in (*chosen, *self.odd_inputs())]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Accuracy, macro-F1 and the confusion matrix of the most probable labels; calibration of all scores."""
        return evaluation.single_label_metrics(predictions, targets, labels)
