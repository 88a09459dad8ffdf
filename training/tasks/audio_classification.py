"""Trains a model to put one label on a sound."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import AutoModelForAudioClassification, PreTrainedModel, Trainer

from handler.inputs.sounds import SpeechFeatures
from training import evaluation, media, sounds, trainer
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits
from training.tasks.media_classification import MediaClassification


class AudioClassification(MediaClassification):
    """One label for a sound."""

    auto_model: ClassVar[Any] = AutoModelForAudioClassification
    purpose: ClassVar[str] = "an audio classifier"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Files in the column `path`, class indices in `label`."""
        sounds.check_base("audio-classification", options, base, "audio-spectrogram-transformer max_length=128")
        return media.read_labelled(options, seed, base, sounds.check)

    def load(self, base: BaseModel, splits: Splits, options: Options) -> tuple[PreTrainedModel, Any]:
        """An audio classifier with the labels of the data, and the feature extractor it needs."""
        model = self.load_model(base, splits)
        return model, sounds.load_extractor(base, model, self.purpose, splits)

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Length of a window, where the model has none of its own, and overflow policy."""
        overflow = options.overflow or "truncate"
        if isinstance(sounds.served(processor, model), SpeechFeatures):
            return {"max_length": options.max_length or sounds.USUAL_MAX_LENGTH, "stride": 0, "overflow": overflow}
        if options.max_length is not None:
            raise UserError(f"--max-length {options.max_length}: this model has a length of its own; leave it out")
        return {"overflow": overflow}

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
        features = sounds.served(processor, model, settings.get("max_length", sounds.USUAL_MAX_LENGTH))
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

    def odd_inputs(self) -> list[str]:
        """See `sounds.odd_sounds`."""
        return sounds.odd_sounds()
