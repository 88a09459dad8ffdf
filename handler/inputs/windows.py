"""Texts and pairs that each say how they are split into windows: for tasks whose requests may name a stride."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from handler.errors import RequestError, TooLarge
from handler.inputs import Encoded, Feature
from handler.inputs.text import HiddenRow, Text, TextInputs, Truncation

# Characters of a text, times the windows that each is in: bounds the memory that small steps would take.
_MOST_CHARACTERS = 4_000_000
_WINDOW_COST = 32  # what a window takes besides its tokens, in tokens


@dataclass(frozen=True, slots=True)
class Windowed:
    """A text or a pair. length: tokens of one window, special tokens included; stride: tokens that neighbours share."""

    text: Text
    length: int
    stride: int


class WindowInputs:
    """Encodes samples as `TextInputs` does, each with windows of its own length and stride.

    max_length: the largest length of a window. A sample's stride must be below the room that its windows have for
    the text that is split (see `room`): the tokenizers library panics where it is not.
    """

    def __init__(
        self, model_dir: Path, config: Mapping[str, Any], max_length: int, truncation: Truncation = "longest_first"
    ) -> None:
        self._texts = _Texts(model_dir, config, max_length, 0, truncation)
        self.tokenizer = self._texts.tokenizer
        self.shapes = self._texts.shapes

    def room(self, length: int, *, pair: bool) -> int:
        """Tokens of text in a window of `length` tokens, i.e. without the special ones; of both texts if a `pair`."""
        return length - self.tokenizer.num_special_tokens_to_add(pair)

    def check(self, text: str, length: int, step: int) -> None:
        """Raises TooLarge for a text that windows of `length` tokens, `step` tokens apart, would repeat too often."""
        if len(text) * (length + _WINDOW_COST) > _MOST_CHARACTERS * step:
            raise TooLarge(
                f"a text of {len(text)} characters is too long for windows of {length} tokens that go on by {step}; "
                "send a shorter text, or ask for a smaller stride"
            )

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without special ones."""
        return [len(encoding) for encoding in self._texts.whole(texts)]

    def beginning(self, text: str, tokens: int) -> str:
        """The characters of the first `tokens` tokens of a text."""
        [encoding] = self._texts.whole([text])
        return text if len(encoding) <= tokens else text[: encoding.offsets[tokens - 1][1]]

    def size(self, sample: Windowed) -> int:
        """Characters of a text or of both texts of a pair."""
        return self._texts.size(sample.text)

    def encode(self, samples: Sequence[Windowed]) -> list[Encoded | RequestError]:
        """Encodes all samples, in one tokenizer call for each combination of length and stride among them."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            groups[sample.length, sample.stride].append(index)
        encoded: dict[int, Encoded | RequestError] = {}
        for window, indices in groups.items():
            self._texts.set_window(*window)
            texts = [samples[index].text for index in indices]
            encoded.update(zip(indices, self._texts.encode(texts), strict=True))
        return [encoded[index] for index in range(len(samples))]

    def features(self, sample: Windowed, rows: Sequence[Encoding], most: int) -> list[list[Feature]]:
        """See `TextInputs.features`."""
        return self._texts.features(sample.text, rows, most)

    def hide(self, row: Encoding, features: Sequence[Feature]) -> HiddenRow:
        """See `TextInputs.hide`."""
        return self._texts.hide(row, features)

    def shown(
        self, sample: Windowed, rows: Sequence[Encoding], attributions: Sequence[tuple[Feature, float]]
    ) -> list[dict[str, Any]]:
        """See `TextInputs.shown`."""
        return self._texts.shown(sample.text, rows, attributions)

    def collate(self, rows: Sequence[Encoding | HiddenRow]) -> dict[str, NDArray[np.int64]]:
        """Pads rows to one batch, see `TextInputs.collate`."""
        return self._texts.collate(rows)


class _Texts(TextInputs):
    """Texts split into windows that may change from call to call, up to the `max_length` that batches are padded to."""

    _window: tuple[int, int] | None = None

    def set_window(self, length: int, stride: int) -> None:
        if self._window != (length, stride):
            self._window = length, stride
            self._truncate()

    def whole(self, texts: Sequence[str]) -> list[Encoding]:
        """The texts without special tokens and never cut."""
        self.tokenizer.no_truncation()
        try:
            return self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        finally:
            self._truncate()

    def _truncate(self) -> None:
        length, stride = self._window or (self._max_length, self._stride)
        self.tokenizer.enable_truncation(length, stride=stride, strategy=self._truncation)
