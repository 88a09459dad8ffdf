"""Trains a model to put one label on an image."""

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from PIL import ExifTags, Image
from torch.utils.data import Dataset as TorchDataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, Trainer
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from handler.errors import TooLarge
from handler.inputs.images import ImageProcessor, decode, dimensions
from handler.settings import Settings
from training import evaluation, media, models, trainer
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits
from training.tasks.media_classification import MediaClassification

# Images of one size up to this side keep it in a model from scratch that takes any size; others become this square.
_LARGEST_OWN_SIZE = 224
_SIZES_LOOKED_AT = 500
_MOST_PIXELS = Settings(task="image-classification").max_pixels
# At most: degrees of a turn, and share of a side that an image is moved by.
_TURN, _SHIFT = 10.0, 0.1


class ImageClassification(MediaClassification):
    """One label for an image."""

    auto_model: ClassVar[Any] = AutoModelForImageClassification
    purpose: ClassVar[str] = "an image classifier"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Files in the column `path`, class indices in `label`."""
        if options.base_model is None and base.spec is None:
            raise UserError(
                "image-classification needs --base-model, a folder or hub id of an image model, or --from-scratch, "
                "e.g. 'vit image_size=28 patch_size=4 num_channels=1'"
            )
        return media.read_labelled(options, seed, base, _check)

    def load(self, base: BaseModel, splits: Splits, options: Options) -> tuple[PreTrainedModel, Any]:
        """An image classifier with the labels of the data, and the image processor it needs."""
        model = self.load_model(base, splits)
        if base.spec is not None:
            processor: Any = _new_processor(model.config, splits)
        else:
            with models.loading(base, self.purpose):
                processor = AutoImageProcessor.from_pretrained(base.location, backend="pil", trust_remote_code=False)
        with models.loading(base, f"{self.purpose} that can be served"):
            _served(processor, model)
        return model, processor

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Nothing that is not in the model's own files."""
        return {}

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer over images that are decoded when they are needed."""
        arguments.train_sampling_strategy = "random"  # all images have the same length
        served = _served(processor, model)

        def collate(rows: Sequence[tuple[np.ndarray, int]]) -> dict[str, torch.Tensor]:
            pixels = served.normalise(np.stack([pixels for pixels, _ in rows]))
            return {"pixel_values": torch.from_numpy(pixels), "labels": torch.tensor([label for _, label in rows])}

        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=TrainingImages(splits.train, served, augment=options.augment),
            validation=TrainingImages(splits.validation, served),
            collator=collate,
            metrics=evaluation.label_metrics,
        )

    def odd_inputs(self) -> list[str]:
        """A single pixel, a strip, and a transparent image that EXIF data turns."""
        ramp = np.arange(90 * 60, dtype=np.uint32).reshape(60, 90)
        channels = np.stack([ramp % 256, ramp // 25 % 256, ramp // 90 * 4 % 256, 255 - ramp % 90], axis=-1)
        turned = Image.Exif()
        turned[ExifTags.Base.Orientation] = 6
        return [
            _png(Image.new("L", (1, 1))),
            _png(Image.new("RGB", (300, 20), (255, 0, 128))),
            _png(Image.fromarray(channels.astype(np.uint8), "RGBA"), exif=turned),
        ]


class TrainingImages(TorchDataset[tuple[np.ndarray, int]]):
    """Items (uint8 [channels, height, width], class index), prepared by the very code that will serve the model."""

    def __init__(self, rows: Dataset, processor: ImageProcessor, *, augment: bool = False) -> None:
        self._paths, self._labels = list(rows["path"]), list(rows["label"])
        self._processor, self._augment = processor, augment

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        with open(self._paths[index], "rb") as file:
            image = decode(file.read(), self._processor.mode)
        return self._processor.pixels(_moved(image) if self._augment else image), self._labels[index]


def _check(content: bytes) -> None:
    """Raises RequestError for an image that the served model would refuse, too."""
    width, height = dimensions(content)
    if width * height > _MOST_PIXELS:
        raise TooLarge(f"the image has {width * height} pixels; at most {_MOST_PIXELS} are taken")
    decode(content, "RGB")


def _moved(image: Image.Image) -> Image.Image:
    """The image turned and shifted a little; what comes in at the edges is black."""
    turn, across, down = (2 * torch.rand(3) - 1).tolist()
    shift = round(across * _SHIFT * image.width), round(down * _SHIFT * image.height)
    return image.rotate(turn * _TURN, Image.Resampling.BILINEAR, translate=shift)


def _served(processor: Any, model: PreTrainedModel) -> ImageProcessor:
    """What will prepare the images of the served model. Raises ValueError if the model needs something else."""
    return ImageProcessor(json.loads(processor.to_json_string()), int(getattr(model.config, "num_channels", 3)))


def _new_processor(config: Any, splits: Splits) -> ViTImageProcessorPil:
    """For a model from scratch: images of the size it is built for, or of their own size, from -1 to 1."""
    size = getattr(config, "image_size", None)
    height, width = _own_size(splits) if size is None else (size, size) if isinstance(size, int) else size
    half = [0.5] * int(config.num_channels)
    return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)


def _own_size(splits: Splits) -> tuple[int, int]:
    """Height and width that most training images have, if they are small."""
    assert splits.train is not None
    counts: Counter[tuple[int, int]] = Counter()
    for path in splits.train["path"][:_SIZES_LOOKED_AT]:
        with open(path, "rb") as file:
            counts[dimensions(file.read())] += 1
    [((width, height), _)] = counts.most_common(1)
    return (height, width) if max(width, height) <= _LARGEST_OWN_SIZE else (_LARGEST_OWN_SIZE, _LARGEST_OWN_SIZE)


def _png(image: Image.Image, **options: Any) -> str:
    """base64 of an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
