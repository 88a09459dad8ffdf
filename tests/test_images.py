"""Images: the same pixels as transformers makes, whatever the file, and nothing in a file harms the worker."""

import base64
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from conftest import OFFLINE, ROOT
from numpy.typing import NDArray
from PIL import Image
from transformers.image_utils import load_image

from handler.errors import InvalidInput, RequestError, TooLarge, UnreadableRequest, UnsupportedMediaType
from handler.inputs import Encoded
from handler.inputs.images import ImageInputs, ImageProcessor, decode


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
