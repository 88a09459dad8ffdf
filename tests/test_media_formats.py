"""Images and sounds in every wire format: the same bytes reach the task, and no text is taken for a file."""

import base64
import io
import json
import wave
from typing import Any

import pytest
from PIL import Image
from test_formats import JSON, Sent, binary, decode, form, grpc, grpc_tensors, rest, tensor

from handler.errors import InvalidInput, RequestError
from handler.media import media_type, read_bytes
from handler.messages import Request


def picture(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 30, 90)).save(buffer, form)
    return buffer.getvalue()


def silence() -> bytes:
    """A sound that is, byte for byte, valid UTF-8."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8000)
        file.writeframes(bytes(40))
    buffer.getvalue().decode("utf-8")
    return buffer.getvalue()


FILES = {
    "image/png": picture("PNG"),
    "image/jpeg": picture("JPEG"),
    "image/webp": picture("WEBP"),
    "image/gif": picture("GIF"),
    "image/bmp": picture("BMP"),
    "image/tiff": picture("TIFF"),
    "audio/wav": silence(),
    "audio/flac": b"fLaC\x00\x00\x00\x22\x10\x00\x10\x00",
    "audio/ogg": b"OggS\x00\x02" + bytes(20),
}


@pytest.mark.parametrize(("kind", "content"), FILES.items(), ids=FILES)
def test_files_are_told_by_their_first_bytes(kind: str, content: bytes) -> None:
    assert media_type(content) == media_type(bytearray(content)) == kind


WAYS = {
    "type": lambda kind, content: rest(content, kind),
    "odd type": lambda kind, content: rest(content, f"{kind.title()}; name=x"),
    "no type": lambda kind, content: rest(content),
    "octets": lambda kind, content: rest(content, "application/octet-stream"),
    "unknown type": lambda kind, content: rest(content, "application/x-something"),
    "part": lambda kind, content: form("multipart/form-data; boundary=x", data=(kind, content)),
    "part, octets": lambda _, content: form(
        "multipart/form-data; boundary=x", data=("application/octet-stream", content)
    ),
    "part, no type": lambda kind, content: form("multipart/form-data; boundary=x", body=("", content)),
    "grpc": lambda kind, content: grpc(data=content),
    "grpc, body": lambda kind, content: grpc(body=content),
}


@pytest.mark.parametrize(("kind", "content"), FILES.items(), ids=FILES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_file_is_read_as_its_bytes(way: Any, kind: str, content: bytes) -> None:
    request, _ = decode(way(kind, content))
    assert request == Request([content], {}, many=False)
    assert type(request.inputs[0]) is bytes


@pytest.mark.parametrize(("kind", "content"), FILES.items(), ids=FILES)
@pytest.mark.parametrize("way", [binary, grpc_tensors], ids=["binary", "grpc"])
def test_a_file_in_a_tensor_is_read_as_its_bytes(way: Any, kind: str, content: bytes) -> None:
    request, _ = decode(way(content, b"a text", content))
    assert request == Request([content, "a text", content], {}, many=True)


def test_bytes_of_no_known_kind_in_a_tensor_stay_bytes() -> None:
    for way in (binary, grpc_tensors):
        assert decode(way(b"\xff\x00\xfe"))[0].inputs == [b"\xff\x00\xfe"]


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_base64_in_json_is_read_as_the_same_bytes(content: bytes) -> None:
    text = base64.b64encode(content).decode()
    for sent in (
        rest({"inputs": text}, JSON),
        rest({"inputs": text, "parameters": {}}),
        rest(text, JSON),
        rest({"inputs": [text]}, JSON),
        rest({"instances": [text]}, JSON),
        rest({"instances": [{"b64": text}]}, JSON),
        rest({"inputs": [tensor(text)]}, JSON),
        grpc(data=json.dumps({"inputs": text}).encode()),
        grpc_tensors(text.encode()),
        rest(text.encode(), "text/plain"),
        rest(f"data:image/png;base64,{text}".encode()),
    ):
        [value] = decode(sent)[0].inputs
        assert read_bytes(value, "file") == content


def test_parameters_travel_beside_base64() -> None:
    sent = rest({"inputs": "QUJD", "parameters": {"top_k": 2}}, JSON)
    assert decode(sent)[0] == Request(["QUJD"], {"top_k": 2}, many=False)


TEXTS = [
    "GIF89a is an image format",
    "BMW makes cars, BMX are bikes",
    "BM",
    "RIFF and WAVE",
    "RIFF....AVI LIST",
    "fLaC is written with a capital C",
    "OggS begin a page",
    "II* MM*",
    "PNG\r\n\x1a\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_begin_like_a_file_are_texts(text: str) -> None:
    for sent in (rest(text.encode()), rest(text.encode(), "application/octet-stream"), grpc(data=text.encode())):
        assert decode(sent)[0] == Request([text])
    assert decode(binary(text.encode()))[0].inputs == [text]


def test_a_declared_text_is_never_taken_for_a_file() -> None:
    content = silence()
    assert decode(rest(content, "text/plain"))[0] == Request([content.decode()])


@pytest.mark.parametrize("kind", ["image/png", "audio/wav", "video/mp4", "image/svg+xml"])
def test_the_declared_type_of_a_file_is_believed(kind: str) -> None:
    """What the bytes really are is for the task to find out."""
    for content in (b"a text", b'{"inputs": "a text"}', b"\xff"):
        assert decode(rest(content, kind))[0] == Request([content])


@pytest.mark.parametrize("sent", [rest(b"", "image/png"), rest(b"", "audio/wav"), grpc(data=b"")])
def test_no_bytes_are_refused(sent: Sent) -> None:
    with pytest.raises(RequestError, match="the body is empty") as caught:
        decode(sent)
    assert caught.value.code == 400


@pytest.mark.parametrize("address", ["http://localhost/a.png", "https://a/b", "file:///a", "s3://a/b", "GOPHER://a"])
def test_addresses_are_never_fetched(address: str) -> None:
    with pytest.raises(InvalidInput, match="addresses are not fetched: send the bytes of the image"):
        read_bytes(address, "image")
