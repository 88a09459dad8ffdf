"""Images to pixel values with Pillow and numpy alone, as the image processors of transformers make them."""

import io
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from handler import media
from handler.errors import RequestError, TooLarge, UnreadableRequest, UnsupportedMediaType
from handler.inputs import Encoded, Feature

CONFIG_FILE = "preprocessor_config.json"

_FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}
# The most that a JPEG or a GIF can have; Pillow is slow with rows or columns of millions of pixels.
_MAX_SIDE = 65_535
# Where the shorter side is resized to what the model takes, the longer one grows with it.
_MAX_ASPECT = 100
# Each scan of a progressive JPEG is a pass over the whole image, and some 80 bytes are enough for one.
_MAX_SCANS = 64
# Positions are counted in squares of this side where the model has no patches of its own.
_PATCH = 16
# Squares of a heat map from side to side.
_GRID = 14

# The image processors that resize, crop, rescale and normalise in that order and do nothing else.
_PLAIN = ("Bit", "CLIP", "DeiT", "MobileNetV1", "Pvt", "Siglip", "ViT")
# Below this size ConvNext resizes to more than it needs and crops; from it on, it resizes without regard to the aspect.
_CONVNEXT, _CONVNEXT_WARPS = "ConvNext", 384


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image that has not been decoded yet.

    pixels: those that its header says it has, or those of what becomes of it if they are more.
    """

    content: bytes
    pixels: int


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image for the model: uint8 [channels, height, width], and the patches that the model spends on it.

    box: what the model sees of the upright image, in the image's own pixels: left, top, right, bottom.
    """

    pixels: NDArray[np.uint8]
    patches: int
    box: tuple[float, float, float, float]

    def __len__(self) -> int:
        return self.patches


