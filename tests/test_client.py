"""marble_client against real HTTP and gRPC servers that behave as TorchServe does."""

import asyncio
import http.server
import importlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
import pytest

import marble_client
from marble_client import (
    AsyncClient,
    AsyncGrpcClient,
    AsyncRestClient,
    Client,
    GrpcClient,
    ItemError,
    Json,
    Label,
    ModelInfo,
    RestClient,
    ServedModel,
    Usage,
    cli,
    retry,
)
from marble_client.retry import Deadline, with_retries
from marble_client.tokens import attached, bearer, find_tokens

ROOT = Path(__file__).resolve().parent.parent
GENERATE = ROOT / "scripts" / "generate_stubs.py"
MODEL = {"name": "sentiment", "version": "1.0", "digest": "sha256:0f", "task": "text-classification"}
LABELS = [{"label": "positive", "score": 0.9}, {"label": "negative", "score": 0.1}]
BAD_ITEM = {"error": "item 1 is empty", "code": 422, "type": "InvalidParameter"}

# What TorchServe says over gRPC for what its frontend refuses with an HTTP status.
FRONTEND_STATUS = {
    "ModelNotFoundException": (404, grpc.StatusCode.INTERNAL),
    "ServiceUnavailableException": (503, grpc.StatusCode.INTERNAL),
    "InvalidKeyException": (400, grpc.StatusCode.PERMISSION_DENIED),
    "InternalServerException": (500, grpc.StatusCode.INTERNAL),
}


@dataclass
class Reply:
    """What a handler (or, with `frontend`, TorchServe itself) answers."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    frontend: tuple[str, str] | None = None


def answers(predictions: Any, truncated: bool = False) -> Reply:
    usage = {"tokens": 7, "truncated": truncated, "windows": 1}
    return Reply(200, json.dumps({"predictions": predictions, "usage": usage, "model": MODEL}).encode())


def fails(status: int, kind: str = "SomeError", **headers: str) -> Reply:
    body = json.dumps({"error": f"why {status}", "code": status, "type": kind}).encode()
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def frontend(kind: str, message: str) -> Reply:
    status, _ = FRONTEND_STATUS[kind]
    body = json.dumps({"code": status, "type": kind, "message": message}).encode()
    return Reply(status, body, frontend=(kind, message))


@dataclass
class Request:
    model: str
    version: str | None
    body: bytes
    authorization: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Backend:
    """The server's mind, the same behind both transports."""

    requests: list[Request] = field(default_factory=list)
    script: list[Reply] = field(default_factory=list)
    models: dict[str, list[str]] = field(default_factory=lambda: {"sentiment": ["READY", "UNLOADING"]})
    page_size: int = 100
    stuck_page: bool = False
    key: str | None = None
    management_key: str | None = None
    stuck: bool = False
    release: threading.Event = field(default_factory=threading.Event)
    connections: int = 0

    def predict(self, request: Request) -> Reply:
        self.requests.append(request)
        if self.stuck:
            self.release.wait(20)
        if self.key is not None and request.authorization != f"Bearer {self.key}":
            return frontend("InvalidKeyException", "Token Authorization failed.")
        if self.script:
            return self.script.pop(0)
        if request.model not in self.models:
            return frontend("ModelNotFoundException", f"Model not found: {request.model}")
        if request.json == {"canary": True}:
            return answers({"drift": 0.001})
        inputs = request.json["inputs"]
        return answers([LABELS for _ in ([inputs] if isinstance(inputs, str) else inputs)])

    def describe(self, model: str, version: str | None, authorization: str | None) -> Reply:
        if self.management_key is not None and authorization != f"Bearer {self.management_key}":
            return frontend("InvalidKeyException", "Token Authorization failed.")
        if model not in self.models or version not in (None, "1.0"):
            return frontend("ModelNotFoundException", f"Model not found: {model}")
        workers = [{"id": str(number), "status": status} for number, status in enumerate(self.models[model])]
        description = [{"modelName": model, "modelVersion": "1.0", "workers": workers}]
        return Reply(200, json.dumps(description).encode())

    def list(self, limit: int, page: int, authorization: str | None) -> Reply:
        if self.management_key is not None and authorization != f"Bearer {self.management_key}":
            return frontend("InvalidKeyException", "Token Authorization failed.")
        names = sorted(self.models)
        end = page + min(limit, self.page_size)
        reply: dict[str, Any] = {"models": [{"modelName": name, "modelUrl": "x"} for name in names[page:end]]}
        if end <= len(names):
            reply["nextPageToken"] = str(page if self.stuck_page else end)
        return Reply(200, json.dumps(reply).encode())


class HttpHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    backend: Backend

    def setup(self) -> None:
        super().setup()
        self.backend.connections += 1

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Type"] == "application/json"
        _, kind, model, *version = urlsplit(self.path).path.split("/")
        assert kind == "predictions"
        token = self.headers["Authorization"]
        self._send(self.backend.predict(Request(model, version[0] if version else None, body, token)))

    def do_GET(self) -> None:
        parts, token = urlsplit(self.path), self.headers["Authorization"]
        _, kind, *rest = parts.path.split("/")
        assert kind == "models"
        if rest:
            self._send(self.backend.describe(rest[0], rest[1] if len(rest) > 1 else None, token))
        else:
            query = {name: int(values[0]) for name, values in parse_qs(parts.query).items()}
            self._send(self.backend.list(query["limit"], query["next_page_token"], token))

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, *_: Any) -> None:
        pass


class QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that gave up is part of the tests
            super().handle_error(request, client_address)


