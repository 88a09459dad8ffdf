"""The front door, end to end: a real nginx before a real TorchServe, one start of them for all tests here.

They go in the order they are written in: the last ones stop a worker, kill TorchServe, and shut down.
"""

import concurrent.futures
import http.client
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import browser
import grpc
import psutil
import pytest
import requests
from browser import Browser
from conftest import ROOT, build_here, free_ports, run, serve, stop, succeeded, write_config, write_settings
from console_page import NAME, StartConsole, choose, holds, opened

from marble_client import ConnectionFailed, RestClient
from marble_client.stubs import inference_pb2, open_inference_grpc_pb2
from server import tokens
from server.front import Certificate, Settings
from server.torchserve import ServerError
from server.watchdog import Check, End, History, Restart, Timing, judge

MODEL = "small"
BODY = {"inputs": "good"}
# A token of each role, named as it.
OWN = tuple(zip(tokens.ROLES, tokens.ROLES, strict=True))
# The limits of this door: a client has 200 requests and then one a second, four at a time, of 100 kB at most.
LIMITS = {
    "client_rate": 1,
    "client_burst": 200,
    "client_in_flight": 4,
    "max_body_bytes": 100_000,
    "slow_client_seconds": 1,
    "canary_every_seconds": 0.5,
    "canary_within_seconds": 2,
    "silent_seconds": 4,
}


