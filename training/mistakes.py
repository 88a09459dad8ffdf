"""The validation examples that a model is most certain about and wrong, and which words, or squares, made it so."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from handler.engine import Engine
from handler.errors import RequestError
from handler.inputs.images import decode
from handler.messages import Request
from handler.tasks.image_classification import ImageClassification
from handler.tasks.question_answering import QuestionAnswering
from handler.tasks.text_classification import TextClassification
from handler.tasks.token_classification import TokenClassification
from training import evaluation
from training.tasks.question_answering import overlap

MOST = 10
_NO_ENTITY, _NO_ANSWER = "no entity", "no answer"
_CHARACTERS = 60  # of an answer in a heading
_SIDE = 160  # pixels of an image's longer side
_ALL_LABELS = 100_000

Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Word:
    """A stretch of text. score: how much it speaks for the answer, in logits; None if that is not known.

    marked: whether it is what the mistake is about.
    """

    text: str
    score: float | None = None
    marked: bool = False


@dataclass(frozen=True, slots=True)
class Square:
    """A part of an image, in its pixels. score: as of a word."""

    x: float
    y: float
    width: float
    height: float
    score: float


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as it is looked at: a small PNG in base64, what it was in pixels, and its squares."""

    png: str
    width: int
    height: int
    squares: Sequence[Square]


@dataclass(frozen=True, slots=True)
class Mistake:
    """title: what is wrong. scores: by name, first the one that is explained.

    texts: one, or two of a pair or a question, in words; or else a picture.
    """

    title: str
    scores: Mapping[str, float]
    texts: Sequence[Sequence[Word]] = ()
    picture: Picture | None = None

    @property
    def most(self) -> float:
        """The largest score of a word or square, whichever way it speaks."""
        scores = [word.score for words in self.texts for word in words]
        scores += [square.score for square in self.picture.squares] if self.picture else []
        return max((abs(score) for score in scores if score is not None), default=0.0)


@dataclass(frozen=True, slots=True)
class _Wrong:
    """A mistake before it is explained.

    certainty: from 0 to 1, what it is ranked by. answer: what tells the answer it is about from others, None if
    nothing is to be explained. marks: what it is about in the last of the texts.
    """

    example: Mapping[str, Any]
    title: str
    scores: Mapping[str, float]
    certainty: float
    answer: Mapping[str, Any] | None
    parameters: Mapping[str, Any]
    marks: Sequence[Place] = field(default=())


def hardest(engine: Engine, examples: Sequence[Mapping[str, Any]], predictions: Sequence[Any]) -> list[Mistake] | None:
    """The ten mistakes with the highest scores, explained by occlusion; None for a task whose answers are not.

    examples: `inputs`, `parameters` and `target` as the task scores them; predictions: the engine's, of a
    classifier with all labels.
    """
    wrong = _wrong(engine, examples, predictions)
    if wrong is None:
        return None
    return [_explained(engine, entry) for entry in sorted(wrong, key=lambda entry: -entry.certainty)[:MOST]]


def _wrong(
    engine: Engine, examples: Sequence[Mapping[str, Any]], predictions: Sequence[Any]
) -> Iterator[_Wrong] | None:
    """All mistakes there are, in no order."""
    pairs = list(zip(examples, predictions, strict=True))
    match engine.task:
        case TextClassification() if isinstance(examples[0]["target"], list):
            usual = dict.fromkeys(engine.task.labels, 0.5)
            return _labels(pairs, engine.settings.options.get("thresholds", usual))
        case TextClassification() | ImageClassification() if isinstance(examples[0]["target"], str):
            return _label(pairs)
        case TokenClassification():
            return _entities(engine, pairs)
        case QuestionAnswering():
            return _answers(pairs)
    return None


Pairs = Sequence[tuple[Mapping[str, Any], Any]]


def _label(pairs: Pairs) -> Iterator[_Wrong]:
    """One label, and another is right."""
    for example, found in pairs:
        target, answer, score = example["target"], found[0]["label"], found[0]["score"]
        if answer != target:
            scores = {entry["label"]: entry["score"] for entry in found}
            parameters = {**example["parameters"], "top_k": _ALL_LABELS}
            shown = {answer: score, target: scores.get(target, 0.0)}
            yield _Wrong(example, f"{target}, taken for {answer}", shown, score, {"label": answer}, parameters)


def _labels(pairs: Pairs, thresholds: Mapping[str, float]) -> Iterator[_Wrong]:
    """A label too many or too few, by how much of the way from its threshold to 0 or 1 its score is off."""
    for example, found in pairs:
        for label, score in ((entry["label"], entry["score"]) for entry in found):
            limit, there = thresholds[label], label in example["target"]
            if (score >= limit) == there:
                continue
            title = f"{label}, missed" if there else f"{label}, which is not there"
            certainty = (limit - score) / limit if there else (score - limit) / max(1 - limit, 1e-9)
            # Without a threshold, all labels are answered, and explained.
            yield _Wrong(example, title, {label: score}, certainty, {"label": label}, {"overflow": "truncate"})