class Awaited:
    """An AsyncClient called as a Client is: what is tested of the one is tested of the other."""

    def __init__(self, make: Callable[[], AsyncClient]) -> None:
        async def made() -> AsyncClient:
            return make()

        self._runner = asyncio.Runner()
        try:
            self._client = self._runner.run(made())
        except BaseException:
            self._runner.close()
            raise

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *given, **options: self._runner.run(method(*given, **options))

    def predict_many(self, *given: Any, **options: Any) -> list[Any]:
        async def results() -> list[Any]:
            return [result async for result in self._client.predict_many(*given, **options)]

        return self._runner.run(results())

    def stream(self, *given: Any, **options: Any) -> list[Any]:
        async def tokens() -> list[Any]:
            return [token async for token in self._client.stream(*given, **options)]  # type: ignore[attr-defined]

        return self._runner.run(tokens())

    def __enter__(self) -> "Awaited":
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@dataclass
class Servers:
    backend: Backend
    url: str
    target: str

    def client(self, transport: str, **options: Any) -> Client:
        places = {"rest": self.url, "grpc": self.target}
        kinds: dict[str, Callable[..., Any]] = {"rest": RestClient, "grpc": GrpcClient}
        if transport in kinds:
            return kinds[transport](places[transport], places[transport], **options)
        kinds = {"rest": AsyncRestClient, "grpc": AsyncGrpcClient}
        name = transport.removeprefix("async-")
        client: Any = Awaited(lambda: kinds[name](places[name], places[name], **options))
        return client

    def flags(self, transport: str) -> list[str]:
        if transport == "rest":
            return ["--url", self.url, "--management-url", self.url]
        return ["--grpc", "--grpc-target", self.target, "--grpc-management-target", self.target]


@pytest.fixture(scope="session")
def stubs() -> dict[str, Any]:
    subprocess.run([sys.executable, GENERATE], check=True, timeout=60, capture_output=True)
    names = [f"{service}_{part}" for service in ("inference", "management") for part in ("pb2", "pb2_grpc")]
    return {name: importlib.import_module(f"marble_client.stubs.{name}") for name in names}


