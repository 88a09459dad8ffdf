"""Trains a small VAE or GAN to paint an image for a label, or bundles a diffusers pipeline as it is.

    python train.py --task text-to-image --train-file images/ --from-scratch 'marble-vae latent_size=32' \\
        --learning-rate 2e-3 --num-train-epochs 60 --output-dir artifacts/digits

A GAN (`marble-gan`) learns well at half that rate. Its loss does not tell how good it is, so its last epoch is shipped.
"""

import base64
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.metrics import euclidean_distances
from torch.utils.data import StackDataset
from transformers import AutoModel, Trainer
from transformers.trainer_utils import IntervalStrategy

from handler.inputs.images import decode
from handler.messages import Media
from handler.models.label_to_image import MODEL_TYPES, Gan, LabelToImage
from training import data, media, models, trainer
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

_PURPOSE = "a model that paints images of labels"
_PIPELINE = "model_index.json"
_PIPELINE_FILES = {".json", ".txt", ".model", ".spm", ".jinja", ".safetensors"}
_PIPELINE_LIMITS = {"max_pixels": 1024 * 1024, "max_characters": 10_000}
_PIPELINE_PROMPT = "a red bicycle by the sea"
_GOLDEN_LABELS = 16
_GOLDEN_STEPS = 2  # a worker replays the golden set whenever it starts


