"""Speech recognition with CTC models: what is said in a sound, with the times of words or characters if asked for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from handler.errors import InternalError
from handler.inputs.sounds import Sound, SoundInputs, SoundRow, SpeechFeatures
from handler.parameters import CommonParameters
from handler.settings import Settings
from handler.tasks import TIE, EncoderTask, Measure, Outputs, Part

# What tokenizers saved with `clean_up_tokenization_spaces` do to a text, in this order.
_CLEAN_UP = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")),
    *((" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechRecognitionParameters(CommonParameters):
    """return_timestamps: add the start and end, in seconds, of each word (also: true) or character."""

    return_timestamps: Literal["word", "char"] | bool = False


class SpeechRecognition(EncoderTask):
    """Greedy CTC decoding. A long sound is heard in overlapping windows, each of which decides up to mid-overlap."""

    auto_model: ClassVar[str] = "AutoModelForCTC"
    Parameters: ClassVar[type[CommonParameters]] = SpeechRecognitionParameters
    inputs: SoundInputs
    measure: ClassVar[Measure] = Measure("sound", "seconds", "max_seconds")

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        self.inputs = SoundInputs(model_dir, settings, config)
        features = self.inputs.features
        if not isinstance(features, SpeechFeatures):
            raise ValueError(f"{model_dir}: speech recognition needs a model that hears samples, not spectrograms")
        self._ratio, self._rate = features.ratio, features.sampling_rate
        self._vocabulary = CtcVocabulary(model_dir, int(config["vocab_size"]))

    def read(self, value: Any, parameters: Any) -> Sequence[Sound]:
        """The sound of an input: bytes or base64 of a wav, flac or ogg file."""
        return [self.inputs.read(value)]

    def kind(self, row: SoundRow) -> int:
        """See `SoundInputs.kind`."""
        return self.inputs.kind(row)

    def keep(self, row: SoundRow, outputs: Outputs) -> Outputs:
        """The most probable class of each position of the row, -1 where the model gave no number."""
        logits = outputs["logits"][: len(row)]
        classes = np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
        return {"classes": classes.astype(np.float32)}

    def postprocess(self, parts: Sequence[Part], parameters: Any) -> dict[str, Any]:
        """`{"text": …}`, and with return_timestamps `"chunks": [{"text": …, "timestamp": [start, end]}, …]`."""
        [part] = parts
        classes = []
        for number, (row, outputs) in enumerate(zip(part.rows, part.outputs, strict=True), start=1):
            end = len(row) - row.right if number < len(part.rows) else len(row)
            classes.append(outputs["classes"][row.left : end])
        spans = self._vocabulary.spans(np.concatenate(classes).astype(np.int64))
        answer: dict[str, Any] = {"text": self._vocabulary.text(spans)}
        if parameters.return_timestamps:
            chunks = spans if parameters.return_timestamps == "char" else self._vocabulary.words(spans)
            answer["chunks"] = [
                {"text": text, "timestamp": [start * self._ratio / self._rate, end * self._ratio / self._rate]}
                for text, start, end in chunks
            ]
        return answer

    @staticmethod
    def drift(expected: dict[str, Any], found: dict[str, Any]) -> float:
        """Share of the characters by which two texts differ."""
        return 1 - SequenceMatcher(None, expected["text"], found["text"], autojunk=False).ratio()

    @staticmethod
    def agrees(expected: dict[str, Any], found: dict[str, Any]) -> bool:
        """Whether the texts are as good as equal."""
        return SpeechRecognition.drift(expected, found) <= TIE


class Span(NamedTuple):
    """A piece of text and where it was heard: its first position and the one after its last."""

    text: str
    start: int
    end: int


class CtcVocabulary:
    """How the classes of a CTC model become text: the files of a Wav2Vec2CTCTokenizer, whose results it equals.

    size: classes of the model. Raises ValueError if the folder has no such tokenizer.
    """

    def __init__(self, model_dir: Path, size: int) -> None:
        config = {
            **_read_json(model_dir / "special_tokens_map.json", optional=True),
            **_read_json(model_dir / "tokenizer_config.json", optional=True),
        }
        kind = config.get("tokenizer_class", "Wav2Vec2CTCTokenizer")
        if kind != "Wav2Vec2CTCTokenizer":
            raise ValueError(f"{model_dir}: the tokenizer must be a Wav2Vec2CTCTokenizer, not {kind}")
        vocabulary = _read_json(model_dir / "vocab.json")
        if language := config.get("target_lang"):
            vocabulary = vocabulary[language]
        added = config.get("added_tokens_decoder", {})
        names = {int(index): _token(token) for index, token in added.items()}
        names.update({index: token for token, index in vocabulary.items()})
        unknown = _token(config.get("unk_token", "<unk>"))
        tokens = [names.get(index, unknown) for index in range(size)]
        # A token that several classes stand for collapses across them.
        firsts: dict[str, int] = {}
        self._classes = np.array([firsts.setdefault(token, index) for index, token in enumerate(tokens)])
        self._blank = firsts.get(_token(config.get("pad_token", "<pad>")))
        self._space = str(config.get("replace_word_delimiter_char", " "))
        delimiter = _token(config.get("word_delimiter_token", "|"))
        self._texts = [self._space if token == delimiter else token for token in tokens]
        self._lower = bool(config.get("do_lower_case", False))
        self._cleans = bool(config.get("clean_up_tokenization_spaces", False))

    def spans(self, classes: NDArray[np.int64]) -> list[Span]:
        """What is heard, from the most probable class of each position: runs of one class, without the blank.

        Raises InternalError if a class is negative.
        """
        if classes.min(initial=0) < 0:
            raise InternalError("the model gave a score that is not a number; its weights or precision are unsound")
        heard = self._classes[classes]
        starts = np.flatnonzero(np.diff(heard, prepend=-1))
        ends = np.append(starts[1:], len(heard))
        runs = zip(heard[starts].tolist(), starts.tolist(), ends.tolist(), strict=True)
        return [Span(self._texts[index], start, end) for index, start, end in runs if index != self._blank]

    def words(self, spans: Sequence[Span]) -> list[Span]:
        """Spans joined to words."""
        groups = (list(group) for space, group in groupby(spans, lambda span: span.text == self._space) if not space)
        return [Span("".join(span.text for span in group), group[0].start, group[-1].end) for group in groups]

    def text(self, spans: Sequence[Span]) -> str:
        """The text of all spans."""
        text = "".join(span.text for span in spans).strip()
        if self._lower:
            text = text.lower()
        if self._cleans:
            for untidy, tidy in _CLEAN_UP:
                text = text.replace(untidy, tidy)
        return text


def _token(token: Any) -> str:
    """A special token, which some versions write with its properties."""
    return str(token["content"] if isinstance(token, dict) else token)


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise ValueError(f"{path} is missing: a CTC model needs its vocabulary") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); build or copy the model again") from None
    return document
