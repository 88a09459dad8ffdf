"""The TorchServe side: real contexts, real encoding of answers; every row has its own status and hurts no other.

Also what happens before the first request: digests, the golden set, and saying why a model did not load.
"""

import ast
import json
import logging
import socket
import struct
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from test_formats import JSON, Sent, form, grpc, grpc_tensors, received, rest, tensor
from ts.context import Context
from ts.protocol import otf_message_handler
from ts.protocol.otf_message_handler import create_predict_response

from handler import digests, entry, formats
from handler import service as service_module
from handler.entry import LOAD_FAILED, Entry
from handler.messages import Request, Result
from handler.service import Service

TEXT = "The room was cold, the staff were warm: I would come back."
GOOD = rest({"inputs": TEXT}, JSON)
# max_response_size of config.properties: TorchServe ends a worker whose answer is larger.
MAX_RESPONSE = 6_553_500


# --- TorchServe, as far as a worker sees it


def context(model_dir: Path, name: str = "reviews") -> Context:
    """What TorchServe hands to `initialize`."""
    return Context(name, str(model_dir), {"model": {"modelVersion": "1.0"}}, 64, None, "0.12.0")


@dataclass(frozen=True)
class Answer:
    """One answer as the frontend reads it."""

    status: int
    content_type: str
    headers: dict[str, str]
    body: Any


class Wire:
    """Reads the message that TorchServe's worker sends to its frontend."""

    def __init__(self, message: bytes) -> None:
        self._message, self._position = message, 0

    def number(self) -> int:
        [value] = struct.unpack_from("!i", self._message, self._position)
        self._position += 4
        return int(value)

    def text(self) -> bytes:
        length = self.number()
        start, self._position = self._position, self._position + length
        return bytes(self._message[start : self._position])


def answers(message: bytes, count: int) -> Iterator[Answer]:
    """The answers in a message of TorchServe's worker."""
    wire = Wire(message)
    assert wire.number() == 200
    wire.text()
    for index in range(count):
        assert wire.text() == f"request-{index}".encode()
        content_type, status, phrase = wire.text().decode("ascii"), wire.number(), wire.text()
        assert phrase == b""
        headers = {}
        for _ in range(wire.number()):
            name = wire.text().decode("ascii")
            headers[name] = wire.text().decode("ascii")
        for name, value in headers.items():
            assert (name + value).isprintable()
        body = wire.text()
        assert len(body) < MAX_RESPONSE
        yield Answer(status, content_type, headers, json.loads(body.decode("ascii")))
    assert wire.number() == -1


def serve(service: Service | Entry, context: Context, *requests: Sent) -> list[Answer]:
    """Puts one batch through a service, as `ts.service.Service.predict` does."""
    processors, rows = received(*requests)
    context.request_processor = processors
    bodies = service.handle(rows, context)
    assert len(bodies) == len(requests)
    for processor in processors:
        assert all(type(value) is str for pair in processor.get_response_headers().items() for value in pair)
    ids = {index: f"request-{index}" for index in range(len(requests))}
    return list(answers(create_predict_response(bodies, ids, "Prediction success", 200, context), len(requests)))