class ImageInputs:
    """Decodes images and makes `pixel_values` of them: float32 [batch, channels, height, width].

    Raises ValueError if the model's image processor is not one whose results are reproduced here.
    """

    def __init__(self, model_dir: Path, config: Mapping[str, Any]) -> None:
        channels = int(config.get("num_channels", 3))
        self.processor = ImageProcessor.load(model_dir, channels)
        height, width = self.processor.size
        self.shapes: Mapping[str, tuple[int, ...]] = {"pixel_values": (-1, channels, height, width)}
        patch = config.get("patch_size") or _PATCH
        down, across = (patch, patch) if isinstance(patch, int) else patch
        self._patches = (height // down) * (width // across) + 1

    def read(self, value: Any) -> ImageFile:
        """One input of a request, of which the header alone is read: see `media.read_bytes` and `dimensions`."""
        content = media.read_bytes(value, "image")
        width, height = dimensions(content)
        across, down = self.processor.resized(width, height)
        return ImageFile(content, max(width * height, across * down, math.prod(self.processor.size)))

    def size(self, sample: ImageFile) -> int:
        """Pixels, known before the image is decoded."""
        return sample.pixels

    def encode(self, samples: Sequence[ImageFile]) -> list[Encoded | RequestError]:
        """Decodes each image and makes one row of it."""
        return [self._encode(sample) for sample in samples]

    def collate(self, rows: Sequence[ImageRow]) -> dict[str, NDArray[np.float32]]:
        """`pixel_values` of all rows."""
        return {"pixel_values": self.processor.normalise(np.stack([row.pixels for row in rows]))}

    def features(self, sample: ImageFile, rows: Sequence[ImageRow], most: int) -> list[list[Feature]]:
        """The squares of a grid over the image."""
        height, width = self.processor.size
        side = max(1, min(_GRID, math.isqrt(most), height, width))
        tops, lefts = (np.linspace(0, size, side + 1).astype(int) for size in (height, width))
        return [
            [
                Feature((down, across), np.s_[tops[down] : tops[down + 1], lefts[across] : lefts[across + 1]], (side,))
                for down in range(side)
                for across in range(side)
            ]
            for _ in rows
        ]

    def hide(self, row: ImageRow, features: Sequence[Feature]) -> ImageRow:
        """The row with the image's mean colour in these squares."""
        pixels = row.pixels.copy()
        mean = row.pixels.mean(axis=(1, 2), keepdims=True).astype(np.uint8)
        for feature in features:
            pixels[(slice(None), *feature.place)] = mean
        return replace(row, pixels=pixels)

    def shown(
        self, sample: ImageFile, rows: Sequence[ImageRow], attributions: Sequence[tuple[Feature, float]]
    ) -> dict[str, Any]:
        """`{"heat_map": [[…], …], "box": {…}}`: rows of squares from the top, and what they cover of the image."""
        heat = np.zeros((attributions[0][0].extent[0],) * 2)
        for feature, score in attributions:
            down, across = feature.key
            heat[down, across] += score
        names = ("xmin", "ymin", "xmax", "ymax")
        return {"heat_map": heat.tolist(), "box": dict(zip(names, rows[0].box, strict=True))}

    def _encode(self, sample: ImageFile) -> Encoded | RequestError:
        try:
            image = decode(sample.content, self.processor.mode)
        except RequestError as error:
            return error
        return Encoded([ImageRow(self.processor.pixels(image), self._patches, self.processor.box(*image.size))])


class ImageProcessor:
    """Resizes, crops and normalises one image as the Pillow-based image processor of transformers does.

    size: (height, width) of what comes out. mode: Pillow's mode of the images that go in, "RGB" or "L".
    Raises ValueError for a configuration that it cannot reproduce.
    """

    def __init__(self, config: Mapping[str, Any], channels: int) -> None:
        kind = re.sub("ImageProcessor(Fast|Pil)?$", "", str(config.get("image_processor_type")))
        if kind not in (*_PLAIN, _CONVNEXT):
            known = ", ".join(f"{name}ImageProcessor" for name in (*_PLAIN, _CONVNEXT))
            raise ValueError(f"image_processor_type {kind!r} is not one of: {known}")
        if channels not in (1, 3):
            raise ValueError(f"the model takes images of {channels} channels; only 1 and 3 are known here")
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not isinstance(config.get(step), bool):
                raise ValueError(f"{step} is missing: load the image processor with transformers 5 and save it again")
        if config.get("do_pad"):
            raise ValueError("do_pad is set: images are resized and cropped here, never padded to a size")
        self.mode = "RGB" if channels == 3 else "L"
        self._resample = Image.Resampling(config.get("resample", Image.Resampling.BILINEAR))
        self._height_width: tuple[int, int] | None = None
        self._shortest: int | None = None
        self._crops: list[tuple[int, int]] = []
        if config["do_resize"]:
            self._set_resize(config, kind)
        if config.get("do_center_crop"):
            self._crops.append(_height_width(config.get("crop_size"), "crop_size"))
        final = self._crops[-1] if self._crops else self._height_width
        if final is None:
            raise ValueError("it leaves images of different sizes; give it a size of height and width, or a crop_size")
        self.size = final
        self._table = _table(config, channels)

    @classmethod
    def load(cls, model_dir: Path, channels: int) -> "ImageProcessor":
        """Reads `preprocessor_config.json`. Raises ValueError, naming it, if it is missing or not understood."""
        path = model_dir / CONFIG_FILE
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")), channels)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: the model needs the configuration of its image processor") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image after it was resized and before it is cropped."""
        if self._height_width is not None:
            return self._height_width[1], self._height_width[0]
        if self._shortest is None:
            return width, height
        longer = int(self._shortest * max(width, height) / min(width, height))
        return (self._shortest, longer) if width <= height else (longer, self._shortest)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """An image of the right mode, resized and cropped: uint8 [channels, height, width]."""
        image = image.resize(self.resized(*image.size), self._resample)
        for height, width in self._crops:
            # Floor division also where the image is the smaller one: what is missing is filled with zeros.
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        array = np.asarray(image)
        return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """What is left of an image of this size once it is cropped: left, top, right and bottom, in its own pixels."""
        across, down = self.resized(width, height)
        left, top, right, bottom = 0, 0, across, down
        for crop_height, crop_width in self._crops:
            left += (right - left - crop_width) // 2
            top += (bottom - top - crop_height) // 2
            right, bottom = left + crop_width, top + crop_height
        return (left * width / across, top * height / down, right * width / across, bottom * height / down)

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Rescales and normalises a batch: uint8 to float32, both [batch, channels, height, width]."""
        values = np.empty(pixels.shape, dtype=np.float32)
        for channel, table in enumerate(self._table):
            values[:, channel] = table[pixels[:, channel]]
        return values

    def _set_resize(self, config: Mapping[str, Any], kind: str) -> None:
        size = config.get("size")
        shortest = size.get("shortest_edge") if isinstance(size, dict) and set(size) == {"shortest_edge"} else None
        if shortest is None:
            self._height_width = _height_width(size, "size")
        elif type(shortest) is not int or shortest < 1:
            raise ValueError(f"size: shortest_edge must be a positive integer, not {shortest!r}")
        elif kind != _CONVNEXT:
            self._shortest = shortest
        elif shortest < _CONVNEXT_WARPS:
            self._shortest = int(shortest / float(config.get("crop_pct") or 224 / 256))
            self._crops.append((shortest, shortest))
        else:
            self._height_width = (shortest, shortest)


