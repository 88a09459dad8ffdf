"""Token classification: named entities and their places in a text, as the pipeline of transformers gives them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from handler.errors import InvalidParameter
from handler.explain import MOST_TARGETS, Target, Term
from handler.inputs.text import read_text, special_token
from handler.inputs.windows import Windowed, WindowInputs
from handler.parameters import CommonParameters, at_least
from handler.settings import Settings
from handler.tasks import TIE, EncoderTask, Outputs, Part
from handler.tasks.text_classification import finite, label_names

Strategy = Literal["none", "simple", "first", "average", "max"]
Entity = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClassificationParameters(CommonParameters):
    """aggregation_strategy: how tokens become entities; "none" answers for each token.

    ignore_labels: labels to leave out, ["O"] if not given; of entities the type, without B- or I-.
    stride: tokens that neighbouring windows of a long text share, instead of the archive's own number.
    """

    aggregation_strategy: Strategy = "none"
    ignore_labels: list[str] | None = None
    stride: int | None = at_least(0)


@dataclass(slots=True)
class _Piece:
    """Neighbouring tokens under one label. words: what the tokenizer's decoder joins to their text."""

    label: str
    score: float
    words: list[str]
    start: int
    end: int


class TokenClassification(EncoderTask):
    """Labels each token and, on demand, groups tokens to words and words to entities."""

    auto_model: ClassVar[str] = "AutoModelForTokenClassification"
    Parameters: ClassVar[type[CommonParameters]] = TokenClassificationParameters

    def __init__(self, model_dir: Path, settings: Settings, config: Mapping[str, Any]) -> None:
        self.inputs: WindowInputs = WindowInputs(model_dir, config, settings.max_length)
        self._settings = settings
        self._labels = label_names(config)
        self.labels = list(dict.fromkeys(map(_type, self._labels)))
        tokenizer, unknown = self.inputs.tokenizer, special_token(model_dir, "unk_token")
        self._decoder = tokenizer.decoder
        self._marks_subwords = bool(getattr(tokenizer.model, "continuing_subword_prefix", None))
        self._unknown = tokenizer.token_to_id(unknown) if unknown else None

    def read(self, value: Any, parameters: Any) -> Sequence[Windowed]:
        """The text of an input: a string, or an object `{"text": …}`."""
        given = value.get("text") if isinstance(value, dict) and set(value) == {"text"} else value
        text = read_text(given, 'a string or {"text": string}')
        length = self._settings.max_length
        room = self.inputs.room(length, pair=False)
        stride = self._settings.stride if parameters.stride is None else parameters.stride
        if stride >= room:
            raise InvalidParameter(f"parameter 'stride' must be below {room}, the tokens of text in a window")
        self.inputs.check(text, length, room - stride)
        return [Windowed(text, length, stride)]

    def keep(self, row: Encoding, outputs: Outputs) -> Outputs:
        """The logits without padding."""
        return {"logits": outputs["logits"][: len(row)].copy()}

    def postprocess(self, parts: Sequence[Part], parameters: Any) -> list[Entity]:
        """Entities, or labelled tokens, in the order of the text."""
        [part] = parts
        ignored = ["O"] if parameters.ignore_labels is None else parameters.ignore_labels
        shift = self.inputs.room(part.sample.length, pair=False) - part.sample.stride
        alone = len(part.rows) == 1
        found: list[Entity] = []
        for number, (row, outputs) in enumerate(zip(part.rows, part.outputs, strict=True)):
            scores = _softmax(outputs["logits"])
            if parameters.aggregation_strategy == "none":
                # Of several windows, the surer one may be that with a label to ignore: ignored below.
                found += self._tokens(part.sample.text, row, scores, ignored if alone else (), number * shift)
            else:
                found += self._entities(part.sample.text, row, scores, ignored, parameters.aggregation_strategy)
        if alone:
            return found
        if parameters.aggregation_strategy == "none":
            return [token for token in _surest_tokens(found) if token["entity"] not in ignored]
        return _longest_entities(found)

    def targets(self, part: Part, prediction: list[Entity], parameters: Any) -> list[Target]:
        """Of each entity, or labelled token, the mean over its tokens of the logit of their most probable label of its
        type, in the window that has most text around it."""
        return [self._target(part, entity) for entity in prediction[:MOST_TARGETS]]

    def _target(self, part: Part, entity: Entity) -> Target:
        group = entity["entity_group"] if "entity_group" in entity else _type(entity["entity"])
        kinds = [index for index, label in enumerate(self._labels) if group in (label, label.split("-", 1)[-1])]
        start, end = entity["start"], entity["end"]

        def inside(row: Encoding) -> list[int]:
            return [at for at in _content(row) if start <= row.offsets[at][0] and row.offsets[at][1] <= end]

        def room(number: int) -> int:
            positions = inside(part.rows[number])
            return min(positions[0], len(part.rows[number]) - positions[-1]) if positions else -1

        number = max(range(len(part.rows)), key=lambda number: (len(inside(part.rows[number])), room(number)))
        logits = part.outputs[number]["logits"]
        positions = inside(part.rows[number])
        best = [kinds[int(logits[position, kinds].argmax())] for position in positions]
        terms = [
            Term(number, "logits", (position, label), 1 / len(positions))
            for position, label in zip(positions, best, strict=True)
        ]
        return Target(entity, terms)

    def found(self, prediction: Any) -> Iterable[tuple[str, float]]:
        """The type of each entity or token that is none of "O"."""
        return [(_type(_label(entity)), entity["score"]) for entity in prediction]

    @staticmethod
    def drift(expected: list[Entity], found: list[Entity]) -> float:
        """Largest change of a score; of a label that gave way to another, the least it must have changed by.

        inf if the entities, or tokens, are not at the same places.
        """
        places = [[(entity["start"], entity["end"]) for entity in entities] for entities in (expected, found)]
        if places[0] != places[1]:
            return float("inf")
        return float(np.max([_change(before, after) for before, after in zip(expected, found, strict=True)], initial=0))

    @staticmethod
    def agrees(expected: list[Entity], found: list[Entity]) -> bool:
        """Whether the same entities, or tokens, have the same labels, but for ties and for one in a hundred."""
        places = [[(entity["start"], entity["end"]) for entity in entities] for entities in (expected, found)]
        if places[0] != places[1]:
            return False
        changed = [
            _label(before) != _label(after) and _change(before, after) > TIE
            for before, after in zip(expected, found, strict=True)
        ]
        return bool(sum(changed) <= len(changed) // 100)

    def _tokens(
        self, text: str, row: Encoding, scores: NDArray[np.float32], ignored: Sequence[str], shift: int
    ) -> list[Entity]:
        """Each token with its label. shift: tokens of the text before this window."""
        ids, offsets, tokens = row.ids, row.offsets, row.tokens
        best = scores.argmax(axis=-1)
        found = []
        for index in _content(row):
            if (label := self._labels[best[index]]) in ignored:
                continue
            start, end = offsets[index]
            found.append(
                {
                    "entity": label,
                    "score": float(scores[index, best[index]]),
                    "index": index + shift,
                    "word": text[start:end] if ids[index] == self._unknown else tokens[index],
                    "start": start,
                    "end": end,
                }
            )
        return found

    def _entities(
        self, text: str, row: Encoding, scores: NDArray[np.float32], ignored: Sequence[str], strategy: Strategy
    ) -> list[Entity]:
        """Neighbouring tokens, or words, of one type."""
        entities: list[list[_Piece]] = []
        for piece in self._pieces(text, row, scores, strategy):
            last = entities[-1][-1] if entities else None
            if last and not piece.label.startswith("B-") and _type(piece.label) == _type(last.label):
                entities[-1].append(piece)
            else:
                entities.append([piece])
        found = []
        for pieces in entities:
            # As the pipeline writes it, whether or not the label has a prefix.
            group = pieces[0].label.split("-", 1)[-1]
            if group not in ignored:
                found.append(
                    {
                        "entity_group": group,
                        "score": float(np.mean([piece.score for piece in pieces])),
                        "word": self._join([word for piece in pieces for word in piece.words]),
                        "start": pieces[0].start,
                        "end": pieces[-1].end,
                    }
                )
        return found

    def _pieces(self, text: str, row: Encoding, scores: NDArray[np.float32], strategy: Strategy) -> Iterable[_Piece]:
        """What has a label of its own: tokens with "simple", words with the other strategies."""
        ids, offsets, tokens = row.ids, row.offsets, row.tokens
        words: list[list[int]] = []
        spelled: dict[int, str] = {}
        for index in _content(row):
            start, end = offsets[index]
            unknown = ids[index] == self._unknown
            spelled[index] = text[start:end] if unknown else tokens[index]
            if words and strategy != "simple" and not unknown and self._continues(text, tokens[index], start, end):
                words[-1].append(index)
            else:
                words.append([index])
        for word in words:
            values = _word_scores(scores[word], strategy)
            best = int(values.argmax())
            parts = [spelled[index] for index in word]
            yield _Piece(
                label=self._labels[best],
                score=float(values[best]),
                words=parts if strategy == "simple" else [self._join(parts)],
                start=offsets[word[0]][0],
                end=offsets[word[-1]][1],
            )

    def _continues(self, text: str, token: str, start: int, end: int) -> bool:
        """Whether a token goes on with the word before it, decided as the pipeline does."""
        if self._marks_subwords:
            return len(token) != end - start
        return start > 0 and " " not in text[start - 1 : start + 1]

    def _join(self, words: list[str]) -> str:
        return self._decoder.decode(words) if self._decoder is not None else " ".join(words)


def _content(row: Encoding) -> list[int]:
    """Positions of a row that are not special tokens."""
    return [index for index, special in enumerate(row.special_tokens_mask) if not special]


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits [tokens, labels] to scores [tokens, labels]. Raises InternalError for logits that are not finite."""
    values = finite(logits)
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True), dtype=np.float32)


def _word_scores(scores: NDArray[np.float32], strategy: Strategy) -> NDArray[np.float32]:
    """Scores [tokens, labels] of a word's tokens to the word's [labels]."""
    if strategy == "average":
        return np.asarray(scores.mean(axis=0))
    return np.asarray(scores[scores.max(axis=-1).argmax() if strategy == "max" else 0])


def _type(label: str) -> str:
    """The entity type of an IOB label."""
    return label[2:] if label.startswith(("B-", "I-")) else label


def _surest_tokens(tokens: Iterable[Entity]) -> list[Entity]:
    """Tokens of several windows, each once: as the surer window has it."""
    best: dict[int, Entity] = {}
    for token in tokens:
        if token["index"] not in best or token["score"] > best[token["index"]]["score"]:
            best[token["index"]] = token
    return [best[index] for index in sorted(best)]


def _longest_entities(entities: Iterable[Entity]) -> list[Entity]:
    """Entities of several windows without those that overlap a longer one, or one as long and surer."""
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda entity: int(entity["start"])):
        if not kept or entity["start"] >= kept[-1]["end"]:
            kept.append(entity)
        elif (_length(entity), entity["score"]) > (_length(kept[-1]), kept[-1]["score"]):
            kept[-1] = entity
    return kept


def _length(entity: Entity) -> int:
    return int(entity["end"] - entity["start"])


def _change(before: Entity, after: Entity) -> float:
    """How much a score changed, or at least must have changed where one label gave way to another.

    A label that is not the highest scores at most as much as the highest one, and at most what that one leaves.
    """
    old, new = before["score"], after["score"]
    if _label(before) == _label(after):
        return float(abs(old - new))
    return float(max(old - min(new, 1 - new), new - min(old, 1 - old), 0.0))


def _label(entity: Entity) -> Any:
    return entity.get("entity", entity.get("entity_group"))
