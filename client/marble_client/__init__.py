"""Call models that Marble deployed on TorchServe: one interface, over REST or gRPC.

>>> with RestClient(token="…") as client:  # doctest: +SKIP
...     client.classify("sentiment", "what a film").predictions[0].label
"""

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
from marble_client.rest import RestClient
from marble_client.tokens import Tokens, find_tokens
from marble_client.trace import tracing

if TYPE_CHECKING:
    from marble_client.grpc import GrpcClient

__all__ = [
    "Answer",
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


def __getattr__(name: str) -> object:
    # Importing grpc takes longer than a REST call: only those who use it pay for it.
    if name == "GrpcClient":
        from marble_client.grpc import GrpcClient

        return GrpcClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
