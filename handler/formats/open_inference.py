"""The Open Inference Protocol (v2), as JSON over REST and as TorchServe hands it on from gRPC.

Spec: https://github.com/kserve/open-inference-protocol and, for tensors sent as raw bytes behind the JSON, Triton's
binary tensor data extension. A request has one BYTES tensor of texts, images or sounds; the answer has one tensor per
field of the predictions, e.g. `label` (BYTES) and `score` (FP32), each [inputs, labels].
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handler import media
from handler.errors import InvalidInput, RequestError, UnreadableRequest
from handler.formats import fields
from handler.formats.hugging_face import details
from handler.messages import Media, Model, Request, Result
from handler.parameters import shown

_FIELDS = ("id", "model_name", "model_version", "inputs", "parameters", "outputs")
# Parameters of the protocol itself, which ask for nothing that a text answer has.
_PROTOCOL_PARAMETERS = ("binary_data_output",)
# The answer repeats the id, so an endless one would make an endless answer, and TorchServe ends a worker that gives it.
_MAX_ID = 1024
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class OpenInferenceReply:
    """Answers with tensors. `grpc`: the answer is parsed by TorchServe, which needs every field, errors included."""

    id: str
    grpc: bool
    outputs: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Mapping[str, Any], grpc: bool) -> "OpenInferenceReply":
        """The reply to a body for which `matches` holds, however broken the rest of it is."""
        identifier, wanted = value.get("id"), value.get("outputs")
        names = [o.get("name") for o in wanted if isinstance(o, dict)] if isinstance(wanted, list) else []
        return cls(
            identifier if isinstance(identifier, str) and len(identifier) <= _MAX_ID else "",
            # TorchServe writes the model's name into the JSON it makes of an Open Inference gRPC message.
            grpc and "model_name" in value,
            tuple(name for name in names if isinstance(name, str)),
        )

    def answer(self, result: Result, model: Model) -> Any:
        """Raises the first error of an input: tensors have no place for one."""
        for entry in result.predictions:
            if isinstance(entry, RequestError):
                raise entry
        tensors = _tensors(result.predictions)
        if unknown := set(self.outputs) - {tensor["name"] for tensor in tensors}:
            names = ", ".join(tensor["name"] for tensor in tensors)
            raise InvalidInput(f"there is no output {shown(min(unknown))}; this model gives: {names}")
        chosen = [tensor for tensor in tensors if not self.outputs or tensor["name"] in self.outputs]
        body = self._body(chosen, model)
        if result.details and not self.grpc:
            body["parameters"] = details(result, model)
        return body

    def error(self, error: RequestError, model: Model) -> Any:
        """`{"error", …}` over REST; over gRPC one BYTES tensor named `error` that holds it."""
        if not self.grpc:
            return error.body()
        text = json.dumps(error.body())
        return self._body([{"name": "error", "datatype": "BYTES", "shape": [1], "data": [text]}], model)

    def _body(self, tensors: list[dict[str, Any]], model: Model) -> dict[str, Any]:
        return {"model_name": model.name, "model_version": model.version, "id": self.id, "outputs": tensors}


def matches(value: Any) -> bool:
    """Whether a body is of this format: its inputs are tensors, or none at all in what TorchServe makes of gRPC."""
    inputs = value.get("inputs") if isinstance(value, dict) else None
    if inputs == []:
        return "model_name" in value
    return isinstance(inputs, list) and isinstance(inputs[0], dict) and "datatype" in inputs[0]


def decode(value: Any, grpc: bool) -> tuple[Request, OpenInferenceReply]:
    """Reads a body for which `matches` holds. Raises RequestError if it is malformed."""
    reply = OpenInferenceReply.of(value, grpc)
    fields.only(value, _FIELDS)
    if reply.id != (value.get("id") or ""):
        raise InvalidInput(f"id must be a string of at most {_MAX_ID} characters")
    if len(value["inputs"]) != 1:
        raise InvalidInput(f"send one input tensor, not {len(value['inputs'])}")
    [tensor] = value["inputs"]
    if tensor.get("datatype") != "BYTES":
        raise InvalidInput("the input tensor must have the datatype BYTES: it holds texts, images or sounds")
    shape, data = tensor.get("shape"), _flat(fields.items(tensor.get("data"), "data"))
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise InvalidInput("the input tensor's shape must be a list of non-negative integers")
    if len(shape) > _MAX_DIMENSIONS:
        raise InvalidInput(f"the input tensor has {len(shape)} dimensions; send at most {_MAX_DIMENSIONS}")
    if math.prod(shape) != len(data):
        raise InvalidInput(f"the input tensor's shape {shown(shape)} does not fit its {len(data)} elements")
    inputs = [_from_base64(element) for element in data] if reply.grpc else data
    given = fields.parameters(value)
    parameters = {name: given[name] for name in given if name not in _PROTOCOL_PARAMETERS}
    return Request(inputs, parameters, True), reply


def header_length(headers: Mapping[str, Any]) -> int | None:
    """Bytes of JSON before the raw tensor data, None if the body has none."""
    for name, value in headers.items():
        if name.lower() == "inference-header-content-length":
            if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):
                return int(value)
            raise UnreadableRequest("Inference-Header-Content-Length must be a number of bytes")
    return None


def read_binary(body: bytes, json_length: int) -> Any:
    """The JSON of a binary request, with `data` filled in from the bytes behind it."""
    try:
        value = json.loads(body[:json_length])
        rest = body[json_length:]
        for tensor in value["inputs"]:
            size = (tensor.get("parameters") or {}).pop("binary_data_size", None)
            if size is not None:
                if not 0 <= size <= len(rest):
                    raise ValueError
                tensor["data"], rest = _elements(rest[:size]), rest[size:]
        if rest:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UnreadableRequest("the binary tensor data does not fit the JSON in front of it") from None
    return value


def _elements(raw: bytes) -> list[str | bytes]:
    """Elements of a BYTES tensor: each a little-endian uint32 length and that many bytes."""
    elements: list[str | bytes] = []
    position = 0
    while position < len(raw):
        start = position + 4
        position = start + int.from_bytes(raw[position:start], "little")
        if position > len(raw):
            raise ValueError
        elements.append(_element(raw[start:position]))
    return elements


def _from_base64(value: Any) -> str | bytes:
    try:
        return _element(base64.b64decode(value, validate=True))
    except (TypeError, ValueError, binascii.Error):
        raise UnreadableRequest("an element of the input tensor is not base64") from None


def _element(raw: bytes) -> str | bytes:
    """One element of a BYTES tensor: a text, or the bytes of what is none."""
    if media.media_type(raw):  # a sound may well be valid UTF-8
        return raw
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _flat(values: list[Any]) -> list[Any]:
    """Nested rows of a tensor as one list."""
    while values and all(isinstance(value, list) for value in values):
        values = [entry for value in values for entry in value]
    return values


def _tensors(predictions: Sequence[Any]) -> list[dict[str, Any]]:
    """One tensor per field, [inputs, entries], when predictions are equally long lists of flat objects; else JSON."""
    rows = [prediction if isinstance(prediction, list) else [prediction] for prediction in predictions]
    names = list(rows[0][0]) if rows[0] and isinstance(rows[0][0], dict) else []
    regular = names and all(
        len(row) == len(rows[0]) and all(isinstance(entry, dict) and list(entry) == names for entry in row)
        for row in rows
    )
    regular = regular and not any(isinstance(v, dict | list) for row in rows for entry in row for v in entry.values())
    if not regular:
        texts = [p.base64() if isinstance(p, Media) else json.dumps(p) for p in predictions]
        return [{"name": "prediction", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]
    shape = [len(rows), len(rows[0])]
    columns = {name: [entry[name] for row in rows for entry in row] for name in names}
    return [
        {"name": name, "datatype": _datatype(data[0]), "shape": shape, "data": data} for name, data in columns.items()
    ]


def _datatype(value: Any) -> str:
    if isinstance(value, str):
        return "BYTES"
    return "INT64" if isinstance(value, int) else "FP32"