class PipelineFolder:
    """A diffusers pipeline that stays as it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def float(self) -> Self:
        """Itself: its weights keep the precision they were saved in."""
        return self

    def save_pretrained(self, target: Path) -> None:
        """Copies what belongs to the pipeline."""
        for path in sorted(self._folder.rglob("*")):
            if path.is_file() and path.suffix in _PIPELINE_FILES:
                copy = target / path.relative_to(self._folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


class TextToImage(TrainingTask):
    """An image for a label, or, with a pipeline, for a text."""

    primary: ClassVar[str] = "label_accuracy"

    def __init__(self) -> None:
        self._golden: list[dict[str, Any]] = []

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Files in the column `path`, class indices in `label`; nothing for a pipeline."""
        if options.base_model is None and base.spec is None:
            raise UserError(
                "text-to-image needs --from-scratch, e.g. 'marble-vae latent_size=32' or 'marble-gan latent_size=32', "
                "or --base-model, a folder of such a model or of a diffusers pipeline"
            )
        if options.overflow == "window":
            raise UserError("--overflow window: a text cannot be painted in pieces; choose error or truncate")
        if _is_pipeline(base):
            if options.files():
                raise UserError(f"--base-model {base.name}: diffusers pipelines are not trained; leave the files out")
            return Splits(None, None, None)
        return media.read_labelled(options, seed, base, lambda content: decode(content, "RGB"))

    def counts(self, rows: Dataset, labels: Sequence[str]) -> dict[str, int]:
        """Rows per label."""
        return data.balance(rows)

    def load(self, base: BaseModel, splits: Splits, options: Options) -> tuple[Any, Any]:
        """A VAE or GAN with the labels of the data, or a pipeline's folder; neither has a processor."""
        if _is_pipeline(base):
            return self._load_pipeline(base), None
        if base.spec is not None and base.spec.model_type not in MODEL_TYPES:
            raise UserError(f"--from-scratch {base.spec.model_type}: text-to-image takes {' and '.join(MODEL_TYPES)}")
        model = models.load(
            base,
            AutoModel,
            _PURPOSE,
            num_labels=len(splits.labels),
            id2label=dict(enumerate(splits.labels)),
            label2id={label: index for index, label in enumerate(splits.labels)},
        )
        if not isinstance(model, LabelToImage):
            raise UserError(f"--base-model {base.name}: it is {model.config.model_type}, not {_PURPOSE}")
        self._golden = [
            {"inputs": label, "parameters": {"seed": seed}} for seed, label in enumerate(splits.labels[:_GOLDEN_LABELS])
        ]
        return model, None

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Limits of a pipeline."""
        if isinstance(model, LabelToImage):
            return {}
        return {"overflow": options.overflow or "error", **_PIPELINE_LIMITS}

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer over images that are in memory, as the model paints them."""
        arguments.train_sampling_strategy = "random"  # all images have the same length
        if isinstance(model, Gan):
            why = "a GAN's loss does not tell how good it is"
            if options.early_stopping_patience and "early_stopping_patience" not in arguments.reasons:
                raise UserError(f"--early-stopping-patience: {why}; leave it out")
            options.early_stopping_patience, arguments.reasons["early_stopping_patience"] = 0, why
            arguments.adam_beta1, arguments.adam_beta2 = 0.0, 0.99  # momentum makes painter and critic chase each other
            arguments.eval_strategy, arguments.load_best_model_at_end = IntervalStrategy.NO, False
        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=_images(splits.train, model.config),
            validation=_images(splits.validation, model.config),
            collator=_collate,
        )

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """The name of each row's label, and the row's image to compare with."""
        return [
            {
                "inputs": labels[label],
                "parameters": {"seed": seed},
                "target": {"label": labels[label], "image": media.as_input(path)},
            }
            for seed, (path, label) in enumerate(zip(rows["path"], rows["label"], strict=True))
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """One image of each label, or a few steps of a pipeline."""
        return self._golden

    def score(
        self, predictions: Sequence[Media], targets: Sequence[Mapping[str, str]], labels: Sequence[str]
    ) -> dict[str, Any]:
        """How the painted images compare with the real ones, pixel by pixel.

        label_accuracy: share of images whose nearest real image has the label that was asked for; real_accuracy: the
        same of each real image and the others, which is what to compare it with. variety: how much images of one label
        differ, as a share of how much real ones do.
        """
        painted = [decode(prediction.content, "RGB") for prediction in predictions]
        real = [decode(base64.b64decode(target["image"]), "RGB").resize(painted[0].size) for target in targets]
        found, known = (np.stack([np.asarray(image).ravel() / 255 for image in images]) for images in (painted, real))
        asked = np.array([target["label"] for target in targets])
        between = euclidean_distances(known)
        np.fill_diagonal(between, np.inf)
        return {
            "rows": len(predictions),
            "label_accuracy": float((asked[euclidean_distances(found, known).argmin(axis=1)] == asked).mean()),
            "real_accuracy": float((asked[between.argmin(axis=1)] == asked).mean()),
            "variety": _variety(found, asked) / max(_variety(known, asked), 1e-9),
        }

    def _load_pipeline(self, base: BaseModel) -> PipelineFolder:
        from handler.models.pipeline import check  # diffusers takes seconds to import

        folder = Path(base.location)
        with models.loading(base, "a diffusers pipeline"):
            labels = check(folder)
        self._golden = [
            {"inputs": prompt, "parameters": {"seed": 0, "num_inference_steps": _GOLDEN_STEPS}}
            for prompt in list(labels or [_PIPELINE_PROMPT])[:2]
        ]
        return PipelineFolder(folder)


def _is_pipeline(base: BaseModel) -> bool:
    return bool(base.location) and (Path(base.location) / _PIPELINE).is_file()


def _images(rows: Dataset, config: Any) -> StackDataset[Any]:
    """Items of `pixel_values`, uint8 [channels, height, width], and `labels`."""
    side, mode = config.image_size, "L" if config.num_channels == 1 else "RGB"
    pixels = np.empty((len(rows), side, side, config.num_channels), dtype=np.uint8)
    for index, path in enumerate(rows["path"]):
        image = decode(Path(path).read_bytes(), mode).resize((side, side))
        pixels[index] = np.asarray(image).reshape(pixels.shape[1:])
    columns: dict[str, Any] = {
        "pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2),
        "labels": torch.tensor(list(rows["label"])),
    }
    return StackDataset(**columns)


def _collate(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch: pixel_values float32 [batch, channels, height, width], 0 to 1; labels int64 [batch]."""
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels.float() / 255, "labels": torch.stack([row["labels"] for row in rows])}


def _variety(images: NDArray[np.float64], labels: NDArray[np.str_]) -> float:
    """Mean standard deviation of a pixel over the images [images, pixels] of one label."""
    return float(np.mean([images[labels == label].std(axis=0).mean() for label in np.unique(labels)]))
