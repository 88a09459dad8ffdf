"""The examples that a text classifier is most certain about and wrong, and which words made it so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handler.engine import Engine
from handler.errors import RequestError
from handler.messages import Request

MOST = 10


@dataclass(frozen=True, slots=True)
class Word:
    """A stretch of text. score: how much it speaks for the answer, in logits; None between words."""

    text: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Mistake:
    """texts: one, or two of a pair, in words. score: of the answer; target_score: of the true label."""

    texts: Sequence[Sequence[Word]]
    target: str
    target_score: float
    answer: str
    score: float

    @property
    def most(self) -> float:
        """The largest score of a word, whichever way it speaks."""
        return max((abs(word.score) for words in self.texts for word in words if word.score is not None), default=0.0)


def hardest(engine: Engine, examples: Sequence[Mapping[str, Any]], predictions: Sequence[Any]) -> list[Mistake]:
    """The ten wrong answers with the highest scores, explained by occlusion: a forward pass for each word.

    examples: `inputs`, `parameters` and as `target` the name of a label; predictions: the engine's, all labels of each.
    Raises RequestError if the engine refuses an example.
    """
    wrong = [
        (example, prediction)
        for example, prediction in zip(examples, predictions, strict=True)
        if prediction[0]["label"] != example["target"]
    ]
    wrong.sort(key=lambda pair: -pair[1][0]["score"])
    return [_explained(engine, *pair) for pair in wrong[:MOST]]


def _explained(engine: Engine, example: Mapping[str, Any], prediction: Sequence[Mapping[str, Any]]) -> Mistake:
    given, target, answer = example["inputs"], example["target"], prediction[0]
    [outcome] = engine.predict([Request([given], example["parameters"], explain=True)])
    if isinstance(outcome, RequestError):
        raise outcome
    explanations = outcome.predictions[0]["explanations"]  # type: ignore[index]  # an error would be the whole outcome
    # Not just the first: of two labels as good as even the other may come first when it is asked again, by itself.
    [found] = [entry["attributions"] for entry in explanations if entry["label"] == answer["label"]]
    texts = [given] if isinstance(given, str) else [given["text"], given["text_pair"]]
    words = [_words(text, [word for word in found if word.get("text", 0) == place]) for place, text in enumerate(texts)]
    scores = {entry["label"]: entry["score"] for entry in prediction}
    return Mistake(words, target, scores[target], answer["label"], answer["score"])


def _words(text: str, attributions: Sequence[Mapping[str, Any]]) -> list[Word]:
    """A text up to its last word that the model has seen; an ellipsis stands for the rest."""
    words, end = [], 0
    for entry in attributions:
        words += [Word(text[end : entry["start"]]), Word(entry["word"], entry["score"])]
        end = entry["end"]
    return [*words, Word(" …")] if text[end:].strip() else words
