"""Marble over gRPC."""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio
from google.protobuf.runtime_version import VersionError

from marble_client.aio import AsyncClient
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
        self._services = _Services(grpc, target, management_target, token, management_token)

    def close(self) -> None:
        for endpoint in self._services.endpoints:
            endpoint.channel.close()

    def _predict(self, model: str, version: str | None, body: bytes, deadline: Deadline) -> bytes:
        return bytes(_exchange(self._services.predict(model, version, body), deadline).prediction)

    def _describe(self, model: str, version: str | None, deadline: Deadline) -> bytes:
        return str(_exchange(self._services.describe(model, version), deadline).msg).encode()

    def _list(self, page: int, deadline: Deadline) -> bytes:
        return str(_exchange(self._services.list(page), deadline).msg).encode()


class AsyncGrpcClient(AsyncClient):
    """An AsyncClient over gRPC; otherwise as GrpcClient."""

    def __init__(
        self,
        target: str = "127.0.0.1:7070",
        management_target: str = "127.0.0.1:7071",
        token: str | None = None,
        management_token: str | None = None,
        timeout: float = 30.0,
    ) -> None:
        super().__init__(timeout)
        self._services = _Services(grpc.aio, target, management_target, token, management_token)

    async def close(self) -> None:
        for endpoint in self._services.endpoints:
            await endpoint.channel.close()

    async def _predict(self, model: str, version: str | None, body: bytes, deadline: Deadline) -> bytes:
        return bytes((await _exchange_async(self._services.predict(model, version, body), deadline)).prediction)

    async def _describe(self, model: str, version: str | None, deadline: Deadline) -> bytes:
        return str((await _exchange_async(self._services.describe(model, version), deadline)).msg).encode()

    async def _list(self, page: int, deadline: Deadline) -> bytes:
        return str((await _exchange_async(self._services.list(page), deadline)).msg).encode()


class _Endpoint:
    """One target with its token and its channel, which is of `channels`: grpc or grpc.aio."""

    def __init__(self, channels: Any, target: str, token: str | None) -> None:
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
            channels.secure_channel(host, grpc.ssl_channel_credentials(), options)
            if tls
            else channels.insecure_channel(host, options)
        )

    def terms(self, deadline: Deadline) -> dict[str, Any]:
        """How a call is made: by when, and with what metadata."""
        return {"timeout": deadline.left(), "metadata": [*self._metadata, ("traceparent", traceparent())]}

    def failure(self, error: Any, deadline: Deadline) -> MarbleError:
        """A call's RpcError in terms of our errors."""
        status: grpc.StatusCode = error.code()
        details: str = error.details() or ""
        if status is grpc.StatusCode.DEADLINE_EXCEEDED:
            return deadline.missed()
        # CANCELLED is a stream that the server reset, as it does where a message is too large.
        if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
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


@dataclass(frozen=True)
class _Call:
    """A call to be made."""

    endpoint: _Endpoint
    method: Callable[..., Any]
    request: Any


class _Services:
    """TorchServe's two services, and what is said to them."""

    def __init__(
        self, channels: Any, target: str, management_target: str, token: str | None, management_token: str | None
    ) -> None:
        self._inference_messages, inference_service = _stubs("inference")
        self._management_messages, management_service = _stubs("management")
        self._inference = _Endpoint(channels, target, token)
        self._management = _Endpoint(channels, management_target, management_token)
        self.endpoints = (self._inference, self._management)
        self._inference_stub = inference_service.InferenceAPIsServiceStub(self._inference.channel)
        self._management_stub = management_service.ManagementAPIsServiceStub(self._management.channel)

    def predict(self, model: str, version: str | None, body: bytes) -> _Call:
        # TorchServe hands no metadata on to the handler, but every input.
        fields = {"data": body, "traceparent": traceparent().encode()}
        request = self._inference_messages.PredictionsRequest(
            model_name=model, model_version=version or "", input=fields
        )
        return _Call(self._inference, self._inference_stub.Predictions, request)

    def describe(self, model: str, version: str | None) -> _Call:
        request = self._management_messages.DescribeModelRequest(model_name=model, model_version=version or "")
        return _Call(self._management, self._management_stub.DescribeModel, request)

    def list(self, page: int) -> _Call:
        # Without a limit TorchServe answers with empty pages for ever.
        request = self._management_messages.ListModelsRequest(limit=100, next_page_token=page)
        return _Call(self._management, self._management_stub.ListModels, request)


def _exchange(call: _Call, deadline: Deadline) -> Any:
    """Make one call; returns the reply's message."""
    try:
        return call.method(call.request, **call.endpoint.terms(deadline))
    except grpc.RpcError as error:
        raise call.endpoint.failure(error, deadline) from error


async def _exchange_async(call: _Call, deadline: Deadline) -> Any:
    """Make one call; returns the reply's message."""
    try:
        return await call.method(call.request, **call.endpoint.terms(deadline))
    except grpc.RpcError as error:
        raise call.endpoint.failure(error, deadline) from error


def _stubs(name: str) -> tuple[Any, Any]:
    """The generated modules of one service: its messages and its methods."""
    try:
        messages = importlib.import_module(f"marble_client.stubs.{name}_pb2")
        service = importlib.import_module(f"marble_client.stubs.{name}_pb2_grpc")
    except (ImportError, VersionError, RuntimeError) as error:  # the last two: newer than protobuf or grpcio
        mend = "run 'python scripts/generate_stubs.py'"
        raise StubsMissing(f"no usable gRPC stubs ({error}): {mend}") from error
    return messages, service
