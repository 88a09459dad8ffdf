"""Sounds: the same features as transformers makes, whatever the file, and nothing in a file harms the worker."""

import base64
import io
import json
import math
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import transformers
from conftest import OFFLINE
from numpy.typing import NDArray
from transformers.pipelines.automatic_speech_recognition import chunk_iter, rescale_stride

from handler.errors import InvalidInput, RequestError, TooLarge, UnreadableRequest, UnsupportedMediaType
from handler.inputs import Encoded
from handler.inputs.sounds import SoundInputs, SoundRow, SpeechFeatures, load_features, read_sound, resample
from handler.settings import Settings

# The feature extractor of transformers warns of the lowest of its own 128 bands.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")

AST_CONFIG = {"max_length": 1024, "num_mel_bins": 128}
WAV2VEC2 = {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}


def tone(frequency: float = 440, rate: int = 16_000, seconds: float = 0.5, channels: int = 1) -> NDArray[np.float64]:
    """A sine at 0.8 of full scale, [samples] or [samples, channels]; every channel half as loud as the one before."""
    wave = 0.8 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)
    return wave if channels == 1 else np.stack([wave / 2**channel for channel in range(channels)], axis=1)


def saved(samples: Any, rate: int = 16_000, form: str = "WAV", coding: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=coding)
    return buffer.getvalue()


def patched(content: bytes, at: int, form: str, *values: int) -> bytes:
    copy = bytearray(content)
    struct.pack_into(form, copy, at, *values)
    return bytes(copy)


def decoded(value: Any, rate: int = 16_000) -> NDArray[np.float32]:
    return read_sound(value, 600).decode(rate)


def speech(seconds: float, seed: int = 0, rate: int = 16_000) -> NDArray[np.float32]:
    """Noise that comes and goes."""
    samples = np.random.default_rng(seed).standard_normal(round(seconds * rate))
    return (samples * np.abs(np.sin(np.arange(len(samples)) / 2000)) * 0.1).astype(np.float32)


def inputs(folder: Path, extractor: Any, config: dict[str, Any] | None = None, **settings: Any) -> SoundInputs:
    extractor.save_pretrained(folder)
    return SoundInputs(folder, Settings(task="audio-classification", **settings), config or {})


# --- decoding

CODINGS = {
    "8-bit wav": ("WAV", "PCM_U8", 1e-2),
    "16-bit wav": ("WAV", "PCM_16", 1e-4),
    "24-bit wav": ("WAV", "PCM_24", 1e-6),
    "32-bit wav": ("WAV", "PCM_32", 1e-6),
    "float wav": ("WAV", "FLOAT", 1e-6),
    "double wav": ("WAV", "DOUBLE", 1e-6),
    "extensible wav": ("WAVEX", "PCM_24", 1e-6),
    "telephone wav": ("WAV", "ULAW", 3e-2),
    "16-bit flac": ("FLAC", "PCM_16", 1e-4),
    "24-bit flac": ("FLAC", "PCM_24", 1e-6),
    "vorbis": ("OGG", "VORBIS", 5e-2),
}


@pytest.mark.parametrize(("form", "coding", "tolerance"), CODINGS.values(), ids=CODINGS)
def test_samples_are_the_same_in_every_coding(form: str, coding: str, tolerance: float) -> None:
    samples = tone()
    found = decoded(saved(samples, form=form, coding=coding))
    assert found.dtype == np.float32
    assert found == pytest.approx(samples, abs=tolerance)


def test_opus_is_decoded_at_its_own_rate() -> None:
    found = decoded(saved(tone(rate=48_000), 48_000, "OGG", "OPUS"))
    assert len(found) == 8000
    assert np.abs(found).max() == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize("channels", [2, 8, 32])
def test_channels_are_averaged(channels: int) -> None:
    samples = tone(channels=channels)
    assert decoded(saved(samples, coding="FLOAT")) == pytest.approx(samples.mean(axis=1), abs=1e-6)


def test_a_sound_longer_than_one_block_is_whole() -> None:
    samples = speech(20)
    assert np.array_equal(decoded(saved(samples, coding="FLOAT")), samples)


def test_bytes_and_base64_are_the_same_sound() -> None:
    content = saved(tone())
    text = base64.b64encode(content).decode()
    for value in (bytearray(content), text, f"data:audio/wav;base64,{text}", {"b64": text}):
        assert np.array_equal(decoded(value), decoded(content))


