"""Wire formats: whatever way a text comes, it is read as the same text and answered alike; the rest is refused.

Requests pass through TorchServe's own code for reading them off the wire, so rows are what a worker really gets.
"""

import base64
import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ts.context import RequestProcessor
from ts.protocol.otf_message_handler import retrieve_msg
from ts.service import Service as TorchServeService

from handler import formats
from handler.engine import Engine
from handler.errors import (
    InvalidInput,
    InvalidParameter,
    RequestError,
    TooLarge,
    UnreadableRequest,
    UnsupportedMediaType,
    WrongAnswer,
)
from handler.formats import Reply
from handler.formats.canary import Canary
from handler.formats.hugging_face import HuggingFaceReply
from handler.formats.kserve_v1 import KServeV1Reply
from handler.formats.open_inference import OpenInferenceReply
from handler.messages import Model, Request, Result, Usage
from handler.tasks.text_classification import TextClassification

TEXT = "The room was cold, the staff were warm: I would come back. 多謝"
JSON = "application/json"
MODEL = Model("reviews", "1.0", "ab12", "text-classification", nests_single=True)


# --- requests as they reach a worker


@dataclass(frozen=True)
class Sent:
    """What TorchServe's frontend passes on: parts, each a content type and bytes, and headers."""

    parts: dict[str, tuple[str, bytes]]
    headers: dict[str, str]


def rest(body: Any, content_type: str = "", **headers: str) -> Sent:
    """A REST request; anything but bytes is sent as JSON. Underscores in header names stand for hyphens."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    declared = {"Content-Type": content_type} if content_type else {}
    media_type = content_type.partition(";")[0].strip()
    return Sent({"body": (media_type, data)}, {**declared, **named, "url_path": "", "explain": "False"})


def form(content_type: str, **parts: tuple[str, bytes]) -> Sent:
    """A web form sent over REST."""
    return Sent(parts, {"Content-Type": content_type, "explain": "False"})


def grpc(**fields: bytes) -> Sent:
    """TorchServe's own gRPC: fields without types and no headers."""
    return Sent({name: ("", value) for name, value in fields.items()}, {})


def grpc_tensors(*texts: bytes, **changes: Any) -> Sent:
    """Open Inference gRPC, which TorchServe turns into JSON with base64."""
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": [encoded(text) for text in texts]}
    body = {"id": "7", "model_name": "m", "inputs": [tensor], **changes}
    return Sent({"body": (JSON, json.dumps(body).encode())}, {})


def encoded(text: bytes) -> str:
    return base64.b64encode(text).decode()


def tensor(*data: Any, **changes: Any) -> dict[str, Any]:
    """An Open Inference input tensor."""
    return {"name": "text", "datatype": "BYTES", "shape": [len(data)], "data": list(data), **changes}


def binary(*texts: bytes, size: Any = None, raw: bytes | None = None, header: str | None = None, **more: Any) -> Sent:
    """Open Inference with Triton's binary tensor data; `size`, `raw` and `header` replace the right values."""
    content = b"".join(struct.pack("<I", len(text)) + text for text in texts) if raw is None else raw
    parameters = {"binary_data_size": len(content) if size is None else size}
    head = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "parameters": parameters}], **more}
    front = json.dumps(head).encode()
    length = str(len(front)) if header is None else header
    return rest(front + content, "application/octet-stream", Inference_Header_Content_Length=length)


def received(*requests: Sent) -> tuple[list[RequestProcessor], list[dict[str, Any]]]:
    """Header holders and rows of one batch, read by TorchServe's worker code."""
    wire = bytearray(b"I")
    end = struct.pack("!i", -1)

    def put(data: bytes) -> None:
        wire.extend(struct.pack("!i", len(data)) + data)

    for number, request in enumerate(requests):
        put(f"request-{number}".encode())
        for name, value in request.headers.items():
            put(name.encode())
            put(value.encode())
        wire.extend(end)
        for name, (content_type, body) in request.parts.items():
            put(name.encode())
            put(content_type.encode())
            put(body)
        wire.extend(end)
    wire.extend(end)
    _, batch = retrieve_msg(SimpleNamespace(recv=io.BytesIO(wire).read))
    processors, rows, _ = TorchServeService.retrieve_data_for_inference(batch)
    return processors, rows


