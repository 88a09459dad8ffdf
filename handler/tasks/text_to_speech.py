"""Text to speech with VITS: a wav file for each text, as `transformers`' pipeline speaks it.

VITS draws random numbers for pitch and rhythm. Each text has its own, from `seed`, so one text with one seed always
sounds the same, whatever else is in the batch.
"""

import base64
import io
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import VitsTokenizer
from transformers.utils.import_utils import is_phonemizer_available, is_uroman_available

from handler import backends
from handler.errors import InternalError, InvalidInput, InvalidParameter, RequestError, TooLarge
from handler.inputs.text import read_text
from handler.messages import Media
from handler.parameters import CommonParameters, between
from handler.settings import Settings
from handler.tasks import Answer, GenerativeTask
from handler.turns import in_turn

USUAL_SEED = 0
_FULL_SCALE = 32767  # of 16-bit samples


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToSpeechParameters(CommonParameters):
    """seed: of pitch and rhythm; None: 0. speaking_rate: 2 is twice as fast; None: the model's own, mostly 1.

    speaker_id: the voice of a model that has several; None: none of them, as in transformers.
    """

    overflow: Literal["error"] | None = None
    seed: int | None = between(0, 2**64 - 1)
    speaking_rate: float | None = between(0.25, 4)
    speaker_id: int | None = None


class TextToSpeech(GenerativeTask):
    """Speaks texts with VITS. Texts of more than `Settings.max_length` tokens, and texts whose sound would be longer
    than `Settings.max_seconds`, are refused (413)."""

    Parameters: ClassVar[type[CommonParameters]] = TextToSpeechParameters

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        if config.get("model_type") != "vits":
            raise ValueError(f"text-to-speech takes models of the type vits, not {config.get('model_type')}")
        self._tokenizer = load_tokenizer(model_dir)
        self._model = backends.load_model(model_dir, settings, "VitsModel")
        self._settings = settings
        self._sampling_rate = int(self._model.config.sampling_rate)
        self._most_frames = settings.max_seconds * self._sampling_rate / np.prod(self._model.config.upsample_rates)
        # How long each token lasts is known long before the sound is made.
        self._model.duration_predictor.register_forward_hook(self._check_duration)
        self._rate = 1.0

    def read(self, value: Any, parameters: Any) -> Sequence[str]:
        """A string."""
        voices = int(self._model.config.num_speakers)
        if parameters.speaker_id is not None and not (voices > 1 and 0 <= parameters.speaker_id < voices):
            allowed = f"must be from 0 to {voices - 1}" if voices > 1 else "cannot be given: this model has one voice"
            raise InvalidParameter(f"parameter 'speaker_id' {allowed}")
        return [read_text(value)]

    def generate(self, requests: Sequence[tuple[Sequence[Any], Any]]) -> list[Answer | RequestError]:
        """A wav file for each text: one channel of 16-bit samples at the model's own rate."""
        return in_turn(requests, self._speak, self._settings.max_generation_seconds)

    @torch.inference_mode()
    def _speak(self, text: str, parameters: TextToSpeechParameters) -> Answer:
        ids = self._encode(text)
        self._rate = parameters.speaking_rate or self._model.speaking_rate
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(USUAL_SEED if parameters.seed is None else parameters.seed)
            try:
                spoken = self._model(
                    input_ids=torch.tensor([ids], device=self._model.device),
                    speaking_rate=self._rate,
                    speaker_id=parameters.speaker_id,
                )
            except ValueError:  # from where durations are drawn
                raise _unsound() from None
        samples = spoken.waveform[0, : int(spoken.sequence_lengths[0])].float().cpu().numpy()
        if not np.isfinite(samples).all():
            raise _unsound()
        return Answer(Media(to_wav(samples, self._sampling_rate), "audio/wav"), tokens=len(ids))

    def _encode(self, text: str) -> list[int]:
        """Token ids. Raises InvalidInput for a text that cannot be spoken, TooLarge for one that is too long."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        if len(ids) > self._settings.max_length:
            raise TooLarge(
                f"the text has {len(ids)} tokens; at most {self._settings.max_length} are spoken at once: split it"
            )
        # With blanks around every token, one blank is left of a text that has none.
        if len(ids) <= int(self._tokenizer.add_blank) or max(ids) >= self._model.config.vocab_size:
            raise InvalidInput("the text has nothing that this model can speak; its characters are another alphabet's")
        return ids

    def _check_duration(self, predictor: torch.nn.Module, inputs: Any, log_frames: torch.Tensor) -> None:
        """Raises TooLarge before memory and time are spent on a sound that is too long. log_frames: [1, 1, tokens]."""
        frames = float(log_frames.exp().sum()) / self._rate
        if not np.isfinite(frames):
            raise _unsound()
        if frames > self._most_frames:
            raise TooLarge(f"the sound would last more than {self._settings.max_seconds:g} seconds; split the text")

    @staticmethod
    def drift(expected: str, found: str) -> float:
        """Root mean square of the difference of samples, which are from -1 to 1; inf if rates or lengths differ."""
        (rate, before), (other_rate, after) = from_wav(base64.b64decode(expected)), from_wav(base64.b64decode(found))
        if rate != other_rate or before.shape != after.shape:
            return float("inf")
        return float(np.sqrt(np.square(before - after).mean()))


def _unsound() -> InternalError:
    return InternalError("the model gave a sound that is not made of numbers; its weights are unsound")


def load_tokenizer(model_dir: Path) -> VitsTokenizer:
    """The tokenizer of a VITS model. Raises ValueError if a program that it calls is missing."""
    tokenizer: VitsTokenizer = VitsTokenizer.from_pretrained(model_dir, local_files_only=True)
    if tokenizer.is_uroman and not is_uroman_available():
        raise ValueError(
            "its tokenizer writes texts in Latin letters with uroman, which is missing: pip install uroman"
        )
    if tokenizer.phonemize:
        if not is_phonemizer_available():
            raise ValueError(
                "its tokenizer needs phonemizer and espeak-ng to write texts in phonemes: pip install phonemizer, and "
                "install espeak-ng, e.g. with apt-get"
            )
        try:
            tokenizer("a")
        except RuntimeError as error:
            raise ValueError(f"its tokenizer writes texts in phonemes, which fails: {error}") from None
    return tokenizer


def to_wav(samples: NDArray[np.float32], sampling_rate: int) -> bytes:
    """A wav file of one channel and 16 bits. samples: float32 [length], -1 to 1; what is beyond is clipped."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sampling_rate)
        file.writeframes((samples.clip(-1, 1) * _FULL_SCALE).round().astype("<i2").tobytes())
    return buffer.getvalue()


def from_wav(content: bytes) -> tuple[int, NDArray[np.float64]]:
    """Sampling rate and samples, float64 [length] from -1 to 1, of a file that `to_wav` wrote."""
    with wave.open(io.BytesIO(content)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        return file.getframerate(), samples / _FULL_SCALE
