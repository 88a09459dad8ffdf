"""What a server says, as values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None

# What can be sent: JSON, with images and sounds as bytes.
Input: TypeAlias = Json | bytes | Sequence["Input"] | Mapping[str, "Input"]

P = TypeVar("P")


@dataclass(frozen=True)
class Label:
    """One class of a text classification; the score's range depends on `function_to_apply`."""

    label: str
    score: float


@dataclass(frozen=True)
class Token:
    """One token of a generated text.

    `text` is what it adds: "" for a special token and for all but the last token of a character. `logprob` is the
    natural logarithm of its probability. `end` comes with the last token.
    """

    id: int
    text: str
    logprob: float
    special: bool
    end: "TextEnd | None" = None


@dataclass(frozen=True)
class TextEnd:
    """A generated text, whole. `finish_reason` is length, eos_token or stop_sequence; `seed` is None unless drawn."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None


@dataclass(frozen=True)
class ItemError:
    """The failure of one item of a list; its neighbours are unharmed."""

    error: str
    code: int
    type: str


@dataclass(frozen=True)
class Usage:
    """What one request cost: tokens read, whether text was cut off, and windows used for long texts."""

    tokens: int
    truncated: bool
    windows: int


@dataclass(frozen=True)
class ModelInfo:
    """The model that really answered; `digest` identifies its archive's content.

    `task`, e.g. text-classification, is None from an archive built before answers told it.
    """

    name: str
    version: str
    digest: str
    task: str | None = None


@dataclass(frozen=True)
class Answer(Generic[P]):
    """The predictions for one request, with what they cost and who made them."""

    predictions: P
    usage: Usage
    model: ModelInfo


@dataclass(frozen=True)
class ServedModel:
    """The default version of a registered model, and how many of its workers are READY."""

    name: str
    version: str
    ready_workers: int
    workers: int