CANARY = Canary(
    {"inputs": "a", "parameters": {"top_k": 1}, "predictions": [{"label": "x", "score": 0.75}]},
    TextClassification.drift,
    tolerance=0.01,
)


def decode(sent: Sent) -> tuple[Request, Reply]:
    [processor], [row] = received(sent)
    return formats.decode(row, processor.get_request_properties(), CANARY)


def refusal(sent: Sent) -> tuple[int, str]:
    """Status and message of the error that decoding `sent` must raise; the message is one ASCII line."""
    with pytest.raises(RequestError) as caught:
        decode(sent)
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 250
    return caught.value.code, message


def reply_to(sent: Sent) -> Reply:
    """How a request that cannot be read is replied to."""
    [processor], [row] = received(sent)
    return formats.reply_to_unreadable(row, processor.get_request_properties())


# --- one text, every way

TYPED = {"inputs": TEXT}
SINGLE = {
    "hugging face": rest(TYPED, JSON),
    "hugging face, no content type": rest(TYPED),
    "hugging face, charset": rest(TYPED, "application/json; charset=utf-8"),
    "hugging face, upper-case type": rest(TYPED, "Application/JSON"),
    "hugging face, +json type": rest(TYPED, "application/vnd.api+json"),
    "hugging face, as octets": rest(TYPED, "application/octet-stream"),
    "hugging face, indented": rest(b" \n" + json.dumps(TYPED, indent=2).encode()),
    "hugging face, options": rest({**TYPED, "options": {"wait_for_model": True}}, JSON),
    "hugging face, null parameters": rest({**TYPED, "parameters": None}, JSON),
    "hugging face, utf-8 unescaped": rest(json.dumps(TYPED, ensure_ascii=False).encode()),
    "hugging face, byte order mark": rest(b"\xef\xbb\xbf" + json.dumps(TYPED).encode(), JSON),
    "hugging face, byte order mark, no content type": rest(b"\xef\xbb\xbf" + json.dumps(TYPED).encode()),
    "json string": rest(TEXT, JSON),
    "json string, no content type": rest(TEXT),
    "plain text": rest(TEXT.encode(), "text/plain"),
    "plain text, charset": rest(TEXT.encode(), 'text/plain; charset="UTF-8"'),
    "plain text, other charset": rest(TEXT.encode("utf-16"), "text/plain; charset=utf-16"),
    "plain text, no content type": rest(TEXT.encode()),
    "plain text, as octets": rest(TEXT.encode(), "application/octet-stream"),
    "multipart": form("multipart/form-data; boundary=x", data=("text/plain", TEXT.encode())),
    "grpc, json": grpc(data=json.dumps(TYPED).encode()),
    "grpc, text": grpc(data=TEXT.encode()),
    "grpc, body": grpc(body=TEXT.encode()),
}
LISTS = {
    "hugging face, list": rest({"inputs": [TEXT]}, JSON),
    "json list": rest([TEXT], JSON),
    "json list, no content type": rest([TEXT]),
    "kserve v1": rest({"instances": [TEXT]}, JSON),
    "kserve v1, no content type": rest({"instances": [TEXT]}),
    "open inference": rest({"inputs": [tensor(TEXT)]}, JSON),
    "open inference, no content type": rest({"id": "7", "inputs": [tensor(TEXT)]}),
    "open inference, nested": rest({"inputs": [tensor([TEXT], shape=[1, 1])]}, JSON),
    "open inference, flat": rest({"inputs": [tensor(TEXT, shape=[1, 1])]}, JSON),
    "open inference, model name": rest({"model_name": "m", "inputs": [tensor(TEXT)]}, JSON),
    "open inference, protocol parameters": rest(
        {"inputs": [tensor(TEXT)], "parameters": {"binary_data_output": False}}, JSON
    ),
    "open inference, binary": binary(TEXT.encode()),
    "open inference, binary with header in lower case": Sent(
        binary(TEXT.encode()).parts,
        {name.lower(): value for name, value in binary(TEXT.encode()).headers.items()},
    ),
    "open inference over grpc": grpc_tensors(TEXT.encode()),
    "open inference json in a grpc field": grpc(data=json.dumps({"inputs": [tensor(TEXT)]}).encode()),
}