def http_server(backend: Backend, port: int = 0) -> QuietServer:
    server = QuietServer(("127.0.0.1", port), type("Handler", (HttpHandler,), {"backend": backend}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def grpc_server(backend: Backend, stubs: dict[str, Any], port: int = 0) -> tuple[grpc.Server, int]:
    def token(context: Any) -> str | None:
        return dict(context.invocation_metadata()).get("authorization")

    def checked(reply: Reply, context: Any) -> bytes:
        if reply.frontend is not None:
            kind, message = reply.frontend
            context.abort(FRONTEND_STATUS[kind][1], f"{message}\norg.pytorch.serve.{kind}")
        return reply.body  # whatever its status: this is how TorchServe is

    class Inference(stubs["inference_pb2_grpc"].InferenceAPIsServiceServicer):  # type: ignore[misc]
        def Predictions(self, request: Any, context: Any) -> Any:
            body = request.input["data"]
            seen = Request(request.model_name, request.model_version or None, body, token(context))
            return stubs["inference_pb2"].PredictionResponse(prediction=checked(backend.predict(seen), context))

    class Management(stubs["management_pb2_grpc"].ManagementAPIsServiceServicer):  # type: ignore[misc]
        def DescribeModel(self, request: Any, context: Any) -> Any:
            reply = backend.describe(request.model_name, request.model_version or None, token(context))
            return stubs["management_pb2"].ManagementResponse(msg=checked(reply, context).decode())

        def ListModels(self, request: Any, context: Any) -> Any:
            reply = backend.list(request.limit, request.next_page_token, token(context))
            return stubs["management_pb2"].ManagementResponse(msg=checked(reply, context).decode())

    server = grpc.server(futures.ThreadPoolExecutor(4))
    stubs["inference_pb2_grpc"].add_InferenceAPIsServiceServicer_to_server(Inference(), server)
    stubs["management_pb2_grpc"].add_ManagementAPIsServiceServicer_to_server(Management(), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, port


@pytest.fixture
def servers(stubs: dict[str, Any]) -> Iterator[Servers]:
    backend = Backend()
    rest = http_server(backend)
    remote, port = grpc_server(backend, stubs)
    yield Servers(backend, f"http://127.0.0.1:{rest.server_port}", f"127.0.0.1:{port}")
    backend.release.set()
    rest.shutdown()
    rest.server_close()
    remote.stop(0).wait(5)


@pytest.fixture
def backend(servers: Servers) -> Backend:
    return servers.backend


@pytest.fixture(params=["rest", "grpc", "async-rest", "async-grpc"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["rest", "grpc"])
def command_transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(servers: Servers, transport: str) -> Iterator[Client]:
    with servers.client(transport) as client:
        yield client


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that is bound, so that nobody else can take it, but refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF_S", 0.005)


@pytest.fixture(autouse=True)
def no_ambient_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MARBLE_TOKEN", raising=False)
    monkeypatch.delenv("MARBLE_MANAGEMENT_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)


# Predictions


def test_predict_sends_the_inference_api_and_reads_details(client: Client, backend: Backend) -> None:
    answer = client.predict("sentiment", ["a", "b"], {"top_k": 2, "details": False}, version="1.0")
    assert answer.predictions == [LABELS, LABELS]
    assert answer.usage == Usage(tokens=7, truncated=False, windows=1)
    assert answer.model == ModelInfo("sentiment", "1.0", "sha256:0f", "text-classification")
    [request] = backend.requests
    assert (request.model, request.version) == ("sentiment", "1.0")
    assert request.json == {"inputs": ["a", "b"], "parameters": {"top_k": 2, "details": True}}


def test_any_json_is_an_input(client: Client, backend: Backend) -> None:
    inputs: Json = {"question": "who?", "context": ["x", 1, 2.5, None, True]}
    backend.script = [answers({"answer": "x"})]
    assert client.predict("sentiment", inputs).predictions == {"answer": "x"}
    assert backend.requests[0].json["inputs"] == inputs


def test_a_model_says_which_it_is_and_what_its_task_is(client: Client, backend: Backend) -> None:
    assert client.identify("sentiment") == ModelInfo("sentiment", "1.0", "sha256:0f", "text-classification")
    older = {name: value for name, value in MODEL.items() if name != "task"}
    usage = {"tokens": 1, "truncated": False, "windows": 1}
    told = {"predictions": {"drift": 0}, "usage": usage, "model": older}
    backend.script = [Reply(200, json.dumps(told).encode())]
    assert client.identify("sentiment").task is None
    assert [request.json for request in backend.requests] == [{"canary": True}] * 2


def test_the_canary_gives_its_drift(client: Client, backend: Backend) -> None:
    assert client.canary("sentiment", version="1.0") == 0.001
    assert (backend.requests[0].version, backend.requests[0].json) == ("1.0", {"canary": True})
    backend.script = [fails(500, "WrongAnswer")]
    with pytest.raises(marble_client.MarbleError) as caught:
        client.canary("sentiment")
    assert caught.value.type == "WrongAnswer"


def test_classify_one_text_gives_its_labels(client: Client, backend: Backend) -> None:
    answer = client.classify("sentiment", "x", top_k=1, function_to_apply="sigmoid", overflow="window")
    assert answer.predictions == [Label("positive", 0.9), Label("negative", 0.1)]
    assert backend.requests[0].json == {
        "inputs": "x",
        "parameters": {"top_k": 1, "function_to_apply": "sigmoid", "overflow": "window", "details": True},
    }


@pytest.mark.parametrize("texts", [["a", "b", "c"], ("a", "b", "c")])
def test_classify_keeps_a_failed_item_in_its_place(client: Client, backend: Backend, texts: Any) -> None:
    backend.script = [answers([LABELS, BAD_ITEM, [{"label": "positive", "score": 1}]])]
    first, second, third = client.classify("sentiment", texts).predictions
    assert first == [Label("positive", 0.9), Label("negative", 0.1)]
    assert second == ItemError("item 1 is empty", 422, "InvalidParameter")
    assert third == [Label("positive", 1.0)]
    assert backend.requests[0].json["parameters"] == {"details": True}


def test_classify_one_text_that_failed_raises(client: Client, backend: Backend) -> None:
    backend.script = [answers([BAD_ITEM])]
    with pytest.raises(marble_client.InvalidParameter, match="item 1 is empty"):
        client.classify("sentiment", "")


@pytest.mark.parametrize("predictions", [[LABELS], [LABELS] * 3, {"label": "x"}, [LABELS, "x"], [LABELS, [{}]]])
def test_classify_refuses_another_shape(client: Client, backend: Backend, predictions: Any) -> None:
    backend.script = [answers(predictions)]
    with pytest.raises(marble_client.BadResponse):
        client.classify("sentiment", ["a", "b"])


def test_lone_surrogates_arrive_as_escapes(client: Client, backend: Backend) -> None:
    client.predict("sentiment", "a\ud800b é")
    assert b"a\\ud800b \\u00e9" in backend.requests[0].body
    assert backend.requests[0].json["inputs"] == "a\ud800b é"


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_json_cannot_say_is_not_sent(client: Client, backend: Backend, number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        client.predict("sentiment", [number])
    with pytest.raises(ValueError, match="not JSON compliant"):
        client.predict("sentiment", "x", {"threshold": number})
    assert backend.requests == []


@pytest.mark.parametrize("name", ["", "..", "a/b", "a?x", "../models", "é", "a\n"])
def test_names_cannot_change_the_address(client: Client, backend: Backend, name: str) -> None:
    for call in (client.predict, client.ready):
        with pytest.raises(ValueError, match="model name"):
            call(name, "x")
    with pytest.raises(ValueError, match="model version"):
        client.predict("sentiment", "x", version=name)
    assert backend.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"hello",
        b"\xff",
        b"[" * 100_000,
        b'[{"label": "x", "score": 1.0}]',
        b'{"predictions": []}',
        answers([math.nan]).body,
        answers([]).body.replace(b'"tokens": 7', b'"tokens": true'),
        answers([]).body.replace(b'"sha256:0f"', b"null"),
        answers([]).body + b"x",
    ],
)
def test_another_servers_answer_is_refused(client: Client, backend: Backend, body: bytes) -> None:
    backend.script = [Reply(200, body)]
    with pytest.raises(marble_client.BadResponse):
        client.predict("sentiment", "x")
    assert len(backend.requests) == 1


def test_connections_are_reused(servers: Servers, backend: Backend) -> None:
    with servers.client("rest") as client:
        for _ in range(5):
            client.predict("sentiment", "x")
            backend.script = [fails(422)]
            with pytest.raises(marble_client.InvalidParameter):
                client.predict("sentiment", "x")
    assert len(backend.requests) == 10
    assert backend.connections == 1


def test_a_local_server_is_never_sought_through_a_proxy(
    servers: Servers, transport: str, dead_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "https_proxy", "grpc_proxy", "all_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{dead_port}")
    for variable in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(variable, raising=False)
    with servers.client(transport) as client:
        assert client.predict("sentiment", "x").predictions == [LABELS]


# Errors

HANDLER_ERRORS: list[tuple[int, type[marble_client.MarbleError], int]] = [
    (400, marble_client.BadRequest, 1),
    (401, marble_client.Unauthorized, 1),
    (403, marble_client.Unauthorized, 1),
    (404, marble_client.NotFound, 1),
    (409, marble_client.BadRequest, 1),
    (413, marble_client.TooLarge, 1),
    (415, marble_client.UnsupportedMediaType, 1),
    (422, marble_client.InvalidParameter, 1),
    (429, marble_client.RateLimited, 3),
    (500, marble_client.ServerError, 1),
    (503, marble_client.Unavailable, 3),
    (507, marble_client.ServerError, 1),
]


@pytest.mark.parametrize(("status", "kind", "tries"), HANDLER_ERRORS)
def test_a_handlers_error_is_the_same_on_both_transports(
    client: Client, backend: Backend, status: int, kind: type[marble_client.MarbleError], tries: int
) -> None:
    backend.script = [fails(status, "Why") for _ in range(tries + 1)]
    with pytest.raises(marble_client.MarbleError) as caught:
        client.predict("sentiment", "x")
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.type, caught.value.message) == (status, "Why", f"why {status}")
    assert str(caught.value) == f"why {status}"
    assert len(backend.requests) == tries


@pytest.mark.parametrize(
    ("reply", "kind", "tries"),
    [
        (frontend("ModelNotFoundException", "Model not found: x"), marble_client.NotFound, 1),
        (
            frontend("ServiceUnavailableException", 'Model "x" has no worker to serve'),
            marble_client.Unavailable,
            3,
        ),
        (frontend("InvalidKeyException", "Token Authorization failed."), marble_client.Unauthorized, 1),
        (frontend("InternalServerException", "Worker died."), marble_client.ServerError, 1),
    ],
)
def test_torchserves_error_is_the_same_on_both_transports(
    client: Client, backend: Backend, reply: Reply, kind: type[marble_client.MarbleError], tries: int
) -> None:
    backend.script = [reply] * (tries + 1)
    with pytest.raises(marble_client.MarbleError) as caught:
        client.predict("sentiment", "x")
    assert type(caught.value) is kind
    assert reply.frontend is not None
    assert (caught.value.type, caught.value.message) == reply.frontend
    assert len(backend.requests) == tries


@pytest.mark.parametrize(
    ("status", "details", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "no\norg.x.InternalServerException", marble_client.BadRequest),
        (grpc.StatusCode.UNAUTHENTICATED, "no", marble_client.Unauthorized),
        (grpc.StatusCode.NOT_FOUND, "no", marble_client.NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, "no", marble_client.InvalidParameter),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many", marble_client.RateLimited),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "gRPC message exceeds maximum size 4: 9",
            marble_client.TooLarge,
        ),
        (grpc.StatusCode.UNAVAILABLE, "no\norg.x.InternalServerException", marble_client.Unavailable),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", marble_client.ConnectionFailed),
        (
            grpc.StatusCode.CANCELLED,
            "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))",
            marble_client.ConnectionFailed,
        ),
        (grpc.StatusCode.UNIMPLEMENTED, "no", marble_client.ServerError),
        (grpc.StatusCode.UNKNOWN, "", marble_client.ServerError),
    ],
)
def test_grpc_statuses(
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    status: grpc.StatusCode,
    details: str,
    kind: type[marble_client.MarbleError],
) -> None:
    monkeypatch.setitem(FRONTEND_STATUS, "Raw", (0, status))

    def abort(_: Request) -> Reply:
        raw = Reply(0, b"")
        raw.frontend = ("Raw", details)
        return raw

    monkeypatch.setattr(servers.backend, "predict", abort)
    with servers.client("grpc") as client, pytest.raises(marble_client.MarbleError) as caught:
        client.predict("sentiment", "x")
    assert type(caught.value) is kind
    assert caught.value.message


@pytest.mark.parametrize(
    ("status", "kind"),
    [(502, marble_client.ServerError), (504, marble_client.Timeout), (413, marble_client.TooLarge)],
)
def test_a_proxys_error_page(
    servers: Servers, backend: Backend, status: int, kind: type[marble_client.MarbleError]
) -> None:
    backend.script = [Reply(status, b"<html>nginx</html>")]
    with servers.client("rest") as client, pytest.raises(kind, match=str(status)):
        client.predict("sentiment", "x")
    assert len(backend.requests) == 1


def test_a_redirect_is_not_followed(servers: Servers, backend: Backend) -> None:
    backend.script = [Reply(302, b"", {"Location": servers.url + "/predictions/other"})]
    with servers.client("rest") as client, pytest.raises(marble_client.BadResponse, match="redirects"):
        client.predict("sentiment", "x")
    assert len(backend.requests) == 1


def test_nobody_there(transport: str, dead_port: int) -> None:
    address = f"127.0.0.1:{dead_port}"
    servers = Servers(Backend(), f"http://{address}", address)
    with servers.client(transport) as client:
        for call in (lambda: client.predict("x", "x"), lambda: client.ready("x"), client.models):
            with pytest.raises(marble_client.ConnectionFailed, match=r"no server at .*start one with scripts/serve"):
                call()


@pytest.mark.usefixtures("stubs")
def test_a_server_that_hangs_up_is_asked_once(transport: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted = []

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    accepted.append(connection.recv(65536))

        threading.Thread(target=hang_up, daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        servers = Servers(Backend(), f"http://{address}", address)
        with servers.client(transport, timeout=5) as client, pytest.raises(marble_client.ConnectionFailed):
            client.predict("x", "x")
        if "rest" in transport:
            assert len(accepted) == 1  # gRPC reconnects its channel by itself
        listener.shutdown(socket.SHUT_RDWR)


# Retries and deadlines


def test_a_server_that_comes_up_between_tries_is_reached(
    stubs: dict[str, Any], transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "BACKOFF_S", 0.1)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    back_off, backend = retry._back_off, Backend()
    stops: list[Callable[[], object]] = []

    def start_then_back_off(*given: Any) -> float:
        if not stops and "rest" in transport:
            rest = http_server(backend, port)
            stops.extend((rest.shutdown, rest.server_close))
        elif not stops:
            server, _ = grpc_server(backend, stubs, port)
            stops.append(lambda: server.stop(0).wait(5))
        return back_off(*given)

    monkeypatch.setattr(retry, "_back_off", start_then_back_off)
    address = f"127.0.0.1:{port}"
    try:
        with Servers(backend, f"http://{address}", address).client(transport) as client:
            assert client.predict("sentiment", "x").predictions == [LABELS]
    finally:
        for stop in stops:
            stop()
    assert len(backend.requests) == 1


@pytest.mark.parametrize("failure", [fails(503), fails(429)])
def test_overload_is_tried_again(client: Client, backend: Backend, failure: Reply) -> None:
    backend.script = [failure, failure, answers(["done"])]
    assert client.predict("sentiment", "x").predictions == ["done"]
    assert len(backend.requests) == 3
    assert len({request.body for request in backend.requests}) == 1


def test_retry_after_is_respected(servers: Servers, backend: Backend) -> None:
    backend.script = [fails(429, Retry_After="1")]
    began = time.monotonic()
    with servers.client("rest") as client:
        assert client.predict("sentiment", "x").predictions == [LABELS]
    assert 1 <= time.monotonic() - began < 5
    assert len(backend.requests) == 2


@pytest.mark.parametrize("value", ["3600", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_retry_after_beyond_the_deadline_is_not_waited_for(servers: Servers, backend: Backend, value: str) -> None:
    backend.script = [fails(503, Retry_After=value)]
    began = time.monotonic()
    with servers.client("rest", timeout=5) as client, pytest.raises(marble_client.Unavailable) as caught:
        client.predict("sentiment", "x")
    assert time.monotonic() - began < 2
    assert caught.value.retry_after is not None
    assert caught.value.retry_after >= 3600
    assert len(backend.requests) == 1


@pytest.mark.parametrize("per_call", [True, False])
def test_a_stuck_server_is_left_at_the_deadline_and_not_asked_again(
    servers: Servers, backend: Backend, transport: str, per_call: bool
) -> None:
    backend.stuck = True
    with servers.client(transport, timeout=60 if per_call else 0.4) as client:
        began = time.monotonic()
        with pytest.raises(marble_client.Timeout, match=r"0\.4 s"):
            client.predict("sentiment", "x", timeout=0.4 if per_call else None)
        assert 0.3 < time.monotonic() - began < 2
    assert len(backend.requests) == 1


def test_retries_stay_within_the_deadline(
    servers: Servers, backend: Backend, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The back-off before the second try is at least 0.1 s, so there can be none.
    monkeypatch.setattr(retry, "BACKOFF_S", 0.1)
    backend.script = [fails(503)] * 3
    gave_up = pytest.raises((marble_client.Unavailable, marble_client.Timeout))
    with servers.client(transport, timeout=0.09) as client, gave_up:
        client.predict("sentiment", "x")
    assert len(backend.requests) <= 1


@pytest.mark.parametrize("every_s", [0.05, 60])
def test_a_trickling_answer_is_left_at_the_deadline(every_s: float) -> None:
    stop = threading.Event()

    def trickle(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            try:
                stop.wait(0.8)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                while not stop.wait(every_s):
                    connection.sendall(b" ")
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: trickle(listener.accept()[0]), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        with RestClient(url, url, timeout=1) as client, pytest.raises(marble_client.Timeout):
            client.predict("sentiment", "x")
        assert 0.9 < time.monotonic() - began < 1.6
        stop.set()


def test_only_a_refused_connection_is_tried_again() -> None:
    calls: list[bool] = []

    def refused(sent: bool) -> Callable[[], None]:
        def call() -> None:
            calls.append(sent)
            raise marble_client.ConnectionFailed("no", sent=sent)

        return call

    for sent in (False, True):
        with pytest.raises(marble_client.ConnectionFailed):
            with_retries(refused(sent), Deadline(10))
    assert calls == [False, False, False, True]


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_a_timeout_is_a_positive_number(servers: Servers, client: Client, transport: str, seconds: float) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        servers.client(transport, timeout=seconds)
    with pytest.raises(ValueError, match="positive number of seconds"):
        client.predict("sentiment", "x", timeout=seconds)


# What is served


def test_ready_means_a_ready_worker(client: Client, backend: Backend) -> None:
    backend.models["dead"] = ["UNLOADING"]
    backend.models["empty"] = []
    assert client.ready("sentiment")
    assert client.ready("sentiment", "1.0")
    assert not client.ready("sentiment", "9.9")
    assert not client.ready("dead")
    assert not client.ready("empty")
    assert not client.ready("unknown")


def test_models_follows_every_page(client: Client, backend: Backend) -> None:
    backend.models = {f"m{number}": ["READY"] * number for number in range(7)}
    backend.page_size = 3
    assert client.models() == [ServedModel(f"m{number}", "1.0", number, number) for number in range(7)]


def test_models_stops_when_pages_do_not_advance(client: Client, backend: Backend) -> None:
    backend.page_size, backend.stuck_page = 1, True
    with pytest.raises(marble_client.BadResponse, match="do not advance"):
        client.models()


def test_models_skips_one_that_went_away(client: Client, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.models["gone"] = ["READY"]
    describe = backend.describe

    def describe_late(model: str, version: str | None, token: str | None) -> Reply:
        backend.models.pop("gone", None)
        return describe(model, version, token)

    monkeypatch.setattr(backend, "describe", describe_late)
    assert [model.name for model in client.models()] == ["sentiment"]
    assert "gone" not in backend.models


# Tokens


def test_each_interface_gets_its_own_token(servers: Servers, backend: Backend, transport: str) -> None:
    backend.key, backend.management_key = "inference-key", "management-key"
    with servers.client(transport, token="inference-key", management_token="management-key") as client:
        assert client.predict("sentiment", "x").predictions == [LABELS]
        assert client.ready("sentiment")
        assert len(client.models()) == 1
    with servers.client(transport, token="management-key", management_token="inference-key") as client:
        for call in (
            lambda: client.predict("sentiment", "x"),
            lambda: client.ready("sentiment"),
            client.models,
        ):
            with pytest.raises(marble_client.Unauthorized) as caught:
                call()
            assert caught.value.type == "InvalidKeyException"


def test_no_token_means_no_header(
    servers: Servers, backend: Backend, transport: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with servers.client(transport) as client:
        client.predict("sentiment", "x")
    assert [request.authorization for request in backend.requests] == [None]


@pytest.mark.parametrize("token", ["", "two words", "line\r\nbreak", "é"])
def test_a_token_that_cannot_travel_is_refused_unshown(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        bearer(token)
    assert not token or token not in str(caught.value)


def write_keys(path: Path, **keys: str) -> None:
    content = {kind: {"key": key, "expiration time": "2030-01-01T00:00:00Z"} for kind, key in keys.items()}
    path.write_text(json.dumps(content))


def test_tokens_are_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    nothing = find_tokens()
    assert (nothing.inference, nothing.management) == (None, None)
    for place in ("--token", "MARBLE_TOKEN", "--management-token", "MARBLE_MANAGEMENT_TOKEN", str(deep)):
        assert place in nothing.origin

    write_keys(tmp_path / "key_file.json", management="far-m", inference="far-i", API="api")
    far = find_tokens()
    assert (far.inference, far.management) == ("far-i", "far-m")
    assert str(tmp_path / "key_file.json") in far.origin

    write_keys(deep / "key_file.json", management="near-m", inference="near-i", API="api")
    near = find_tokens()
    assert (near.inference, near.management) == ("near-i", "near-m")

    other = tmp_path / "other.json"
    write_keys(other, management="other-m", inference="other-i", API="api")
    assert find_tokens(key_file=other).inference == "other-i"

    monkeypatch.setenv("MARBLE_TOKEN", "env-i\n")
    monkeypatch.setenv("MARBLE_MANAGEMENT_TOKEN", "env-m")
    environment = find_tokens()
    assert (environment.inference, environment.management) == ("env-i", "env-m")

    explicit = find_tokens("opt-i", explicit_management="opt-m")
    assert (explicit.inference, explicit.management) == ("opt-i", "opt-m")
    for tokens in (far, near, environment, explicit):
        assert tokens.inference is not None
        assert tokens.inference not in repr(tokens)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"inference": "x"}', None])
def test_a_broken_key_file_is_no_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key_file.json"
    path.mkdir() if content is None else path.write_bytes(content)
    tokens = find_tokens()
    assert (tokens.inference, tokens.management) == (None, None)
    assert f"{path} (which is no readable key file)" in tokens.origin


# The command

Marble = Callable[..., tuple[int, str, str]]


@pytest.fixture
def marble(servers: Servers, command_transport: str, capsys: pytest.CaptureFixture[str]) -> Marble:
    def run(command: str, *arguments: str) -> tuple[int, str, str]:
        return (cli.main([command, *servers.flags(command_transport), *arguments]), *capsys.readouterr())

    return run


def test_predict_prints_labels(marble: Marble, backend: Backend) -> None:
    code, out, err = marble("predict", "sentiment", "what a film", "--top-k", "3", "--version", "1.0")
    assert (code, json.loads(out), err) == (0, LABELS, "")
    [request] = backend.requests
    assert request.version == "1.0"
    assert request.json == {"inputs": "what a film", "parameters": {"top_k": 3, "details": True}}


def test_predict_prints_a_list_for_several_texts(marble: Marble, backend: Backend) -> None:
    options = ["--function-to-apply", "none", "--overflow", "truncate"]
    code, out, err = marble("predict", "sentiment", "a", "b", *options)
    assert (code, json.loads(out), err) == (0, [LABELS, LABELS], "")
    parameters = {"function_to_apply": "none", "overflow": "truncate", "details": True}
    assert backend.requests[0].json == {"inputs": ["a", "b"], "parameters": parameters}


def test_predict_reads_texts_from_standard_input(
    marble: Marble, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\nthree\n"))
    code, out, _ = marble("predict", "sentiment", "-")
    assert (code, json.loads(out)) == (0, [LABELS] * 3)
    assert backend.requests[0].json["inputs"] == ["one", "", "three"]

    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, out, err = marble("predict", "sentiment", "-")
    assert (code, out) == (2, "")
    assert "standard input holds no text" in err


def test_predict_details(marble: Marble) -> None:
    code, out, _ = marble("predict", "sentiment", "a", "--details")
    usage = {"tokens": 7, "truncated": False, "windows": 1}
    assert (code, json.loads(out)) == (0, {"predictions": LABELS, "usage": usage, "model": MODEL})


def test_predict_of_another_task_is_printed_as_it_is(marble: Marble, backend: Backend) -> None:
    backend.script = [answers([[0.25, 0.5]])]
    assert marble("predict", "sentiment", "a")[:2] == (0, "[[0.25, 0.5]]\n")


def test_predict_sends_files_as_base64(marble: Marble, backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\xff")
    code, out, _ = marble("predict", "sentiment", "--file", str(tmp_path / "a.png"))
    assert (code, json.loads(out)) == (0, LABELS)
    assert backend.requests[0].json["inputs"] == "iVBOR/8="


def test_predict_sends_json_and_parameters(marble: Marble, backend: Backend) -> None:
    backend.script = [answers({"answer": "Ann"})]
    options = ["-p", "top_k=2", "--parameter", "mode=fast", "-p", 'stop=["a=b"]']
    code, out, _ = marble("predict", "sentiment", "--json", '{"question": "who?", "context": "Ann"}', *options)
    assert (code, json.loads(out)) == (0, {"answer": "Ann"})
    parameters = {"top_k": 2, "mode": "fast", "stop": ["a=b"], "details": True}
    assert backend.requests[0].json == {"inputs": {"question": "who?", "context": "Ann"}, "parameters": parameters}


def test_predict_writes_media_to_a_file(marble: Marble, backend: Backend, tmp_path: Path) -> None:
    backend.script = [answers("iVBOR/8="), answers(LABELS)]
    place = str(tmp_path / "a.png")
    assert marble("predict", "sentiment", "seven", "--output", place) == (0, "", "")
    assert Path(place).read_bytes() == b"\x89PNG\xff"
    code, _, err = marble("predict", "sentiment", "seven", "--output", place)
    assert (code, "does not answer with an image" in err) == (2, True)
    assert Path(place).read_bytes() == b"\x89PNG\xff"


def test_predict_notes_a_truncated_text(marble: Marble, backend: Backend) -> None:
    backend.script = [answers([LABELS], truncated=True)]
    code, out, err = marble("predict", "sentiment", "long")
    assert (code, json.loads(out)) == (0, LABELS)
    assert "text was cut" in err


def test_predict_prints_an_items_error_in_its_place(marble: Marble, backend: Backend) -> None:
    backend.script = [answers([LABELS, BAD_ITEM])]
    code, out, err = marble("predict", "sentiment", "a", "")
    assert (code, json.loads(out)) == (1, [LABELS, BAD_ITEM])
    assert "1 of 2 inputs failed" in err


def test_predict_prints_any_text_as_json(marble: Marble, backend: Backend) -> None:
    label = [{"label": "好\ud800", "score": 1.0}]
    backend.script = [answers([label])]
    code, out, _ = marble("predict", "sentiment", "a")
    assert (code, json.loads(out)) == (0, label)
    assert "好" in out


def test_predict_says_what_the_server_said_on_one_safe_line(marble: Marble, backend: Backend) -> None:
    body = {"error": "top_k is too big:\nuse at most 2 \x1b[2J", "code": 422, "type": "InvalidParameter"}
    backend.script = [Reply(422, json.dumps(body).encode())]
    code, out, err = marble("predict", "sentiment", "a")
    assert (code, out) == (1, "")
    assert err == "marble: top_k is too big: use at most 2 ?[2J (InvalidParameter)\n"


def test_predict_of_an_unknown_model_says_where_to_look(marble: Marble) -> None:
    code, out, err = marble("predict", "unknown", "a")
    assert (code, out) == (1, "")
    assert "Model not found: unknown" in err
    assert "'marble models'" in err


def test_a_refused_token_says_where_tokens_were_sought(marble: Marble, backend: Backend, tmp_path: Path) -> None:
    backend.key = "right"
    code, out, err = marble("predict", "sentiment", "a")
    assert (code, out) == (1, "")
    assert f"found neither in --token nor MARBLE_TOKEN nor key_file.json in {tmp_path} or above" in err

    write_keys(tmp_path / "key_file.json", inference="stale-secret", management="x", API="y")
    code, _, err = marble("predict", "sentiment", "a")
    assert code == 1
    assert f"inference token from {tmp_path / 'key_file.json'}" in err
    assert "stale-secret" not in err

    assert marble("predict", "sentiment", "a", "--token", "right")[0] == 0


def test_a_token_that_begins_with_a_dash() -> None:
    given = ["predict", "m", "x", "--token", "--oHBaWQ", "--management-token", "-a1b2c3d"]
    assert attached(given) == ["predict", "m", "x", "--token=--oHBaWQ", "--management-token=-a1b2c3d"]
    for whole in (
        ["m", "x", "--token", "good", "--url", "http://x"],
        ["m", "--token", "--url", "http://x"],  # forgotten
        ["m", "--token", "-p", "top_k=2"],
        ["m", "--token", "--url=http://x"],
        ["m", "--token", "--", "-X"],
        ["m", "--", "--token", "-X"],  # two texts
        ["m", "-X", "--token"],
    ):
        assert attached(whole) == whole


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict"],
        ["predict", "sentiment"],
        ["predict", "sentiment", "x", "--overflow", "guess"],
        ["predict", "sentiment", "x", "--top-k", "many"],
        ["predict", "../models", "x"],
        ["predict", "sentiment", "--file"],
        ["predict", "sentiment", "x", "--file", "--json"],
        ["predict", "sentiment", "--file", "/nowhere/y.png"],
        ["predict", "sentiment", "x", "--json"],
        ["predict", "sentiment", "x", "-p", "top_k"],
        ["predict", "sentiment", "x", "y", "--output", "z.wav"],
        ["predict", "sentiment", "x", "--timeout", "0"],
        ["predict", "sentiment", "x", "--token", "two words"],
        ["predict", "sentiment", "x", "--url", "ftp://x"],
        ["predict", "sentiment", "x", "--grpc", "--grpc-target", "http://x:1/y"],
        ["frobnicate"],
        [],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err
    assert "two words" not in err


@pytest.mark.parametrize("command", [["predict", "x", "x"], ["ready"], ["ready", "x"], ["models"]])
def test_nobody_there_exits_with_3(
    command: list[str], command_transport: str, dead_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"127.0.0.1:{dead_port}"
    flags = Servers(Backend(), f"http://{address}", address).flags(command_transport)
    assert cli.main([*command, *flags]) == 3
    out, err = capsys.readouterr()
    where = f"http://{address}" if command_transport == "rest" else address
    assert (out, err) == ("", f"marble: no server at {where}: start one with scripts/serve\n")


def test_a_stuck_server_exits_with_3(marble: Marble, backend: Backend) -> None:
    backend.stuck = True
    code, out, err = marble("predict", "sentiment", "x", "--timeout", "0.4")
    assert (code, out) == (3, "")
    assert "no answer within 0.4 s" in err
    assert len(backend.requests) == 1


def test_ready_proves_an_answer(marble: Marble, backend: Backend) -> None:
    backend.models["topics"] = ["READY"]
    assert marble("ready") == (0, "sentiment ready\ntopics ready\n", "")
    assert [(request.model, request.json) for request in backend.requests] == [
        ("sentiment", {"canary": True}),
        ("topics", {"canary": True}),
    ]
    assert marble("ready", "topics") == (0, "topics ready\n", "")


def test_ready_names_what_is_not(marble: Marble, backend: Backend) -> None:
    backend.models["dead"] = ["UNLOADING"]
    code, out, err = marble("ready", "dead", "sentiment", "unknown")
    assert (code, out) == (1, "sentiment ready\n")
    assert "dead is not ready: none of its 1 workers is READY" in err
    assert "unknown is not ready: it is not served" in err


def test_ready_is_not_fooled_by_a_ready_worker_that_fails(marble: Marble, backend: Backend) -> None:
    backend.script = [frontend("InternalServerException", "Worker died.")]
    code, out, err = marble("ready", "sentiment")
    assert (code, out) == (1, "")
    assert "sentiment is not ready: it did not answer its canary: Worker died." in err

    backend.stuck = True
    code, out, err = marble("ready", "sentiment", "--timeout", "0.4")
    assert (code, out) == (1, "")
    assert "sentiment is not ready: it did not answer its canary: no answer within 0.4 s" in err


def test_ready_with_nothing_served(marble: Marble, backend: Backend) -> None:
    backend.models.clear()
    code, out, err = marble("ready")
    assert (code, out) == (1, "")
    assert "no model is served" in err


def test_models_prints_a_table(marble: Marble, backend: Backend) -> None:
    backend.models["a-model-with-a-long-name"] = []
    assert marble("models") == (
        0,
        (
            "NAME                      VERSION  READY\n"
            "a-model-with-a-long-name  1.0      0/0\n"
            "sentiment                 1.0      1/2\n"
        ),
        "",
    )


def test_interrupted(marble: Marble, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._COMMANDS, "models", interrupt)
    assert marble("models") == (130, "", "")


@pytest.mark.parametrize("command", [[], ["predict"], ["ready"], ["models"]])
def test_help_teaches_by_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert "  marble " in capsys.readouterr().out.partition("example")[2]


def test_a_reader_that_left_is_no_failure(servers: Servers) -> None:
    script = "import sys; from marble_client.cli import main; sys.exit(main())"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            # -E: an unbuffered stdout would have nothing left to fail on at exit.
            [sys.executable, "-E", "-c", script, "models", *servers.flags("rest")],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# Stubs


def test_rest_needs_neither_stubs_nor_grpc(servers: Servers) -> None:
    script = (
        "import sys; sys.modules['grpc'] = sys.modules['marble_client.stubs'] = None\n"
        "from marble_client.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", script, "predict", "sentiment", "x", *servers.flags("rest")]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, LABELS, b"")


def test_missing_stubs_say_how_to_make_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("marble_client.stubs.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "marble_client.stubs", None)
    with pytest.raises(marble_client.StubsMissing, match=r"run 'python scripts/generate_stubs\.py'"):
        GrpcClient()
    assert cli.main(["models", "--grpc"]) == 2
    assert "run 'python scripts/generate_stubs.py'" in capsys.readouterr().err


def test_generating_stubs_again_changes_nothing(stubs: dict[str, Any]) -> None:
    folder = Path(stubs["inference_pb2"].__file__).parent
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert {"inference_pb2.py", "management_pb2_grpc.py", "open_inference_grpc_pb2.pyi"} <= before.keys()
    done = subprocess.run([sys.executable, GENERATE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "up to date" in done.stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def test_generating_stubs_without_torchserve_says_so() -> None:
    done = subprocess.run([sys.executable, "-S", GENERATE], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "torchserve is not installed here" in done.stderr