def token_command(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Runs the program behind scripts/token."""
    return run(sys.executable, "-m", "server", "token", *arguments, cwd=folder)


@dataclass(frozen=True)
class Door:
    """A front door and what is behind it. tokens: by the role that they have, and of other kinds."""

    folder: Path
    rest: int
    grpc: int
    inner: Sequence[int]
    tokens: dict[str, str]

    @property
    def certificate(self) -> Path:
        return self.folder / "front" / "self-signed.pem"

    def ask(self, method: str, path: str, token: str = "", **options: object) -> requests.Response:
        """One request over TLS, its certificate checked."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        headers |= options.pop("headers", {})  # type: ignore[arg-type]
        url = f"https://localhost:{self.rest}{path}"
        with requests.Session() as session:
            # The environment may name other certificates to trust.
            session.trust_env, session.verify = False, str(self.certificate)
            return session.request(method, url, headers=headers, timeout=60, **options)  # type: ignore[arg-type]

    def predict(self, token: str = "") -> requests.Response:
        return self.ask("POST", f"/predictions/{MODEL}", token or self.tokens["predict"], json=BODY)

    def state(self, name: str = "server") -> dict[str, object]:
        value: dict[str, object] = json.loads((self.folder / "run" / f"{name}.json").read_text())
        return value

    def status(self) -> dict[str, object]:
        value: dict[str, object] = self.ask("GET", "/status", self.tokens["watch"]).json()
        return value

    def workers(self) -> list[int]:
        """The READY workers of the model, as the watchdog last saw them."""
        return list(self.status()["models"].get(MODEL, {"workers": []})["workers"])  # type: ignore[attr-defined]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "logs" / "watchdog.log").read_text()
            time.sleep(0.1)

    def ready(self) -> bool:
        return self.ask("GET", "/ready").status_code == 200

    def connect(self) -> ssl.SSLSocket:
        """A TLS connection for bytes that no client would send."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # which sends no more than it was asked for
        raw = socket.create_connection(("localhost", self.rest), timeout=30)
        return context.wrap_socket(raw, server_hostname="localhost")

    def channel(self) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(self.certificate.read_bytes())
        return grpc.secure_channel(f"localhost:{self.grpc}", credentials)

    def call(self, method: str, message: bytes, token: str = "") -> tuple[grpc.StatusCode, bytes]:
        """A unary gRPC call: its status, and its answer or details."""
        with self.channel() as channel:
            metadata = [("authorization", f"Bearer {token}")] if token else []
            try:
                return grpc.StatusCode.OK, channel.unary_unary(method)(message, metadata=metadata, timeout=60)
            except grpc.RpcError as error:
                return error.code(), (error.details() or "").encode()

    @contextmanager
    def stopped_worker(self) -> Iterator[int]:
        """Stops the worker, so that requests stay in flight, for less time than its watchdog grants it."""
        [worker] = self.workers()
        os.kill(worker, signal.SIGSTOP)
        try:
            yield worker
        finally:
            os.kill(worker, signal.SIGCONT)


@pytest.fixture(scope="module")
def tiny_store(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("front_store")
    bundle = Path(shutil.copytree(tiny_bundle, place / MODEL))
    build_here(bundle, place / "store", MODEL, "openvino")
    return place / "store"


@pytest.fixture(scope="module")
def door(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    if shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.fail("nginx is missing; on Debian: apt-get install nginx-light")
    folder = tmp_path_factory.mktemp("front")
    config, inner = write_config(folder)
    rest, grpc_port = free_ports(2)
    settings = write_settings(
        folder / "f.properties", rest=f"127.0.0.1:{rest}", grpc=f"127.0.0.1:{grpc_port}", **LIMITS
    )
    made = {}
    for name, role in (*OWN, ("watch", "admin"), ("fast", "metrics"), ("mutant", "predict")):
        made[name] = succeeded(token_command(folder, "add", name, "--role", role)).strip()
    made["expired"] = tokens.add("old", ["admin"], int(time.time()) - 1, folder / tokens.FILE)
    made["no such"] = f"marble_{'0' * 16}_{'A' * 43}"
    made["other secret"] = made["admin"][:24] + made["predict"][24:]
    done = serve(folder, tiny_store, config, "--front", settings)
    try:
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("ready in ")
        assert "warning: no --cert and --key" in done.stderr
        yield Door(folder, rest, grpc_port, inner, made)
    finally:
        stop(folder)


# --- Who may do what -------------------------------------------------------------------------------------------------

V2 = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["good"]}]}
ROUTES = [
    ("POST", f"/predictions/{MODEL}", BODY, "predict"),
    ("POST", f"/predictions/{MODEL}/1.0", BODY, "predict"),
    ("POST", f"/v1/models/{MODEL}:predict", {"instances": ["good"]}, "predict"),
    ("POST", f"/v2/models/{MODEL}/infer", V2, "predict"),
    ("POST", f"/v2/models/{MODEL}/versions/1.0/infer", V2, "predict"),
    ("POST", f"/explanations/{MODEL}", BODY, "explain"),
    ("GET", "/metrics", None, "metrics"),
    ("GET", "/status", None, "admin"),
]
KINDS = ("", "no such", "other secret", "expired", *tokens.ROLES)


def error_of(answer: requests.Response) -> tuple[int, str]:
    """Status and type of an error, which must have the form of all errors."""
    assert answer.headers["Content-Type"] == "application/json"
    value = answer.json()
    assert value.keys() == {"error", "code", "type"}
    assert value["code"] == answer.status_code
    return answer.status_code, value["type"]


@pytest.mark.parametrize(("method", "path", "body", "role"), ROUTES)
def test_every_route_with_every_kind_of_token(door: Door, method: str, path: str, body: object, role: str) -> None:
    for kind in KINDS:
        answer = door.ask(method, path, door.tokens.get(kind, ""), json=body)
        if kind not in tokens.ROLES:
            assert error_of(answer) == (401, "Unauthorized"), kind
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        elif kind not in (role, "admin"):
            assert error_of(answer) == (403, "Forbidden"), kind
        else:
            assert answer.status_code == 200, answer.text
            assert ("attributions" in answer.text) == (role == "explain")


def test_a_version_of_open_inference_is_that_version(door: Door) -> None:
    predict = door.tokens["predict"]
    answers = [
        door.ask("POST", f"/v2/models/{MODEL}{version}/infer", predict, json=V2).json()
        for version in ("", "/versions/1.0")
    ]
    assert answers[0] == answers[1]
    assert door.ask("POST", f"/v2/models/{MODEL}/versions/7/infer", predict, json=V2).status_code == 404


def test_other_spellings_of_a_token(door: Door) -> None:
    good = door.tokens["predict"]
    for value in (
        f"Basic {good}",
        good,
        f"Bearer {good}x",
        f"Bearer  {good}",
        f"Bearer {good[:-1]}",
        f"Bearer {good} x",
    ):
        answer = door.ask("POST", f"/predictions/{MODEL}", headers={"Authorization": value}, json=BODY)
        assert error_of(answer) == (401, "Unauthorized"), value
    assert door.ask("POST", f"/predictions/{MODEL}", headers={"Authorization": f"bearer {good}"}, json=BODY).ok


def test_the_console_through_the_door(door: Door, start_console: StartConsole, chromium: Browser) -> None:
    """Its certificate is trusted by name, its list of models is not to be had, and one token gives all the rest."""
    roles = [part for role in ("predict", "explain", "metrics") for part in ("--role", role)]
    token = succeeded(token_command(door.folder, "add", "page", *roles)).strip()
    address = f"https://localhost:{door.rest}"
    trust = {"REQUESTS_CA_BUNDLE": "", "CURL_CA_BUNDLE": str(door.certificate)}
    with start_console("--url", address, "--token", token, **trust) as url:
        page = opened(chromium, url)
        page.reads("#models", "not to be had from here")
        page.type(NAME, "other" + browser.ENTER)
        page.reads("#refused [role=alert]", "is that a model's name?")
        page.type(NAME, MODEL + browser.ENTER)
        n = choose(page, MODEL)
        page.type(f"#first-{n} textarea", "good")
        page.click(f"#ask-{n}")
        page.reads(f"#answer-{n}", "positive")
        page.click(f"#explain-{n}")
        page.reads(f"#explanation-{n}", "Method: occlusion", "good")
        page.reads("#models", MODEL, "text-classification", " ms", "since the server started")
        assert page.text("#status").strip() == ""
        done = run("sh", "-c", holds(page, f"#curl-{n} textarea"), MARBLE_TOKEN=token, **trust)
        assert json.loads(succeeded(done)) == door.predict().json()
    with RestClient(address, token=token) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REQUESTS_CA_BUNDLE", "")
            patch.delenv("CURL_CA_BUNDLE", raising=False)
            with pytest.raises(ConnectionFailed, match=f"certificate of {address} is not trusted.* CURL_CA_BUNDLE"):
                client.predict(MODEL, "good")


PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
MODEL_INFER = "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/ModelInfer"


def grpc_messages() -> dict[str, bytes]:
    request = open_inference_grpc_pb2.ModelInferRequest(model_name=MODEL)
    tensor = request.inputs.add(name="text", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"good")
    predictions = inference_pb2.PredictionsRequest(model_name=MODEL, input={"data": json.dumps(BODY).encode()})
    return {PREDICTIONS: predictions.SerializeToString(), MODEL_INFER: request.SerializeToString()}


@pytest.mark.parametrize("method", [PREDICTIONS, MODEL_INFER])
def test_every_grpc_method_with_every_kind_of_token(door: Door, method: str) -> None:
    message = grpc_messages()[method]
    for kind in KINDS:
        code, said = door.call(method, message, door.tokens.get(kind, ""))
        if kind not in tokens.ROLES:
            assert (code, b"no valid token" in said) == (grpc.StatusCode.UNAUTHENTICATED, True), kind
        elif kind not in ("predict", "admin"):
            assert (code, b"lacks the role" in said) == (grpc.StatusCode.PERMISSION_DENIED, True), kind
        else:
            assert code is grpc.StatusCode.OK, said
            assert b"positive" in said


@pytest.mark.parametrize(
    "method",
    [
        f"{service}/{name}"
        for service, names in {
            # The wedge and the worker's death are behind the first two.
            "/org.pytorch.serve.grpc.inference.InferenceAPIsService": (
                "StreamPredictions",
                "StreamPredictions2",
                "Ping",
            ),
            "/org.pytorch.serve.grpc.openinference.GRPCInferenceService": ("ServerLive", "ServerReady", "ModelReady"),
            "/org.pytorch.serve.grpc.management.ManagementAPIsService": (
                "ListModels",
                "ScaleWorker",
                "UnregisterModel",
            ),
        }.items()
        for name in names
    ],
)
def test_no_other_grpc_method_is_served(door: Door, method: str) -> None:
    message = grpc_messages()[PREDICTIONS]
    assert door.call(method, message, door.tokens["admin"])[0] is grpc.StatusCode.UNIMPLEMENTED


def test_broken_protobufs_hurt_nobody(door: Door) -> None:
    """A model named twice, a message cut off, bytes changed: whatever the answer, the next request is served."""
    good = grpc_messages()[PREDICTIONS]
    source = random.Random(5)
    broken = [good + b"\x0a\x05other", b"\x0a\xff\xff\xff\xff\x0f", *(good[:cut] for cut in range(0, len(good), 6))]
    for _ in range(40):
        changed = bytearray(good)
        changed[source.randrange(len(good))] = source.randrange(256)
        broken.append(bytes(changed))
    before = door.workers()
    codes = {door.call(PREDICTIONS, message, door.tokens["mutant"])[0] for message in broken}
    assert codes > {grpc.StatusCode.OK, grpc.StatusCode.INTERNAL}
    assert grpc.StatusCode.DEADLINE_EXCEEDED not in codes
    assert door.predict().ok
    assert door.workers() == before


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/ping",
        "/models",
        f"/models/{MODEL}",
        f"/models/{MODEL}?min_worker=0",
        "/api-description",
        "/token?type=inference",
        "/workflows",
        f"/wfpredict/{MODEL}",
        f"/v1/models/{MODEL}",
        f"/v2/models/{MODEL}",
        "/v2/health/ready",
        f"/predictions/{MODEL}/1.0/some/path",
        f"/predictions/{MODEL}/../../models",
        f"/predictions/%2e%2e/models/{MODEL}",
        "/predictions/nobody",
        "/v1/models/nobody:predict",
        "//metrics",
    ],
)
def test_no_other_route_is_served(door: Door, path: str) -> None:
    """As they are written: requests would tidy the paths."""
    for method in ("GET", "POST", "PUT", "DELETE"):
        with door.connect() as connection:
            head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {door.tokens['admin']}\r\n"
            connection.sendall(f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
            answer = receive(connection)
        status = 405 if "nobody" in path and method != "POST" else 404
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == status


def receive(connection: ssl.SSLSocket) -> bytes:
    """All that comes until the other side closes."""
    content = b""
    try:
        while piece := connection.recv(65536):
            content += piece
    except (ConnectionResetError, ssl.SSLEOFError):
        pass
    return content


def answered(connection: ssl.SSLSocket) -> int:
    """The status of the one answer that comes next, read whole: the connection is kept."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def test_methods_and_media_types(door: Door) -> None:
    predict, metrics = door.tokens["predict"], door.tokens["metrics"]
    assert error_of(door.ask("GET", f"/predictions/{MODEL}", predict)) == (405, "MethodNotAllowed")
    assert error_of(door.ask("POST", "/metrics", metrics)) == (405, "MethodNotAllowed")
    assert error_of(door.ask("DELETE", "/ready")) == (405, "MethodNotAllowed")
    for options in ({"data": {"inputs": "good"}}, {"files": {"data": b"good"}}):
        answer = door.ask("POST", f"/predictions/{MODEL}", predict, **options)
        assert error_of(answer) == (415, "UnsupportedMediaType")


def test_what_reaches_the_handler_is_no_more_than_the_request(door: Door) -> None:
    """Neither headers that TorchServe takes for orders, nor a query that it would add to the fields."""
    headers = {"explain": "True", "describe": "True"}
    answer = door.ask(
        "POST", f"/predictions/{MODEL}?describe=True&data=x", door.tokens["predict"], json=BODY, headers=headers
    )
    assert answer.status_code == 200, answer.text
    assert answer.json() == door.predict().json()


def test_request_ids(door: Door) -> None:
    headers = {"X-Request-Id": "mine-1"}
    answer = door.ask("POST", f"/predictions/{MODEL}", door.tokens["predict"], json=BODY, headers=headers)
    assert answer.headers["X-Request-Id"] == "mine-1"
    answer = door.ask("POST", f"/predictions/{MODEL}", headers={"X-Request-Id": 'no"id'}, json=BODY)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])