@pytest.mark.parametrize("sent", SINGLE.values(), ids=SINGLE)
def test_a_single_text_is_read(sent: Sent) -> None:
    request, reply = decode(sent)
    assert request == Request([TEXT], {}, many=False)
    assert reply == HuggingFaceReply(many=False)


@pytest.mark.parametrize("sent", LISTS.values(), ids=LISTS)
def test_a_list_of_one_is_read(sent: Sent) -> None:
    request, _ = decode(sent)
    assert request == Request([TEXT], {}, many=True)


@pytest.mark.parametrize(
    "sent",
    [
        rest({"inputs": ["a", "b"], "parameters": {"top_k": 1}}, JSON),
        rest({"instances": ["a", "b"], "parameters": {"top_k": 1}}, JSON),
        rest({"inputs": [tensor("a", "b")], "parameters": {"top_k": 1}}, JSON),
        rest({"inputs": [tensor(["a"], ["b"], shape=[2, 1])], "parameters": {"top_k": 1}}, JSON),
        binary(b"a", b"b", parameters={"top_k": 1, "binary_data_output": False}),
    ],
    ids=["hugging face", "kserve v1", "open inference", "open inference, nested", "open inference, binary"],
)
def test_lists_and_parameters_are_read(sent: Sent) -> None:
    assert decode(sent)[0] == Request(["a", "b"], {"top_k": 1}, many=True)


@pytest.mark.parametrize(
    "text",
    [
        "[NAME] is nice",
        "{smile} and be happy",
        "[1] a footnote",
        "[1, 2]",
        '"Great," they said, and left.',
        '"',
        "12",
        "null",
        "true",
        " ",
        "\x00",
        "a\x00b\r\n",
    ],
)
@pytest.mark.parametrize("send", [rest, lambda body: grpc(data=body)], ids=["rest", "grpc"])
def test_texts_that_look_a_little_like_json_are_texts(text: str, send: Any) -> None:
    assert decode(send(text.encode()))[0] == Request([text])


def test_text_declared_as_text_is_never_taken_for_json() -> None:
    text = json.dumps(TYPED)
    assert decode(rest(text.encode(), "text/plain"))[0] == Request([text])
    assert decode(rest(text.encode("utf-16"), "text/plain; charset=utf-16"))[0] == Request([text])


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return Engine(bundle)


def scores(answer: Any) -> dict[str, float]:
    """Scores by label of the one text in an answer of any format."""
    answer = json.loads(json.dumps(answer, allow_nan=False))
    if isinstance(answer, dict) and "outputs" in answer:
        columns = {output["name"]: output for output in answer["outputs"]}
        assert columns["label"]["datatype"] == "BYTES"
        assert columns["score"]["datatype"] == "FP32"
        assert columns["label"]["shape"] == columns["score"]["shape"] == [1, 3]
        return dict(zip(columns["label"]["data"], columns["score"]["data"], strict=True))
    [labels] = answer["predictions"] if isinstance(answer, dict) else answer
    return {entry["label"]: entry["score"] for entry in labels}


def test_every_format_gets_the_same_answer(engine: Engine) -> None:
    ways = {**SINGLE, **LISTS}
    decoded = {way: decode(sent) for way, sent in ways.items()}
    results = engine.predict([request for request, _ in decoded.values()])
    answers = {
        way: scores(reply.answer(result, MODEL))
        for (way, (_, reply)), result in zip(decoded.items(), results, strict=True)
    }
    [expected] = engine.predict([Request([TEXT])])
    right = {entry["label"]: entry["score"] for entry in expected.predictions[0]}
    assert set(right) == {"negative", "neutral", "positive"}
    for way, answer in answers.items():
        assert answer == pytest.approx(right, abs=1e-6), way


# --- what cannot be read

