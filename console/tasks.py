"""What each task asks for and how its answer is shown."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from console import render
from marble_client import Input, Json

# Inputs and parameters, from two fields of text.
Read = Callable[[str, str], tuple[Input, dict[str, Json]]]
# HTML, from the predictions and what was asked.
Show = Callable[[Any, Any], str]


@dataclass(frozen=True)
class Task:
    """How one task is asked.

    first, second: labels of the fields of text. media: a file instead of text. columns: of a csv, one for each field.
    optional: whether the second field may stay empty. explained, streamed: whether the server does that for the task.
    """

    read: Read
    show: Show
    first: str = "Text"
    second: str | None = None
    media: Literal["image", "audio"] | None = None
    columns: tuple[str, ...] = ("text",)
    optional: bool = False
    explained: bool = False
    streamed: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that a csv must have."""
        return self.columns[:1] if self.optional else self.columns


def of(name: str | None) -> Task:
    """The task of that name; for one that the console does not know, JSON in and JSON out."""
    return _TASKS.get(name or "", _OTHER)


def _text(first: str, _: str) -> tuple[Input, dict[str, Json]]:
    return first, {}


def _pair(first: str, second: str) -> tuple[Input, dict[str, Json]]:
    return ({"text": first, "text_pair": second} if second else first), {}


def _question(first: str, second: str) -> tuple[Input, dict[str, Json]]:
    return {"question": first, "context": second}, {}


def _similarity(first: str, second: str) -> tuple[Input, dict[str, Json]]:
    return {"source_sentence": first, "sentences": [line for line in second.splitlines() if line.strip()]}, {}


def _labels(first: str, second: str) -> tuple[Input, dict[str, Json]]:
    return first, {"candidate_labels": [label.strip() for label in second.split(",") if label.strip()]}


def _json(first: str, _: str) -> tuple[Input, dict[str, Json]]:
    try:
        value: Input = json.loads(first)
    except ValueError:
        value = first
    return value, {}


def _show_similarities(scores: list[float], asked: Mapping[str, Any]) -> str:
    return render.bars(list(zip(asked["sentences"], scores, strict=True)), "Sentence")


def _show_fills(found: list[Any], _: Any) -> str:
    masks = found if found and isinstance(found[0], list) else [found]
    return "".join(render.bars([(fill["token_str"], fill["score"]) for fill in fills], "Word") for fills in masks)


def _show_labels(found: list[Any], _: Any) -> str:
    # One text's labels come in one more list, an image's do not.
    labels = found[0] if found and isinstance(found[0], list) else found
    return render.bars([(entry["label"], entry["score"]) for entry in labels], "Label")


def _show_question(found: Any, asked: Mapping[str, str]) -> str:
    answers = found if isinstance(found, list) else [found]
    return "".join(render.answer(answer, asked["context"]) for answer in answers)


def _show_text(key: str) -> Show:
    return lambda found, _: render.text((found[0] if isinstance(found, list) else found)[key])


_TASKS: dict[str, Task] = {
    "text-classification": Task(
        _pair,
        _show_labels,
        second="Second text, for models of pairs",
        columns=("text", "text_pair"),
        optional=True,
        explained=True,
    ),
    "token-classification": Task(_text, lambda found, asked: render.entities(found, asked), explained=True),
    "question-answering": Task(
        _question, _show_question, "Question", "Context", columns=("question", "context"), explained=True
    ),
    "fill-mask": Task(_text, _show_fills, "Text with a mask, such as [MASK]"),
    "text-generation": Task(_text, _show_text("generated_text"), "Prompt", streamed=True),
    "summarization": Task(_text, _show_text("summary_text")),
    "translation": Task(_text, _show_text("translation_text")),
    "sentence-similarity": Task(
        _similarity,
        _show_similarities,
        "Sentence",
        "Sentences to compare with, one a line",
        columns=("source_sentence", "sentences"),
    ),
    "zero-shot-classification": Task(
        _labels, _show_labels, second="Labels, with commas between", columns=("text", "candidate_labels")
    ),
    "image-classification": Task(_text, _show_labels, media="image", columns=(), explained=True),
    "audio-classification": Task(_text, _show_labels, media="audio", columns=()),
    "automatic-speech-recognition": Task(_text, _show_text("text"), media="audio", columns=()),
    "text-to-speech": Task(_text, lambda found, _: render.sound(found), columns=()),
    "text-to-image": Task(_text, lambda found, _: render.image(found), "What to paint", columns=()),
    "feature-extraction": Task(_text, lambda found, _: render.raw(found)),
}

_OTHER = Task(_json, lambda found, _: render.raw(found), "Inputs, as JSON or as a text")
