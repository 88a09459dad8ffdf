"""Texts to token ids with the `tokenizers` library alone: one call for a whole batch, long texts split into windows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from handler.batching import padded
from handler.errors import InvalidInput, RequestError, TooLarge, UnreadableRequest, UnsupportedMediaType
from handler.inputs import Encoded

Text = str | tuple[str, str]
Truncation = Literal["longest_first", "only_first", "only_second"]

_NAMES = ("input_ids", "attention_mask")
_TYPES = "token_type_ids"


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

    def collate(self, rows: Sequence[Encoding]) -> dict[str, NDArray[np.int64]]:
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
            arrays["attention_mask"][index, :n] = 1
            if _TYPES in arrays:
                arrays[_TYPES][index, :n] = row.type_ids
        return arrays

    def _lengths(self, samples: Sequence[Text]) -> list[int]:
        """Tokens of whole samples, special tokens included."""
        self.tokenizer.no_truncation()
        try:
            return [len(encoding) for encoding in self.tokenizer.encode_batch_fast(list(samples))]
        finally:
            self._truncate()

    def _truncate(self) -> None:
        self.tokenizer.enable_truncation(self._max_length, stride=self._stride, strategy=self._truncation)


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