@pytest.mark.parametrize("rate", [1000, 8000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_resampling_keeps_a_sine(rate: int) -> None:
    found = decoded(saved(tone(300, rate, 1.0), rate, coding="FLOAT"))
    assert abs(len(found) - 16_000) <= 1
    wanted = tone(300, 16_000, 1.0)[: len(found)]
    # At the edges the filter reaches into the silence around.
    assert found[1000:-1000] == pytest.approx(wanted[1000 : len(found) - 1000], abs=4e-3)


def test_resampling_leaves_out_what_the_new_rate_cannot_hold() -> None:
    found = decoded(saved(tone(10_000, 48_000), 48_000, coding="FLOAT"))
    assert np.abs(found[500:-500]).max() < 2e-3


def test_an_odd_rate_is_rounded_and_costs_no_more_than_another() -> None:
    started = time.perf_counter()
    for rate in (191_999, 47_999, 44_101):
        found = resample(tone(300, rate, 1.0).astype(np.float32), rate, 16_000)
        assert len(found) == pytest.approx(16_000, abs=2)
        # A phase that is off by 25 millionths after a second.
        assert found[1000:15_000] == pytest.approx(tone(300, 16_000, 1.0)[1000:15_000], abs=0.05)
    assert time.perf_counter() - started < 2


def test_a_wav_written_to_a_pipe_has_no_length() -> None:
    content = saved(tone())
    place = content.index(b"data") + 4
    for length in (0xFFFFFFFF, 0x7FFFF000):
        assert np.array_equal(decoded(patched(content, place, "<I", length)), decoded(content))


# --- what is no sound

WAV, FLAC, OGG = saved(tone()), saved(tone(), form="FLAC"), saved(tone(), form="OGG")
RATE, DATA = 24, WAV.index(b"data") + 4  # where a wav has its sampling rate and the length of its samples
TOTAL = 21  # where a flac has its number of samples, 36 bits
HOURS_16K = 10 * 3600 * 16_000
REFUSED: dict[str, tuple[Any, type[RequestError], str]] = {
    "nothing": (b"", UnreadableRequest, "has no bytes"),
    "no characters": ("", UnreadableRequest, "has no bytes"),
    "no base64": ("this is not base64!", UnreadableRequest, "not base64"),
    "a path": ("/etc/passwd", UnreadableRequest, "not base64"),
    "an address": ("http://example.com/a.wav", InvalidInput, "addresses are not fetched"),
    "a number": (7, InvalidInput, "not int"),
    "text": (b"good morning", UnsupportedMediaType, "send wav, flac or ogg"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(50), UnsupportedMediaType, "send wav, flac or ogg"),
    "an mp3": (saved(tone(), form="MP3"), UnsupportedMediaType, "send wav, flac or ogg"),
    "an aiff": (saved(tone(), form="AIFF"), UnsupportedMediaType, "send wav, flac or ogg"),
    "an odd coding": (saved(tone(), coding="GSM610"), UnsupportedMediaType, "coded in a way"),
    "zero-length wav": (saved(tone()[:0]), UnreadableRequest, "no samples"),
    "wav header alone": (WAV[:44], UnreadableRequest, "no samples"),
    "half a wav header": (WAV[:20], UnreadableRequest, "header"),
    "truncated wav": (WAV[:5000], UnreadableRequest, "promises 16000 bytes of samples and 4956 are there"),
    "wav that promises ten hours": (patched(WAV, DATA, "<I", HOURS_16K * 2), UnreadableRequest, "cut off"),
    "wav that promises nothing": (patched(WAV, DATA, "<I", 0), UnreadableRequest, "no samples"),
    "sampling rate of 0 Hz": (patched(WAV, RATE, "<I", 0), UnreadableRequest, "header"),
    "sampling rate of 1 Hz": (patched(WAV, RATE, "<I", 1), InvalidInput, "is 1 Hz; 1000 to 192000 Hz"),
    "sampling rate of 2 GHz": (patched(WAV, RATE, "<I", 2**31 - 1), InvalidInput, "1000 to 192000 Hz"),
    "33 channels": (saved(np.zeros((80, 33))), InvalidInput, "33 channels; at most 32"),
    "ten hours of flac": (patched(FLAC, TOTAL, ">BI", 0xF0, HOURS_16K), TooLarge, "lasts 36000.0 s"),
    "flac without a length": (patched(FLAC, TOTAL, ">BI", 0xF0, 0), UnreadableRequest, "how long it is"),
    "truncated ogg": (OGG[: len(OGG) // 2], UnreadableRequest, ""),
    "eleven seconds": (saved(np.zeros(11 * 8000), 8000), TooLarge, "lasts 11.0 s; at most 10 s"),
    "work out of proportion": (saved(np.zeros((300_000, 4)), 48_000, "FLAC"), TooLarge, "lower its sampling rate"),
}


@pytest.mark.parametrize(("value", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_sound_is_refused_by_its_header(value: Any, kind: type[RequestError], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_sound(value, 10)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert str(caught.value).isascii()


BROKEN = {
    "truncated flac": FLAC[: len(FLAC) // 2],
    "flac that promises five seconds": patched(FLAC, TOTAL, ">BI", 0xF0, 80_000),
    "not a number": saved(np.array([0.1, math.nan] * 500), coding="FLOAT"),
    "infinite": saved(np.array([0.1, math.inf] * 500), coding="FLOAT"),
    "beyond single precision": saved(np.array([0.1, 1e300] * 500), coding="DOUBLE"),
    "absurdly loud": saved(np.array([0.1, 1e30] * 500), coding="FLOAT"),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_samples_are_an_error_of_their_own(content: bytes, tmp_path: Path) -> None:
    reader = inputs(tmp_path, transformers.Wav2Vec2FeatureExtractor())
    whole = reader.read(WAV)
    first, broken, last = reader.encode([whole, reader.read(content), whole])
    assert isinstance(first, Encoded)
    assert isinstance(broken, UnreadableRequest)
    assert isinstance(last, Encoded)


def outcome(reader: SoundInputs, content: bytes) -> Encoded | RequestError:
    try:
        [found] = reader.encode([reader.read(content)])
    except RequestError as error:
        return error
    return found


@pytest.mark.parametrize("content", [WAV, FLAC, OGG], ids=["wav", "flac", "ogg"])
def test_files_cut_off_anywhere_are_refused(content: bytes, tmp_path: Path) -> None:
    reader = inputs(tmp_path, transformers.Wav2Vec2FeatureExtractor())
    lengths = range(1, len(content) - 20, max(1, len(content) // 60))
    refused = {type(outcome(reader, content[:length])) for length in lengths}
    assert refused == {UnreadableRequest, UnsupportedMediaType}  # the latter for those too short to be told


@pytest.mark.parametrize("content", [WAV, FLAC, OGG], ids=["wav", "flac", "ogg"])
def test_damaged_bytes_raise_nothing_but_request_errors(content: bytes, tmp_path: Path) -> None:
    reader = inputs(tmp_path, transformers.Wav2Vec2FeatureExtractor(), max_length=100, max_seconds=20)
    rng = np.random.default_rng(1)
    for number in range(200):
        damaged = bytearray(content)
        end = len(content) if number % 2 else 120
        for place in rng.integers(4, end, rng.integers(1, 6)):
            damaged[place] = rng.choice([0, 255, rng.integers(256)])
        found = outcome(reader, bytes(damaged))
        if isinstance(found, Encoded):
            arrays = reader.collate(found.rows)
            assert np.isfinite(arrays["input_values"]).all()


def test_what_a_sound_costs_is_known_before_it_is_decoded(tmp_path: Path) -> None:
    reader = inputs(tmp_path, transformers.Wav2Vec2FeatureExtractor())
    ten_minutes = saved(np.zeros(600 * 8000), 8000, "FLAC")
    assert len(ten_minutes) < 40_000
    assert reader.size(reader.read(ten_minutes)) == 600
    assert reader.size(reader.read(WAV)) == 0.5


# --- spectrograms

SPECTROGRAMS: dict[str, dict[str, Any]] = {
    "published": {},
    "small": {"max_length": 64, "num_mel_bins": 32, "mean": -7.5, "std": 3.25},
    "not normalised": {"max_length": 128, "num_mel_bins": 64, "do_normalize": False},
    "8 kHz": {"max_length": 100, "num_mel_bins": 40, "sampling_rate": 8000},
}


@pytest.mark.parametrize("options", SPECTROGRAMS.values(), ids=SPECTROGRAMS)
def test_spectrograms_equal_those_of_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    extractor = transformers.ASTFeatureExtractor(**options)
    config = {"max_length": extractor.max_length, "num_mel_bins": extractor.num_mel_bins}
    reader = inputs(tmp_path, extractor, config)
    sounds = [speech(0.025), speech(1.03), speech(3), np.zeros(4000, np.float32), tone().astype(np.float32) * 1000]
    rows = [reader.features.windows(samples)[0] for samples in sounds]
    found = reader.collate(rows)["input_values"]
    wanted = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="np")["input_values"]
    assert found.dtype == np.float32
    assert found.shape == (len(sounds), extractor.max_length, extractor.num_mel_bins)
    assert found == pytest.approx(np.stack(wanted), abs=1e-4)
    assert reader.shapes == {"input_values": (-1, *found.shape[1:])}


def test_spectrograms_of_real_sounds_equal_those_of_transformers(shared: Path, tmp_path: Path) -> None:
    extractor = transformers.ASTFeatureExtractor()
    reader = inputs(tmp_path, extractor, AST_CONFIG)
    for file in sorted((shared / "fsdd" / "recordings").glob("*.wav"))[::60]:
        samples = decoded(file.read_bytes())
        found = reader.collate(reader.features.windows(samples))["input_values"]
        wanted = extractor(samples, sampling_rate=16_000, return_tensors="np")["input_values"]
        assert found == pytest.approx(np.stack(wanted), abs=1e-4)


def test_positions_of_a_spectrogram_are_those_of_the_model(tmp_path: Path) -> None:
    config = transformers.ASTConfig(hidden_size=8, num_hidden_layers=0, num_attention_heads=1, intermediate_size=8)
    model = transformers.ASTModel(config)
    reader = inputs(tmp_path, transformers.ASTFeatureExtractor(), config.to_dict())
    assert len(reader.features.windows(speech(1))[0]) == model.embeddings.position_embeddings.shape[1]


def test_a_long_sound_is_seen_in_full_windows_up_to_its_end(tmp_path: Path) -> None:
    extractor = transformers.ASTFeatureExtractor(max_length=100, num_mel_bins=32)
    reader = inputs(tmp_path, extractor, {"max_length": 100, "num_mel_bins": 32})
    samples = speech(2.5)  # 248 frames
    [encoded] = reader.encode([reader.read(saved(samples, coding="FLOAT"))])
    assert isinstance(encoded, Encoded)
    assert encoded.overflows
    frames = reader.collate(encoded.rows)["input_values"]
    whole = transformers.ASTFeatureExtractor(max_length=248, num_mel_bins=32)
    [wanted] = whole(samples, sampling_rate=16_000, return_tensors="np")["input_values"]
    for found, start in zip(frames, (0, 100, 148), strict=True):
        assert found == pytest.approx(wanted[start : start + 100], abs=1e-4)
    [encoded] = reader.encode([reader.read(saved(samples[: 99 * 160 + 400]))])
    assert isinstance(encoded, Encoded)
    assert (len(encoded.rows), encoded.overflows) == (1, False)


def test_spectrograms_are_quick(tmp_path: Path) -> None:
    extractor = transformers.ASTFeatureExtractor()
    reader = inputs(tmp_path, extractor, AST_CONFIG)
    rows = reader.features.windows(speech(10.24))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        reader.collate(rows)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.1  # a hundred times faster than the sound


# --- samples

SPEECH: dict[str, dict[str, Any]] = {
    "with a mask": {"return_attention_mask": True},
    "without a mask": {},
    "not normalised": {"do_normalize": False, "return_attention_mask": True, "padding_value": 0.5},
}


@pytest.mark.parametrize("options", SPEECH.values(), ids=SPEECH)
def test_samples_equal_those_of_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    extractor = transformers.Wav2Vec2FeatureExtractor(**options)
    reader = inputs(tmp_path, extractor, max_length=1500)
    sounds = [speech(0.025), speech(1.03), np.zeros(4000, np.float32), tone().astype(np.float32) * 1000]
    for batch in (sounds, *([sound] for sound in sounds)):
        if not reader.features.pads and len(batch) > 1:
            continue
        found = reader.collate([reader.features.windows(samples)[0] for samples in batch])
        wanted = extractor(batch, sampling_rate=16_000, padding=True, return_tensors="np")
        assert found.keys() == reader.shapes.keys()
        assert found["input_values"].dtype == np.float32
        assert found["input_values"] == pytest.approx(wanted["input_values"], abs=1e-4)
        if reader.features.pads:
            assert found["attention_mask"].dtype == np.int64
            assert np.array_equal(found["attention_mask"], wanted["attention_mask"])


def test_sounds_of_different_lengths_share_a_batch_only_under_a_mask(tmp_path: Path) -> None:
    short, long = SoundRow(speech(0.5), 24), SoundRow(speech(0.51), 24)
    masked = inputs(tmp_path, transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True))
    assert masked.kind(short) == masked.kind(long)
    bare = inputs(tmp_path, transformers.Wav2Vec2FeatureExtractor())
    assert bare.kind(short) != bare.kind(long)
    assert bare.kind(short) == bare.kind(SoundRow(speech(0.5, seed=1), 24))


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "small": {"conv_dim": [4, 4, 4], "conv_kernel": [8, 4, 4], "conv_stride": [8, 4, 2]},
    "with an adapter": {"add_adapter": True, "num_adapter_layers": 2, "adapter_stride": 2},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_positions_of_samples_are_those_of_the_model(options: dict[str, Any]) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": 8}
    sizes |= {"num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 1, "conv_dim": [4] * 7}
    config = transformers.Wav2Vec2Config(**{**sizes, **options})
    model = transformers.Wav2Vec2Model(config)
    features = load_features(WAV2VEC2, config.to_dict(), 10**6, 0)
    assert isinstance(features, SpeechFeatures)
    shortest = features.shortest
    assert int(model._get_feat_extract_output_lengths(shortest - 1)) == 0
    for samples in (shortest, shortest + 1, 4000, 7777, 16_000):
        [row] = features.windows(np.zeros(samples, np.float32))
        assert len(row) == int(model._get_feat_extract_output_lengths(samples)) > 0


@pytest.mark.parametrize(("length", "stride"), [(50, 16), (50, 0), (99, 33), (30, 14)])
def test_windows_are_those_of_the_transformers_pipeline(length: int, stride: int) -> None:
    features = load_features(WAV2VEC2, {}, length, stride)
    side = stride // 2 * 320
    rng = np.random.default_rng(length)
    for samples in (speech(int(count) / 16_000) for count in (length * 320, *rng.integers(400, 100_000, 40))):
        extractor = transformers.Wav2Vec2FeatureExtractor()
        chunks = list(chunk_iter(samples, extractor, length * 320, side, side))
        rows = features.windows(samples)
        kept = []
        for chunk in chunks:
            [(total, left, right)] = rescale_stride([chunk["stride"]], 1 / 320)
            positions = (chunk["stride"][0] - 80) // 320
            kept.append((chunk["stride"][0], list(range(max(0, positions)))[left : total - right]))
        found = [(len(row.samples), list(range(len(row)))[row.left : len(row) - row.right]) for row in rows]
        assert found == [entry for entry in kept if entry[1] or len(kept) == 1]


def test_a_sound_shorter_than_the_model_hears_is_refused(tmp_path: Path) -> None:
    speech_reader = inputs(tmp_path, transformers.Wav2Vec2FeatureExtractor())
    for reader in (speech_reader, inputs(tmp_path, transformers.ASTFeatureExtractor(), AST_CONFIG)):
        assert isinstance(outcome(reader, saved(speech(0.025))), Encoded)
        refusal = outcome(reader, saved(speech(0.0249)))
        assert isinstance(refusal, InvalidInput)
        assert str(refusal) == "the sound lasts 24.9 ms; the model needs at least 25.0 ms"


# --- the feature extractor's file


def test_the_file_of_a_processor_is_read(tmp_path: Path) -> None:
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True, sampling_rate=8000)
    document = {"feature_extractor": extractor.to_dict(), "processor_class": "Wav2Vec2Processor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(document))
    reader = SoundInputs(tmp_path, Settings(task=""), {})
    assert (reader.features.sampling_rate, reader.features.pads) == (8000, True)


NO_EXTRACTOR: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "none": (None, {}, "preprocessor_config.json is missing"),
    "broken": ("{", {}, "preprocessor_config.json cannot be read"),
    "of another kind": ('{"feature_extractor_type": "WhisperFeatureExtractor"}', {}, "is not one of: AST"),
    "of another size": ('{"feature_extractor_type": "ASTFeatureExtractor"}', {"max_length": 9}, "the model takes"),
    "of several values": (
        '{"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 80}',
        {},
        "one value",
    ),
}


@pytest.mark.parametrize(("text", "config", "message"), NO_EXTRACTOR.values(), ids=NO_EXTRACTOR)
def test_a_model_without_a_known_feature_extractor(
    text: str | None, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        SoundInputs(tmp_path, Settings(task=""), config)
    assert str(tmp_path) in str(caught.value)


def test_neither_torch_nor_transformers_is_imported() -> None:
    modules: Sequence[str] = ("handler.tasks.audio_classification", "handler.tasks.speech_recognition")
    code = f"import sys, {', '.join(modules)}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=OFFLINE, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