def dimensions(content: bytes) -> tuple[int, int]:
    """Width and height of an image as its header says, before it is turned upright.

    Raises RequestError: 415 for what is not PNG, JPEG, WebP or GIF, 400 for a broken header, 413 for sides that are too
    long or too unequal.
    """
    with _reading(), _opened(content) as image:
        width, height = image.size
    if not width or not height:
        raise UnreadableRequest("the image has no pixels")
    longer = max(width, height)
    if longer > _MAX_SIDE or longer > _MAX_ASPECT * min(width, height):
        raise TooLarge(f"the image is {width} x {height}: a side is too long, or they are too unequal; crop it")
    return width, height


def decode(content: bytes, mode: str) -> Image.Image:
    """Decodes an image, upright as its EXIF data says, in Pillow's mode "RGB" or "L"; of a GIF, the first frame.

    Transparency is dropped, as `Image.convert` does. 16-bit grey becomes 8-bit by its high byte, where `convert` would
    make nearly all of it white. Raises UnsupportedMediaType, UnreadableRequest or TooLarge.
    """
    with _reading(), _opened(content) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
        return image.convert(mode)


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """The image of which the header alone was read. Raises UnsupportedMediaType and TooLarge."""
    kind = _FORMATS.get(media.media_type(content) or "")
    if kind is None:
        raise UnsupportedMediaType("these bytes are no image that this model takes; send PNG, JPEG, WebP or GIF")
    # In compressed data a byte 0xFF is never followed by this one, so nothing but scans is counted.
    if kind == "JPEG" and (scans := content.count(b"\xff\xda")) > _MAX_SCANS:
        raise TooLarge(f"the JPEG has {scans} scans; at most {_MAX_SCANS} are taken: save it again, not progressive")
    with Image.open(io.BytesIO(content), formats=(kind,)) as image:
        yield image


@contextmanager
def _reading() -> Iterator[None]:
    """Turns whatever Pillow raises for a broken file, which may be anything, into a RequestError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata: it does no harm here
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except RequestError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError):
            raise TooLarge("the image has too many pixels; scale it down") from None
        except Exception:
            raise UnreadableRequest("the image is broken or cut off; send the whole file") from None


def _height_width(size: Any, name: str) -> tuple[int, int]:
    if not isinstance(size, dict) or set(size) != {"height", "width"}:
        raise ValueError(f'{name} must be {{"height": …, "width": …}}, not {size!r}')
    pair = size["height"], size["width"]
    if not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(f"{name}: height and width must be positive integers, not {pair}")
    return pair


def _table(config: Mapping[str, Any], channels: int) -> NDArray[np.float32]:
    """What becomes of each of the 256 values of a pixel: float32 [channels, 256]."""
    values = np.arange(256, dtype=np.float64)
    if config["do_rescale"]:
        values = values * float(config.get("rescale_factor", 1 / 255))
    table = np.tile(values.astype(np.float32), (channels, 1))
    if config["do_normalize"]:
        table = (table - _per_channel(config, "image_mean", channels)) / _per_channel(config, "image_std", channels)
    if not np.isfinite(table).all():
        raise ValueError("image_mean and image_std make values that are not numbers; image_std must not be 0")
    return table


def _per_channel(config: Mapping[str, Any], name: str, channels: int) -> NDArray[np.float32]:
    """float32 [channels, 1]; one number stands for all channels."""
    value = config.get(name)
    values = np.asarray([value] * channels if isinstance(value, int | float) else value, dtype=np.float32)
    if values.shape != (channels,):
        raise ValueError(f"{name} must have one number for each of the model's {channels} channels, not {value!r}")
    return values[:, None]
