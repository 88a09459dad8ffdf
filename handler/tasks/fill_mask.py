"""Fill-mask: the most probable tokens in the place of each mask, as the pipeline of transformers gives them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from handler.errors import InvalidInput, InvalidParameter, RequestError, TooLarge
from handler.inputs import Encoded
from handler.inputs.text import TextInputs, read_text
from handler.parameters import CommonParameters, at_least
from handler.settings import Settings
from handler.tasks import EncoderTask, Outputs, Part
from handler.tasks.text_classification import finite

Fill = dict[str, Any]

_TOP_K = 5
# Each fill comes with the whole text, decoded anew: what a text may ask for is bounded.
_MOST_FILLS = 500
# What transformers takes out of decoded texts where a tokenizer asks for it.
_SPACES = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't"}
_SPACES |= {" 'm": "'m", " 's": "'s", " 've": "'ve", " 're": "'re"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FillMaskParameters(CommonParameters):
    """top_k: fills for each mask, 5 if not given.

    targets: the only fills to choose from; of one that is not in the vocabulary its first token is taken.
    """

    top_k: int | None = at_least(1)
    targets: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Masked:
    """A text with masks. top_k: fills wanted; targets: the only ones, None for the whole vocabulary."""

    text: str
    top_k: int
    targets: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class _Row:
    """A window of a text. masks: where its masks are; candidates: token ids to choose from, None for all."""

    encoding: Encoding
    masks: list[int]
    top_k: int
    candidates: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.encoding)


class FillMask(EncoderTask):
    """Scores are probabilities over the whole vocabulary, also where `targets` leaves few tokens to choose from."""

    auto_model: ClassVar[str] = "AutoModelForMaskedLM"
    Parameters: ClassVar[type[CommonParameters]] = FillMaskParameters

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        named = _tokenizer_config(model_dir)
        mask = _content(named.get("mask_token"))
        if mask is None:
            raise ValueError(f"{model_dir}: its tokenizer names no mask token, so the model cannot fill one")
        self.inputs: _Inputs = _Inputs(model_dir, config, settings, mask)
        self._mask, self._stride = mask, settings.stride
        tokenizer = self.inputs.tokenizer
        self._pad_id = tokenizer.token_to_id(_content(named.get("pad_token")) or "")
        # Transformers cleans up after tokenizers that are not BPE only.
        self._cleans = bool(named.get("clean_up_tokenization_spaces")) and not isinstance(tokenizer.model, BPE)

    def read(self, value: Any, parameters: Any) -> Sequence[Masked]:
        """The text of an input: a string, or an object `{"text": …}`."""
        given = value.get("text") if isinstance(value, dict) and set(value) == {"text"} else value
        text = read_text(given, 'a string or {"text": string}')
        targets = None if parameters.targets is None else tuple(map(read_text, parameters.targets))
        return [Masked(text, parameters.top_k or _TOP_K, targets)]

    def keep(self, row: _Row, outputs: Outputs) -> Outputs:
        """`tokens` and `scores`, each [masks, fills], best first: all that is left of [length, vocabulary]."""
        logits = outputs["logits"][row.masks].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):  # `postprocess` refuses what is not finite
            scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
        if row.candidates is not None:
            scores = scores[:, row.candidates]
        order = np.argsort(-scores, axis=-1, kind="stable")[:, : row.top_k]
        tokens = order if row.candidates is None else row.candidates[order]
        kept: dict[str, Any] = {"tokens": tokens, "scores": np.take_along_axis(scores, order, axis=-1)}
        return kept

    def postprocess(self, parts: Sequence[Part], parameters: Any) -> list[Fill] | list[list[Fill]]:
        """The fills of a single mask; of several masks a list of them for each, in the order of the text."""
        [part] = parts
        ids, found = self._join(part)
        if not found:
            raise InvalidInput(
                f"the text is too long: its {self._mask} is behind what the model takes; shorten it, or send the "
                'parameter "overflow": "window"'
            )
        single = len(found) == 1
        answers = [self._fills(ids, place, *found[place], single=single) for place in sorted(found)]
        return answers[0] if single else answers

    @staticmethod
    def drift(expected: list[Any], found: list[Any]) -> float:
        """Largest change of a score; of a token that gave way to another, the least it must have changed by.

        inf if there are more masks in one than in the other.
        """
        before, after = (fills if fills and isinstance(fills[0], list) else [fills] for fills in (expected, found))
        if [len(fills) for fills in before] != [len(fills) for fills in after]:
            return float("inf")
        return float(np.max([_change(*fills) for fills in zip(before, after, strict=True)], initial=0.0))

    def _join(self, part: Part) -> tuple[list[int], dict[int, tuple[NDArray[Any], NDArray[Any]]]]:
        """The token ids of the whole text, and for each mask, by its index there, its tokens and scores.

        A mask that is in two windows is answered by the one that has more text on both of its sides.
        """
        ids: list[int] = []
        best: dict[int, int] = {}
        found: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        for row, kept in zip(part.rows, part.outputs, strict=True):
            encoding: Encoding = row.encoding
            if ids:  # this window begins with the last `stride` tokens of the text so far
                before, after = _surroundings(encoding)
                del ids[len(ids) - after - self._stride :]
                shift = len(ids) - before
                ids += encoding.ids[before:]
            else:
                shift = 0
                ids += encoding.ids
            for index, place in enumerate(row.masks):
                context = min(place, len(row) - 1 - place)
                if context > best.get(shift + place, -1):
                    best[shift + place] = context
                    found[shift + place] = kept["tokens"][index], kept["scores"][index]
        return ids, found

    def _fills(
        self, ids: list[int], place: int, tokens: NDArray[Any], scores: NDArray[Any], *, single: bool
    ) -> list[Fill]:
        tokenizer = self.inputs.tokenizer
        filled = [[*ids[:place], int(token), *ids[place + 1 :]] for token in tokens]
        sequences = tokenizer.decode_batch(
            [[token for token in entry if token != self._pad_id] for entry in filled], skip_special_tokens=single
        )
        # Other masks are special tokens, too, and must stay.
        words = tokenizer.decode_batch([[int(token)] for token in tokens], skip_special_tokens=False)
        return [
            {"score": float(score), "token": int(token), "token_str": self._clean(word), "sequence": self._clean(text)}
            for score, token, word, text in zip(finite(scores), tokens, words, sequences, strict=True)
        ]

    def _clean(self, text: str) -> str:
        if self._cleans:
            for spaced, tight in _SPACES.items():
                text = text.replace(spaced, tight)
        return text


class _Inputs(TextInputs):
    """Texts of which each has at least one mask, and each knows which fills are asked for."""

    def __init__(self, model_dir: Path, config: Mapping[str, Any], settings: Settings, mask: str) -> None:
        super().__init__(model_dir, config, settings.max_length, settings.stride)
        self._mask, self._mask_id = mask, self.tokenizer.token_to_id(mask)
        self._vocabulary = int(config["vocab_size"])

    def size(self, sample: Any) -> int:
        """Characters of the text and of the targets."""
        return len(sample.text) + sum(map(len, sample.targets or ()))

    def encode(self, samples: Sequence[Any]) -> list[Encoded | RequestError]:
        """Encodes all texts in one tokenizer call. A text without a mask, or with too many, is its own error."""
        texts = super().encode([sample.text for sample in samples])
        known: dict[tuple[str, ...], NDArray[np.int64]] = {}
        return [self._masked(sample, encoded, known) for sample, encoded in zip(samples, texts, strict=True)]

    def collate(self, rows: Sequence[Any]) -> dict[str, NDArray[np.int64]]:
        """Pads rows to one batch, see `TextInputs.collate`."""
        return super().collate([row.encoding for row in rows])

    def _masked(
        self, sample: Masked, encoded: Encoded | RequestError, known: dict[tuple[str, ...], NDArray[np.int64]]
    ) -> Encoded | RequestError:
        """known: ids of the targets of other samples."""
        if isinstance(encoded, RequestError):
            return encoded
        masks = [[place for place, token in enumerate(row.ids) if token == self._mask_id] for row in encoded.rows]
        if not any(masks):
            return InvalidInput(f"the text has nothing to fill; put {self._mask} where a token is missing")
        candidates, top_k = None, sample.top_k
        if sample.targets is not None:
            if sample.targets not in known:
                known[sample.targets] = _token_ids(self.tokenizer, sample.targets, self._vocabulary)
            candidates = known[sample.targets]
            if not len(candidates):
                return InvalidParameter("parameter 'targets' has no text in it; name at least one, or leave it out")
            top_k = min(top_k, len(candidates))
        if (fills := sum(map(len, masks)) * top_k) > _MOST_FILLS:
            return TooLarge(
                f"{fills} fills are asked for, 'top_k' for each {self._mask}; at most {_MOST_FILLS} are given: lower "
                "'top_k', or split the text"
            )
        rows = [_Row(row, places, top_k, candidates) for row, places in zip(encoded.rows, masks, strict=True)]
        return Encoded(rows, encoded.tokens, encoded.overflows)


def _token_ids(tokenizer: Tokenizer, targets: Sequence[str], vocabulary: int) -> NDArray[np.int64]:
    """Distinct ids of the targets, or of their first tokens; those the model has no token for are left out."""
    ids = set()
    for target in targets:
        token = tokenizer.token_to_id(target)
        ids.update(tokenizer.encode(target, add_special_tokens=False).ids[:1] if token is None else [token])
    return np.array(sorted(token for token in ids if token < vocabulary), dtype=np.int64)


def _surroundings(encoding: Encoding) -> tuple[int, int]:
    """How many special tokens stand before and after the text."""
    special = encoding.special_tokens_mask
    return special.index(0), special[::-1].index(0)


def _change(before: Sequence[Fill], after: Sequence[Fill]) -> float:
    """Largest change of a score between the fills of one mask."""
    scores = [{fill["token"]: fill["score"] for fill in fills} for fills in (before, after)]
    changes = [abs(scores[0][token] - scores[1][token]) for token in scores[0].keys() & scores[1].keys()]
    for mine, other in (scores, scores[::-1]):
        lowest = min(other.values(), default=0.0)
        changes += [max(0.0, score - lowest) for token, score in mine.items() if token not in other]
    # Unlike max(), numpy's keeps a NaN wherever it stands.
    return float(np.max(changes, initial=0.0))


def _tokenizer_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return config


def _content(token: Any) -> str | None:
    """The text of a special token, which a tokenizer's configuration holds as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token
