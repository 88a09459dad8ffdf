"""Texts to token ids with the `tokenizers` library alone: one call for a whole batch, long texts split into windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding, Tokenizer


@dataclass(frozen=True, slots=True)
class EncodedText:
    """One text as token ids.

    windows: one encoding of at most `max_length` tokens, or several that overlap by `stride` tokens.
    tokens: tokens of the whole text, its special tokens counted once.
    """

    windows: list[Encoding]
    tokens: int


class TextTokenizer:
    """Encodes texts the way the model's own Hugging Face tokenizer does, special tokens included."""

    def __init__(self, model_dir: Path, max_length: int, stride: int) -> None:
        path = model_dir / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"{path} is missing: the model needs a tokenizer of the `tokenizers` library")
        self._tokenizer = Tokenizer.from_file(str(path))
        # A saved tokenizer may carry the padding of its last training run; batching pads here.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length, stride=stride)
        self._stride = stride
        self._special = self._tokenizer.num_special_tokens_to_add(is_pair=False)

    def __call__(self, texts: Sequence[str]) -> list[EncodedText]:
        """Encodes all texts in one tokenizer call; the result is in the order of `texts`."""
        return [self._encoded(encoding) for encoding in self._tokenizer.encode_batch(list(texts))]

    def _encoded(self, first: Encoding) -> EncodedText:
        windows = [first, *first.overflowing]
        if len(windows) == 1:
            return EncodedText(windows, len(first))
        content = sum(len(window) - self._special for window in windows) - self._stride * (len(windows) - 1)
        return EncodedText(windows, content + self._special)
