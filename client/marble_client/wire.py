"""The JSON that travels, to and from values. Strict both ways: what is malformed is refused, not guessed."""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import NoReturn, TypeVar

from marble_client.answer import Answer, Input, ItemError, Json, Label, ModelInfo, ServedModel, TextEnd, Token, Usage
from marble_client.errors import BadResponse, MarbleError, error_for

T = TypeVar("T")

# The body that has a model answer its first golden example.
CANARY = b'{"canary": true}'

# What torch-model-archiver accepts; anything else could change the path of a URL.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def check_name(name: str, what: str) -> str:
    """`name` unchanged; raises ValueError unless it can be a model's name or version."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no {what}: use letters, digits, '_', '-' and '.'")
    return name


def check_model(model: str, version: str | None) -> None:
    """Raises ValueError for what can be no name or version of a model."""
    check_name(model, "model name")
    if version is not None:
        check_name(version, "model version")


def encode_request(inputs: Input, parameters: Mapping[str, Json] | None, *, stream: bool = False) -> bytes:
    """A request's body, bytes as base64. Raises ValueError or TypeError for what JSON cannot say, NaN included."""
    request: dict[str, Input] = {"inputs": inputs, "parameters": {**(parameters or {}), "details": True}}
    if stream:
        request["stream"] = True
    # ASCII keeps lone surrogates, which UTF-8 cannot carry, as escapes.
    return json.dumps(request, ensure_ascii=True, allow_nan=False, default=_base64).encode("ascii")


def _base64(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    raise TypeError(f"a value of type {type(value).__name__} cannot be sent")


def decode_answer(body: bytes) -> Answer[Json]:
    """The answer in a reply. Raises the error it carries instead, or BadResponse."""
    reply = _parse(body)
    item = item_error(reply)
    if item is not None:
        # gRPC carries no status of its own for these.
        raise error_for(item.code, item.type, item.error)
    if not isinstance(reply, dict) or not ({"predictions", "generated_text"} & reply.keys()):
        raise BadResponse("the reply has no 'predictions': this model was not built by Marble")
    usage, model = _take(reply, "usage", dict), _take(reply, "model", dict)
    # Text generation has its predictions beside the rest, where the Inference API wants them.
    beside = {name: value for name, value in reply.items() if name not in ("usage", "model")}
    return Answer(
        reply.get("predictions", beside),
        Usage(_take(usage, "tokens", int), _take(usage, "truncated", bool), _take(usage, "windows", int)),
        ModelInfo(
            _take(model, "name", str),
            _take(model, "version", str),
            _take(model, "digest", str),
            _take(model, "task", str) if "task" in model else None,
        ),
    )


def decode_event(line: bytes) -> Token | None:
    """The token in a line of a stream, None for a line without one. Raises the error it carries instead."""
    if not line.startswith(b"data:"):
        return None
    event = _parse(line.removeprefix(b"data:"))
    if isinstance(event, dict) and "error" in event:
        raise error_for(_take(event, "code", int), _take(event, "type", str), _take(event, "error", str))
    token = _take(event, "token", dict)
    return Token(
        _take(token, "id", int),
        _take(token, "text", str),
        _number(token, "logprob"),
        _take(token, "special", bool),
        _text_end(event),
    )


class Stream:
    """The tokens in the bytes of a stream, however these are cut into pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def tokens(self, piece: bytes) -> Iterator[Token]:
        """Those whose lines end in this piece. Raises the error that one of them carries instead."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if (token := decode_event(line)) is not None:
                yield token

    @staticmethod
    def broken_off() -> BadResponse:
        """What is raised when the bytes end before the text does."""
        return BadResponse("the stream broke off before the text was whole")


def _text_end(event: Json) -> TextEnd | None:
    if not isinstance(event, dict) or event.get("generated_text") is None:
        return None
    details = _take(event, "details", dict)
    return TextEnd(
        _take(event, "generated_text", str),
        _take(details, "finish_reason", str),
        _take(details, "generated_tokens", int),
        None if details.get("seed") is None else _take(details, "seed", int),
    )


def decode_drift(predictions: Json) -> float:
    """The drift in the answer to a canary."""
    return _number(predictions, "drift")


def decode_labels(entry: Json) -> list[Label] | ItemError:
    """One entry of a text classification's predictions."""
    error = item_error(entry)
    if error is not None:
        return error
    if not isinstance(entry, list):
        raise BadResponse("the predictions are not those of a text classification")
    return [Label(_take(label, "label", str), _number(label, "score")) for label in entry]


def decode_error(code: int, body: bytes, retry_after: float | None) -> MarbleError:
    """The exception for a reply with an HTTP status of 400 or more, whoever wrote its body."""
    try:
        reply = _parse(body)
    except BadResponse:
        reply = None
    if isinstance(reply, dict):
        # A handler says "error", TorchServe's frontend "message".
        message, kind = reply.get("error", reply.get("message")), reply.get("type")
        if isinstance(message, str) and isinstance(kind, str):
            return error_for(code, kind, message, retry_after)
    return error_for(code, None, f"the server answered with HTTP status {code}", retry_after)


def decode_page(body: bytes, page: int) -> tuple[list[str], int | None]:
    """The list of models from `page` on: their names, and the next page's token if there is one."""
    reply = _parse(body)
    names = [_take(model, "modelName", str) for model in _take(reply, "models", list)]
    if not isinstance(reply, dict) or reply.get("nextPageToken") is None:
        return names, None
    token = _take(reply, "nextPageToken", str)
    if not token.isdecimal():
        raise BadResponse("the list of models has a page token that is not a number")
    if int(token) <= page:
        raise BadResponse("the list of models has pages that do not advance")
    return names, int(token)


def decode_description(body: bytes) -> ServedModel:
    """The description of one version of a model."""
    reply = _parse(body)
    if not isinstance(reply, list) or len(reply) != 1:
        raise BadResponse("the description is not that of one model")
    model = reply[0]
    workers = _take(model, "workers", list)
    ready = sum(_take(worker, "status", str) == "READY" for worker in workers)
    return ServedModel(_take(model, "modelName", str), _take(model, "modelVersion", str), ready, len(workers))


def without_details(predictions: Json) -> Json:
    """Predictions without what is told of each token of a generated text."""
    if isinstance(predictions, list):
        return [without_details(entry) for entry in predictions]
    if isinstance(predictions, dict) and "generated_text" in predictions:
        return {name: value for name, value in predictions.items() if name != "details"}
    return predictions


def is_item_error(value: Json) -> bool:
    """Whether a prediction, or a whole reply, is the handler's error object."""
    return isinstance(value, dict) and value.keys() == {"error", "code", "type"}


def item_error(value: Json) -> ItemError | None:
    """The handler's error object as a value; None for anything else."""
    if not is_item_error(value):
        return None
    return ItemError(_take(value, "error", str), _take(value, "code", int), _take(value, "type", str))


def _parse(body: bytes) -> Json:
    try:
        value: Json = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadResponse(f"the reply is not valid JSON: {error}") from error
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _take(value: Json, key: str, kind: type[T]) -> T:
    field = value.get(key) if isinstance(value, dict) else None
    # Not isinstance: a bool is no int here.
    if type(field) is not kind:
        raise BadResponse(f"the reply has no {kind.__name__} named {key!r}")
    return field


def _number(value: Json, key: str) -> float:
    if isinstance(value, dict) and type(value.get(key)) is int:
        return float(_take(value, key, int))
    return _take(value, key, float)