DEEP = b"[" * 100_000 + b"]" * 100_000
LONG_NUMBER = b'{"inputs": "a", "parameters": {"top_k": ' + b"9" * 5000 + b"}}"
UNREADABLE = {
    "no row": (Sent({}, {"explain": "False"}), 400, "the request has no body"),
    "no row, grpc": (grpc(), 400, "the request has no body"),
    "empty body": (rest(b""), 400, "the body is empty"),
    "empty json": (rest(b"", JSON), 400, "the body is empty"),
    "empty field, grpc": (grpc(data=b""), 400, "the body is empty"),
    "other field, grpc": (grpc(other=b"a"), 415, "the body came as a web form"),
    "web form": (form("application/x-www-form-urlencoded", text=("", b"a")), 415, "Content-Type: application/json"),
    "empty web form": (form("application/x-www-form-urlencoded"), 415, "Content-Type: application/json"),
    "broken json": (rest(b'{"inputs": "a"', JSON), 400, "not valid JSON: Expecting ',' delimiter at character 14"),
    "broken json, no type": (rest(b'{"inputs": "a"'), 400, "not valid JSON: Expecting ',' delimiter at character 14"),
    "broken json, grpc": (grpc(data=b'["a"'), 400, "not valid JSON"),
    "text as json": (rest(b"hello", JSON), 400, "not valid JSON: Expecting value at character 0"),
    "deep json": (rest(DEEP, JSON), 400, "nested too deeply"),
    "deep json, no type": (rest(DEEP), 400, "nested too deeply"),
    "deep json in an object": (rest(b'{"inputs": ' + DEEP + b"}", JSON), 400, "nested too deeply"),
    "long number": (rest(LONG_NUMBER, JSON), 400, "a number too long"),
    "long number, no type": (rest(LONG_NUMBER), 400, "a number too long"),
    "not utf-8": (rest(b"caf\xe9"), 400, "the text is not valid utf-8 at byte 3; send UTF-8"),
    "not utf-8, text": (rest(b"caf\xe9", "text/plain"), 400, "the text is not valid utf-8 at byte 3"),
    "not utf-8, charset": (rest(b"caf\xe9", "text/plain; charset=utf-8"), 400, "not valid utf-8 at byte 3"),
    "not utf-8, octets": (rest(b"\xff\xfe", "application/octet-stream"), 400, "not valid utf-8 at byte 0"),
    "not utf-8, json": (rest(b'{"inputs": "caf\xe9"}', JSON), 400, "not UTF-8"),
    "not utf-8, grpc": (grpc(data=b"caf\xe9"), 400, "not valid utf-8 at byte 3"),
    "not in its charset": (rest(b"caf\xe9", "text/plain; charset=ascii"), 400, "not valid ascii at byte 3"),
    "unknown charset": (rest(b"\xe9", "text/plain; charset=klingon"), 415, "charset of the content type is not known"),
    "endless charset": (rest(b"\xe9", f"text/plain; charset={'a' * 8000}"), 415, "charset"),
    "charset not of text": (rest(b"\xe9", "text/plain; charset=rot13"), 415, "charset"),
    "charset undefined": (rest(b"\xe9", "text/plain; charset=undefined"), 415, "charset"),
    "charset punycode": (rest(b"a-\xe9", "text/plain; charset=punycode"), 415, "charset"),
    "charset idna": (rest(b"\xe9", "text/plain; charset=idna"), 415, "charset"),
    "charset of python": (rest(b"\\xe9", "application/x; charset=unicode_escape"), 415, "charset"),
    "no inputs": (rest({}, JSON), 422, 'the body has no "inputs"'),
    "unknown field": (rest({"inputs": "a", "top_k": 1}, JSON), 422, "unknown field 'top_k'; the body takes: inputs"),
    "hostile field": (rest({"a\r\nb\ud800" + "x" * 999: 1}, JSON), 422, "unknown field 'a\\r\\nb\\ud800xxx"),
    "parameters list": (rest({"inputs": "a", "parameters": [1]}, JSON), 422, "parameters must be an object, not list"),
    "parameters text": (rest({"inputs": "a", "parameters": "{}"}, JSON), 422, "parameters must be an object, not str"),
    "instances text": (rest({"instances": "a"}, JSON), 422, "instances must be a list, not str"),
    "instances null": (rest({"instances": None}, JSON), 422, "instances must be a list, not NoneType"),
    "instances and inputs": (rest({"instances": ["a"], "inputs": "a"}, JSON), 422, "unknown field 'inputs'"),
}


