"""Images: the same pixels as transformers makes, whatever the file, and nothing in a file harms the worker."""

import base64
import io
import json
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import torch
import transformers
from conftest import NO_CHECKPOINTS, OFFLINE, ROOT, HubClient, Served, build_here, train_here
from datasets import Dataset
from numpy.typing import NDArray
from PIL import Image
from text_models import converted
from transformers.image_utils import load_image

import marble_client
from handler.engine import Engine
from handler.errors import (
    InvalidInput,
    InvalidParameter,
    Overloaded,
    RequestError,
    TooLarge,
    UnreadableRequest,
    UnsupportedMediaType,
)
from handler.inputs import Encoded
from handler.inputs.images import ImageInputs, ImageProcessor, decode
from handler.messages import Request, Result
from marble_client import cli
from marble_client.stubs import (
    open_inference_grpc_pb2,
    open_inference_grpc_pb2_grpc,
)
from training import base_model, bundle, evaluation, mistakes
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options
from training.tasks import Splits
from training.tasks.image_classification import ImageClassification, TrainingImages


def image(width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth picture with some noise, unlike itself under every flip and rotation."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 120, height))
    channels = [across, down, (across * down) % 256, 255 - across / 2]
    values = np.stack(channels, axis=-1) + rng.integers(0, 40, (height, width, 4))
    rgba = Image.fromarray(values.clip(0, 255).astype(np.uint8), "RGBA" if "A" in mode else None)
    return rgba.convert("RGB").convert(mode) if "A" not in mode else rgba.convert(mode)


def saved(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says what size it is and has next to no data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b""))


def inputs(folder: Path, processor: Any = None, channels: int = 3, **config: Any) -> ImageInputs:
    (processor or transformers.ViTImageProcessorPil(size={"height": 24, "width": 32})).save_pretrained(folder)
    return ImageInputs(folder, {"num_channels": channels, **config})


def pixel_values(reader: ImageInputs, *contents: Any) -> NDArray[np.float32]:
    rows = []
    for encoded in reader.encode([reader.read(content) for content in contents]):
        assert isinstance(encoded, Encoded)
        rows += encoded.rows
    return reader.collate(rows)["pixel_values"]


# --- the same pixel values as transformers

PROCESSORS = {
    "vit": transformers.ViTImageProcessorPil(size={"height": 24, "width": 32}),
    "vit, upscaled": transformers.ViTImageProcessorPil(size={"height": 224, "width": 224}),
    "vit, nearest": transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}, resample=0),
    "vit, not normalised": transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False),
    "vit, raw": transformers.ViTImageProcessorPil(
        size={"height": 16, "width": 16}, do_normalize=False, do_rescale=False
    ),
    "vit, one mean": transformers.ViTImageProcessorPil(
        size={"height": 9, "width": 9}, image_mean=0.2, image_std=0.3, rescale_factor=1 / 127.5
    ),
    "deit": transformers.DeiTImageProcessorPil(),
    "deit, odd crop": transformers.DeiTImageProcessorPil(
        size={"height": 40, "width": 41}, crop_size={"height": 31, "width": 30}
    ),
    "crop larger than the image": transformers.DeiTImageProcessorPil(
        size={"height": 20, "width": 41}, crop_size={"height": 31, "width": 30}
    ),
    "crop alone": transformers.DeiTImageProcessorPil(do_resize=False, crop_size={"height": 27, "width": 50}),
    "convnext, cropped": transformers.ConvNextImageProcessorPil(size={"shortest_edge": 28}),
    "convnext, crop_pct": transformers.ConvNextImageProcessorPil(size={"shortest_edge": 33}, crop_pct=0.6),
    "convnext, warped": transformers.ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    "convnext, cropped twice": transformers.ConvNextImageProcessorPil(
        size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 25, "width": 31}
    ),
    "bit": transformers.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    "clip": transformers.CLIPImageProcessorPil(),
    "siglip": transformers.SiglipImageProcessorPil(),
    "pvt": transformers.PvtImageProcessorPil(size={"height": 30, "width": 30}),
    "mobilenet v1": transformers.MobileNetV1ImageProcessorPil(),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_pixel_values_equal_those_of_transformers(processor: Any, tmp_path: Path) -> None:
    reader = inputs(tmp_path, processor)
    pictures = [image(40, 30), image(30, 41), image(64, 64), image(3, 50), image(1, 1), image(500, 333)]
    found = pixel_values(reader, *(saved(picture) for picture in pictures))
    expected = np.concatenate([processor(picture, return_tensors="np")["pixel_values"] for picture in pictures])
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert found.shape[1:] == reader.shapes["pixel_values"][1:]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_grey_pixel_values_equal_those_of_transformers(tmp_path: Path) -> None:
    processor = transformers.ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.3], image_std=[0.2])
    pictures = [image(mode="L", seed=seed) for seed in range(3)]
    found = pixel_values(inputs(tmp_path, processor, channels=1), *map(saved, pictures))
    expected = np.concatenate([processor(picture, return_tensors="np")["pixel_values"] for picture in pictures])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_real_images_equal_those_of_transformers(shared: Path, tmp_path: Path) -> None:
    """Files go through transformers' own reading of files, too."""
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    files = sorted((shared / "mnist" / "samples").glob("*.png"))
    assert len(files) == 40
    expected = processor([load_image(str(file)) for file in files], return_tensors="np")["pixel_values"]
    found = pixel_values(inputs(tmp_path, processor), *(file.read_bytes() for file in files))
    np.testing.assert_allclose(found, expected, atol=1e-6)


