"""Sounds to arrays with libsndfile, numpy and scipy alone: decoding, resampling, windows, features.

The features equal those of the Hugging Face feature extractor named in `preprocessor_config.json`.
"""

import io
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
from numpy.typing import NDArray
from scipy.fft import rfft
from scipy.signal import resample_poly

from handler import media
from handler.errors import InvalidInput, RequestError, TooLarge, UnreadableRequest, UnsupportedMediaType
from handler.inputs import Encoded
from handler.settings import Settings

_KINDS = ("audio/wav", "audio/flac", "audio/ogg")
_CODINGS = {
    *("PCM_U8", "PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM"),
    *("VORBIS", "OPUS"),
}
_MIN_RATE, _MAX_RATE, _MAX_CHANNELS = 1_000, 192_000, 32
# Samples of all channels for each second that a sound may last: stereo at 48 kHz. More is work out of proportion.
_RICHEST = 96_000
_BLOCK = 1 << 16
# Far above any scaling of samples in use, and low enough for sums of squares in single precision.
_LOUDEST = 1e12
# Writers to a pipe, which cannot go back to fill in the length, leave one from here on.
_UNKNOWN_LENGTH = 0x7FFF0000


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound file whose header has been read and found acceptable.

    frames: samples of one channel; sampling_rate: in Hz.
    """

    content: bytes
    frames: int
    sampling_rate: int
    channels: int

    def decode(self, sampling_rate: int) -> NDArray[np.float32]:
        """The sound as float32 [samples] at `sampling_rate` Hz, full scale ±1, its channels averaged.

        Raises UnreadableRequest if the file breaks off, is damaged, or has samples that are not numbers.
        """
        mono = np.empty(self.frames, dtype=np.float32)
        start = 0
        try:
            with soundfile.SoundFile(io.BytesIO(self.content)) as file:
                for block in file.blocks(_BLOCK, frames=self.frames, dtype="float32", always_2d=True):
                    mono[start : start + len(block)] = block.mean(axis=1)
                    start += len(block)
        except RuntimeError:
            start = 0
        if start != self.frames:
            raise UnreadableRequest("the sound is cut off or damaged: its samples end before the header says")
        if not np.abs(mono).max() < _LOUDEST:  # false for NaN too
            raise UnreadableRequest("the sound has samples that are not numbers, or too large to be sound")
        return resample(mono, self.sampling_rate, sampling_rate)


def read_sound(value: Any, max_seconds: float) -> Sound:
    """A sound from the bytes of a wav, flac or ogg file, or from their base64 (see `media.read_bytes`).

    Only its header is read. Raises RequestError: 400 if it is broken or empty, 413 if it lasts more than
    `max_seconds`, 415 if it is another kind of file, 422 for an odd sampling rate or too many channels.
    """
    content = media.read_bytes(value, "sound")
    if (kind := media.media_type(content)) not in _KINDS:
        raise UnsupportedMediaType("these bytes are no sound that this model takes; send wav, flac or ogg")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            coding = file.subtype
            sound = Sound(content, file.frames, file.samplerate, file.channels)
    except RuntimeError:
        raise UnreadableRequest("the header of the sound is cut off or damaged; send the whole file") from None
    if coding not in _CODINGS:
        raise UnsupportedMediaType("the samples of the sound are coded in a way that is not taken; send PCM")
    _check(sound, max_seconds)
    if kind == "audio/wav":
        _check_wav_length(content)
    return sound


def _check(sound: Sound, max_seconds: float) -> None:
    if sound.frames <= 0:
        raise UnreadableRequest("the sound has no samples: it is empty, or cut off after its header")
    if not _MIN_RATE <= sound.sampling_rate <= _MAX_RATE:
        raise InvalidInput(
            f"the sampling rate of the sound is {sound.sampling_rate} Hz; {_MIN_RATE} to {_MAX_RATE} Hz are taken"
        )
    if sound.channels > _MAX_CHANNELS:
        raise InvalidInput(f"the sound has {sound.channels} channels; at most {_MAX_CHANNELS} are taken: mix it down")
    if sound.frames > 1 << 60:
        raise UnreadableRequest("the header of the sound does not say how long it is; write it to a file, not a pipe")
    if (seconds := sound.frames / sound.sampling_rate) > max_seconds:
        raise TooLarge(f"the sound lasts {seconds:.1f} s; at most {max_seconds:g} s are taken: send it in parts")
    if sound.frames * sound.channels > max_seconds * _RICHEST:
        raise TooLarge(
            f"the sound has {sound.frames * sound.channels} samples in {sound.channels} channels; at most "
            f"{max_seconds * _RICHEST:.0f} are taken: lower its sampling rate or mix its channels down"
        )


def _check_wav_length(content: bytes) -> None:
    """Raises UnreadableRequest if fewer samples are there than the header promises, which libsndfile lets pass."""
    position = 12
    while position + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, position)
        position += 8
        if name == b"data":
            if len(content) - position < size < _UNKNOWN_LENGTH:
                raise UnreadableRequest(
                    f"the sound is cut off: its header promises {size} bytes of samples and "
                    f"{len(content) - position} are there; send the whole file"
                )
            return
        position += size + size % 2


def resample(samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    """Samples at `rate` Hz to float32 samples at `wanted` Hz, by a polyphase filter (scipy's Kaiser window).

    Odd ratios are rounded to a denominator of at most 1,000: the filter grows with it.
    """
    ratio = Fraction(wanted, rate).limit_denominator(1000)
    if ratio == 1:
        return samples
    return np.asarray(resample_poly(samples, ratio.numerator, ratio.denominator), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class SoundRow:
    """A window of a sound.

    samples: float32 [samples]. positions: what the encoder spends on it. left, right: positions at either end that
    the neighbouring window answers for.
    """

    samples: NDArray[np.float32]
    positions: int
    left: int = 0
    right: int = 0

    def __len__(self) -> int:
        return self.positions


class Features(Protocol):
    """What one kind of model wants of a sound.

    sampling_rate: in Hz. shortest: samples of the shortest sound. pads: whether sounds of different lengths may share
    a batch. shapes: of the arrays, -1 where they vary.
    """

    sampling_rate: int
    shortest: int
    pads: bool
    shapes: Mapping[str, tuple[int, ...]]

    def windows(self, samples: NDArray[np.float32]) -> list[SoundRow]:
        """Splits samples, of which there are at least `shortest`, into windows that the model takes."""
        ...

    def collate(self, rows: Sequence[SoundRow]) -> dict[str, NDArray[Any]]:
        """One batch of arrays [batch, …] by input name."""
        ...


class SpectrogramFeatures:
    """Log-mel spectrograms of a fixed length: Kaldi's filter banks, as ASTFeatureExtractor computes them with numpy.

    Windows lie side by side; the last of several ends with the sound, so that all are full.
    """

    _FRAME, _HOP, _FFT = 400, 160, 512
    _PREEMPHASIS, _FLOOR = 0.97, 1.192092955078125e-07

    def __init__(self, extractor: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.sampling_rate = int(extractor.get("sampling_rate", 16000))
        self.shortest, self.pads = self._FRAME, True
        self._bins = int(extractor.get("num_mel_bins", 128))
        self._length = int(extractor.get("max_length", 1024))
        self._mean, self._std = 0.0, 0.5
        if extractor.get("do_normalize", True):
            self._mean = float(extractor.get("mean", -4.2677393))
            self._std = float(extractor.get("std", 4.5689974))
        shape = int(config.get("max_length", 1024)), int(config.get("num_mel_bins", 128))
        if shape != (self._length, self._bins):
            raise ValueError(f"the feature extractor makes {self._length} x {self._bins} and the model takes {shape}")
        self.shapes: Mapping[str, tuple[int, ...]] = {"input_values": (-1, self._length, self._bins)}
        patch = int(config.get("patch_size", 16))
        times = (self._length - patch) // int(config.get("time_stride", 10)) + 1
        bands = (self._bins - patch) // int(config.get("frequency_stride", 10)) + 1
        self._positions = times * bands + 2  # the class and the distillation token
        self._window = np.hanning(self._FRAME)
        self._filters = _mel_filters(self._bins, self._FFT, 20.0, self.sampling_rate // 2, self.sampling_rate)

    def windows(self, samples: NDArray[np.float32]) -> list[SoundRow]:
        """See `Features.windows`; the first window is what ASTFeatureExtractor keeps of a long sound."""
        last = max(0, self._frames(len(samples)) - self._length)
        starts = [first * self._HOP for first in (*range(0, last, self._length), last)]
        size = (self._length - 1) * self._HOP + self._FRAME
        return [SoundRow(samples[start : start + size], self._positions) for start in starts]

    def collate(self, rows: Sequence[SoundRow]) -> dict[str, NDArray[np.float32]]:
        """`input_values`, float32 [batch, max_length, mel bins]."""
        values = np.zeros((len(rows), self._length, self._bins), dtype=np.float32)
        for row, spectrogram in zip(rows, values, strict=True):
            spectrogram[: self._frames(len(row.samples))] = self.spectrogram(row.samples)
        return {"input_values": (values - self._mean) / np.float32(self._std * 2)}

    def _frames(self, samples: int) -> int:
        return max(0, (samples - self._FRAME) // self._HOP + 1)

    def spectrogram(self, samples: NDArray[np.float32]) -> NDArray[np.float64]:
        """Log-mel energies [frames, mel bins], in double precision: quiet bands lie 100 dB below loud ones."""
        frames = np.lib.stride_tricks.sliding_window_view(samples, self._FRAME)[:: self._HOP].astype(np.float64)
        frames -= frames.mean(axis=1, keepdims=True)
        frames[:, 1:] -= self._PREEMPHASIS * frames[:, :-1]
        frames[:, 0] *= 1 - self._PREEMPHASIS
        spectrum = rfft(frames * self._window, self._FFT)
        power = spectrum.real**2 + spectrum.imag**2
        return np.asarray(np.log(np.maximum(power @ self._filters, self._FLOOR)))


def _mel_filters(bins: int, fft_length: int, lowest: float, highest: float, rate: int) -> NDArray[np.float64]:
    """Triangles on Kaldi's mel scale, [fft_length // 2 + 1, bins]; frequencies in Hz."""

    def mel(frequency: Any) -> Any:
        return 1127.0 * np.log1p(np.asarray(frequency) / 700.0)

    corners = np.linspace(mel(lowest), mel(highest), bins + 2)
    width = corners[1] - corners[0]
    points = mel(np.arange(fft_length // 2 + 1) * rate / fft_length)[:, None]
    return np.asarray(np.maximum(0.0, 1.0 - np.abs(points - corners[1:-1]) / width))


class SpeechFeatures:
    """Raw samples for Wav2Vec2 and its kin, as Wav2Vec2FeatureExtractor prepares them.

    A window is at most `max_length` positions long. Neighbouring windows share `stride` positions, half of which each
    of the two answers for, as with `chunk_length_s` and `stride_length_s` of the transformers pipeline.
    ratio: samples for one position.
    """

    def __init__(self, extractor: Mapping[str, Any], config: Mapping[str, Any], max_length: int, stride: int) -> None:
        if int(extractor.get("feature_size", 1)) != 1:
            raise ValueError("the feature extractor makes more than one value of a sample")
        self.sampling_rate = int(extractor.get("sampling_rate", 16000))
        self._normalises = bool(extractor.get("do_normalize", True))
        self._padding = float(extractor.get("padding_value", 0.0))
        self.pads = bool(extractor.get("return_attention_mask", False))
        self.shapes: Mapping[str, tuple[int, ...]] = {"input_values": (-1, -1)}
        if self.pads:
            self.shapes = {**self.shapes, "attention_mask": (-1, -1)}
        kernels = config.get("conv_kernel", (10, 3, 3, 3, 3, 2, 2))
        strides = config.get("conv_stride", (5, 2, 2, 2, 2, 2, 2))
        self._layers = list(zip(kernels, strides, strict=True))
        if config.get("add_adapter"):
            self._layers += [(1, int(config.get("adapter_stride", 2)))] * int(config.get("num_adapter_layers", 3))
        self.shortest = 1
        for kernel, step in reversed(self._layers):
            self.shortest = (self.shortest - 1) * step + kernel
        self.ratio = math.prod(stride for _, stride in self._layers)
        self._window, self._side = max_length * self.ratio, stride // 2 * self.ratio

    def windows(self, samples: NDArray[np.float32]) -> list[SoundRow]:
        """See `Features.windows`."""
        step = self._window - 2 * self._side
        starts = range(0, max(1, len(samples) - 2 * self._side), step)
        rows = []
        for start in starts:
            window = samples[start : start + self._window]
            # Shares of the whole, because the last window need not be a multiple of the ratio.
            total = round(len(window) / self.ratio)
            side = round(self._side / len(window) * total)
            left = side if start else 0
            right = side if start + self._window < len(samples) else 0
            if (positions := self._positions(len(window))) > left:
                rows.append(SoundRow(window, positions, left, max(0, right - (total - positions))))
        return rows

    def collate(self, rows: Sequence[SoundRow]) -> dict[str, NDArray[Any]]:
        """`input_values`, float32 [batch, samples], and int64 `attention_mask` where the model takes one."""
        lengths = [len(row.samples) for row in rows]
        shape = len(rows), max(lengths)
        values = np.full(shape, self._padding, dtype=np.float32)
        for row, target in zip(rows, values, strict=True):
            target[: len(row.samples)] = self._normalised(row.samples)
        if not self.pads:
            return {"input_values": values}
        return {"input_values": values, "attention_mask": (np.arange(shape[1]) < np.array(lengths)[:, None]) * 1}

    def _positions(self, samples: int) -> int:
        for kernel, stride in self._layers:
            samples = (samples - kernel) // stride + 1
        return max(0, samples)

    def _normalised(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self._normalises:
            return samples
        return np.asarray((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7))


def load_features(extractor: Mapping[str, Any], config: Mapping[str, Any], max_length: int, stride: int) -> Features:
    """The features that a model is given. extractor: settings of its feature extractor; config: its `config.json`.

    Raises ValueError if the feature extractor is not one whose results are reproduced here.
    """
    kind = extractor.get("feature_extractor_type")
    if kind == "ASTFeatureExtractor":
        return SpectrogramFeatures(extractor, config)
    if kind == "Wav2Vec2FeatureExtractor":
        return SpeechFeatures(extractor, config, max_length, stride)
    raise ValueError(f"the feature extractor {kind!r} is not one of: ASTFeatureExtractor, Wav2Vec2FeatureExtractor")


class SoundInputs:
    """Sounds to rows of `SoundRow`, and rows to the arrays of the model in `model_dir`.

    Of the settings, `max_seconds` bounds a sound; `max_length` and `stride` are positions of a window and those that
    neighbours share, unless the model has a length of its own. Raises ValueError if the folder's feature extractor is
    not one whose results are reproduced here.
    """

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        try:
            self.features = load_features(_read_extractor(model_dir), config, settings.max_length, settings.stride)
        except ValueError as error:
            raise ValueError(f"{model_dir}: {error}") from None
        self.shapes = self.features.shapes
        self._max_seconds = settings.max_seconds

    def read(self, value: Any) -> Sound:
        """See `read_sound`."""
        return read_sound(value, self._max_seconds)

    def size(self, sample: Sound) -> float:
        """Seconds."""
        return sample.frames / sample.sampling_rate

    def kind(self, row: SoundRow) -> int:
        """See `EncoderTask.kind`: sounds of different lengths in one batch change each other where nothing masks it."""
        return 0 if self.features.pads else len(row.samples)

    def encode(self, samples: Sequence[Sound]) -> list[Encoded | RequestError]:
        """Decodes sounds, resamples them and splits them into windows; the features are left to `collate`."""
        return [self._encode(sound) for sound in samples]

    def _encode(self, sound: Sound) -> Encoded | RequestError:
        try:
            samples = sound.decode(self.features.sampling_rate)
        except RequestError as error:
            return error
        if len(samples) < self.features.shortest:
            lasts, least = (1000 * n / self.features.sampling_rate for n in (len(samples), self.features.shortest))
            return InvalidInput(f"the sound lasts {lasts:.1f} ms; the model needs at least {least:.1f} ms")
        rows = self.features.windows(samples)
        return Encoded(rows, overflows=len(rows) > 1)

    def collate(self, rows: Sequence[SoundRow]) -> dict[str, NDArray[Any]]:
        """See `SpectrogramFeatures.collate` and `SpeechFeatures.collate`."""
        return self.features.collate(rows)


def _read_extractor(model_dir: Path) -> Mapping[str, Any]:
    """Settings of the feature extractor, from its own file or from the one that transformers 5 writes for processors.

    Raises ValueError if there is neither.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        try:
            document = json.loads((model_dir / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} cannot be read ({error}); build or copy the model again") from None
        settings: Mapping[str, Any] = document.get("feature_extractor", document)
        return settings
    raise ValueError("preprocessor_config.json is missing: the model needs the settings of its feature extractor")
