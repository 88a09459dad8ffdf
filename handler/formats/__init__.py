"""Wire formats: bytes to a `Request`, a `Result` back to JSON. One file per format, told apart by the body itself.

There is no TorchServe service envelope: the stock ones answer only the first request of a batch.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from handler.errors import RequestError
from handler.formats import body, hugging_face, kserve_v1, open_inference
from handler.formats.canary import Canary
from handler.formats.canary import matches as is_canary
from handler.messages import Model, Request, Result


class Reply(Protocol):
    """How one request wants to be answered."""

    def answer(self, result: Result, model: Model) -> Any:
        """The JSON value of a good answer. Raises RequestError if the format cannot express it."""
        ...

    def error(self, error: RequestError, model: Model) -> Any:
        """The JSON value of an error."""
        ...


def decode(row: Mapping[str, Any], headers: Mapping[str, Any], canary: Canary) -> tuple[Request, Reply]:
    """Reads one row of a TorchServe batch.

    row: the fields of the request, normally one named "body" or "data". headers: those of the HTTP request; gRPC
    requests have none. canary: the model's. Raises RequestError if no format can read it.
    """
    value = body.read(row, headers)
    if is_canary(value):
        return canary.request, canary
    if open_inference.matches(value):
        return open_inference.decode(value, is_grpc(headers))
    if kserve_v1.matches(value):
        return kserve_v1.decode(value)
    return hugging_face.decode(value)


def reply_to_unreadable(row: Mapping[str, Any], headers: Mapping[str, Any]) -> Reply:
    """The reply for a request that `decode` refused: in its own format where that can still be told."""
    try:
        value = body.read(row, headers)
    except Exception:
        return hugging_face.HuggingFaceReply(many=False)
    if open_inference.matches(value):
        return open_inference.OpenInferenceReply.of(value, is_grpc(headers))
    return hugging_face.HuggingFaceReply(many=False)


def is_grpc(headers: Mapping[str, Any]) -> bool:
    """Whether a row came over gRPC: TorchServe marks every REST request with `explain`, and gRPC ones with nothing."""
    return "explain" not in headers