BROKEN_CONFIGS = {
    "unknown processor": ({"image_processor_type": "LevitImageProcessor"}, "image_processor_type 'Levit' is not one"),
    "no processor": ({"image_processor_type": None}, "is not one of: BitImageProcessor"),
    "old file": ({"do_rescale": None}, "do_rescale is missing: load the image processor with transformers 5"),
    "padding": ({"do_pad": True}, "do_pad is set"),
    "number as size": ({"size": 224}, "size must be"),
    "two kinds of size": ({"size": {"shortest_edge": 2, "longest_edge": 3}}, "size must be"),
    "no height": ({"size": {"height": 0, "width": 3}}, "size: height and width must be positive"),
    "no edge": ({"size": {"shortest_edge": 0}}, "shortest_edge must be a positive integer, not 0"),
    "sizes differ": ({"size": {"shortest_edge": 9}}, "it leaves images of different sizes"),
    "nothing resized": ({"do_resize": False}, "it leaves images of different sizes"),
    "no crop size": ({"do_center_crop": True}, "crop_size must be"),
    "grey mean": ({"image_mean": [0.5]}, "image_mean must have one number for each of the model's 3 channels"),
    "no deviation": ({"image_std": [0.5, 0, 0.5]}, "image_std must not be 0"),
    "no resampling": ({"resample": 99}, "99 is not a valid Resampling"),
}


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
@pytest.mark.parametrize(("changes", "message"), BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_a_processor_that_cannot_be_reproduced_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = json.loads(PROCESSORS["vit"].to_json_string())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: ") as caught:
        ImageProcessor.load(tmp_path, 3)
    assert message in str(caught.value)


def test_a_missing_or_unreadable_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is missing"):
        ImageProcessor.load(tmp_path, 3)
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: "):
        ImageProcessor.load(tmp_path, 3)
    with pytest.raises(ValueError, match="images of 4 channels"):
        inputs(tmp_path, channels=4)


def test_rows_count_patches(tmp_path: Path) -> None:
    for config, patches in (({"patch_size": 4}, 49), ({"patch_size": [8, 16]}, 7), ({}, 3)):
        reader = inputs(tmp_path, **config)
        [encoded] = reader.encode([reader.read(saved(image()))])
        assert isinstance(encoded, Encoded)
        assert [len(row) for row in encoded.rows] == [patches]
        assert (encoded.tokens, encoded.overflows) == (0, False)


def test_no_torch_is_needed_to_read_images() -> None:
    code = (
        "import sys, handler.inputs.images; sys.exit(bool({'torch', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=OFFLINE, check=False).returncode == 0


# --- files of every kind

WRITABLE = {
    "PNG": ("1", "L", "P", "RGB", "LA", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in WRITABLE.items() for mode in modes])
def test_every_kind_of_file_is_read_as_transformers_does(form: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(saved(image(mode=mode), form))
    expected = load_image(str(path))
    np.testing.assert_array_equal(np.asarray(decode(path.read_bytes(), "RGB")), np.asarray(expected))
    assert decode(path.read_bytes(), "L").mode == "L"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_images_are_turned_upright(form: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image"
    path.write_bytes(saved(image(), form, exif=exif, **({"lossless": True} if form == "WEBP" else {})))
    upright = decode(path.read_bytes(), "RGB")
    assert upright.size == ((40, 30) if orientation < 5 else (30, 40))
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(load_image(str(path))))


def test_an_unknown_orientation_and_broken_exif_data_are_no_errors() -> None:
    for exif in (
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0",
        b"Exif\0\0MM\0*" + b"\xff" * 9,
        b"?",
    ):
        assert decode(saved(image(), "JPEG", exif=exif), "RGB").size == (40, 30)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)
    content = saved(Image.fromarray(values))
    assert Image.open(io.BytesIO(content)).mode == "I;16"
    np.testing.assert_array_equal(np.asarray(decode(content, "L")), values >> 8)
    np.testing.assert_array_equal(np.asarray(decode(content, "RGB"))[..., 1], values >> 8)


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [image(seed=seed) for seed in range(3)]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        content = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
        alone = saved(frames[0], form, **options)
        np.testing.assert_array_equal(np.asarray(decode(content, "RGB")), np.asarray(decode(alone, "RGB")))


# --- what an input may be


def test_bytes_and_base64_in_every_wrapping_are_the_same_image(tmp_path: Path) -> None:
    reader, content = inputs(tmp_path), saved(image())
    text = base64.b64encode(content).decode()
    ways = [
        content,
        bytearray(content),
        text,
        f"data:image/png;base64,{text}",
        base64.encodebytes(content).decode(),
        {"b64": text},
        {"b64": f"DATA:image/png;base64,{text}"},
    ]
    values = pixel_values(reader, *ways)
    assert len(values) == len(ways)
    assert (values == values[0]).all()


REFUSED: dict[str, tuple[Any, type[RequestError], str]] = {
    "address": ("https://example.org/a.png", InvalidInput, "addresses are not fetched"),
    "address of a file": ("FILE:///etc/passwd", InvalidInput, "addresses are not fetched"),
    "address in b64": ({"b64": "http://localhost:8081/models"}, InvalidInput, "addresses are not fetched"),
    "path": ("/etc/hostname.png", UnreadableRequest, "not base64"),
    "text": ("a cat on a mat", UnreadableRequest, "not base64"),
    "short text": ("a cat", UnreadableRequest, "not base64"),
    "letters beyond ascii": ("日本語", UnreadableRequest, "not base64"),
    "lone surrogate": ("\ud800", UnreadableRequest, "not base64"),
    "no characters": ("", UnreadableRequest, "has no bytes"),
    "data address without base64": ("data:image/png,abc", UnreadableRequest, "not base64"),
    "number": (7, InvalidInput, "not int"),
    "null": (None, InvalidInput, "not NoneType"),
    "object": ({"image": "abcd"}, InvalidInput, "not dict"),
    "number in b64": ({"b64": 7}, InvalidInput, "not int"),
    "list": ([[0, 1], [2, 3]], InvalidInput, "not list"),
    "base64 of a text": ("YWJjZA==", UnsupportedMediaType, "send PNG, JPEG, WebP or GIF"),
    "no bytes": (b"", UnreadableRequest, "has no bytes"),
    "text bytes": (b"a cat on a mat", UnsupportedMediaType, "send PNG, JPEG, WebP or GIF"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UnsupportedMediaType, "send PNG"),
    "bmp": (saved(image(), "BMP"), UnsupportedMediaType, "send PNG"),
    "tiff": (saved(image(), "TIFF"), UnsupportedMediaType, "send PNG"),
    "signature alone": (b"\x89PNG\r\n\x1a\n", UnreadableRequest, "broken or cut off"),
    "jpeg of three bytes": (b"\xff\xd8\xff", UnreadableRequest, "broken or cut off"),
    "webp header alone": (b"RIFF\x99\0\0\0WEBPVP8X", UnreadableRequest, "broken or cut off"),
    "gif header alone": (b"GIF89a\0\0\0\0", UnreadableRequest, "broken or cut off"),
    "no width": (png_header(0, 10), UnreadableRequest, ""),
    "bomb beyond pillow's limit": (png_header(10_000, 10_000), TooLarge, "too many pixels"),
    "bomb beyond all limits": (png_header(2**31 - 1, 2**31 - 1), TooLarge, "too many pixels"),
    "long line": (png_header(65_536, 1000), TooLarge, "a side is too long"),
    "thin line": (png_header(9, 901), TooLarge, "too unequal"),
}


@pytest.mark.parametrize(("value", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_image_is_refused(value: Any, kind: type[RequestError], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        inputs(tmp_path).read(value)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert str(caught.value).isascii()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_files_cut_off_anywhere_are_errors_of_their_own(form: str, tmp_path: Path) -> None:
    reader, content = inputs(tmp_path), saved(image(), form)
    whole = reader.read(content)
    refused, samples = [], [whole]
    for length in range(1, len(content) - 30, 7):  # the last bytes of a PNG are checksums and an end mark
        try:
            samples.append(reader.read(content[:length]))
        except RequestError as error:
            refused.append(error)
    outcomes = reader.encode([*samples, whole])
    assert isinstance(outcomes[0], Encoded)
    assert isinstance(outcomes[-1], Encoded)
    refused += [outcome for outcome in outcomes[1:-1] if isinstance(outcome, RequestError)]
    assert len(refused) == len(range(1, len(content) - 30, 7))
    assert {type(error) for error in refused} == {UnreadableRequest, UnsupportedMediaType}
    assert isinstance(refused[0], UnsupportedMediaType)  # too short to be told


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_bytes_raise_nothing_but_request_errors(form: str, tmp_path: Path) -> None:
    reader, content = inputs(tmp_path), saved(image(), form)
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(8, len(content), rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        try:
            [outcome] = reader.encode([reader.read(damaged)])
        except RequestError:
            continue
        assert isinstance(outcome, Encoded | RequestError)


def test_a_gif_whose_frame_is_larger_than_it_says_is_measured_by_the_frame(tmp_path: Path) -> None:
    content = bytearray(saved(image(2100, 1000, "P"), "GIF"))
    content[6:10] = struct.pack("<HH", 1, 1)
    assert inputs(tmp_path).read(content).pixels == 2_100_000


def test_a_webp_canvas_of_hundreds_of_megapixels_is_refused_before_it_is_made(tmp_path: Path) -> None:
    frame = saved(image(16, 16), "WEBP")[12:]
    side = (16_382).to_bytes(3, "little")

    def part(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data

    body = b"WEBP" + part(b"VP8X", bytes([2, 0, 0, 0]) + side + side) + part(b"ANIM", bytes(6))
    body += part(b"ANMF", bytes(6) + (15).to_bytes(3, "little") * 2 + bytes(4) + frame)
    with pytest.raises(TooLarge):
        inputs(tmp_path).read(part(b"RIFF", body))


def test_a_progressive_jpeg_of_endless_scans_is_refused(tmp_path: Path) -> None:
    content = saved(image(200, 200), "JPEG", progressive=True)
    assert isinstance(inputs(tmp_path).encode([inputs(tmp_path).read(content)])[0], Encoded)
    scan = content[content.rindex(b"\xff\xda") : -2]
    with pytest.raises(TooLarge, match="scans; at most 64"):
        inputs(tmp_path).read(content[:-2] + scan * 1000 + b"\xff\xd9")


def test_what_an_image_costs_is_known_before_it_is_decoded(tmp_path: Path) -> None:
    reader = inputs(tmp_path)
    assert reader.size(reader.read(png_header(1000, 999))) == 999_000
    # A tiny image is as much work as what becomes of it.
    assert reader.size(reader.read(png_header(1, 1))) == 24 * 32
    reader = inputs(tmp_path, PROCESSORS["clip"])
    assert reader.size(reader.read(png_header(5, 90))) == 224 * 4032
    reader = inputs(tmp_path, PROCESSORS["crop alone"])
    assert reader.size(reader.read(png_header(1, 1))) == 27 * 50


# --- predictions

LABELS = [str(digit) for digit in range(10)]
NAMES: dict[str, Any] = {"id2label": dict(enumerate(LABELS)), "label2id": {name: int(name) for name in LABELS}}
WIDE = {"initializer_range": 0.3}  # weights that give a model preferences, unlike those near zero
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, **WIDE}
SQUARE = {"height": 28, "width": 28}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "vit": (
        transformers.ViTConfig(image_size=28, patch_size=7, **SMALL, **NAMES),
        transformers.ViTImageProcessorPil(size=SQUARE),
    ),
    "deit": (
        transformers.DeiTConfig(
            image_size=24, patch_size=6, architectures=["DeiTForImageClassification"], **SMALL, **NAMES
        ),
        transformers.DeiTImageProcessorPil(size=SQUARE, crop_size={"height": 24, "width": 24}),
    ),
    "resnet": (
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **NAMES),
        transformers.ConvNextImageProcessorPil(size={"shortest_edge": 28}),
    ),
    "convnext": (
        transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], **WIDE, **NAMES),
        transformers.ConvNextImageProcessorPil(size={"shortest_edge": 40}, do_center_crop=True, crop_size=SQUARE),
    ),
    "swin": (
        transformers.SwinConfig(
            image_size=32, patch_size=4, window_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], **WIDE, **NAMES
        ),
        transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}),
    ),
}


