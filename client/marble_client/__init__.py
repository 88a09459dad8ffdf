"""Call models that Marble deployed on TorchServe: one interface, over REST or gRPC, called or awaited.

>>> with RestClient(token="…") as client:  # doctest: +SKIP
...     client.classify("sentiment", "what a film").predictions[0].label
"""

import importlib
from typing import TYPE_CHECKING

from marble_client.answer import Answer, Input, ItemError, Json, Label, ModelInfo, ServedModel, TextEnd, Token, Usage
from marble_client.client import Client
from marble_client.errors import (
    BadRequest,
    BadResponse,
    ConnectionFailed,
    InvalidParameter,
    MarbleError,
    NotFound,
    RateLimited,
    ServerError,
    StubsMissing,
    Timeout,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
)
from marble_client.metrics import ModelMetrics
from marble_client.rest import RestClient
from marble_client.tokens import Tokens, find_tokens
from marble_client.trace import tracing

if TYPE_CHECKING:
    from marble_client.aio import AsyncClient
    from marble_client.aio_rest import AsyncRestClient
    from marble_client.grpc import AsyncGrpcClient, GrpcClient

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncGrpcClient",
    "AsyncRestClient",
    "BadRequest",
    "BadResponse",
    "Client",
    "ConnectionFailed",
    "GrpcClient",
    "Input",
    "InvalidParameter",
    "ItemError",
    "Json",
    "Label",
    "MarbleError",
    "ModelInfo",
    "ModelMetrics",
    "NotFound",
    "RateLimited",
    "RestClient",
    "ServedModel",
    "ServerError",
    "StubsMissing",
    "TextEnd",
    "Timeout",
    "Token",
    "Tokens",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnsupportedMediaType",
    "Usage",
    "find_tokens",
    "tracing",
]


# Importing these takes longer than a REST call, and aiohttp may be missing: only those who use them pay for it.
_LATE = {
    "AsyncClient": "marble_client.aio",
    "AsyncGrpcClient": "marble_client.grpc",
    "AsyncRestClient": "marble_client.aio_rest",
    "GrpcClient": "marble_client.grpc",
}


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
