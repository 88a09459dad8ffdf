"""Text to image: a PNG for the name of a class, by a small VAE or GAN, or for any text, by a diffusers pipeline.

Each image has random numbers of its own, from `seed`: one input with one seed always gives the same image, whatever
else is in the batch. The seed is written into the PNG, as the text `seed`.
"""

import base64
import io
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from handler import backends
from handler.errors import InternalError, InvalidInput, InvalidParameter, RequestError, TooLarge
from handler.inputs.text import read_text
from handler.messages import Media
from handler.models import label_to_image
from handler.parameters import CommonParameters, at_least, between
from handler.settings import Settings
from handler.tasks import Answer, GenerativeTask
from handler.turns import in_turn

if TYPE_CHECKING:
    from handler.models.pipeline import Pipeline

_SHOWN_LABELS = 20
_ALWAYS = ("overflow", "details", "seed")  # parameters that every model honours


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToImageParameters(CommonParameters):
    """Those of the Inference API that a pipeline may honour; what is None is the pipeline's own default.

    seed: of the image; None draws one.
    """

    overflow: Literal["error", "truncate"] | None = None
    seed: int | None = between(0, 2**64 - 1)
    width: int | None = at_least(1)
    height: int | None = at_least(1)
    num_inference_steps: int | None = at_least(1)
    guidance_scale: float | None = between(0, 1000)
    negative_prompt: str | None = None


class TextToImage(GenerativeTask):
    """Paints with whatever is in the folder: a model of `handler.models.label_to_image`, or a diffusers pipeline."""

    Parameters: ClassVar[type[CommonParameters]] = TextToImageParameters

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        self._settings = settings
        self._artist: _LabelPainter | Pipeline
        if config:
            self._artist = _LabelPainter(model_dir, settings, config)
        else:
            from handler.models import pipeline  # diffusers takes seconds to import

            self._artist = pipeline.Pipeline(model_dir, settings)
        own = [field.name for field in fields(TextToImageParameters) if field.name in self._artist.parameters]
        self._allowed = sorted({*_ALWAYS, *own})

    def read(self, value: Any, parameters: Any) -> Sequence[str]:
        """A string: the name of a class, or what the image shall show."""
        for field in fields(parameters):
            if field.name not in self._allowed and getattr(parameters, field.name) is not None:
                raise InvalidParameter(
                    f"parameter {field.name!r} means nothing to this model; it takes: {', '.join(self._allowed)}"
                )
        self._check_limits(parameters)
        prompt = read_text(value, "a string")
        labels = self._artist.labels
        if labels and prompt not in labels:
            shown = ", ".join(map(repr, list(labels)[:_SHOWN_LABELS])) + (", …" if len(labels) > _SHOWN_LABELS else "")
            raise InvalidInput(f"this model paints images of {shown}; the input must be one of these names")
        return [prompt]

    def generate(self, requests: Sequence[tuple[Sequence[Any], Any]]) -> list[Answer | RequestError]:
        """A PNG for each text."""
        return in_turn(requests, self._paint, self._settings.max_generation_seconds)

    def _check_limits(self, parameters: TextToImageParameters) -> None:
        limits = self._settings
        if (parameters.num_inference_steps or 0) > limits.max_inference_steps:
            raise InvalidParameter(f"parameter 'num_inference_steps' must be at most {limits.max_inference_steps}")
        if (parameters.width is None) != (parameters.height is None):
            raise InvalidParameter("parameters 'width' and 'height' must be given together")
        pixels = (parameters.width or 0) * (parameters.height or 0)
        if pixels > limits.max_pixels:
            raise InvalidParameter(
                f"parameters 'width' and 'height' ask for {pixels} pixels; at most {limits.max_pixels} are made"
            )
        if len(parameters.negative_prompt or "") > limits.max_characters:
            raise InvalidParameter(f"parameter 'negative_prompt' has more than {limits.max_characters} characters")

    @torch.inference_mode()
    def _paint(self, prompt: str, parameters: TextToImageParameters) -> Answer:
        tokens, truncated = self._tokens(prompt, parameters)
        seed = secrets.randbits(63) if parameters.seed is None else parameters.seed
        given = {name: getattr(parameters, name) for name in self._allowed if name not in _ALWAYS}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            pixels = self._artist.paint(prompt, seed, **given)
        except ValueError:
            if not given:
                raise
            raise InvalidParameter(
                f"the pipeline refuses these values of {', '.join(given)}; width and height are mostly multiples of 8"
            ) from None
        if pixels is None:
            raise InvalidInput("the pipeline's own safety checker withholds the image; send another text or seed")
        if not np.isfinite(pixels).all():
            raise InternalError("the model gave an image that is not made of numbers; its weights are unsound")
        return Answer(Media(to_png(pixels, seed), "image/png"), tokens, truncated)

    def _tokens(self, prompt: str, parameters: TextToImageParameters) -> tuple[int, bool]:
        """Tokens of the texts, and whether some are cut off. Raises TooLarge where that is not wanted."""
        counts, most = zip(*map(self._artist.tokens, (prompt, parameters.negative_prompt or "")), strict=True)
        truncated = most[0] is not None and max(counts) > most[0]
        if truncated and (parameters.overflow or self._settings.overflow) != "truncate":
            raise TooLarge(
                f"the text has {max(counts)} tokens and the model takes {most[0]}; shorten it, or send the parameter "
                '"overflow": "truncate"'
            )
        return counts[0], truncated

    @staticmethod
    def drift(expected: str, found: str) -> float:
        """Largest difference of a pixel, 0 to 1, beyond the one of 255 steps that rounding may make; inf if the images
        differ in size or kind."""
        files = [Image.open(io.BytesIO(base64.b64decode(content))) for content in (expected, found)]
        before, after = (np.asarray(image, dtype=np.int16) for image in files)
        if before.shape != after.shape:
            return float("inf")
        return float(max(0, np.abs(before - after).max() - 1) / 255)


class _LabelPainter:
    """A VAE or GAN of ours: an image for the name of a class."""

    parameters: frozenset[str] = frozenset()

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        if config.get("model_type") not in label_to_image.MODEL_TYPES:
            raise ValueError(
                f"text-to-image takes models of the types {', '.join(label_to_image.MODEL_TYPES)} and diffusers "
                f"pipelines, not {config.get('model_type')}"
            )
        self._model = backends.load_model(model_dir, settings, "AutoModel")
        names = sorted(self._model.config.id2label.items())
        self.labels: Mapping[str, int] = {name: index for index, name in names}

    def tokens(self, prompt: str) -> tuple[int, int | None]:
        """Labels have no tokens."""
        return 0, None

    def paint(self, prompt: str, seed: int) -> NDArray[np.float32]:
        """Pixels float32 [height, width, channels], 0 to 1."""
        noise = torch.randn(1, self._model.config.latent_size, generator=torch.Generator().manual_seed(seed))
        label = torch.tensor([self.labels[prompt]], device=self._model.device)
        [pixels] = self._model.paint(noise.to(self._model.device, self._model.dtype), label)
        return np.asarray(pixels.permute(1, 2, 0).float().cpu().numpy())


def to_png(pixels: NDArray[np.float32], seed: int) -> bytes:
    """A PNG file, grey or RGB, with its seed. pixels: float32 [height, width, 1 or 3], 0 to 1."""
    values = (pixels * 255).round().astype(np.uint8)
    facts = PngInfo()
    facts.add_text("seed", str(seed))
    buffer = io.BytesIO()
    Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values).save(buffer, "PNG", pnginfo=facts)
    return buffer.getvalue()