def test_marble_client_through_the_door(door: Door) -> None:
    environment = {
        "REQUESTS_CA_BUNDLE": str(door.certificate),
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(door.certificate),
        "MARBLE_TOKEN": door.tokens["predict"],
    }
    addresses = ("--url", f"https://localhost:{door.rest}", "--grpc-target", f"https://localhost:{door.grpc}")
    command = (sys.executable, "-c", "import sys; from marble_client.cli import main; sys.exit(main())")
    answers = [
        json.loads(succeeded(run(*command, "predict", MODEL, "good", *addresses, *over, **environment)))
        for over in ([], ["--grpc"])
    ]
    assert answers[0] == answers[1]
    assert {entry["label"] for entry in answers[0]} == {"negative", "positive"}


# --- What is malformed, too slow, too large, too much ----------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"POST /predictions/small HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"POST /predictions/small HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"POST /predictions/small HTTP/1.1\r\nHost: x\r\nContent-Length: +4\r\n",
        b"POST /predictions/small HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n",
        b"POST /predictions/small HTTP/1.1\r\n",
        b"POST /predictions/small HTTP/1.1\r\nHost: x\r\nHost: y\r\n",
        b"POST /predictions/sm\x00all HTTP/1.1\r\nHost: x\r\n",
        b"NO\x01 / HTTP/1.1\r\nHost: x\r\n",
        b"nonsense\r\n",
    ],
)
def test_a_malformed_request_is_refused(door: Door, head: bytes) -> None:
    with door.connect() as connection:
        authorization = f"Authorization: Bearer {door.tokens['predict']}\r\n".encode()
        connection.sendall(head + authorization + b"\r\n0\r\n\r\nGET /live HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = receive(connection)
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    assert answer.count(b"HTTP/1.1 ") == 1, "what followed was not taken for a request"
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "UnreadableRequest"


@pytest.mark.parametrize(
    ("line", "status"),
    [("GET /" + "x" * 9000 + " HTTP/1.1", 414), ("GET /live HTTP/9.9", 505), ("GET /%zz HTTP/1.1", 400)],
)
def test_a_first_line_that_is_refused(door: Door, line: str, status: int) -> None:
    with door.connect() as connection:
        connection.sendall(f"{line}\r\nHost: x\r\n\r\n".encode())
        answer = receive(connection)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == status


@pytest.mark.parametrize("coding", ["identity", "gzip, chunked", "xchunked"])
def test_a_transfer_encoding_that_is_not_known(door: Door, coding: str) -> None:
    headers = {"Transfer-Encoding": coding}
    answer = door.ask("POST", f"/predictions/{MODEL}", door.tokens["predict"], headers=headers, data=b"x")
    assert error_of(answer) == (501, "NotImplemented")


def test_headers_that_are_too_large(door: Door) -> None:
    answer = door.ask("POST", f"/predictions/{MODEL}", door.tokens["predict"], headers={"x": "y" * 9000}, json=BODY)
    assert error_of(answer) == (431, "HeadersTooLarge")


@pytest.mark.parametrize("sent", ["half a header", "half a body"])
def test_a_slow_client_is_closed(door: Door, sent: str) -> None:
    head = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {door.tokens['predict']}\r\n"
    rest = "Content-Le" if sent == "half a header" else 'Content-Length: 100\r\n\r\n{"inputs": '
    with door.connect() as connection:
        connection.sendall((head + rest).encode())
        assert b"HTTP/1.1 200" not in receive(connection)  # returns, so it was closed


@pytest.mark.parametrize("how", ["declared", "chunked"])
def test_a_body_that_is_too_large(door: Door, how: str) -> None:
    head = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {door.tokens['predict']}\r\n"
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    with door.connect() as connection:
        if how == "declared":
            connection.sendall(f"{head}Content-Length: 1000000000\r\n\r\n".encode())
        else:
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + 30 * chunk)
        answer = receive(connection)
    assert answer.startswith(b"HTTP/1.1 413 "), answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "TooLarge"