@pytest.fixture(scope="module")
def digits(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of MNIST digits as PNG files: train/<digit>/, and test/ with an index.csv."""
    folder = tmp_path_factory.mktemp("digits")
    with np.load(shared / "mnist" / "mnist_small.npz") as arrays:
        train, test = (list(zip(arrays[f"x_{part}"], arrays[f"y_{part}"], strict=True)) for part in ("train", "test"))
    for number, (pixels, label) in enumerate(train[:400]):
        (folder / "train" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "train" / str(label) / f"{number}.png")
    (folder / "test").mkdir()
    rows = ["path,label"]
    for number, (pixels, label) in enumerate(test[:100]):
        Image.fromarray(pixels).save(folder / "test" / f"{number}.png")
        rows.append(f"{number}.png,{label}")
    (folder / "test" / "index.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def hundred(digits: Path) -> list[Path]:
    files = sorted((digits / "test").glob("*.png"))
    assert len(files) == 100
    return files


def model_folder(folder: Path, config: Any, processor: Any, **settings: Any) -> Path:
    transformers.set_seed(3)
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    folder.mkdir(exist_ok=True)
    bundle.write_model(folder, model, processor)
    bundle.write_model_config(folder, "image-classification", settings)
    return folder


def predictions(engine: Engine, contents: list[Any], **parameters: Any) -> list[Any]:
    [result] = engine.predict([Request(contents, parameters, many=True)])
    assert isinstance(result, Result)
    return list(result.predictions)


def by_label(entries: Any) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in entries}


def pipeline_scores(folder: Path, files: list[Path], **parameters: Any) -> list[dict[str, float]]:
    reference = transformers.pipeline("image-classification", str(folder), device="cpu")
    return [by_label(entries) for entries in reference([str(file) for file in files], top_k=10, **parameters)]


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_equal_the_transformers_pipeline(family: str, hundred: list[Path], tmp_path: Path) -> None:
    folder = model_folder(tmp_path / family, *FAMILIES[family])
    train_here("--task", "image-classification", "--base-model", folder, "--output-dir", tmp_path / "bundle")
    contents = [file.read_bytes() for file in hundred]
    engine = Engine(folder, threads=1)
    wanted = pipeline_scores(folder, hundred)
    assert max(np.ptp([entry[label] for entry in wanted]) for label in LABELS) > 0.01  # it does look at the image
    for backend in (engine, Engine(converted(tmp_path / "bundle"), threads=1)):
        for one, other in zip(predictions(backend, contents, top_k=10), wanted, strict=True):
            assert by_label(one) == pytest.approx(other, abs=1e-4)
            assert [entry["score"] for entry in one] == sorted((entry["score"] for entry in one), reverse=True)
    found = predictions(engine, contents[:10], top_k=10, function_to_apply="none")
    for one, other in zip(found, pipeline_scores(folder, hundred[:10], function_to_apply="none"), strict=True):
        assert by_label(one) == pytest.approx(other, abs=1e-4)


def test_predictions_of_a_grey_model_equal_its_parts(hundred: list[Path], tmp_path: Path) -> None:
    """The pipeline makes every image RGB, which a model of one channel cannot take."""
    config = transformers.ViTConfig(image_size=28, patch_size=7, num_channels=1, **SMALL, **NAMES)
    processor = transformers.ViTImageProcessorPil(size=SQUARE, image_mean=[0.5], image_std=[0.5])
    folder = model_folder(tmp_path / "grey", config, processor)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    with torch.inference_mode():
        pixels = processor([Image.open(file) for file in hundred], return_tensors="pt")["pixel_values"]
        wanted = model(pixel_values=pixels).logits.softmax(dim=-1).numpy()
    found = predictions(Engine(folder, threads=1), [file.read_bytes() for file in hundred], top_k=10)
    for entries, scores in zip(found, wanted, strict=True):
        assert by_label(entries) == pytest.approx(dict(zip(LABELS, scores, strict=True)), abs=1e-4)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(model_folder(tmp_path_factory.mktemp("models") / "vit", *FAMILIES["vit"]), threads=1)


def outcome(engine: Engine, value: Any, **parameters: Any) -> Any:
    [result] = engine.predict([Request([value], parameters)])
    return result.predictions[0] if isinstance(result, Result) else result


def test_five_labels_are_answered_unless_asked_otherwise(engine: Engine) -> None:
    content = saved(image())
    full = outcome(engine, content, top_k=10)
    assert len(full) == 10
    assert outcome(engine, content) == outcome(engine, content, top_k=None) == full[:5]
    assert outcome(engine, content, top_k=2) == full[:2]
    assert outcome(engine, content, top_k=99) == full
    assert sum(entry["score"] for entry in full) == pytest.approx(1)
    raw = by_label(outcome(engine, content, top_k=10, function_to_apply="none"))
    squashed = by_label(outcome(engine, content, top_k=10, function_to_apply="sigmoid"))
    assert squashed == pytest.approx({label: 1 / (1 + np.exp(-value)) for label, value in raw.items()})


@pytest.mark.parametrize(
    "parameters",
    [{"top_k": 0}, {"top_k": "5"}, {"top_k": 2.0}, {"function_to_apply": "argmax"}, {"threshold": 0.5}],
)
def test_unknown_and_ill_typed_parameters_are_refused(engine: Engine, parameters: dict[str, Any]) -> None:
    error = outcome(engine, saved(image()), **parameters)
    assert isinstance(error, InvalidParameter)
    assert next(iter(parameters)) in str(error)


def test_an_image_that_cannot_be_read_fails_alone(engine: Engine) -> None:
    good = saved(image())
    requests = [
        Request([good]),
        Request([good[:900]]),
        Request([good, png_header(50, 50), "https://example.org/a.png", b"text", good], many=True),
        Request([good], {"top_k": 0}),
        Request([good]),
    ]
    first, cut, several, wrong, last = engine.predict(requests)
    assert isinstance(first, Result)
    assert isinstance(cut, UnreadableRequest)
    assert isinstance(wrong, InvalidParameter)
    assert isinstance(last, Result)
    assert isinstance(several, Result)
    assert several.predictions[0] == several.predictions[4]
    assert [type(entry) for entry in several.predictions[1:4]] == [
        UnreadableRequest,
        InvalidInput,
        UnsupportedMediaType,
    ]
    assert (last.usage.tokens, last.usage.truncated, last.usage.windows) == (0, False, 1)
    for found in (several.predictions[0], last.predictions[0]):
        assert by_label(found) == pytest.approx(by_label(first.predictions[0]), abs=1e-6)


def test_pixels_are_rationed_before_anything_is_decoded(tmp_path: Path) -> None:
    limited = Engine(model_folder(tmp_path / "vit", *FAMILIES["vit"]), threads=1, max_pixels=2000)
    small, broken_if_decoded = saved(image(40, 30)), png_header(50, 50)
    assert len(outcome(limited, small)) == 5
    for value, pixels in ((broken_if_decoded, 2500), (png_header(8000, 8000), 64_000_000)):
        error = outcome(limited, value)
        assert isinstance(error, TooLarge)
        assert f"the image has {pixels} pixels; at most 2000 are taken" in str(error)
    [error] = limited.predict([Request([small, small], many=True)])
    assert isinstance(error, TooLarge)
    assert "2400 pixels" in str(error)
    outcomes = limited.predict([Request([small])] * 8)
    assert [type(entry) for entry in outcomes] == [Result] * 6 + [Overloaded] * 2


# --- training


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet trained from scratch on a folder of digits, by train.py."""
    place = tmp_path_factory.mktemp("bundles") / "digits"
    train_here(
        *("--task", "image-classification", "--from-scratch", "resnet"),
        *("--train-file", digits / "train", "--test-file", digits / "test", "--output-dir", place),
        *("--num-train-epochs", 5, "--learning-rate", 3e-3, "--per-device-train-batch-size", 16),
    )
    return place


@pytest.fixture(scope="module")
def grey(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of one channel, trained for a few steps on an index."""
    place = tmp_path_factory.mktemp("bundles") / "grey"
    spec = "vit image_size=28 patch_size=7 hidden_size=32 num_hidden_layers=1 num_attention_heads=2 num_channels=1"
    train_here(
        *("--task", "image-classification", "--from-scratch", spec, *NO_CHECKPOINTS, "--augment"),
        *("--train-file", digits / "test" / "index.csv", "--output-dir", place, "--max-steps", 4),
    )
    return place


def test_training_learns_and_says_so(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["primary"] == "accuracy"
    assert metrics["labels"] == LABELS
    assert metrics["rows"] == {"train": 360, "validation": 40, "test": 100}
    scores = metrics["splits"]["test"]
    most = max(map(sum, scores["confusion_matrix"])) / 100
    assert scores["accuracy"] > 3 * most  # of answering one digit always
    assert 0 < scores["macro_f1"] <= 1
    assert len(scores["confusion_matrix"]) == 10
    assert len(metrics["epochs"]) == 5
    sources = json.loads((trained / "provenance.json").read_text())["data"]
    assert sources["train"]["file"] == "train"
    assert len({sources["train"]["sha256"], sources["test"]["sha256"]}) == 2
    assert "image-classification" in (trained / "README.md").read_text()


def test_the_report_shows_what_is_hardest_and_whether_scores_are_probabilities(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())["splits"]["validation"]
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert f"{metrics['ece']:.4f}" in page
    assert "It is not applied: the model serves its scores as they are." in page
    engine = Engine(trained, threads=1)
    rows = [json.loads(line) for line in (trained / "validation.jsonl").read_text().splitlines()]
    rows[0]["target"] = "1" if rows[0]["target"] != "1" else "2"  # one mistake at least
    predictions = evaluation.predict(engine, rows)
    assert all(len(prediction) == 10 for prediction in predictions)
    found = mistakes.hardest(engine, rows, predictions)
    assert found
    scores = [next(iter(mistake.scores.values())) for mistake in found]
    assert scores == sorted(scores, reverse=True)
    for mistake in found:
        assert mistake.picture is not None
        with Image.open(io.BytesIO(base64.b64decode(mistake.picture.png))) as image:
            assert image.size == (mistake.picture.width, mistake.picture.height) == (28, 28)
        covered = sum(square.width * square.height for square in mistake.picture.squares)
        assert covered == pytest.approx(28 * 28)
    right = sum(row["target"] == prediction[0]["label"] for row, prediction in zip(rows, predictions, strict=True))
    assert page.count('<svg class="picture"') == min(10, round(40 * (1 - metrics["accuracy"]))) >= len(found) - 1
    assert len(found) == min(10, 40 - right)


def test_a_bundle_is_a_model_that_transformers_loads(trained: Path, grey: Path, hundred: list[Path]) -> None:
    assert by_label(outcome(Engine(trained, threads=1), hundred[0].read_bytes(), top_k=10)) == pytest.approx(
        pipeline_scores(trained, hundred[:1])[0], abs=1e-4
    )
    processor = transformers.AutoImageProcessor.from_pretrained(grey)
    assert (dict(processor.size), list(processor.image_mean)) == (SQUARE, [0.5])
    assert transformers.AutoConfig.from_pretrained(grey).num_channels == 1
    for bundled in (trained, grey):
        for line in (bundled / "golden.jsonl").read_text().splitlines():
            assert len(json.loads(line)["predictions"]) == 10


def test_training_pixels_are_those_of_the_served_model(trained: Path, digits: Path) -> None:
    paths = sorted(map(str, (digits / "train").rglob("*.png")))[:6]
    rows = Dataset.from_dict({"path": paths, "label": [0] * 6})
    processor = ImageProcessor.load(trained, 3)
    plain, moved = TrainingImages(rows, processor), TrainingImages(rows, processor, augment=True)
    reader = ImageInputs(trained, {})
    served = pixel_values(reader, *(Path(path).read_bytes() for path in paths))
    np.testing.assert_array_equal(processor.normalise(np.stack([plain[index][0] for index in range(6)])), served)
    torch.manual_seed(1)
    once, twice = moved[0][0], moved[0][0]
    assert once.shape == twice.shape == plain[0][0].shape
    assert not np.array_equal(once, twice)
    assert abs(float(once.mean()) - float(plain[0][0].mean())) < 20


def load(location: Path, splits: Splits) -> tuple[Any, Any]:
    options = Options(base_model=str(location))
    return ImageClassification().load(base_model.resolve(str(location)), splits, options)


def test_a_trained_model_is_a_base_for_other_labels_and_is_bundled_as_it_is(trained: Path) -> None:
    model, processor = load(trained, Splits(None, None, None, ["cat", "dog"]))
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert dict(processor.size) == SQUARE
    base = base_model.resolve(str(trained))
    splits = ImageClassification().read(Options(base_model=str(trained)), 7, base)
    assert splits == Splits(None, None, None, LABELS)
    same, _ = load(trained, splits)
    before = transformers.AutoModelForImageClassification.from_pretrained(trained).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in same.state_dict().items())
    # Without examples there are still images to prove the model by.
    assert len(ImageClassification().golden([], 512, 7)) == 3


def test_what_cannot_be_trained_or_served_is_refused(trained: Path, digits: Path, tmp_path: Path) -> None:
    task, nothing = ImageClassification(), BaseModel("", "none", None, None)
    with pytest.raises(UserError, match=r"image-classification needs --base-model, .* or --from-scratch"):
        task.read(Options(train_file=str(digits / "train")), 7, nothing)
    base = base_model.resolve(None, "vit")
    write_bad = tmp_path / "images" / "0"
    write_bad.mkdir(parents=True)
    (write_bad / "cut.png").write_bytes(saved(image())[:500])
    (write_bad / "huge.png").write_bytes(png_header(9000, 9000))
    (write_bad / "notes.txt").write_bytes(b"a text")
    with pytest.raises(UserError) as caught:
        task.read(Options(train_file=str(tmp_path / "images")), 7, base)
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines[1:]] == [
        "  row 1 (0/cut.png)",
        "  row 2 (0/huge.png)",
        "  row 3 (0/notes.txt)",
    ]
    for line, reason in zip(lines[1:], ("broken or cut off", "81000000 pixels", "send PNG"), strict=True):
        assert reason in line
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    transformers.LevitImageProcessorPil().save_pretrained(other)
    with pytest.raises(UserError, match="an image classifier that can be served: image_processor_type 'Levit'"):
        load(other, Splits(None, None, None, LABELS))
    with pytest.raises(UserError, match="cannot be loaded as an image classifier"):
        task.load(base_model.resolve(None), Splits(None, None, None, LABELS), Options())


def test_a_model_of_any_size_takes_the_size_of_its_images(digits: Path, tmp_path: Path) -> None:
    base = base_model.resolve(None, "resnet")
    splits = ImageClassification().read(Options(train_file=str(digits / "train")), 7, base)
    assert dict(ImageClassification().load(base, splits, Options())[1].size) == SQUARE
    for label in "ab":
        for number in range(4):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{number}.jpg").write_bytes(saved(image(300, 200 + number), "JPEG"))
    splits = ImageClassification().read(Options(train_file=str(tmp_path), validation_share=0.3), 7, base)
    processor = ImageClassification().load(base, splits, Options())[1]
    assert dict(processor.size) == {"height": 224, "width": 224}


# --- archives, served


@pytest.fixture(scope="module")
def archives(trained: Path, grey: Path, shared_store: Path) -> Path:
    """A model store with `numerals` (OpenVINO) and `grey` (torch)."""
    build_here(trained, shared_store, "numerals", "openvino")
    build_here(grey, shared_store, "grey", "torch")
    return shared_store


def test_openvino_equals_the_transformers_pipeline(
    trained: Path, archives: Path, hundred: list[Path], tmp_path: Path
) -> None:
    with zipfile.ZipFile(archives / "numerals.mar") as file:
        file.extractall(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    engine = Engine(tmp_path)
    assert engine.settings.backend == "openvino"
    found = predictions(engine, [file.read_bytes() for file in hundred], top_k=10)
    for entries, wanted in zip(found, pipeline_scores(trained, hundred), strict=True):
        assert by_label(entries) == pytest.approx(wanted, abs=1e-4)


@pytest.fixture(scope="module")
def served(archives: Path, serve_models: Callable[..., Served]) -> Served:
    return serve_models("numerals", "grey")


def grpc_prediction(served: Served, model: str, body: bytes) -> Any:
    return json.loads(served.grpc_predictions(model, body))


def grpc_open_inference(served: Served, model: str, content: bytes) -> dict[str, float]:
    message = open_inference_grpc_pb2.ModelInferRequest
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [content]}}
    with grpc.insecure_channel(served.grpc) as channel:
        stub = open_inference_grpc_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = message(model_name=model, inputs=[message.InferInputTensor(**tensor)])
        answer = stub.ModelInfer(request, metadata=served.metadata(), timeout=60)
    outputs = {output.name: output for output in answer.outputs}
    names = [json.loads(value) for value in outputs["label"].contents.bytes_contents]
    return dict(zip(names, outputs["score"].contents.fp32_contents, strict=True))


@pytest.mark.parametrize("model", ["numerals", "grey"])
def test_every_door_gives_the_same_answer(served: Served, model: str, hundred: list[Path], same_workers: None) -> None:
    content = hundred[7].read_bytes()
    text = base64.b64encode(content).decode()
    path = f"/predictions/{model}"
    expected = by_label(served.post(path, content).json())
    assert len(expected) == 5
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
    columns = {
        output["name"]: output["data"]
        for output in served.post(f"/v2/models/{model}/infer", {"inputs": [tensor]}).json()["outputs"]
    }
    multipart = requests.post(
        f"{served.url}{path}",
        files={"data": ("digit.png", content, "image/png")},
        headers={"Authorization": f"Bearer {served.token}"},
        timeout=60,
    )
    answers = {
        "typed": by_label(served.post(path, content, "image/png").json()),
        "octets": by_label(served.post(path, content, "application/octet-stream").json()),
        "base64": by_label(served.post(path, {"inputs": text}).json()),
        "data address": by_label(served.post(path, {"inputs": f"data:image/png;base64,{text}"}).json()),
        "list": by_label(served.post(path, {"inputs": [text]}).json()[0]),
        "multipart": by_label(multipart.json()),
        "kserve v1": by_label(
            served.post(f"/v1/models/{model}:predict", {"instances": [{"b64": text}]}).json()["predictions"][0]
        ),
        "open inference": dict(zip(columns["label"], columns["score"], strict=True)),
        "open inference, grpc": grpc_open_inference(served, model, content),
        "grpc": by_label(grpc_prediction(served, model, content)),
        "grpc, json": by_label(grpc_prediction(served, model, json.dumps({"inputs": text}).encode())),
    }
    with served.rest_client() as client:
        answers["marble rest"] = by_label(client.predict(model, content).predictions)
    with served.grpc_client() as client:
        answers["marble grpc"] = by_label(client.predict(model, content).predictions)
    for way, answer in answers.items():
        assert answer == pytest.approx(expected, abs=1e-6), way


def test_the_hubs_client_gets_what_the_pipeline_gives(
    inference_client: HubClient,
    trained: Path,
    hundred: list[Path],
    tmp_path: Path,
) -> None:
    client = inference_client("numerals")
    files = hundred[:5]
    for form in ("JPEG", "WEBP", "GIF"):
        files.append(tmp_path / f"digit.{form.lower()}")
        files[-1].write_bytes(saved(Image.open(hundred[11]).convert("RGB").resize((50, 40)), form))
    for file, wanted in zip(files, pipeline_scores(trained, files), strict=True):
        for image_given in (file, str(file), file.read_bytes()):
            found = client.image_classification(image_given)
            assert len(found) == 5
            assert {entry.label: entry.score for entry in found} == pytest.approx(
                dict(list(wanted.items())[:5]), abs=1e-4
            )
        everything = client.image_classification(file.read_bytes(), top_k=10, function_to_apply="softmax")
        assert {entry.label: entry.score for entry in everything} == pytest.approx(wanted, abs=1e-4)
        [first] = client.image_classification(file, top_k=1)
        assert first.label == next(iter(wanted))


def test_a_heat_map_is_drawn_over_the_image(
    served: Served,
    hundred: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`marble explain --file X --output Y`: each square is of the colour, and as deep, as its number says."""
    content = saved(Image.open(hundred[3]).convert("RGB").resize((40, 30)))  # the model sees the whole of it
    (tmp_path / "digit.png").write_bytes(content)
    with served.rest_client() as client:
        first = client.explain("numerals", content).predictions["explanations"][0]  # type: ignore[index, call-overload]
    rows, box = np.array(first["heat_map"]), first["box"]
    command = ["explain", "numerals", "--url", served.url, "--token", served.token]
    picture, heat = str(tmp_path / "digit.png"), tmp_path / "heat.png"
    assert cli.main([*command, "--file", picture, "--output", str(heat)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digit.png", "heat.png"]

    drawn = np.asarray(Image.open(heat), dtype=float)
    scale = 480 // 40
    assert drawn.shape == (30 * scale, 40 * scale, 3)
    plain = np.asarray(Image.open(picture).resize((480, 360), Image.Resampling.NEAREST), dtype=float)
    down, across = np.unravel_index(np.abs(rows).argmax(), rows.shape)
    y = round(scale * (box["ymin"] + (down + 0.5) * (box["ymax"] - box["ymin"]) / len(rows)))
    x = round(scale * (box["xmin"] + (across + 0.5) * (box["xmax"] - box["xmin"]) / len(rows[0])))
    colour = (217, 72, 15) if rows[down, across] > 0 else (24, 100, 171)
    assert drawn[y, x] == pytest.approx(0.25 * plain[y, x] + 0.75 * np.array(colour), abs=2)

    (tmp_path / "no.png").write_bytes(b"no image")
    capsys.readouterr()
    for given, code, message in (
        (["--file", picture, picture], 2, "--output draws over one image: name it with --file"),
        (["a text"], 2, "--output draws over one image: name it with --file"),
        (["--file", str(tmp_path / "none.png")], 2, "none.png: No such file"),
        (["--file", str(tmp_path / "no.png")], 1, "UnsupportedMediaType"),
    ):
        assert cli.main([*command, *given, "--output", str(tmp_path / "other.png")]) == code
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "marble_client.heat")
    monkeypatch.delattr(marble_client, "heat")
    assert cli.main([*command, "--file", picture, "--output", str(tmp_path / "other.png")]) == 2
    assert "pip install 'marble-client[image]'" in capsys.readouterr().err
    assert not (tmp_path / "other.png").exists()


MALFORMED: dict[str, tuple[bytes, str | None, int]] = {
    "truncated png": (saved(image())[:700], "image/png", 400),
    "truncated jpeg, no type": (saved(image(), "JPEG")[:400], None, 400),
    "signature alone": (b"\x89PNG\r\n\x1a\n", None, 400),
    "zero bytes": (b"", "image/png", 400),
    "bomb": (png_header(60_000, 60_000), "image/png", 413),
    "bomb within pillow's limit": (png_header(9_000, 9_000), None, 413),
    "huge header": (png_header(2**31 - 1, 2**31 - 1), "image/png", 413),
    "long line": (png_header(2**31 - 1, 1), "image/png", 413),
    "endless scans": (saved(image(), "JPEG", progressive=True)[:-2] + b"\xff\xda" * 1000, "image/jpeg", 413),
    "text as an image": (b"a cat on a mat", "image/png", 415),
    "text": (b"a cat on a mat", "text/plain", 400),
    "text, no type": (b"a cat on a mat", None, 400),
    "bmp": (saved(image(), "BMP"), "image/bmp", 415),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 415),
    "sound": (b"RIFF\x24\0\0\0WAVEfmt ", None, 415),
    "film": (b"\0\0\0\x18ftypmp42", "video/mp4", 415),
    "address": (b'{"inputs": "http://localhost:8081/models"}', "application/json", 422),
    "number": (b'{"inputs": 7}', "application/json", 422),
    "not base64": (b'{"inputs": "a cat"}', "application/json", 400),
    "unknown parameter": (b'{"inputs": "QUJD", "parameters": {"k": 1}}', "application/json", 422),
}


def test_malformed_images_end_no_worker(served: Served, hundred: list[Path], same_workers: None) -> None:
    for model in ("numerals", "grey"):
        for name, (body, content_type, status) in MALFORMED.items():
            answer = served.post(f"/predictions/{model}", body, content_type)
            assert answer.status_code == status, (name, answer.text)
            assert answer.json()["code"] == status, name
            if body and not (content_type or "").startswith(("text", "application", "video")):
                assert grpc_prediction(served, model, body)["code"] in (400, 413, 415), name
        assert len(served.post(f"/predictions/{model}", hundred[0].read_bytes()).json()) == 5


def test_a_worker_that_runs_openvino_loads_no_torch_for_images(served: Served) -> None:
    maps = ["".join(Path(f"/proc/{pid}/maps").read_text()) for pid in served.workers()]
    assert sum("libopenvino" in text and "libtorch" not in text for text in maps) == 1
    assert sum("libtorch" in text for text in maps) == 1