@pytest.mark.parametrize(("sent", "code", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_refused(sent: Sent, code: int, message: str) -> None:
    found = refusal(sent)
    assert found[0] == code
    assert message in found[1]
    assert reply_to(sent).error(InvalidInput("x"), MODEL) == {"error": "x", "code": 422, "type": "InvalidInput"}


MEDIA = {
    "image": rest(b"\x89PNG\r\n", "image/png"),
    "audio": rest(b"RIFF", "Audio/WAV; rate=8000"),
    "image part": form("multipart/form-data", data=("image/jpeg", b"\xff\xd8")),
    "image, no content type": rest(b"\x89PNG\r\n\x1a\n"),
    "image, grpc": grpc(data=b"\xff\xd8\xff"),
    "tensor, not utf-8": binary(b"caf\xe9"),
    "tensor over grpc, not utf-8": grpc_tensors(b"\xff\xfe"),
}


@pytest.mark.parametrize("sent", MEDIA.values(), ids=MEDIA)
def test_a_text_model_refuses_images_and_sounds(sent: Sent, engine: Engine) -> None:
    [outcome] = engine.predict([decode(sent)[0]])
    assert isinstance(outcome, UnsupportedMediaType)
    assert outcome.code == 415
    assert "this model takes text" in str(outcome)


def test_a_declared_charset_is_followed() -> None:
    assert decode(rest(b"caf\xe9", "text/plain; charset=latin-1"))[0] == Request(["café"])
    assert decode(rest(b"caf\xe9", "text/plain; Charset='x'; CHARSET=\"ISO-8859-1\"; a=b"))[0] == Request(["café"])


# --- Open Inference

MALFORMED_TENSORS = {
    "two tensors": ([tensor("a"), tensor("b")], 422, "send one input tensor, not 2"),
    "second is none": ([tensor("a"), None], 422, "send one input tensor, not 2"),
    "wrong datatype": ([tensor(1.0, datatype="FP32")], 422, "must have the datatype BYTES"),
    "datatype of no kind": ([tensor("a", datatype=["BYTES"])], 422, "must have the datatype BYTES"),
    "shape too large": ([tensor("a", shape=[2])], 422, "the input tensor's shape [2] does not fit its 1 elements"),
    "shape too small": ([tensor("a", "b", shape=[1])], 422, "shape [1] does not fit its 2 elements"),
    "shape of nested": ([tensor(["a", "b"], ["c", "d"], shape=[2])], 422, "shape [2] does not fit its 4 elements"),
    "negative shape": ([tensor("a", shape=[-1])], 422, "a list of non-negative integers"),
    "shape of bools": ([tensor("a", shape=[True])], 422, "a list of non-negative integers"),
    "shape of floats": ([tensor("a", shape=[1.0])], 422, "a list of non-negative integers"),
    "shape no list": ([tensor("a", shape=1)], 422, "a list of non-negative integers"),
    "no shape": ([{"name": "text", "datatype": "BYTES", "data": ["a"]}], 422, "a list of non-negative integers"),
    "endless number in shape": ([tensor("a", shape=[10**4000])], 422, "does not fit its 1 elements"),
    "many dimensions": ([tensor("a", shape=[1] * 9)], 422, "has 9 dimensions; send at most 8"),
    "numbers beyond multiplying": ([tensor("a", shape=[10**4000] * 1000)], 422, "has 1000 dimensions"),
    "no data": ([{"name": "text", "datatype": "BYTES", "shape": [1]}], 422, "data must be a list, not NoneType"),
    "data no list": ([tensor(data="a", shape=[1])], 422, "data must be a list, not str"),
}


@pytest.mark.parametrize(("inputs", "code", "message"), MALFORMED_TENSORS.values(), ids=MALFORMED_TENSORS)
@pytest.mark.parametrize("over_grpc", [False, True], ids=["rest", "grpc"])
def test_malformed_tensors_are_refused(inputs: list[Any], code: int, message: str, over_grpc: bool) -> None:
    sent = grpc_tensors(inputs=inputs) if over_grpc else rest({"id": "7", "inputs": inputs}, JSON)
    found = refusal(sent)
    assert found[0] == code
    assert message in found[1]
    assert reply_to(sent) == OpenInferenceReply("7", over_grpc)


def test_tensor_elements_that_are_no_texts_are_left_to_the_task() -> None:
    assert decode(rest({"inputs": [tensor("a", 1, None, ["b"])]}, JSON))[0].inputs == ["a", 1, None, ["b"]]


def test_an_unknown_field_beside_tensors() -> None:
    assert "unknown field 'input'" in refusal(rest({"inputs": [tensor("a")], "input": 1}, JSON))[1]


@pytest.mark.parametrize("identifier", [7, ["7"], "x" * 1025], ids=["number", "list", "too long"])
def test_an_id_that_cannot_be_repeated_is_refused(identifier: Any) -> None:
    sent = rest({"id": identifier, "inputs": [tensor("a")]}, JSON)
    assert refusal(sent) == (422, "id must be a string of at most 1024 characters")
    assert reply_to(sent) == OpenInferenceReply("", grpc=False)


@pytest.mark.parametrize("identifier", [None, "", "x" * 1024], ids=["null", "empty", "longest"])
def test_an_id_is_repeated(identifier: str | None) -> None:
    assert decode(rest({"id": identifier, "inputs": [tensor("a")]}, JSON))[1] == OpenInferenceReply(
        identifier or "", grpc=False
    )


# Valid base64, so that reading it as such would not fail but give another text.
LIKE_BASE64 = "good"


def test_base64_is_read_only_from_torchserves_grpc() -> None:
    named = {"model_name": "reviews", "model_version": "1.0", "inputs": [tensor(LIKE_BASE64)]}
    request, reply = decode(rest(named, JSON))
    assert request.inputs == [LIKE_BASE64]
    assert reply == OpenInferenceReply("", grpc=False)
    assert decode(grpc_tensors(LIKE_BASE64.encode()))[0].inputs == [LIKE_BASE64]


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (["not base64"], 400, "not base64"),
        (["\u00e9"], 400, "not base64"),
        ([None], 400, "not base64"),
        ([1], 400, "not base64"),
    ],
)
def test_tensors_over_grpc_that_are_not_base64(data: list[Any], code: int, message: str) -> None:
    found = refusal(grpc_tensors(inputs=[tensor(*data)]))
    assert found[0] == code
    assert message in found[1]