def test_a_grpc_message_that_is_too_large(door: Door) -> None:
    message = inference_pb2.PredictionsRequest(model_name=MODEL, input={"data": b"x" * 200_000}).SerializeToString()
    assert door.call(PREDICTIONS, message, door.tokens["predict"])[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_client_that_asks_too_often(door: Door) -> None:
    with requests.Session() as session:
        session.trust_env, session.verify = False, str(door.certificate)
        session.headers["Authorization"] = f"Bearer {door.tokens['fast']}"
        answers = [session.get(f"https://localhost:{door.rest}/metrics", timeout=60) for _ in range(300)]
    refused = [answer for answer in answers if not answer.ok]
    assert answers[0].ok
    assert error_of(refused[0]) == (429, "RateLimited")
    assert refused[0].headers["Retry-After"] == "1"
    assert door.predict().ok, "another client is not hurt"


def fill(door: Door, pool: concurrent.futures.Executor) -> list["concurrent.futures.Future[requests.Response]"]:
    """Has the client's four places taken by requests to a stopped worker: a fifth has been refused."""
    asked = [pool.submit(door.predict) for _ in range(5)]
    done, waiting = concurrent.futures.wait(asked, 60, concurrent.futures.FIRST_COMPLETED)
    assert [error_of(entry.result()) for entry in done] == [(429, "RateLimited")]
    return list(waiting)


def test_a_client_that_asks_too_much_at_a_time(door: Door) -> None:
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        with door.stopped_worker():
            waiting = fill(door, pool)
            code, _ = door.call(PREDICTIONS, grpc_messages()[PREDICTIONS], door.tokens["predict"])
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert [entry.result().status_code for entry in waiting] == [200] * 4


def test_a_client_that_hangs_up_keeps_its_places(door: Door) -> None:
    """TorchServe goes on with what it was asked; else hanging up would be a way around the limit."""
    content = json.dumps(BODY)
    head = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {door.tokens['predict']}\r\n"
    request = f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode()
    with door.stopped_worker():
        connections = [door.connect() for _ in range(5)]
        for connection in connections:
            connection.sendall(request)
        [refused], _, _ = select.select(connections, [], [], 60)
        assert refused.recv(12) == b"HTTP/1.1 429"
        for connection in connections:
            connection.close()
        assert error_of(door.predict()) == (429, "RateLimited")
    door.wait_until(lambda: door.predict().ok)


# --- Tokens ----------------------------------------------------------------------------------------------------------


def test_tokens_come_and_go_while_requests_do(door: Door) -> None:
    over = threading.Event()
    asker = succeeded(token_command(door.folder, "add", "asker", "--role", "predict")).strip()

    def keep_asking() -> list[int]:
        with requests.Session() as session:
            session.trust_env, session.verify = False, str(door.certificate)
            session.headers["Authorization"] = f"Bearer {asker}"
            url = f"https://localhost:{door.rest}/predictions/{MODEL}"
            statuses = []
            while not over.wait(0.05) and len(statuses) < 95:
                statuses.append(session.post(url, json=BODY, timeout=60).status_code)
            return statuses

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking) for _ in range(2)]
        secret = succeeded(token_command(door.folder, "add", "guest", "--role", "predict", "--expires-days", 1)).strip()
        assert door.predict(secret).ok
        assert re.search(r"^guest +predict +\S+ +\d{4}-", succeeded(token_command(door.folder, "list")), re.MULTILINE)
        succeeded(token_command(door.folder, "revoke", "guest"))
        assert error_of(door.predict(secret)) == (401, "Unauthorized")
        over.set()
        statuses = [status for entry in asking for status in entry.result()]
    assert len(statuses) > 2
    assert set(statuses) == {200}


