"""The texts that servers are asked about, and their requests as files for the load generators."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
_SHORTEST, _LONGEST = 5, 500
_LONG_TAIL = {"reviews": 120, "naughty": 90, "contexts": 90}
_GOLDEN_RATIO = (5**0.5 - 1) / 2


class Texts:
    """Mixes of texts. data: the folder of data sets; model_dir: whose tokenizer counts the tokens."""

    def __init__(self, data: Path, model_dir: Path, max_length: int) -> None:
        self._data, self._max_length = data, max_length
        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def sst2(self) -> list[str]:
        """The development texts of SST-2."""
        return self._spread(_column(self._data / "sst2" / "dev.csv"))

    def long_tail(self) -> list[str]:
        """Reviews, hostile strings and SQuAD contexts: mostly short, some long, 5 to 500 tokens."""
        found = {
            "reviews": _column(ROOT / "examples" / "reviews" / "test.csv"),
            "naughty": [row["text"] for row in _json_lines(self._data / "naughty_strings" / "naughty.jsonl")],
            "contexts": [row["context"] for row in _json_lines(self._data / "squad" / "dev.jsonl")],
        }
        longest = min(_LONGEST, self._max_length)
        mix = []
        for name, texts in found.items():
            fitting = [text for text in dict.fromkeys(texts) if _SHORTEST <= self.tokens(text) <= longest]
            mix += self._spread(fitting)[: _LONG_TAIL[name]]
        return self._spread(mix)

    def wnut17(self) -> list[str]:
        """The development texts of WNUT 2017: short messages with names in them."""
        return self._spread([" ".join(row["tokens"]) for row in _json_lines(self._data / "wnut17" / "dev.jsonl")])

    def of_length(self, tokens: int) -> list[str]:
        """Some texts of exactly so many tokens."""
        source = " ".join(row["context"] for row in _json_lines(self._data / "squad" / "dev.jsonl")[:200])
        encoding = self._tokenizer.encode(source, add_special_tokens=False)
        special = self._tokenizer.num_special_tokens_to_add(False)
        step = tokens - special
        texts = []
        for first in range(0, len(encoding) - step, step):
            text = source[encoding.offsets[first][0] : encoding.offsets[first + step - 1][1]]
            if self.tokens(text) == tokens:
                texts.append(text)
            if len(texts) == 32:
                break
        return texts

    def tokens(self, text: str) -> int:
        """Tokens of a text, special ones included."""
        return len(self._tokenizer.encode(text))

    def describe(self, texts: Sequence[str]) -> dict[str, float]:
        """Number of texts and their tokens: the mean, the median and the extremes."""
        lengths = sorted(map(self.tokens, texts))
        return {
            "texts": len(texts),
            "mean_tokens": round(sum(lengths) / len(lengths), 1),
            "median_tokens": lengths[len(lengths) // 2],
            "least_tokens": lengths[0],
            "most_tokens": lengths[-1],
        }

    def _spread(self, texts: Iterable[str]) -> list[str]:
        return spread(texts, self.tokens)


def spread(texts: Iterable[str], size: Callable[[str], int]) -> list[str]:
    """Texts in an order any stretch of which has about the sizes of the whole: a slow server, which gets to see only
    the first hundred, has the same work for each as a fast one, which sees them all several times."""
    ordered = sorted(texts, key=lambda text: (size(text), text))
    return [text for _, text in sorted(((index * _GOLDEN_RATIO) % 1, text) for index, text in enumerate(ordered))]


def write_bodies(path: Path, bodies: Iterable[Any]) -> Path:
    """One request a line, as JSON in ASCII: no character of a text ends a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies), encoding="ascii")
    return path


def chunks(texts: Sequence[str], size: int) -> list[list[str]]:
    """The texts in groups of `size`, what is left over left out."""
    return [list(texts[start : start + size]) for start in range(0, len(texts) - size + 1, size)]


def _column(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def _json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
