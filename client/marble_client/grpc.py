"""Marble over gRPC."""

import importlib
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.runtime_version import VersionError

from marble_client.client import TransportClient
from marble_client.errors import ConnectionFailed, MarbleError, StubsMissing, error_for
from marble_client.retry import Deadline
from marble_client.tokens import bearer, is_loopback
from marble_client.trace import traceparent

_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 422,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
}

# UNAVAILABLE is said by a server that is overloaded, and by this side when there is no server.
_NOT_CONNECTED = re.compile(r"failed to connect|resolution failed|attempt timed out", re.IGNORECASE)
_DISCONNECTED = re.compile(r"socket closed|connection reset|broken pipe|stream removed|goaway", re.IGNORECASE)
_OVERSIZED = re.compile(r"larger than max|exceeds maximum size", re.IGNORECASE)

# TorchServe ends its details with the name of a Java class.
_JAVA_CLASS = re.compile(r"\n(?:\w+\.)*(\w+)(?:\.\(\))?$")


class GrpcClient(TransportClient):
    """A client over gRPC. A target is `host:port`, or `https://host:port` for TLS.

    Raises StubsMissing when scripts/generate_stubs.py has not been run.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:7070",
        management_target: str = "127.0.0.1:7071",
        token: str | None = None,
        management_token: str | None = None,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(timeout)
        self._inference_messages, inference_service = _stubs("inference")
        self._management_messages, management_service = _stubs("management")
        self._inference = _Endpoint(target, token)
        self._management = _Endpoint(management_target, management_token)
        self._inference_stub = inference_service.InferenceAPIsServiceStub(self._inference.channel)
        self._management_stub = management_service.ManagementAPIsServiceStub(self._management.channel)

    def close(self) -> None:
        self._inference.channel.close()
        self._management.channel.close()

    def _predict(self, model: str, version: str | None, body: bytes, deadline: Deadline) -> bytes:
        # TorchServe hands no metadata on to the handler, but every input.
        fields = {"data": body, "traceparent": traceparent().encode()}
        request = self._inference_messages.PredictionsRequest(
            model_name=model, model_version=version or "", input=fields
        )
        reply = self._inference.exchange(self._inference_stub.Predictions, request, deadline)
        return bytes(reply.prediction)

    def _describe(self, model: str, version: str | None, deadline: Deadline) -> bytes:
        messages = self._management_messages
        request = messages.DescribeModelRequest(model_name=model, model_version=version or "")
        reply = self._management.exchange(self._management_stub.DescribeModel, request, deadline)
        return str(reply.msg).encode()

    def _list(self, page: int, deadline: Deadline) -> bytes:
        # Without a limit TorchServe answers with empty pages for ever.
        request = self._management_messages.ListModelsRequest(limit=100, next_page_token=page)
        reply = self._management.exchange(self._management_stub.ListModels, request, deadline)
        return str(reply.msg).encode()


class _Endpoint:
    """One target with its token and its channel."""

    def __init__(self, target: str, token: str | None) -> None:
        tls = target.startswith("https://")
        host = target.removeprefix("https://")
        parts = urlsplit(f"//{host}")
        if not parts.hostname or parts.netloc != host:
            raise ValueError(f"{target!r} is no gRPC target: write host:port, or https://host:port for TLS")
        options = [
            ("grpc.max_receive_message_length", -1),  # the server bounds its own replies
            # Shorter than our own back-off, else a retry is refused without trying.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.enable_http_proxy", 0 if is_loopback(parts.hostname) else 1),
        ]
        self._target = target
        authorization = bearer(token)
        self._metadata = [("authorization", authorization)] if authorization is not None else []
        self.channel = (
            grpc.secure_channel(host, grpc.ssl_channel_credentials(), options)
            if tls
            else grpc.insecure_channel(host, options)
        )

    def exchange(self, method: Callable[..., Any], request: Any, deadline: Deadline) -> Any:
        """Make one call; returns the reply's message."""
        try:
            metadata = [*self._metadata, ("traceparent", traceparent())]
            return method(request, timeout=deadline.left(), metadata=metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise deadline.missed() from error
            raise self._failure(error.code(), error.details() or "") from error

    def _failure(self, status: grpc.StatusCode, details: str) -> MarbleError:
        if status is grpc.StatusCode.UNAVAILABLE:
            if _NOT_CONNECTED.search(details):
                message = f"no server at {self._target}: start one with scripts/serve"
                return ConnectionFailed(message, sent=False)
            if _DISCONNECTED.search(details):
                message = f"the connection to {self._target} failed before an answer came: {details}"
                return ConnectionFailed(message, sent=True)
        code = _HTTP_STATUS.get(status, 500)
        java_class = _JAVA_CLASS.search(details)
        kind = java_class[1] if java_class else status.name
        message = details[: java_class.start()] if java_class else details
        if kind in ("ModelNotFoundException", "ModelVersionNotFoundException"):
            code = 404
        elif status is grpc.StatusCode.PERMISSION_DENIED:
            kind = "InvalidKeyException"
        elif status is grpc.StatusCode.INTERNAL and "no worker" in message:
            code = 503
        elif _OVERSIZED.search(details):
            code = 413
        return error_for(code, kind, message or f"the server answered with gRPC status {status.name}")


def _stubs(name: str) -> tuple[Any, Any]:
    """The generated modules of one service: its messages and its methods."""
    try:
        messages = importlib.import_module(f"marble_client.stubs.{name}_pb2")
        service = importlib.import_module(f"marble_client.stubs.{name}_pb2_grpc")
    except (ImportError, VersionError, RuntimeError) as error:  # the last two: newer than protobuf or grpcio
        mend = "run 'python scripts/generate_stubs.py'"
        raise StubsMissing(f"no usable gRPC stubs ({error}): {mend}") from error
    return messages, service