@pytest.fixture(autouse=True)
def no_filters(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leaves the log handlers as they were: a worker has its own, here they are pytest's."""
    handlers = logging.getLogger().handlers
    before = [list(handler.filters) for handler in handlers]
    yield
    for handler, filters in zip(handlers, before, strict=False):
        handler.filters[:] = filters


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> Service:
    return Service(context(bundle))


@pytest.fixture
def service(loaded: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    """A service whose engine a test may change."""
    monkeypatch.setattr(loaded, "_engine", loaded._engine)
    return loaded


@pytest.fixture
def batch(service: Service, bundle: Path) -> Any:
    """Serves one batch of requests."""
    return lambda *requests: serve(service, context(bundle), *requests)


def scores(labels: Sequence[Any]) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in labels}


# --- statuses, headers, neighbours


def test_a_good_answer(batch: Any, bundle: Path) -> None:
    [answer] = batch(GOOD)
    assert (answer.status, answer.content_type) == (200, "application/json")
    assert [sorted(entry) for entry in answer.body[0]] == [["label", "score"]] * 3
    assert answer.headers == {
        "content-type": "application/json",
        "x-model-name": "reviews",
        "x-model-version": "1.0",
        "x-model-digest": digests.sha256(bundle / "model.safetensors"),
        "x-usage-tokens": "17",
        "x-usage-truncated": "false",
        "x-usage-windows": "1",
    }


def test_details_are_the_facts_of_the_headers(batch: Any, bundle: Path) -> None:
    [answer] = batch(rest({"inputs": [TEXT, "good " * 300], "parameters": {"details": True}}, JSON))
    assert answer.body["usage"] == {"tokens": 319, "truncated": True, "windows": 2}
    digest = digests.sha256(bundle / "model.safetensors")
    assert answer.body["model"] == {
        "name": "reviews",
        "version": "1.0",
        "digest": digest,
        "task": "text-classification",
    }
    assert len(answer.body["predictions"]) == 2
    usage = {name: value for name, value in answer.headers.items() if name.startswith("x-usage")}
    assert usage == {"x-usage-tokens": "319", "x-usage-truncated": "true", "x-usage-windows": "2"}


# Requests that fail, each with its status; "\ud800" is half of a surrogate pair, escaped in the JSON.
BAD: dict[str, tuple[Sent, int, str]] = {
    "no body": (rest(b""), 400, "UnreadableRequest"),
    "broken json": (rest(b"{", JSON), 400, "UnreadableRequest"),
    "deep json": (rest(b"[" * 100_000, JSON), 400, "UnreadableRequest"),
    "not utf-8": (rest(b"\xff"), 400, "UnreadableRequest"),
    "lone surrogate": (rest({"inputs": "\ud800"}, JSON), 400, "UnreadableRequest"),
    "too long": (rest({"inputs": "good " * 300, "parameters": {"overflow": "error"}}, JSON), 413, "TooLarge"),
    "too many": (rest({"inputs": ["a"] * 1025}, JSON), 413, "TooLarge"),
    "too many characters": (rest({"inputs": "a" * 1_000_001}, JSON), 413, "TooLarge"),
    "image": (rest(b"\x89PNG", "image/png"), 415, "UnsupportedMediaType"),
    "web form": (form("application/x-www-form-urlencoded", a=("", b"b")), 415, "UnsupportedMediaType"),
    "no inputs": (rest({"inputs": []}, JSON), 422, "InvalidInput"),
    "number": (rest({"inputs": 7}, JSON), 422, "InvalidInput"),
    "null": (rest(b"null", JSON), 422, "InvalidInput"),
    "only bad inputs": (rest({"inputs": [7, None]}, JSON), 422, "InvalidInput"),
    "unknown parameter": (rest({"inputs": "a", "parameters": {"top_p": 1}}, JSON), 422, "InvalidParameter"),
    "hostile parameter": (rest({"inputs": "a", "parameters": {"\r\n\ud800": 1}}, JSON), 422, "InvalidParameter"),
    "nested parameter": (
        rest(b'{"inputs": "a", "parameters": {"top_k": ' + b"[" * 900 + b"]" * 900 + b"}}", JSON),
        422,
        "InvalidParameter",
    ),
    "kserve v1": (rest({"instances": "a"}, JSON), 422, "InvalidInput"),
    "open inference": (rest({"inputs": [tensor("a", shape=[3])]}, JSON), 422, "InvalidInput"),
    "open inference, one bad text": (rest({"inputs": [tensor("a", 7)]}, JSON), 422, "InvalidInput"),
    "open inference, header": (rest(b"{}", Inference_Header_Content_Length="9" * 5000), 400, "UnreadableRequest"),
    "open inference, unknown output": (
        rest({"inputs": [tensor("a")], "outputs": [{"name": "logits"}]}, JSON),
        422,
        "InvalidInput",
    ),
    "explanation": (
        Sent(rest({"inputs": "a", "parameters": {"steps": 0}}, JSON).parts, {**GOOD.headers, "explain": "True"}),
        422,
        "InvalidParameter",
    ),
}


@pytest.mark.parametrize(("sent", "status", "kind"), BAD.values(), ids=BAD)
def test_a_bad_request_has_its_own_status(batch: Any, sent: Sent, status: int, kind: str) -> None:
    [answer] = batch(sent)
    assert (answer.status, answer.body["code"], answer.body["type"]) == (status, status, kind)
    assert sorted(answer.body) == ["code", "error", "type"]
    assert answer.body["error"].isprintable()
    assert answer.headers["x-model-name"] == "reviews"
    assert not any(name.startswith("x-usage") for name in answer.headers)


def test_bad_rows_do_not_hurt_good_ones(batch: Any) -> None:
    texts = [f"{TEXT} {'Nice. ' * number}" for number in range(len(BAD))]
    alone = [scores(batch(rest({"inputs": text}, JSON))[0].body[0]) for text in texts[:4]]
    mixed = [sent for text, (bad, *_) in zip(texts, BAD.values(), strict=True) for sent in (rest(text.encode()), bad)]
    found = batch(*mixed)
    assert [answer.status for answer in found] == [status for _, code, _ in BAD.values() for status in (200, code)]
    for answer, expected in zip(found[::2], alone, strict=False):
        assert scores(answer.body[0]) == pytest.approx(expected, abs=1e-5)


def test_one_bad_text_of_a_list_is_an_error_in_its_place(batch: Any) -> None:
    [answer] = batch(rest({"inputs": [TEXT, "\ud800", 7]}, JSON))
    assert answer.status == 200
    assert [type(entry) for entry in answer.body] == [list, dict, dict]
    assert [entry["code"] for entry in answer.body[1:]] == [400, 422]


def test_an_empty_batch(batch: Any) -> None:
    assert batch() == []


def test_headers_a_client_sends_do_not_matter(batch: Any) -> None:
    odd = {"body": "text/plain", "describe": "True", "content-type": "x", "ts_stream_next": "true", "X-A": "é"}
    [answer] = batch(Sent(GOOD.parts, {**odd, **GOOD.headers}))
    assert answer.status == 200


# --- gRPC


def test_only_grpc_rows_say_that_no_more_answers_follow(batch: Any) -> None:
    found = batch(GOOD, grpc(data=TEXT.encode()), grpc(data=b""), grpc_tensors(TEXT.encode()), rest(b""))
    assert [answer.headers.get("ts_stream_next") for answer in found] == [None, "false", "false", "false", None]


LONG_ID = "é" * 1_000_000
OVER_GRPC: dict[str, tuple[Sent, int]] = {
    "good": (grpc_tensors(TEXT.encode()), 200),
    "no tensor": (grpc_tensors(inputs=[]), 422),
    "no texts": (grpc_tensors(), 422),
    "two tensors": (grpc_tensors(inputs=[tensor("a"), tensor("b")]), 422),
    "wrong datatype": (grpc_tensors(inputs=[tensor(1.0, datatype="FP32")]), 422),
    "no data": (grpc_tensors(inputs=[{"name": "t", "datatype": "x", "shape": [1]}]), 422),
    "not a text": (grpc_tensors(b"\xff"), 415),
    "one not a text": (grpc_tensors(b"a", b"\xff"), 415),
    "endless id": (grpc_tensors(TEXT.encode(), id=LONG_ID), 422),
    "endless id and no tensor": (grpc_tensors(id=LONG_ID, inputs=[]), 422),
    "too many texts": (grpc_tensors(*[b"a"] * 1025), 413),
}


@pytest.mark.parametrize(("sent", "status"), OVER_GRPC.values(), ids=OVER_GRPC)
def test_open_inference_over_grpc_always_has_every_field(batch: Any, sent: Sent, status: int) -> None:
    """TorchServe parses these answers and ends the worker where a field is missing."""
    [answer] = batch(sent)
    assert answer.status == status
    assert sorted(answer.body) == ["id", "model_name", "model_version", "outputs"]
    assert (answer.body["model_name"], answer.body["model_version"]) == ("reviews", "1.0")
    for output in answer.body["outputs"]:
        assert sorted(output) == ["data", "datatype", "name", "shape"]
    names = [output["name"] for output in answer.body["outputs"]]
    if status == 200:
        assert names == ["label", "score"]
        assert answer.body["id"] == "7"
    else:
        assert names == ["error"]
        assert json.loads(answer.body["outputs"][0]["data"][0])["code"] == status


def test_every_transport_gives_the_same_scores(batch: Any) -> None:
    by_rest, by_grpc, tensors = batch(GOOD, grpc(data=TEXT.encode()), grpc_tensors(TEXT.encode()))
    columns = {output["name"]: output["data"] for output in tensors.body["outputs"]}
    expected = pytest.approx(scores(by_rest.body[0]), abs=1e-6)
    assert scores(by_grpc.body[0]) == expected
    assert dict(zip(columns["label"], columns["score"], strict=True)) == expected


# --- too large an answer


@pytest.mark.parametrize(
    "sent",
    [
        rest({"inputs": ["a"] * 30}, JSON),
        rest({"inputs": [tensor(*["a"] * 30)]}, JSON),
        grpc_tensors(*[b"a"] * 30),
    ],
    ids=["hugging face", "open inference", "open inference over grpc"],
)
def test_too_large_an_answer_is_refused_alone(service: Service, bundle: Path, sent: Sent) -> None:
    engine = service._engine
    settings = engine.settings
    try:
        engine.settings = replace(settings, max_response_bytes=600)
        before, large, after = serve(service, context(bundle), GOOD, sent, GOOD)
    finally:
        engine.settings = settings
    assert (before.status, large.status, after.status) == (200, 413, 200)
    assert scores(before.body[0]) == pytest.approx(scores(after.body[0]), abs=1e-6)
    assert "x-usage-tokens" not in large.headers
    assert "send fewer inputs in one request" in json.dumps(large.body)


# --- defects of the server

SECRET = "the-patient-is-called-Poison"


class Poisoned:
    """An engine that fails on any batch that holds SECRET, with a message that quotes it."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.settings, self.calls = engine, engine.settings, 0

    def predict(self, requests: Sequence[Request]) -> Any:
        self.calls += 1
        if text := next((text for request in requests for text in request.inputs if SECRET in str(text)), None):
            raise ValueError(f"cannot handle {text}")
        return self._engine.predict(requests)


def test_a_request_on_which_the_engine_fails_fails_alone(
    service: Service, batch: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    [alone] = batch(GOOD)
    service._engine = Poisoned(service._engine)
    poison = rest({"inputs": f"{SECRET}\nand more"}, JSON)
    found = batch(GOOD, poison, rest(b""), grpc_tensors(SECRET.encode()), GOOD)
    assert [answer.status for answer in found] == [200, 500, 400, 500, 200]
    for good in (found[0], found[4]):
        assert scores(good.body[0]) == pytest.approx(scores(alone.body[0]), abs=1e-5)
    assert found[1].body == {
        "error": "the model failed on this request; the server's log has the cause",
        "code": 500,
        "type": "InternalError",
    }
    assert [output["name"] for output in found[3].body["outputs"]] == ["error"]
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    assert err.count("ValueError in a request") == 2
    assert "in predict" in err


def test_a_good_batch_is_predicted_in_one_go(service: Service, batch: Any) -> None:
    service._engine = poisoned = Poisoned(service._engine)
    assert {answer.status for answer in batch(GOOD, rest(b""), GOOD, GOOD)} == {200, 400}
    assert poisoned.calls == 1


def failing_on_secret(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, failing on a row that holds SECRET with a message that quotes it."""

    def failing(row: Any, *more: Any) -> Any:
        if SECRET in str(row):
            raise KeyError(SECRET)
        return function(row, *more)

    return failing


def test_a_row_on_which_decoding_fails_fails_alone(
    batch: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats, "decode", failing_on_secret(formats.decode))
    found = batch(GOOD, rest({"inputs": SECRET}, JSON), grpc_tensors(b"a", id=SECRET), GOOD)
    assert [answer.status for answer in found] == [200, 500, 500, 200]
    assert found[1].body["type"] == "InternalError"
    assert sorted(found[2].body) == ["id", "model_name", "model_version", "outputs"]
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    assert err.count("KeyError in a request") == 2


def test_a_row_whose_body_cannot_be_read_at_all_fails_alone(
    batch: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(formats.body, "read", failing_on_secret(formats.body.read))
    found = batch(GOOD, rest({"inputs": SECRET}, JSON), GOOD)
    assert [answer.status for answer in found] == [200, 500, 200]
    assert found[1].body["type"] == "InternalError"
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize("score", [float("nan"), float("inf"), object()], ids=["nan", "inf", "object"])
def test_an_answer_that_json_cannot_hold_fails_alone(
    service: Service, batch: Any, capfd: pytest.CaptureFixture[str], score: Any
) -> None:
    class Unsound(Poisoned):
        def predict(self, requests: Sequence[Request]) -> Any:
            return [
                Result([[{"label": SECRET, "score": score}]], result.usage) if request.inputs == [SECRET] else result
                for request, result in zip(requests, self._engine.predict(requests), strict=True)
            ]

    service._engine = Unsound(service._engine)
    found = batch(GOOD, rest({"inputs": SECRET}, JSON), GOOD)
    assert [answer.status for answer in found] == [200, 500, 200]
    assert found[1].body["error"] == "the answer could not be written; the server's log has the cause"
    assert SECRET not in "".join(capfd.readouterr())


def test_no_request_text_is_written_anywhere(
    batch: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    batch(rest({"inputs": SECRET}, JSON), rest(f"[{SECRET}".encode()), rest({"inputs": "a", SECRET: 1}, JSON))
    batch(rest({"inputs": SECRET + "\ud800"}, JSON), grpc(data=SECRET.encode()), rest(SECRET.encode(), "image/png"))
    assert SECRET not in "".join(capfd.readouterr())
    assert not [record for record in caplog.records if SECRET in record.getMessage()]


def test_what_a_worker_logs_for_each_batch_is_dropped() -> None:
    lines = []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())
    root = logging.getLogger()
    level = root.level
    root.addHandler(listener)
    try:
        root.setLevel(logging.DEBUG)
        service_module._trim_worker()
        logging.info("Backend received inference at: %d", 1)
        logging.info("[METRICS]PredictionTime")
        logging.warning("a warning")
        logging.error("an error")
    finally:
        root.setLevel(level)
        root.removeHandler(listener)
    assert lines == ["a warning", "an error"]


def test_a_batch_is_received_in_whatever_pieces_it_comes() -> None:
    """By TorchServe's own reader, over a real socket."""
    service_module._trim_worker()
    header, body = (b"Content-Type", b"text/plain"), (b"body", b"text/plain", b"x" * 300_000)

    def field(value: bytes) -> bytes:
        return struct.pack("!i", len(value)) + value

    end = struct.pack("!i", -1)
    request = field(b"request-0") + b"".join(map(field, header)) + end + b"".join(map(field, body)) + end
    message = b"I" + request * 2 + end
    here, there = socket.socketpair()
    with here, there:

        def send() -> None:
            for start in (0, 1, 7, 40, 70_000, 2 * len(request)):
                stop = {0: 1, 1: 7, 7: 40, 40: 70_000, 70_000: 2 * len(request)}.get(start, len(message))
                there.sendall(message[start:stop])
            there.sendall(message)  # the next batch, for which nothing of this one may be left over

        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(2):
            command, requests = otf_message_handler.retrieve_msg(here)
            assert command == b"I"
            assert [bytes(entry["requestId"]) for entry in requests] == [b"request-0"] * 2
            assert [len(entry["parameters"][0]["value"]) for entry in requests] == [len(body[2])] * 2
        sender.join()
        there.shutdown(socket.SHUT_WR)
        with pytest.raises(SystemExit):
            otf_message_handler.retrieve_msg(here)


# --- digests


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A folder of three files with their digests."""
    (tmp_path / "sub").mkdir()
    files = {"a.txt": b"a", "sub/b.bin": bytes(range(256)) * 5000, "empty": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "digests.json").write_text(digests.render({name: tmp_path / name for name in files}), encoding="utf-8")
    return tmp_path


def test_digests_are_those_of_the_files(sealed: Path) -> None:
    listing = json.loads((sealed / "digests.json").read_text(encoding="utf-8"))
    assert list(listing) == ["a.txt", "empty", "sub/b.bin"]
    assert listing["a.txt"] == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert listing["empty"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    digests.verify(sealed)


def test_digests_do_not_depend_on_the_order_of_files(sealed: Path) -> None:
    names = ["sub/b.bin", "empty", "a.txt"]
    again = digests.render({name: sealed / name for name in names})
    assert again == (sealed / "digests.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", [b"b", b"", b"a\n"])
def test_a_changed_file_is_named(sealed: Path, content: bytes) -> None:
    (sealed / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt does not have the digest in digests\.json"):
        digests.verify(sealed)


def test_a_single_bit_counts(sealed: Path) -> None:
    content = bytearray((sealed / "sub" / "b.bin").read_bytes())
    content[-1] ^= 1
    (sealed / "sub" / "b.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"sub/b\.bin does not have the digest"):
        digests.verify(sealed)


def test_a_missing_file_is_named(sealed: Path) -> None:
    (sealed / "empty").unlink()
    with pytest.raises(ValueError, match="empty is missing from the archive"):
        digests.verify(sealed)
    (sealed / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is missing from the archive"):
        digests.verify(sealed)


def test_the_models_digest_is_that_of_its_listing_or_its_weights(sealed: Path, bundle: Path) -> None:
    assert digests.model_digest(sealed) == digests.sha256(sealed / "digests.json")
    digests.verify(bundle)
    assert digests.model_digest(bundle) == digests.sha256(bundle / "model.safetensors")


# --- loading


@pytest.fixture
def archive(store: Path, tmp_path: Path) -> Path:
    """The OpenVINO archive, unpacked where a test may break it."""
    with zipfile.ZipFile(store / "reviews-fp32.mar") as file:
        file.extractall(tmp_path / "archive")
    return tmp_path / "archive"


def failure(model_dir: Path, capfd: pytest.CaptureFixture[str]) -> tuple[dict[str, str], str]:
    """What a worker says on stderr when it cannot load: the marked line, and the traceback before it."""
    with pytest.raises(Exception):  # noqa: B017, PT011 - which one, the caller sees in what it says
        Entry().initialize(context(model_dir, name="mine"))
    trace, marked = capfd.readouterr().err.rstrip("\n").rsplit("\n", 1)
    marker, _, facts = marked.partition(" ")
    assert marker == LOAD_FAILED == "MARBLE_LOAD_FAILED"
    said: dict[str, str] = json.loads(facts)
    assert sorted(said) == ["error", "model"]
    assert said["model"] == "mine"
    return said, trace


def test_an_archive_loads_and_answers(archive: Path, capfd: pytest.CaptureFixture[str]) -> None:
    worker = Entry()
    worker.initialize(context(archive))
    [answer, refused] = serve(worker, context(archive), GOOD, rest(b""))
    assert (answer.status, refused.status) == (200, 400)
    assert answer.headers["x-model-digest"] == digests.sha256(archive / "digests.json")
    assert LOAD_FAILED not in capfd.readouterr().err


def test_a_changed_archive_is_not_loaded(archive: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (archive / "openvino_model.bin").open("ab") as file:
        file.write(b"\0")
    said, trace = failure(archive, capfd)
    assert said["error"].startswith("ValueError: openvino_model.bin does not have the digest in digests.json")
    assert "in verify" in trace


def test_an_archive_that_lacks_a_file_is_not_loaded(archive: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (archive / "tokenizer.json").unlink()
    said, _ = failure(archive, capfd)
    assert said["error"].startswith("ValueError: tokenizer.json is missing from the archive")


def test_a_model_that_drifts_is_not_loaded(archive: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = archive / "golden.jsonl"
    first, *others = path.read_text(encoding="utf-8").split("\n")
    example = json.loads(first)
    example["predictions"][0]["score"] -= 0.2
    path.write_text("\n".join([json.dumps(example), *others]), encoding="utf-8")
    (archive / "digests.json").unlink()
    said, trace = failure(archive, capfd)
    assert said["error"].startswith(f"GoldenMismatch: golden example 1 of {len(others)} drifts by 0.2")
    assert "in replay" in trace


def test_a_model_without_a_golden_set_is_not_loaded(archive: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (archive / "golden.jsonl").unlink()
    (archive / "digests.json").unlink()
    assert failure(archive, capfd)[0]["error"].startswith("ValueError: golden.jsonl is missing")


def test_a_handler_that_cannot_be_imported_says_why(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "handler.service")
    monkeypatch.setitem(sys.modules, "handler.engine", None)
    said, trace = failure(bundle, capfd)
    assert said["error"] == "ModuleNotFoundError: import of handler.engine halted; None in sys.modules"
    assert "from handler.service import Service" in trace
    assert "from handler.engine import Engine" in trace


def test_a_missing_model_folder_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "model-config.yaml is missing" in failure(tmp_path, capfd)[0]["error"]


def test_the_entry_imports_nothing_that_may_be_missing() -> None:
    """TorchServe hides why an import at the top of it fails."""
    tree = ast.parse(Path(entry.__file__).read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in tree.body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported
    assert imported <= set(sys.stdlib_module_names)