def _entities(engine: Engine, pairs: Pairs) -> Iterator[_Wrong]:
    """An entity of another type, at another place, where there is none, or missed."""
    missed = []
    for example, found in pairs:
        targets, text = example["target"], example["inputs"]
        there = {_key(entity) for entity in targets}
        for entity in found:
            if _key(entity) in there:
                continue
            kind, place = entity["entity_group"], (entity["start"], entity["end"])
            near = [target for target in targets if evaluation.shared_characters(target, entity)]
            title = f"{kind}, where there is {_NO_ENTITY}: {_short(text[slice(*place)])}"
            if near:
                other = _short(text[near[0]["start"] : near[0]["end"]])
                title = f"{near[0]['entity_group']} ({other}), taken for {kind} ({_short(text[slice(*place)])})"
            wanted = {"entity_group": kind, "start": place[0], "end": place[1]}
            yield _Wrong(
                example, title, {kind: entity["score"]}, entity["score"], wanted, example["parameters"], [place]
            )
        lost = [
            target for target in targets if not any(evaluation.shared_characters(target, entity) for entity in found)
        ]
        missed += [(example, target) for target in lost]
    asked = [{"inputs": example["inputs"], "parameters": _EVERY_TOKEN} for example, _ in missed]
    for (example, target), tokens in zip(missed, evaluation.predict(engine, asked), strict=True):
        scores = [token["score"] for token in tokens if evaluation.shared_characters(target, token)]
        score = sum(scores) / len(scores) if scores else 0.0
        place = (target["start"], target["end"])
        title = f"{target['entity_group']}, missed: {_short(example['inputs'][slice(*place)])}"
        yield _Wrong(example, title, {_NO_ENTITY: score}, score, None, {}, [place])


_EVERY_TOKEN = {"aggregation_strategy": "none", "ignore_labels": [], "overflow": "window"}


def _answers(pairs: Pairs) -> Iterator[_Wrong]:
    """An answer that is none of the right ones, by its score times the share of it that is in none of them."""
    for example, found in pairs:
        texts, answer = example["target"], found["answer"]
        best = max(overlap(answer, text) for text in texts or [""])
        if best == 1:
            continue
        right, given = (_short(text) if text else _NO_ANSWER for text in (texts[0] if texts else "", answer))
        marks = [(found["start"], found["end"])] if answer else []
        title = f"{right}, taken for {given}"
        wanted = {"answer": answer, "start": found["start"]}
        certainty = found["score"] * (1 - best)
        yield _Wrong(example, title, {given: found["score"]}, certainty, wanted, example["parameters"], marks)


def _explained(engine: Engine, wrong: _Wrong) -> Mistake:
    given = wrong.example["inputs"]
    entry: Mapping[str, Any] = {}
    if wrong.answer is not None:
        [outcome] = engine.predict([Request([given], wrong.parameters, explain=True)])
        # What cannot be explained, say because it is too long, is shown all the same.
        explained: Any = {"explanations": []} if isinstance(outcome, RequestError) else outcome.predictions[0]
        # Not just the first: of two labels as good as even the other may come first when it is asked again, by itself.
        # And those of an answer that has many parts are not all explained.
        same = [e for e in explained["explanations"] if all(e[key] == value for key, value in wrong.answer.items())]
        entry = same[0] if same else {}
    if isinstance(engine.task, ImageClassification):
        return Mistake(wrong.title, wrong.scores, picture=_picture(given, entry))
    texts = [given] if isinstance(given, str) else list(given.values())
    words = [
        _words(
            text,
            [word for word in entry.get("attributions", ()) if word.get("text", 0) == place],
            wrong.marks if place == len(texts) - 1 else (),
        )
        for place, text in enumerate(texts)
    ]
    return Mistake(wrong.title, wrong.scores, words)


def _words(text: str, attributions: Sequence[Mapping[str, Any]], marks: Sequence[Place]) -> list[Word]:
    """A text up to its last word that the model has seen; an ellipsis stands for the rest.

    Without attributions, all of it in stretches that are marked and not.
    """
    parts = [*attributions] or [{"start": start, "end": end} for start, end in marks]
    words, end = [], 0
    for part in parts:
        place = part["start"], part["end"]
        words += [Word(text[end : place[0]]), Word(text[slice(*place)], part.get("score"), _among(place, marks))]
        end = place[1]
    if not attributions:
        return [*words, Word(text[end:])]
    return [*words, Word(" …")] if text[end:].strip() else words


def _picture(given: str, entry: Mapping[str, Any]) -> Picture:
    image = decode(base64.b64decode(given), "RGB")
    width, height = image.size
    squares = []
    if entry:
        rows, box = entry["heat_map"], entry["box"]
        wide, high = (box["xmax"] - box["xmin"]) / len(rows[0]), (box["ymax"] - box["ymin"]) / len(rows)
        squares = [
            Square(box["xmin"] + x * wide, box["ymin"] + y * high, wide, high, score)
            for y, row in enumerate(rows)
            for x, score in enumerate(row)
        ]
    image.thumbnail((_SIDE, _SIDE))
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    return Picture(base64.b64encode(png.getvalue()).decode("ascii"), width, height, squares)


def _key(entity: Mapping[str, Any]) -> tuple[Any, ...]:
    return entity["entity_group"], entity["start"], entity["end"]


def _among(place: Place, marks: Sequence[Place]) -> bool:
    return any(place[0] < end and start < place[1] for start, end in marks)


def _short(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 1]}…"