@pytest.mark.parametrize(
    "sent",
    [grpc_tensors(inputs=[]), grpc_tensors(inputs=[tensor("a"), tensor("b")]), grpc_tensors(id="x" * 6_000_000)],
    ids=["no tensor", "two tensors", "endless id"],
)
def test_every_error_over_grpc_is_a_tensor_with_all_fields(sent: Sent) -> None:
    code, message = refusal(sent)
    answer = reply_to(sent).error(InvalidInput(message), MODEL)
    assert code == 422
    assert (answer["model_name"], answer["model_version"]) == ("reviews", "1.0")
    assert answer["id"] in ("", "7")
    [output] = answer["outputs"]
    [text] = output.pop("data")
    assert output == {"name": "error", "datatype": "BYTES", "shape": [1]}
    assert json.loads(text) == {"error": message, "code": 422, "type": "InvalidInput"}


def test_no_tensor_over_rest_is_an_empty_list() -> None:
    assert decode(rest({"inputs": []}, JSON)) == (Request([], {}, True), HuggingFaceReply(many=True))


BINARY = "the binary tensor data does not fit the JSON in front of it"
BROKEN_BINARY = {
    "truncated text": binary(b"abc", size=6, raw=b"\x03\x00\x00\x00ab"),
    "truncated length": binary(b"abc", size=2, raw=b"\x03\x00"),
    "truncated body": binary(b"abc", size=7, raw=b"\x03\x00\x00\x00ab"),
    "element beyond the body": binary(b"abc", raw=b"\xff\xff\xff\xffabc"),
    "negative size": binary(b"abc", size=-1, raw=b"\x03\x00\x00\x00abcd"),
    "negative size of nothing": binary(size=-1),
    "very negative size": binary(b"abc", size=-(10**30)),
    "huge size": binary(b"abc", size=10**30),
    "size of another type": binary(b"abc", size="7"),
    "size null in a list": binary(b"abc", size=[7]),
    "float size": binary(b"abc", size=7.0),
    "bytes left over": binary(b"abc", size=7, raw=b"\x03\x00\x00\x00abcdef"),
    "header beyond the body": binary(b"abc", header="999999999"),
    "header into the json": binary(b"abc", header="10"),
    "header zero": binary(b"abc", header="0"),
    "json no object": rest(b"[1]", Inference_Header_Content_Length="3"),
    "json text": rest(b'"a"', Inference_Header_Content_Length="3"),
    "inputs no list": rest(b'{"inputs": 3}', Inference_Header_Content_Length="13"),
    "tensor no object": rest(b'{"inputs": [3]}', Inference_Header_Content_Length="15"),
    "parameters no object": rest({"inputs": [tensor("a", parameters=[1])]}, Inference_Header_Content_Length="9999"),
    "deep json": rest(DEEP, Inference_Header_Content_Length=str(len(DEEP))),
}