def test_no_token_is_written_down(door: Door) -> None:
    """Neither with the door's own files nor in its configuration or a log."""
    folders = [door.folder, Path(str(door.state("front")["folder"]))]
    contents = [path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(contents) > 10
    secrets = [secret[24:].encode() for secret in door.tokens.values()]
    assert [secret for secret in secrets for content in contents if secret in content] == []
    assert (door.folder / "front" / "tokens.json").stat().st_mode & 0o077 == 0


def test_the_log_has_who_asked_and_no_text(door: Door) -> None:
    door.ask("POST", f"/predictions/{MODEL}?secret=planted", door.tokens["predict"], json={"inputs": "a planted text"})
    path, headers = f"/predictions/{MODEL}?secret=planted", {"Referer": "https://planted.example"}
    assert door.ask("POST", path, door.tokens["predict"], headers=headers, data=b"x" * 200_000).status_code == 413
    log = door.folder / "logs" / "front_access.log"
    door.wait_until(lambda: '"client":"predict"' in log.read_text() and '"status":413' in log.read_text())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {"status", "path", "request", "seconds"} <= lines[0].keys()
    assert "planted" not in log.read_text() + (door.folder / "logs" / "front_error.log").read_text()


def test_a_large_log_begins_anew_and_connections_stay(door: Door) -> None:
    log = door.folder / "logs" / "front_access.log"
    old = log.with_name("front_access.log.1")
    with door.connect() as connection:
        ask = b"GET /live HTTP/1.1\r\nHost: x\r\nX-Request-Id: %s\r\n\r\n"
        connection.sendall(ask % b"before-it")
        assert answered(connection) == 200
        door.wait_until(lambda: "before-it" in log.read_text())
        with log.open("ab") as file:
            file.write(b"\n" * 20_000_000)
        door.wait_until(old.exists)
        connection.sendall(ask % b"after-it")
        assert answered(connection) == 200
    door.wait_until(lambda: "after-it" in log.read_text())
    assert "before-it" in old.read_text()
    assert log.stat().st_size < 100_000
    assert b"\0" not in log.read_bytes()
    old.unlink()


# --- Health ----------------------------------------------------------------------------------------------------------


def test_live_and_ready_need_no_token(door: Door) -> None:
    assert door.ask("GET", "/live").json() == {"live": True}
    assert door.ask("GET", "/ready").json() == {"ready": True}
    report = door.status()
    assert report["restarts"] == 0
    assert str(report["certificate_ends"]) > time.strftime("%Y")
    assert len(door.workers()) == 1


def test_nothing_but_the_door_listens_beyond_loopback(door: Door) -> None:
    found = {}
    for pid in (door.state()["pid"], door.state("front")["nginx"]):
        for connection in psutil.Process(pid).net_connections():  # type: ignore[arg-type]
            if connection.status == psutil.CONN_LISTEN:
                found[connection.laddr.port] = connection.laddr.ip.removeprefix("::ffff:")
    assert found == dict.fromkeys((*door.inner, door.rest, door.grpc), "127.0.0.1")


def test_a_worker_that_has_stopped_is_noticed_and_replaced(door: Door) -> None:
    [worker] = door.workers()
    os.kill(worker, signal.SIGSTOP)
    door.wait_until(lambda: not door.ready())
    door.wait_until(door.ready)
    assert door.workers() != [worker]
    assert door.predict().ok
    log = (door.folder / "logs" / "watchdog.log").read_text()
    assert f"worker {worker} of '{MODEL}' is READY, has answered nothing and computed nothing for 4 s" in log
    assert door.status()["workers_ended"] == 1


def test_torchserve_is_started_anew(door: Door) -> None:
    """Meanwhile the door says that it is not there; a client with the same token goes on afterwards."""
    killed = int(str(door.state()["pid"]))
    os.kill(killed, signal.SIGKILL)
    statuses = set()

    def recovered() -> bool:
        answer = door.predict(door.tokens["admin"])
        statuses.add(answer.status_code)
        return answer.ok and door.ready()

    door.wait_until(lambda: not door.ready())
    door.wait_until(recovered)
    assert statuses == {200, 503}
    assert door.state()["pid"] != killed
    log = (door.folder / "logs" / "watchdog.log").read_text()
    assert f"TorchServe (process {killed}) has ended by itself" in log
    assert door.status()["restarts"] == 1


def test_shutting_down_loses_no_request(door: Door) -> None:
    """And leaves nothing behind, the tokens and the certificate excepted."""
    state = door.state("front")
    processes = [psutil.Process(state[name]) for name in ("supervisor", "nginx")]  # type: ignore[arg-type]
    processes += [psutil.Process(door.state()["pid"])]  # type: ignore[arg-type]
    processes += [child for process in processes for child in process.children(recursive=True)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        with door.stopped_worker():
            waiting = fill(door, pool)
            stopping = pool.submit(stop, door.folder)
            door.wait_until(lambda: not listens(door.rest))
        assert [entry.result().status_code for entry in waiting] == [200] * 4
        assert succeeded(stopping.result()) == f"stopped process {state['supervisor']}\n"
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    assert not Path(str(state["folder"])).exists()
    assert list((door.folder / "run").iterdir()) == []
    assert sorted(p.name for p in (door.folder / "front").iterdir() if p.suffix != ".lock") == [
        "self-signed.key",
        "self-signed.pem",
        "tokens.json",
    ]


def test_the_same_tokens_after_a_restart_and_what_is_killed(door: Door, tiny_store: Path) -> None:
    """nginx is started anew by its supervisor; scripts/stop cleans up after a supervisor that was killed."""
    config, settings = door.folder / "config.properties", door.folder / "f.properties"
    succeeded(serve(door.folder, tiny_store, config, "--front", settings))
    assert door.predict().ok
    assert error_of(door.predict(door.tokens["expired"])) == (401, "Unauthorized")
    assert "is running already" in serve(door.folder, tiny_store, config, "--front", settings).stderr

    killed = door.state("front")["nginx"]
    os.kill(killed, signal.SIGKILL)  # type: ignore[arg-type]
    door.wait_until(lambda: door.state("front")["nginx"] != killed)
    assert door.predict().ok

    state = door.state("front")
    os.kill(state["supervisor"], signal.SIGKILL)  # type: ignore[arg-type]
    assert error_of(door.ask("GET", "/ready"))[0] == 503
    assert "whose supervisor was gone" in succeeded(stop(door.folder))
    assert list((door.folder / "run").iterdir()) == []
    assert not any(map(listens, (door.rest, door.grpc, *door.inner)))


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


# --- Without a server ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cert", "a.pem"], "--cert and --key go together"),
        (["--cert", "a.pem", "--key", "b.pem"], "--cert a.pem: there is no such file"),
        (["--cert", "text.pem", "--key", "text.pem"], "are no pair of PEM certificate and unencrypted key"),
    ],
)
def test_certificates_that_are_none(tmp_path: Path, tiny_store: Path, options: list[str], words: str) -> None:
    (tmp_path / "text.pem").write_text("no certificate\n")
    config, _ = write_config(tmp_path)
    rest, grpc_port = free_ports(2)
    settings = write_settings(tmp_path / "f", rest=f"127.0.0.1:{rest}", grpc=f"127.0.0.1:{grpc_port}")
    done = serve(tmp_path, tiny_store, config, "--front", settings, *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_where_a_folder_belongs(tmp_path: Path, tiny_store: Path) -> None:
    (tmp_path / "front").touch()
    config, _ = write_config(tmp_path)
    rest, grpc_port = free_ports(2)
    settings = write_settings(tmp_path / "f", rest=f"127.0.0.1:{rest}", grpc=f"127.0.0.1:{grpc_port}")
    done = serve(tmp_path, tiny_store, config, "--front", settings)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "scripts/serve: [Errno 17] File exists: 'front'\n")


