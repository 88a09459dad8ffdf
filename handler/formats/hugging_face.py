"""The Hugging Face Inference API: `{"inputs": …, "parameters": {…}}`, a bare JSON string or list, or plain text.

Spec: the `spec/` folders of huggingface.js, packages/tasks; the client side is `huggingface_hub.InferenceClient`.
"""

from dataclasses import asdict, dataclass
from typing import Any

from handler.errors import InvalidInput, InvalidParameter, Overloaded, RequestError
from handler.formats import fields
from handler.messages import Model, Request, Result
from handler.parameters import shown

# `options` steers the hub's own caches and queues; clients send it out of habit and it changes no answer.
_FIELDS = ("inputs", "parameters", "options", "stream")
# The parameters of feature extraction, which this API alone of all puts beside the inputs.
_LOOSE_PARAMETERS = ("normalize", "prompt_name", "truncate", "truncation_direction", "dimensions", "encoding_format")


@dataclass(frozen=True, slots=True)
class HuggingFaceReply:
    """Answers with the prediction itself, or under `predictions` when details are asked for."""

    many: bool

    def answer(self, result: Result, model: Model) -> Any:
        """A list of predictions for a list of inputs, else the one prediction in the Inference API's shape."""
        predictions: Any = listed(result)
        if not self.many and (result.explains or not model.nests_single):
            predictions = predictions[0]
        if not result.details:
            return predictions
        if isinstance(predictions, dict) and "details" in predictions:  # text generation, which has them in place
            return {**predictions, **details(result, model)}
        return {"predictions": predictions, **details(result, model)}

    def error(self, error: RequestError, model: Model) -> Any:
        """`{"error", "code", "type"}`."""
        return error.body()


def decode(value: Any) -> tuple[Request, HuggingFaceReply]:
    """Reads a body. Raises RequestError if it is not one of this format."""
    if isinstance(value, dict):
        loose = {name: value[name] for name in _LOOSE_PARAMETERS if name in value}
        fields.only({name: value[name] for name in value if name not in loose}, _FIELDS)
        if "inputs" not in value:
            raise InvalidInput('the body has no "inputs"; send JSON such as {"inputs": "a text"}')
        inputs, parameters = value["inputs"], {**loose, **fields.parameters(value)}
        stream = value.get("stream") or False
    else:
        inputs, parameters, stream = value, {}, False
    if not isinstance(stream, bool):
        raise InvalidParameter(f'"stream" must be true or false, not {shown(stream)}')
    many = isinstance(inputs, list)
    return Request(inputs if many else [inputs], parameters, many, stream), HuggingFaceReply(many)


def stream_error(error: RequestError) -> dict[str, Any]:
    """The event that ends a stream with an error; `error_type` is what text-generation-inference calls it."""
    return {**error.body(), "error_type": "overloaded" if isinstance(error, Overloaded) else "generation"}


def listed(result: Result) -> list[Any]:
    """The predictions of a result, an error body in the place of each input that failed."""
    return [entry.body() if isinstance(entry, RequestError) else entry for entry in result.predictions]


def details(result: Result, model: Model) -> dict[str, Any]:
    """What `"details": true` adds to an answer."""
    return {
        "usage": asdict(result.usage),
        "model": {"name": model.name, "version": model.version, "digest": model.digest, "task": model.task},
    }