@pytest.mark.parametrize("sent", BROKEN_BINARY.values(), ids=BROKEN_BINARY)
def test_broken_binary_tensors_are_refused(sent: Sent) -> None:
    assert refusal(sent) == (400, BINARY)
    assert reply_to(sent) == HuggingFaceReply(many=False)


@pytest.mark.parametrize("header", ["", "-1", "1e3", "0x10", "٣", "9" * 5000, "1 2"])
def test_a_header_length_that_is_no_number_of_bytes(header: str) -> None:
    assert refusal(binary(b"abc", header=header)) == (
        400,
        "Inference-Header-Content-Length must be a number of bytes",
    )


def test_binary_tensors_may_be_empty_or_in_json() -> None:
    assert decode(binary())[0] == Request([], {}, many=True)
    assert decode(binary(b"", b"a\x00", "é".encode()))[0].inputs == ["", "a\x00", "é"]
    body = json.dumps({"inputs": [tensor("a")]}).encode()
    assert decode(rest(body, Inference_Header_Content_Length=str(len(body))))[0].inputs == ["a"]


# --- answers

GOOD = [{"label": "positive", "score": 0.75}, {"label": "negative", "score": 0.25}]
POOR = [{"label": "negative", "score": 0.5}, {"label": "positive", "score": 0.5}]
USAGE = Usage(tokens=9, truncated=True, windows=2)
FACTS = {
    "usage": {"tokens": 9, "truncated": True, "windows": 2},
    "model": {"name": "reviews", "version": "1.0", "digest": "ab12", "task": "text-classification"},
}
WRONG = {"error": "too long", "code": 413, "type": "TooLarge"}


def result(*predictions: Any, details: bool = False) -> Result:
    return Result(list(predictions), USAGE, details)


def test_hugging_face_answers() -> None:
    single, many = HuggingFaceReply(many=False), HuggingFaceReply(many=True)
    bare = Model("reviews", "1.0", "ab12", "text-classification", nests_single=False)
    assert single.answer(result(GOOD), MODEL) == [GOOD]
    assert single.answer(result(GOOD), bare) == GOOD
    assert many.answer(result(GOOD), bare) == [GOOD]
    assert many.answer(result(GOOD, TooLarge("too long"), POOR), MODEL) == [GOOD, WRONG, POOR]
    assert single.answer(result(GOOD, details=True), MODEL) == {"predictions": [GOOD], **FACTS}
    assert many.error(TooLarge("too long"), MODEL) == WRONG


def test_kserve_v1_answers() -> None:
    assert KServeV1Reply().answer(result(GOOD, TooLarge("too long")), MODEL) == {"predictions": [GOOD, WRONG]}
    assert KServeV1Reply().answer(result(GOOD, details=True), MODEL) == {"predictions": [GOOD], **FACTS}
    assert KServeV1Reply().error(TooLarge("too long"), MODEL) == WRONG


OUTPUTS = [
    {"name": "label", "datatype": "BYTES", "shape": [2, 2], "data": ["positive", "negative", "negative", "positive"]},
    {"name": "score", "datatype": "FP32", "shape": [2, 2], "data": [0.75, 0.25, 0.5, 0.5]},
]
HEAD = {"model_name": "reviews", "model_version": "1.0", "id": "7"}


