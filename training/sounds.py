"""What the training of models that hear has in common: sounds as the served model will get them, and odd ones."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset
from transformers import ASTFeatureExtractor, AutoFeatureExtractor, PreTrainedModel, Wav2Vec2FeatureExtractor

from handler.inputs.sounds import (
    Features,
    SoundRow,
    SpectrogramFeatures,
    SpeechFeatures,
    load_features,
    read_sound,
    resample,
)
from handler.settings import Settings
from training import models
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits

USUAL_MAX_LENGTH = 1500  # positions; with Wav2Vec2's usual 320 samples for each: 30 s at 16 kHz
_MOST_SECONDS = Settings(task="").max_seconds
_UNBOUNDED = 10**9  # positions of a window
_SOUNDS_LOOKED_AT = 500
# At most: change of speed, of loudness in decibels, and seconds of silence before a sound.
_STRETCH, _LOUDER, _LATER = 0.1, 6.0, 0.1


def check_base(task: str, options: Options, base: BaseModel, example: str) -> None:
    """Raises UserError if there is nothing to start from that can hear."""
    if options.base_model is None and base.spec is None:
        raise UserError(
            f"{task} needs --base-model, a folder or hub id of a model that hears, or --from-scratch, e.g. '{example}'"
        )


def check(content: bytes) -> None:
    """Raises RequestError for a sound that the served model would refuse, too."""
    sound = read_sound(content, _MOST_SECONDS)
    sound.decode(sound.sampling_rate)


def load_extractor(base: BaseModel, model: PreTrainedModel, purpose: str, splits: Splits) -> Any:
    """The model's feature extractor; for a model from scratch a new one, which may look at the training data.

    Raises UserError if it cannot be loaded or served, or if a sound is too short for the model.
    """
    with models.loading(base, purpose):
        if base.spec is None:
            extractor = AutoFeatureExtractor.from_pretrained(base.location, trust_remote_code=False)
        elif model.config.model_type == "audio-spectrogram-transformer":
            extractor = _spectrogram_extractor(model, splits.train)
        else:
            # With group normalisation padding changes what is heard, mask or no mask.
            masks = getattr(model.config, "feat_extract_norm", "group") == "layer"
            extractor = Wav2Vec2FeatureExtractor(return_attention_mask=masks)
    with models.loading(base, f"{purpose} that can be served"):
        features = served(extractor, model)
    for rows in splits.named().values():
        for path in rows["path"]:
            if (seconds := _seconds(path)) < features.shortest / features.sampling_rate:
                raise UserError(
                    f"{path}: it lasts {1000 * seconds:.1f} ms and the model needs at least "
                    f"{1000 * features.shortest / features.sampling_rate:.1f} ms; leave it out of the data"
                )
    return extractor


def served(extractor: Any, model: PreTrainedModel, max_length: int = _UNBOUNDED) -> Features:
    """What will prepare sounds for the served model; `max_length`: of a window, where the model has none of its own.

    Raises ValueError if the model needs something else.
    """
    return load_features(json.loads(extractor.to_json_string()), model.config.to_dict(), max_length, 0)


def prepare(model: Any, features: Features, arguments: TrainerOptions, train: Dataset) -> None:
    """Settles what depends on how long the training sounds are."""
    if isinstance(features, SpectrogramFeatures):
        arguments.train_sampling_strategy = "random"  # all of them have the same length
        return
    assert isinstance(features, SpeechFeatures)
    shortest = min(map(_seconds, train["path"])) * features.sampling_rate / features.ratio
    # Masking stretches of time fails on a batch of sounds that are not longer than one.
    if shortest <= getattr(model.config, "mask_time_length", 0) + 1:
        model.config.apply_spec_augment = False


class Sounds(TorchDataset[dict[str, Any]]):
    """Items `{"input_values": float32 [samples], "labels": …}`, of files that are decoded when they are needed.

    Where the model has a length of its own, what lies behind it is left out. augment: change speed, loudness and start
    a little, at random.
    """

    def __init__(
        self, paths: Sequence[str], labels: Sequence[Any], features: Features, *, augment: bool = False
    ) -> None:
        self._paths, self._labels, self._features, self._augment = list(paths), list(labels), features, augment

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        samples = decode(self._paths[index], self._features.sampling_rate)
        if self._augment:
            samples = _moved(samples, self._features.sampling_rate)
        # A resampled sound may be a sample short of its length.
        if (missing := self._features.shortest - len(samples)) > 0:
            samples = np.pad(samples, (0, missing))
        return {"input_values": samples, "labels": self._labels[index]}


def decode(path: str, sampling_rate: int) -> NDArray[np.float32]:
    """A sound file as float32 [samples] at `sampling_rate` Hz."""
    return read_sound(Path(path).read_bytes(), _MOST_SECONDS).decode(sampling_rate)


def _seconds(path: str) -> float:
    sound = read_sound(Path(path).read_bytes(), _MOST_SECONDS)
    return sound.frames / sound.sampling_rate


def collate(features: Features, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One batch of the model's inputs, without labels."""
    rows: list[SoundRow] = [features.windows(item["input_values"])[0] for item in items]
    return {name: torch.from_numpy(array) for name, array in features.collate(rows).items()}


def odd_sounds() -> list[str]:
    """base64 of sounds unlike any in training: a model must answer them, too, and the same way in every format."""
    time = np.arange(44_100) / 44_100
    chirp = np.sin(2 * np.pi * (100 + 2000 * time) * time)
    stereo = np.stack([chirp, np.sign(np.sin(2 * np.pi * 440 * time)) / 2], axis=1)
    return [
        _file(np.zeros(8_000), 16_000, "WAV", "PCM_16"),
        _file(chirp[:22_050] / 2, 22_050, "WAV", "FLOAT"),
        _file(stereo, 44_100, "FLAC", "PCM_24"),
        _file(chirp[:2_000] / 8, 8_000, "WAV", "PCM_U8"),
    ]


def _file(samples: NDArray[np.float64], rate: int, kind: str, coding: str) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=coding)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _spectrogram_extractor(model: PreTrainedModel, train: Dataset | None) -> ASTFeatureExtractor:
    """With the mean and standard deviation that the training data have."""
    sizes = {"max_length": model.config.max_length, "num_mel_bins": model.config.num_mel_bins}
    features = served(ASTFeatureExtractor(**sizes), model)
    assert isinstance(features, SpectrogramFeatures)
    paths = train["path"][:_SOUNDS_LOOKED_AT] if train else []
    values = np.concatenate([features.spectrogram(decode(path, features.sampling_rate)).ravel() for path in paths])
    return ASTFeatureExtractor(**sizes, mean=float(values.mean()), std=float(values.std()))


def _moved(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    stretch, louder, later = torch.rand(3).tolist()
    samples = resample(samples, round(rate * (1 + _STRETCH * (2 * stretch - 1))), rate)
    samples = samples * np.float32(10 ** (_LOUDER * (2 * louder - 1) / 20))
    return np.pad(samples, (round(later * _LATER * rate), 0))
