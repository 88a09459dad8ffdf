"""Trains a model to put one label on a sound."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import AutoModelForAudioClassification, PreTrainedModel, Trainer

from training import data, evaluation, media, models, sounds, trainer
from training.base_model import BaseModel
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

_PURPOSE = "an audio classifier"
_GOLDEN_PER_LABEL = 2
_GOLDEN_LABELS = 16
_ALL_LABELS = 100_000


class AudioClassification(TrainingTask):
    """One label for a sound."""

    metrics: ClassVar[tuple[str, ...]] = ("macro_f1", "accuracy")
    primary: ClassVar[str] = "accuracy"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Files in the column `path`, class indices in `label`."""
        sounds.check_base("audio-classification", options, base, "audio-spectrogram-transformer max_length=128")
        return media.read_labelled(options, seed, base, sounds.check)

    def counts(self, rows: Dataset, labels: Sequence[str]) -> dict[str, int]:
        """Rows per label."""
        return data.balance(rows)

    def load(self, base: BaseModel, splits: Splits, options: Options) -> tuple[PreTrainedModel, Any]:
        """An audio classifier with the labels of the data, and the feature extractor it needs."""
        model = models.load(
            base,
            AutoModelForAudioClassification,
            _PURPOSE,
            num_labels=len(splits.labels),
            id2label=dict(enumerate(splits.labels)),
            label2id={label: index for index, label in enumerate(splits.labels)},
            problem_type="single_label_classification",
        )
        return model, sounds.load_extractor(base, model, _PURPOSE, splits)

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Length of a window, where the model has none of its own, and overflow policy."""
        return {
            "max_length": options.max_length or sounds.USUAL_MAX_LENGTH,
            "stride": 0,
            "overflow": options.overflow or "truncate",
        }

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer over sounds that are decoded when they are needed."""
        features = sounds.served(processor, model, settings["max_length"])
        assert splits.train is not None
        sounds.prepare(model, features, arguments, splits.train)

        def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
            return {**sounds.collate(features, items), "labels": torch.tensor([item["labels"] for item in items])}

        assert splits.validation is not None
        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=sounds.Sounds(splits.train["path"], splits.train["label"], features, augment=options.augment),
            validation=sounds.Sounds(splits.validation["path"], splits.validation["label"], features),
            collator=collate,
            metrics=evaluation.label_metrics,
        )

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """A sound and its label's name."""
        return [
            {
                "inputs": media.as_input(path),
                "parameters": {"top_k": 1, "overflow": "truncate"},
                "target": labels[label],
            }
            for path, label in zip(rows["path"], rows["label"], strict=True)
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Sounds of each label and odd ones, with all scores: which of them are the first few may well change."""
        shuffled = random.Random(seed).sample(list(examples), len(examples))
        chosen: list[str] = []
        for label in sorted({example["target"] for example in examples})[:_GOLDEN_LABELS]:
            chosen += [e["inputs"] for e in shuffled if e["target"] == label][:_GOLDEN_PER_LABEL]
        odd = sounds.odd_sounds()
        return [{"inputs": value, "parameters": {"top_k": _ALL_LABELS}} for value in (*chosen, *odd)]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Accuracy, macro-F1 and the confusion matrix of the most probable labels."""
        return evaluation.classification_metrics(targets, [entries[0]["label"] for entries in predictions], labels)