@pytest.mark.parametrize("over_grpc", [False, True], ids=["rest", "grpc"])
def test_open_inference_answers(over_grpc: bool) -> None:
    reply = OpenInferenceReply("7", over_grpc)
    assert reply.answer(result(GOOD, POOR), MODEL) == {**HEAD, "outputs": OUTPUTS}
    with pytest.raises(TooLarge, match="too long"):
        reply.answer(result(GOOD, TooLarge("too long")), MODEL)


def test_open_inference_details_go_into_the_parameters_over_rest() -> None:
    detailed = result(GOOD, POOR, details=True)
    assert OpenInferenceReply("7", False).answer(detailed, MODEL)["parameters"] == FACTS
    # gRPC has nowhere to put them.
    assert OpenInferenceReply("7", True).answer(detailed, MODEL) == {**HEAD, "outputs": OUTPUTS}


def test_open_inference_gives_the_chosen_outputs() -> None:
    body = {"id": "7", "inputs": [tensor("a", "b")], "outputs": [{"name": "score"}]}
    _, reply = decode(rest(body, JSON))
    assert reply.answer(result(GOOD, POOR), MODEL) == {**HEAD, "outputs": OUTPUTS[1:]}


@pytest.mark.parametrize("name", ["logits", "a\r\n\ud800" + "x" * 100])
def test_open_inference_refuses_an_unknown_output(name: str) -> None:
    _, reply = decode(rest({"inputs": [tensor("a")], "outputs": [{"name": "score"}, {"name": name}]}, JSON))
    with pytest.raises(InvalidInput) as caught:
        reply.answer(result(GOOD), MODEL)
    message = str(caught.value)
    assert message.startswith(f"there is no output {ascii(name)[:37]}")
    assert message.endswith("; this model gives: label, score")
    assert message.isascii()
    assert message.isprintable()


def test_open_inference_predictions_of_unequal_length_are_json_texts() -> None:
    answer = OpenInferenceReply("7", False).answer(result(GOOD, GOOD[:1]), MODEL)
    [output] = answer["outputs"]
    texts = output.pop("data")
    assert output == {"name": "prediction", "datatype": "BYTES", "shape": [2]}
    assert [json.loads(text) for text in texts] == [GOOD, GOOD[:1]]


def test_tensor_shapes_are_those_of_their_data() -> None:
    for predictions in ([GOOD], [GOOD, POOR], [GOOD[:1]] * 5):
        for output in OpenInferenceReply("7", False).answer(result(*predictions), MODEL)["outputs"]:
            assert int(np.prod(output["shape"])) == len(output["data"])


@pytest.mark.parametrize("kind", [UnreadableRequest, InvalidParameter, TooLarge])
def test_errors_look_alike_in_every_rest_format(kind: type[RequestError]) -> None:
    error = kind("a\ud800")
    expected = {"error": "a\ud800", "code": kind.code, "type": kind.__name__}
    for reply in (HuggingFaceReply(False), KServeV1Reply(), OpenInferenceReply("7", False)):
        assert reply.error(error, MODEL) == expected
        json.dumps(reply.error(error, MODEL)).encode("ascii")


# --- the canary


@pytest.mark.parametrize("content_type", [JSON, None])
def test_a_canary_is_the_first_golden_example(content_type: Any) -> None:
    request, reply = decode(rest({"canary": True}, content_type) if content_type else grpc(data=b'{"canary": true}'))
    assert request == Request(["a"], {"top_k": 1})
    good = reply.answer(Result([[{"label": "x", "score": 0.755}]], Usage(3, False, 1)), MODEL)
    assert good["predictions"] == {"drift": pytest.approx(0.005)}
    assert good["model"]["name"] == MODEL.name


@pytest.mark.parametrize(
    "found", [[{"label": "x", "score": 0.9}], [{"label": "y", "score": 0.75}], [{"label": "x", "score": float("nan")}]]
)
def test_a_canary_that_is_answered_wrongly_is_an_error(found: Any) -> None:
    with pytest.raises(WrongAnswer, match="drifts by"):
        CANARY.answer(Result([found], Usage(3, False, 1)), MODEL)


@pytest.mark.parametrize("body", [{"canary": False}, {"canary": "yes"}, {"canary": True, "inputs": "a"}])
def test_what_is_not_quite_a_canary_is_refused(body: Any) -> None:
    with pytest.raises(RequestError):
        decode(rest(body, JSON))