def test_a_given_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = Certificate.self_signed()
    assert Certificate.self_signed() == made, "it is kept"
    assert made.ends() > time.time() + 80 * 86400
    assert Certificate.given(made.certificate, made.key) == made
    shutil.move(made.key, "first.key")
    Certificate.self_signed()
    with pytest.raises(ServerError, match="are no pair"):
        Certificate.given(made.certificate, Path("first.key"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("client_rate=fast\n", "client_rate=fast: give a number above 0"),
        ("client_rate=0\n", "client_rate=0: give a number above 0"),
        ("rest=8443\n", "rest=8443: write ADDRESS:PORT"),
        ("colour=red\n", "missing or unknown: colour"),
    ],
)
def test_settings_that_are_none(tmp_path: Path, changes: str, words: str) -> None:
    path = tmp_path / "f.properties"
    path.write_text((ROOT / "front.properties").read_text() + changes)
    with pytest.raises(ServerError, match=re.escape(words)):
        Settings.read(path)


def test_the_token_command_says_what_is_wrong(tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        done = token_command(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr

    path = tmp_path / tokens.FILE
    tokens.add("a", ["predict"], None, path)
    assert "there is a token for 'a' already" in refused("add", "a", "--role", "predict")
    assert "there is no token for 'b'" in refused("revoke", "b")
    assert "is no name for a client" in refused("add", 'x"; }', "--role", "predict")
    path.write_text("[{")
    assert "is damaged" in refused("list")


TIMING = Timing(every=2, within=5, silent=10, stuck=90)


def judged(*steps: tuple[float, float, str | None], managed: bool = True, wrong: bool = False) -> list[object]:
    """What the watchdog does after checks of a worker: (seconds, its CPU seconds, fault)."""
    history = History(0)
    actions: list[object] = []
    for at, cpu_seconds, fault in steps:
        actions += judge(Check("m", [7], fault, at, managed, wrong), history, TIMING, {7: cpu_seconds})
    return actions


def test_a_busy_worker_is_left_alone_until_it_is_stuck() -> None:
    """Requests before the canary take their time."""
    busy = [(float(at), at * 0.9, "no answer") for at in range(0, 88, 2)]
    assert judged(*busy) == []
    [action] = judged(*busy, (91, 81, "no answer"))
    assert isinstance(action, End)
    assert "worker 7 of 'm' has answered nothing for 91 s" in action.seen


def test_an_idle_worker_that_answers_nothing_is_ended() -> None:
    well = [(float(at), 5 + at / 1000, None) for at in range(0, 60, 2)]
    assert judged(*well) == [], "it idles because nobody asks"
    [action] = judged(*well, *((float(at), 5.06, "no answer") for at in range(60, 70, 2)))
    assert action == End(7, "worker 7 of 'm' is READY, has answered nothing and computed nothing for 10 s (no answer)")


def test_wrong_answers_end_a_worker_and_then_the_server() -> None:
    wrong = [(float(at), 0.5 * at, "drifts") for at in range(2, 26, 2)]
    actions = judged(*wrong, wrong=True)
    assert [type(action) for action in actions] == [End, End, End, Restart, Restart, Restart]


def test_a_frontend_that_does_not_answer_is_started_anew() -> None:
    [action] = judged(*((float(at), 0, "silence") for at in range(0, 11, 2)), managed=False)
    assert action == Restart("TorchServe's management has not answered for 10 s")
