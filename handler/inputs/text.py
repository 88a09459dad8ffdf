"""Texts to token ids with the `tokenizers` library alone: one call for a whole batch, long texts split into windows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from handler.batching import padded
from handler.errors import InvalidInput, RequestError, TooLarge, UnreadableRequest, UnsupportedMediaType
from handler.inputs import Encoded, Feature

Text = str | tuple[str, str]
Truncation = Literal["longest_first", "only_first", "only_second"]

_NAMES = ("input_ids", "attention_mask")
_TYPES = "token_type_ids"


@dataclass(frozen=True, slots=True)
class HiddenRow:
    """A row some of whose tokens are hidden: what `collate` needs of an `Encoding`."""

    ids: list[int]
    type_ids: list[int]
    attention_mask: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class TextInputs:
    """Encodes texts and pairs of texts the way the model's own Hugging Face tokenizer does, special tokens included.

    truncation: which text of a pair is cut, and split into windows, when both together are too long;
    "longest_first" takes from the longer one and cannot make windows of a pair.
    """

    def __init__(
        self,
        model_dir: Path,
        config: Mapping[str, Any],
        max_length: int,
        stride: int,
        truncation: Truncation = "longest_first",
    ) -> None:
        path = model_dir / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"{path} is missing: the model needs a tokenizer of the `tokenizers` library")
        self.tokenizer = Tokenizer.from_file(str(path))
        # A saved tokenizer may carry the padding of its last training run; batches are padded here.
        self.tokenizer.no_padding()
        # GPT-2 would take token types too, but as further tokens to add to the text's.
        names = (*_NAMES, _TYPES) if config.get("type_vocab_size") else _NAMES
        self.shapes: Mapping[str, tuple[int, ...]] = dict.fromkeys(names, (-1, -1))
        self._max_length, self._stride, self._truncation = max_length, stride, truncation
        self._pad_id = int(config.get("pad_token_id") or 0)
        self._neutral_id = self._neutral(model_dir)
        self._truncate()

    def size(self, sample: Text) -> int:
        """Characters of a text or of both texts of a pair."""
        return len(sample) if isinstance(sample, str) else sum(map(len, sample))

    def encode(self, samples: Sequence[Text]) -> list[Encoded | RequestError]:
        """Encodes all samples in one tokenizer call; a row is a `tokenizers.Encoding` of at most `max_length` tokens.

        Neighbouring windows of one text overlap by `stride` tokens.
        """
        try:
            encodings = self.tokenizer.encode_batch(list(samples))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            # A text of a pair that must not be cut leaves no room for the other: find the culprits one by one. Where
            # the room is smaller than the stride, tokenizers panics, and a panic is no Exception.
            if len(samples) > 1:
                return [encoded for sample in samples for encoded in self.encode([sample])]
            return [TooLarge(f"the text that must stay whole leaves no room in the model's {self._max_length} tokens")]
        long = [index for index, encoding in enumerate(encodings) if encoding.overflowing]
        lengths = dict(zip(long, self._lengths([samples[index] for index in long]), strict=True)) if long else {}
        encoded: list[Encoded | RequestError] = []
        for index, (sample, first) in enumerate(zip(samples, encodings, strict=True)):
            if not len(first):
                encoded.append(InvalidInput("the text is empty; this model needs at least one character"))
                continue
            if index not in lengths:
                encoded.append(Encoded([first], len(first)))
                continue
            splits = isinstance(sample, str) or self._truncation != "longest_first"
            rows = [first, *first.overflowing] if splits else [first]
            encoded.append(Encoded(rows, lengths[index], overflows=True))
        return encoded

    def collate(self, rows: Sequence[Encoding | HiddenRow]) -> dict[str, NDArray[np.int64]]:
        """Pads rows to one length on the right.

        Returns `input_ids`, `attention_mask` and, for a model that has them, `token_type_ids`, each int64 [batch,
        length], where length is a multiple of 8 unless that would exceed `max_length`.
        """
        length = min(padded(max(map(len, rows))), self._max_length)
        shape = (len(rows), length)
        arrays = {
            "input_ids": np.full(shape, self._pad_id, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
        }
        if _TYPES in self.shapes:
            arrays[_TYPES] = np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            n = len(row)
            arrays["input_ids"][index, :n] = row.ids
            arrays["attention_mask"][index, :n] = row.attention_mask if isinstance(row, HiddenRow) else 1
            if _TYPES in arrays:
                arrays[_TYPES][index, :n] = row.type_ids
        return arrays

    def features(self, sample: Text, rows: Sequence[Encoding], most: int) -> list[list[Feature]]:
        """The words of each row, as the tokenizer splits them; of a long text, runs of several words.

        A window that begins and ends within runs has one or two more than `most`.
        """
        words = [_words(row) for row in rows]
        # Counted in the whole text, so that windows agree on which words go together.
        size = max(1, -(-max(map(len, words)) // most))
        features = []
        for row, found in zip(rows, words, strict=True):
            runs: dict[tuple[int, int], list[int]] = {}
            for (field, word), positions in found.items():
                runs.setdefault((field, word // size), []).extend(positions)
            offsets = row.offsets
            features.append(
                [
                    Feature(key, positions, (offsets[positions[0]][0], offsets[positions[-1]][1]))
                    for key, positions in runs.items()
                ]
            )
        return features

    def hide(self, row: Encoding, features: Sequence[Feature]) -> HiddenRow:
        """The row with the model's mask token, or one that says as little, for each token of the features.

        No token attends to these, for a mask says something, too: that a word is missing. Where nothing is before the
        first token, as in GPT-2, it is attended to: a token must attend to one.
        """
        ids, mask = list(row.ids), list(row.attention_mask)
        for feature in features:
            for position in feature.place:
                ids[position] = self._neutral_id
                mask[position] = 0 if position else 1
        return HiddenRow(ids, row.type_ids, mask)

    def shown(
        self, sample: Text, rows: Sequence[Encoding], attributions: Sequence[tuple[Feature, float]]
    ) -> list[dict[str, Any]]:
        """`[{"word", "start", "end", "score"}, …]` in the order of the text, in characters; of a pair, with its `text`.

        `text` is 0 for the first text of a pair and 1 for the second.
        """
        texts = (sample,) if isinstance(sample, str) else sample
        words: dict[Any, dict[str, Any]] = {}
        for feature, score in attributions:
            start, end = feature.extent
            word = words.setdefault(feature.key, {"word": "", "start": start, "end": end, "score": 0.0})
            word["start"], word["end"] = min(start, word["start"]), max(end, word["end"])
            word["score"] += score
        found = []
        for (field, _), word in sorted(words.items()):
            # Some tokenizers count the space before a word to it.
            written = texts[field][word["start"] : word["end"]]
            word["start"] += len(written) - len(written.lstrip())
            word["word"] = written.strip()
            word["end"] = word["start"] + len(word["word"])
            if word["word"]:
                found.append(word if isinstance(sample, str) else {"text": field, **word})
        return found

    def _lengths(self, samples: Sequence[Text]) -> list[int]:
        """Tokens of whole samples, special tokens included."""
        self.tokenizer.no_truncation()
        try:
            return [len(encoding) for encoding in self.tokenizer.encode_batch_fast(list(samples))]
        finally:
            self._truncate()

    def _neutral(self, model_dir: Path) -> int:
        """The token that stands for a hidden one. Not the padding, which tells some models where a text ends."""
        for name in ("mask_token", "unk_token"):
            token = self.tokenizer.token_to_id(special_token(model_dir, name) or "")
            if token not in (None, self._pad_id):
                return int(token)
        return next(iter(self.tokenizer.encode(" ", add_special_tokens=False).ids), self._pad_id)

    def _truncate(self) -> None:
        self.tokenizer.enable_truncation(self._max_length, stride=self._stride, strategy=self._truncation)


def special_token(model_dir: Path, name: str) -> str | None:
    """A special token, e.g. the "mask_token", that `tokenizer_config.json` names; a string or an object there."""
    path = model_dir / "tokenizer_config.json"
    token = json.loads(path.read_text(encoding="utf-8")).get(name) if path.exists() else None
    return token["content"] if isinstance(token, dict) else token


def _words(row: Encoding) -> dict[tuple[int, int], list[int]]:
    """Positions of each word of a row: by the text of a pair that it is of, and its number there."""
    words: dict[tuple[int, int], list[int]] = {}
    for position, (field, word) in enumerate(zip(row.sequence_ids, row.word_ids, strict=True)):
        if field is not None and word is not None:
            words.setdefault((field, word), []).append(position)
    return words


def read_text(value: Any, expected: str = "a string") -> str:
    """`value` if it is a text that can be encoded. Raises RequestError, saying what is `expected`, if not."""
    if isinstance(value, bytes | bytearray):
        raise UnsupportedMediaType("this model takes text, not bytes of an image, a sound or another file")
    if not isinstance(value, str):
        raise InvalidInput(f"an input must be {expected}, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnreadableRequest(
            f"the text has half of a surrogate pair at character {error.start}: send whole characters"
        ) from None
    return value
