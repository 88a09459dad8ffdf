"""What passes between a wire format, the engine and a task: requests and results, free of any transport."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from handler.errors import RequestError


@dataclass(frozen=True, slots=True)
class Request:
    """One request: one or more inputs that share their parameters.

    `many` tells whether the client sent a list: the answer to a list is a list, also when it has one entry.
    `parameters` are as the client sent them, not yet checked. `stream`: the answer is wanted piece by piece. `explain`:
    what is wanted is an explanation of the answer.
    """

    inputs: Sequence[Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    many: bool = False
    stream: bool = False
    explain: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What the inputs of one request cost.

    tokens: tokens of all texts, special tokens included, before anything was cut off.
    truncated: whether any text was cut to the model's maximum length.
    windows: how many sequences went through the model.
    """

    tokens: int
    truncated: bool
    windows: int


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one `Request`: one prediction per input, in order; an input that failed has its error there.

    explains: whether they are explanations.
    """

    predictions: Sequence[Any | RequestError]
    usage: Usage
    details: bool = False
    explains: bool = False


@dataclass(slots=True)
class Work:
    """What an engine has spent since this was taken last.

    encoding_seconds: reading the inputs and tokenization. inference_seconds: forward passes and postprocessing, which
    overlap. micro_batches: rows of each forward pass; none of generative tasks.
    """

    encoding_seconds: float = 0.0
    inference_seconds: float = 0.0
    micro_batches: list[int] = field(default_factory=list)

    def take(self) -> "Work":
        """All of it; begins anew."""
        taken = Work(self.encoding_seconds, self.inference_seconds, self.micro_batches)
        self.encoding_seconds, self.inference_seconds, self.micro_batches = 0.0, 0.0, []
        return taken


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer that is streamed, as a JSON value. `usage` is that of the whole; `last`: none follows."""

    value: Any
    usage: Usage
    last: bool


@dataclass(frozen=True, slots=True)
class Media:
    """A prediction that is a file, e.g. a PNG image. Alone it is answered as it is, within JSON as base64."""

    content: bytes
    media_type: str

    def base64(self) -> str:
        """The content as base64."""
        return base64.b64encode(self.content).decode("ascii")


def jsonable(value: Any) -> str:
    """For `json.dumps(default=…)`: media as base64. Raises TypeError for anything else."""
    if isinstance(value, Media):
        return value.base64()
    raise TypeError(f"{type(value).__name__} is no JSON value")


@dataclass(frozen=True, slots=True)
class Model:
    """What a wire format says of the model that answered.

    digest: SHA-256 (hex) that stands for all files of the archive.
    task: its name in the registry of tasks, e.g. text-classification.
    nests_single: whether the Inference API wraps this task's answer to a single input in a list of one.
    """

    name: str
    version: str
    digest: str
    task: str
    nests_single: bool
