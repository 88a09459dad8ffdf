"""Hostile requests, made from a seed: what the fuzzers of row 8 send.

Three sources: values that Hypothesis makes, mutations of valid bodies of every wire format, and lists of what is known
to hurt parsers. The same seed and number give the same request.
"""

import gzip
import io
import json
import math
import random
import struct
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import strategies
from PIL import Image

from benchmarks.fault_injection import http2
from benchmarks.fault_injection.bench import MODEL
from benchmarks.fault_injection.site import BODY, MODEL_INFER, PREDICTIONS
from marble_client.stubs import inference_pb2, open_inference_grpc_pb2

_TEXT = BODY["inputs"]
_HUGGING_FACE, _V1, _V2 = (
    f"/predictions/{MODEL}",
    f"/v1/models/{MODEL}:predict",
    f"/v2/models/{MODEL}/infer",
)
_TENSOR: dict[str, Any] = {"name": "text", "datatype": "BYTES", "shape": [2], "data": [_TEXT, "Dull."]}
_V2_BODY: dict[str, Any] = {"id": "a", "inputs": [_TENSOR], "outputs": [{"name": "label"}]}
# Valid bodies with the route of each.
_VALID: list[tuple[str, Any]] = [
    (_HUGGING_FACE, BODY),
    (_HUGGING_FACE, {"inputs": [_TEXT, "Dull."], "parameters": {"top_k": 2, "overflow": "truncate", "details": True}}),
    (_HUGGING_FACE, {"inputs": _TEXT, "parameters": {"function_to_apply": "sigmoid"}, "stream": False}),
    (_V1, {"instances": [_TEXT, "Dull."]}),
    (_V1, {"instances": [{"inputs": _TEXT}], "parameters": {"top_k": 1}}),
    (_V2, _V2_BODY),
    (_HUGGING_FACE, {"canary": True}),
]
_PARAMETERS = ("top_k", "function_to_apply", "overflow", "details", "truncation", "max_new_tokens", "seed", "")
# Each has broken some program that takes text.
NAUGHTY = [
    "",
    " ",
    "\0",
    "\x1b[31m",
    "\r\nX-Injected: yes",
    "[METRICS]ts_fault.Count:1|#Level:Host|#hostname:x,1",
    "PREDICTION_LOG",
    "undefined",
    "None",
    "__proto__",
    "{{7*7}}${7*7}<%= 7*7 %>",
    "${jndi:ldap://127.0.0.1/x}",
    "' OR 1=1; --",
    "../../../../etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:8081/models",
    "data:image/png;base64,AAAA",
    "<script>alert(1)</script>",
    "%s%n%x%d",
    "\ufeffbyte order mark",
    "\u202eright to left\u202c",
    "e" + "\u0301" * 400,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 30,
    "\ud800",
    "\udfff\ud800",
    "\uffff\ufffe\ufdd0",
    "ﷺ" * 50,
    "1e400",
    "-0",
    "٣",
    "a" * 3000,
    "a " * 2000,
    "\t\v\f\u2028\u2029\u00a0\u3000",
    "</s><s>[CLS][SEP][MASK][PAD]<|endoftext|>",
]
# JSON that parsers disagree about, or cannot hold.
_RAW_JSON = [
    b'{"inputs": NaN}',
    b'{"inputs": [Infinity, -Infinity]}',
    b'{"inputs": "a", "parameters": {"top_k": 1e400}}',
    b'{"inputs": "a", "parameters": {"top_k": ' + b"9" * 5000 + b"}}",
    b'{"inputs": "a", "parameters": {"top_k": -1}}',
    b'{"inputs": "a", "parameters": {"top_k": 1.5}}',
    b'{"inputs": "a", "parameters": {"top_k": true}}',
    b'{"inputs": "a", "inputs": ["b"], "inputs": {"c": 1}}',
    b'{"inputs": "\\ud800"}',
    b'{"inputs": "\\udfff", "id": "\\ud800"}',
    b'{"inputs": "\xed\xa0\x80"}',
    b'{"inputs": "\xff\xfe"}',
    b'{"inputs": "a\x00b"}',
    b'{"inputs": "\\u0000"}',
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b"[" * 500 + b"]" * 500,
    b'{"inputs": ' + b"[" * 900 + b'"a"' + b"]" * 900 + b"}",
    b'{"inputs": [' + b'"a",' * 3000 + b'"a"]}',
    b'{"inputs": []}',
    b'{"instances": [' + b"{}," * 200 + b"{}]}",
    b'{"inputs": "a"} trailing',
    b'{"inputs": "a",}',
    b"{'inputs': 'a'}",
    b"\xef\xbb\xbf" + b'{"inputs": "a"}',
    json.dumps(BODY).encode("utf-16"),
    json.dumps(BODY).encode("utf-32"),
    b'"a text alone"',
    b"null",
    b"0",
    b"{}",
    b"[]",
    b"",
    b"\n" * 5000,
    b'{"inputs": {"image": "AAAA"}}',
    b'{"canary": false}',
    b'{"canary": true, "inputs": "a"}',
    b'{"inputs": "a", "stream": true}',
    b'{"inputs": [{"name": "t", "datatype": "FP32", "shape": [1e9], "data": []}]}',
    b'{"inputs": [{"name": "t", "datatype": "BYTES", "shape": [-1], "data": ["a"]}]}',
    b'{"inputs": [{"name": "t", "datatype": "BYTES", "shape": [99999999999999999999], "data": ["a"]}]}',
    b'{"id": "' + b"i" * 5000 + b'", "inputs": [{"name": "t", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}',
]
_CONTENT_TYPES = [
    b"application/json",
    b"application/json; charset=utf-8",
    b"Application/JSON",
    b"application/json;charset=utf-16",
    b"application/json; charset=rot13",
    b"text/plain",
    b"text/plain; charset=idna",
    b"text/plain; charset=undefined",
    b'text/plain; charset="',
    b"text/plain; charset=utf-7",
    b"application/octet-stream",
    b"application/x-www-form-urlencoded",
    b"multipart/form-data; boundary=x",
    b"multipart/form-data",
    b"application/xml",
    b"application/x-java-serialized-object",
    b"application/x-python-pickle",
    b"image/png",
    b"image/jpeg",
    b"audio/wav",
    b"video/mp4",
    b"*/*",
    b"/",
    b";",
    b"",
    b"x" * 2000,
    b"application/json\xff",
    b"application/json, text/plain",
]
_HEADERS = [
    (b"describe", b"True"),
    (b"explain", b"True"),
    (b"Explain", b"True"),
    (b"url_path", b"../../models"),
    (b"X-Request-Id", b"a\tb"),
    (b"X-Request-Id", b"\xff\xfe" * 20),
    (b"X-Request-Id", b'"},{"forged":"line'),
    (b"traceparent", b"00-" + b"g" * 32 + b"-0-1"),
    (b"traceparent", b"\xe9" * 55),
    (b"Inference-Header-Content-Length", b"10"),
    (b"Inference-Header-Content-Length", b"-1"),
    (b"Inference-Header-Content-Length", b"99999999999999999999"),
    (b"Inference-Header-Content-Length", b"1e3"),
    (b"Content-Encoding", b"gzip"),
    (b"Content-Encoding", b"br, gzip, deflate"),
    (b"Accept", b"application/xml;q=9"),
    (b"Accept-Encoding", b"gzip;q=-1"),
    (b"Expect", b"100-continue"),
    (b"Expect", b"the unexpected"),
    (b"Range", b"bytes=0-1,1-2,2-3"),
    (b"Upgrade", b"websocket"),
    (b"Upgrade", b"h2c"),
    (b"Connection", b"Authorization, keep-alive"),
    (b"Connection", b"close, close"),
    (b"Host", b"169.254.169.254"),
    (b"Host", b""),
    (b"X-Forwarded-For", b"127.0.0.1"),
    (b"X-Original-URL", b"/models"),
    (b"X-HTTP-Method-Override", b"DELETE"),
    (b"Cookie", b"a=" + b"b" * 3000),
    (b"X-Long", b"y" * 9000),
    (b"X-Null", b"a\0b"),
    (b"X-Bare", b"a\rX-Injected: yes"),
    (b"X Space", b"a"),
    (b"X\x01", b"a"),
    (b"", b"a"),
    (b"X-Fold", b"a\r\n b"),
    (b"Content-Length", b"5"),
    (b"Transfer-Encoding", b"identity"),
    (b"Transfer-Encoding", b"gzip, chunked"),
    (b"Trailer", b"Authorization"),
]
_METHODS = [
    b"GET",
    b"HEAD",
    b"PUT",
    b"DELETE",
    b"PATCH",
    b"OPTIONS",
    b"TRACE",
    b"CONNECT",
    b"PROPFIND",
    b"post",
    b"P\xd6ST",
]
_PATHS = [
    "/",
    "*",
    "//",
    "/ping",
    "/live",
    "/ready",
    "/metrics",
    "/status",
    "/models",
    f"/models/{MODEL}?min_worker=0",
    "/predictions/",
    "/predictions/nobody",
    f"/predictions/{MODEL}/9.9",
    f"/predictions/{MODEL}/1.0/x",
    f"/predictions/{MODEL}/",
    f"/predictions/{MODEL}%00",
    f"/predictions/{MODEL}%0d%0aX-Injected:yes",
    f"/predictions/%2e%2e/models/{MODEL}",
    f"/predictions/../predictions/{MODEL}",
    f"/predictions/{MODEL}?describe=True&data=%00&body=x",
    f"/predictions/{MODEL};x=1",
    f"/predictions/{MODEL}#x",
    f"/explanations/{MODEL}",
    f"/explanations/{MODEL}/1.0",
    f"/v1/models/{MODEL}",
    f"/v1/models/{MODEL}:explain",
    f"/v2/models/{MODEL}/versions/9/infer",
    "/v2/models//infer",
    "/token?type=inference",
    "/wfpredict/x",
    f"https://localhost/predictions/{MODEL}",
    "/" + "a" * 3000,
    "/\xff\xfe",
]
_VERSIONS = [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/99.9", b"http/1.1", b"", b"HTTP/1.1 x"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One REST request as it travels. alone: nothing can follow on its connection. silent: it may get no answer,
    because it never ends. control: it is valid, and its answer known. headless: its answer has no body."""

    kind: str
    wire: bytes
    alone: bool = False
    silent: bool = False
    control: bool = False
    headless: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One gRPC call. frames: what is sent instead of the message, on a connection of HTTP/2 with a stream that `{}`
    cannot name: the function gets its number."""

    kind: str
    method: str
    message: bytes
    metadata: Sequence[tuple[str, str | bytes]] = ()
    frames: Callable[[int], bytes] | None = None
    control: bool = False
    compressed: bool = False


def json_values(seed: int, count: int) -> list[Any]:
    """JSON values that Hypothesis makes, lone surrogates, NaN and all."""
    anything = strategies.text(strategies.characters(exclude_categories=())) | strategies.sampled_from(NAUGHTY)
    leaves = (
        strategies.none()
        | strategies.booleans()
        | strategies.integers()
        | strategies.floats()
        | strategies.text()
        | anything
    )
    names = strategies.sampled_from(("inputs", "parameters", "instances", "data", "shape", "id")) | anything
    values = strategies.recursive(
        leaves, lambda inner: strategies.lists(inner) | strategies.dictionaries(names, inner), max_leaves=12
    )
    found: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(values)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


@dataclass
class Source:
    """Makes requests. tokens: by what is the matter with them; "predict" is a good one."""

    seed: int
    tokens: Mapping[str, str]
    values: Sequence[Any]
    _media: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        for form in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
            file = io.BytesIO()
            Image.effect_noise((24, 24), 60).convert("RGB").save(file, form)
            self._media.append(file.getvalue())
        file = io.BytesIO()
        with wave.open(file, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(16000)
            sound.writeframes(b"\1\2" * 400)
        self._media += [
            file.getvalue(),
            b"fLaC\0\0\0\x22" + bytes(60),
            b"OggS" + bytes(60),
            b"%PDF-1.7",
            b"PK\3\4" + bytes(30),
        ]
        self._media += [gzip.compress(bytes(200_000)), b"\x80\x04cos\nsystem\n(S'true'\ntR."]

    def ask(self, number: int) -> Ask:
        """A REST request."""
        chance = random.Random(f"rest {self.seed} {number}")
        [make] = chance.choices(
            (
                self._control,
                self._json,
                self._mutated,
                self._raw_json,
                self._binary,
                self._typed,
                self._header,
                self._authorized,
                self._routed,
                self._framed,
            ),
            (4, 22, 24, 12, 8, 8, 8, 6, 5, 3),
        )
        return make(chance)

    def call(self, number: int) -> Call:
        """A gRPC call."""
        chance = random.Random(f"grpc {self.seed} {number}")
        [make] = chance.choices(
            (
                self._grpc_control,
                self._grpc_json,
                self._grpc_mutated,
                self._grpc_binary,
                self._tensors,
                self._grpc_metadata,
                self._grpc_method,
                self._grpc_framed,
            ),
            (4, 26, 26, 10, 18, 6, 2, 8),
        )
        return make(chance)

    # --- REST

    def _control(self, chance: random.Random) -> Ask:
        return Ask("control", self._request(_HUGGING_FACE, json.dumps(BODY).encode()), control=True)

    def _json(self, chance: random.Random) -> Ask:
        path, body = self._shaped(chance)
        kind = chance.choices((b"application/json", None), (4, 1))[0]
        return Ask("json", self._request(path, body, kind))

    def _mutated(self, chance: random.Random) -> Ask:
        path, value = chance.choice(_VALID)
        body = mutated(chance, json.dumps(value, ensure_ascii=False).encode())
        return Ask("mutated", self._request(path, body, chance.choice((b"application/json", None, b"text/plain"))))

    def _raw_json(self, chance: random.Random) -> Ask:
        path = chance.choices((_HUGGING_FACE, _V1, _V2), (3, 1, 1))[0]
        return Ask("raw json", self._request(path, chance.choice(_RAW_JSON)))

    def _binary(self, chance: random.Random) -> Ask:
        kind = chance.choice((None, b"image/png", b"audio/wav", b"application/octet-stream", b"application/json"))
        return Ask("media", self._request(_HUGGING_FACE, self._file(chance), kind))

    def _typed(self, chance: random.Random) -> Ask:
        path, value = chance.choice(_VALID)
        body = chance.choice(
            (json.dumps(value).encode(), _TEXT.encode(), chance.choice(NAUGHTY).encode("utf-8", "replace"))
        )
        kind = chance.choice(_CONTENT_TYPES)
        return Ask("content type", self._request(path, body, kind), alone=b"\xff" in kind)

    def _header(self, chance: random.Random) -> Ask:
        path, value = chance.choice(_VALID)
        body = json.dumps(value).encode()
        extra = [chance.choice(_HEADERS) for _ in range(chance.randint(1, 3))]
        if any(value == b"gzip" for _, value in extra) and chance.random() < 0.5:
            body = gzip.compress(body)
        # A second length that is shorter or a coding may make the body a next request, which has to be refused.
        names = {name for name, _ in extra}
        silent = bool(names & {b"Content-Length", b"Transfer-Encoding"})
        return Ask("header", self._request(path, body, b"application/json", extra), alone=True, silent=silent)

    def _authorized(self, chance: random.Random) -> Ask:
        path, value = chance.choice(_VALID)
        good = self.tokens["predict"].encode()
        given = chance.choice(
            (
                [],
                [b"Bearer " + self.tokens[chance.choice(list(self.tokens))].encode()],
                [b"Bearer " + mutated(chance, good).replace(b"\n", b"").replace(b"\r", b"")],
                [b"Basic " + good],
                [good],
                [b"Bearer " + good, b"Bearer " + good],
                [b"Bearer " + good[:-1]],
                [b"Bearer " + b"A" * 4000],
                [b"Bearer"],
                [b'Bearer ";} return 200;#'],
                [b"bearer\t" + good],
            )
        )
        headers = [(b"Authorization", entry) for entry in given]
        wire = self._request(path, json.dumps(value).encode(), b"application/json", headers, authorized=False)
        return Ask("authorization", wire, alone=True)

    def _routed(self, chance: random.Random) -> Ask:
        method = chance.choice((b"POST", b"GET", chance.choice(_METHODS)))
        path = chance.choice((_HUGGING_FACE, chance.choice(_PATHS)))
        version = chance.choice((b"HTTP/1.1", b"HTTP/1.1", chance.choice(_VERSIONS)))
        token = "admin" if chance.random() < 0.3 else "predict"
        wire = self._request(path, json.dumps(BODY).encode(), b"application/json", (), method, version, token=token)
        # HTTP/0.9 has neither status nor headers; no version means that.
        old = version in (b"", b"HTTP/0.9")
        return Ask("route", wire, alone=True, silent=old, headless=method == b"HEAD")

    def _framed(self, chance: random.Random) -> Ask:
        body = json.dumps(BODY).encode()
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:9], body[9:])) + b"0\r\n\r\n"
        chunked = b"Transfer-Encoding: chunked"
        framing, content, silent = chance.choices(
            (
                (chunked, chunks, False),
                (chunked, mutated(chance, chunks), True),
                (chunked, b"FFFFFFFFFFFFFFFF1\r\nx", False),
                (chunked, b"-1\r\nx", False),
                (chunked, b"5;" + b"e" * 3000 + b"\r\nabcde\r\n0\r\n\r\n", True),
                (chunked, chunks[:-5] + b"0\r\nAuthorization: Bearer x\r\n\r\n", False),
                (b"Content-Length: %d" % (len(body) - 3), body, False),
                (b"Content-Length: -1", body, False),
                (b"Content-Length: 0x10", body, False),
                (b"Content-Length: 99999999999999999999", body, False),
                (b"Content-Length: 7000000", body, False),
                (b"Content-Length: " + b"0" * 300 + b"%d" % len(body), body, False),
                (b"X-No-Length: 1", body, False),
                (b"Content-Length: %d" % (len(body) + 5), body, True),
                (b"Transfer-Encoding: xchunked", chunks, True),
            ),
            # What never ends takes slow_client_seconds to be closed.
            (4, 0.5, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 0.3, 4),
        )[0]
        head = (
            f"POST {_HUGGING_FACE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.tokens['predict']}\r\n".encode()
        )
        return Ask("framing", head + framing + b"\r\n\r\n" + content, alone=True, silent=silent)

    def _request(
        self,
        path: str,
        body: bytes,
        content_type: bytes | None = b"application/json",
        headers: Sequence[tuple[bytes, bytes]] = (),
        method: bytes = b"POST",
        version: bytes = b"HTTP/1.1",
        authorized: bool = True,
        token: str = "predict",
    ) -> bytes:
        lines = [method + b" " + path.encode("latin-1") + (b" " + version if version else b"")]
        if all(name != b"Host" for name, _ in headers):
            lines.append(b"Host: localhost")
        if authorized:
            lines.append(b"Authorization: Bearer " + self.tokens[token].encode())
        if content_type is not None:
            lines.append(b"Content-Type: " + content_type)
        lines += [name + b": " + value for name, value in headers]
        lines.append(b"Content-Length: %d" % len(body))
        return b"\r\n".join(lines) + b"\r\n\r\n" + body

    # --- Bodies

    def _shaped(self, chance: random.Random) -> tuple[str, bytes]:
        """A route, and JSON in which one thing is a value of Hypothesis."""
        value = chance.choice(self.values)
        path, body = chance.choice(
            (
                (_HUGGING_FACE, value),
                (_HUGGING_FACE, {"inputs": value}),
                (_HUGGING_FACE, {"inputs": [_TEXT, value]}),
                (_HUGGING_FACE, {"inputs": _TEXT, "parameters": value}),
                (_HUGGING_FACE, {"inputs": _TEXT, "parameters": {chance.choice(_PARAMETERS): value}}),
                (_HUGGING_FACE, {"inputs": _TEXT, chance.choice(("stream", "canary", "options", "id")): value}),
                (_V1, {"instances": value}),
                (_V1, {"instances": [value, _TEXT]}),
                (_V1, {"instances": [{"inputs": value, "parameters": value}], "signature_name": value}),
                (_V2, {"inputs": value}),
                (_V2, {**_V2_BODY, chance.choice(("id", "outputs", "parameters", "model_name")): value}),
                (
                    _V2,
                    {"inputs": [{**_TENSOR, chance.choice(("name", "datatype", "shape", "data")): value}]},
                ),
            )
        )
        escaped = chance.random() < 0.7
        return path, json.dumps(body, ensure_ascii=escaped).encode("utf-8", "surrogatepass")

    def _file(self, chance: random.Random) -> bytes:
        content = chance.choice(self._media)
        return chance.choice((content, content[: chance.randrange(len(content))], mutated(chance, content)))

    # --- gRPC

    def _grpc_control(self, chance: random.Random) -> Call:
        return Call("control", PREDICTIONS, self._predictions(json.dumps(BODY).encode()), self._bearer(), control=True)

    def _grpc_json(self, chance: random.Random) -> Call:
        body = self._shaped(chance)[1] if chance.random() < 0.7 else chance.choice(_RAW_JSON)
        compressed = chance.random() < 0.05
        return Call("json", PREDICTIONS, self._predictions(body), self._bearer(), compressed=compressed)

    def _grpc_mutated(self, chance: random.Random) -> Call:
        _, value = chance.choice(_VALID)
        if chance.random() < 0.5:
            message, method = self._predictions(json.dumps(value).encode()), PREDICTIONS
        else:
            message, method = self._infer().SerializeToString(), MODEL_INFER
        return Call("mutated protobuf", method, mutated(chance, message), self._bearer())

    def _grpc_binary(self, chance: random.Random) -> Call:
        name = chance.choice(("data", "body", "", "parameters", "\x00", "content-type"))
        request = inference_pb2.PredictionsRequest(model_name=MODEL, input={name: self._file(chance)})
        if chance.random() < 0.5:
            request.input[chance.choice(NAUGHTY).encode("utf-8", "replace").decode()] = b"more"
        return Call("media", PREDICTIONS, request.SerializeToString(), self._bearer())

    def _tensors(self, chance: random.Random) -> Call:
        """Open Inference requests whose fields are right and do not fit each other."""
        request = self._infer()
        tensor = request.inputs[0]
        for _ in range(chance.randint(1, 3)):
            match chance.randrange(14):
                case 0:
                    del tensor.shape[:]
                    tensor.shape.extend(chance.choice(([], [0], [-1], [2**62], [1] * 200, [1, 1, 1])))
                case 1:
                    tensor.datatype = chance.choice(("", "FP32", "INT64", "BOOL", "bytes", "UINT8", "FP64", "☃"))
                case 2:
                    tensor.contents.fp32_contents.extend((math.nan, math.inf, 1e38))
                case 3:
                    tensor.contents.fp64_contents.extend((math.nan, -math.inf))
                case 4:
                    tensor.contents.int64_contents.append(2**63 - 1)
                case 5:
                    tensor.contents.uint64_contents.append(2**64 - 1)
                case 6:
                    tensor.contents.ClearField("bytes_contents")
                case 7:
                    tensor.contents.bytes_contents.append(self._file(chance))
                case 8:
                    request.raw_input_contents.append(chance.choice((b"", b"\4\0\0\0good", b"\xff" * 30)))
                case 9:
                    request.parameters[chance.choice((*_PARAMETERS, "binary_data_output"))].int64_param = -(2**63)
                case 10:
                    tensor.parameters["content_type"].string_param = (
                        chance.choice(NAUGHTY).encode("utf-8", "replace").decode()
                    )
                case 11:
                    request.id = chance.choice(("", "i" * 5000, "\0", '"}'))
                case 12:
                    request.inputs.append(tensor)
                case _:
                    del request.inputs[1:]
                    request.outputs.add(name=chance.choice(("", "label", "score", "nobody")))
        return Call("tensors", MODEL_INFER, request.SerializeToString(), self._bearer())

    def _grpc_metadata(self, chance: random.Random) -> Call:
        body = self._predictions(json.dumps(BODY).encode())
        good = self.tokens["predict"]
        choices: list[list[tuple[str, str | bytes]]] = [
            [],
            [("authorization", f"Bearer {self.tokens[chance.choice(list(self.tokens))]}")],
            [("authorization", good)],
            [("authorization", f"Bearer {good}x")],
            [("authorization", f"Bearer {good}"), ("authorization", f"Bearer {good}")],
            [*self._bearer(), ("explain", "True"), ("describe", "True")],
            [*self._bearer(), ("x-request-id", '"},{"forged')],
            [*self._bearer(), ("x-bin", bytes(range(256)))],
            [*self._bearer(), ("x-long", "y" * 6000)],
            [*self._bearer(), *((f"x-{n}", "y") for n in range(200))],
            [*self._bearer(), ("content-type-x", "text/html"), ("url_path", "../models")],
            [*self._bearer(), ("traceparent", "00-zz")],
        ]
        return Call("metadata", PREDICTIONS, body, chance.choice(choices))

    def _grpc_method(self, chance: random.Random) -> Call:
        method = chance.choice(
            (
                PREDICTIONS.replace("Predictions", "StreamPredictions"),
                PREDICTIONS.replace("Predictions", "StreamPredictions2"),
                PREDICTIONS.replace("Predictions", "Ping"),
                MODEL_INFER.replace("ModelInfer", "ServerReady"),
                "/org.pytorch.serve.grpc.management.ManagementAPIsService/ScaleWorker",
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                "/",
                "/x" * 200,
                PREDICTIONS + "/",
                PREDICTIONS.lower(),
            )
        )
        return Call("method", method, self._predictions(json.dumps(BODY).encode()), self._bearer())

    def _grpc_framed(self, chance: random.Random) -> Call:
        """Frames and prefixes of lengths that no library would send."""
        message = self._predictions(json.dumps(BODY).encode())
        good = b"\0" + struct.pack(">I", len(message)) + message
        content = chance.choice(
            (
                b"",
                b"\0",
                good[:7],
                good + good,
                good + b"\0\0",
                b"\1" + good[1:],
                b"\7" + good[1:],
                b"\0" + struct.pack(">I", len(message) + 9) + message,
                b"\0" + struct.pack(">I", len(message) - 9) + message,
                b"\0\xff\xff\xff\xff" + message,
                b"\0\0\0\0\0",
                mutated(chance, good),
                b"\1" + struct.pack(">I", len(packed := gzip.compress(message))) + packed,
            )
        )
        fields = [
            (b":method", chance.choice((b"POST", b"POST", b"POST", b"GET", b"PUT"))),
            (b":scheme", b"https"),
            (b":path", chance.choice((PREDICTIONS, MODEL_INFER)).encode()),
            (b":authority", b"localhost"),
            (
                b"content-type",
                chance.choice((b"application/grpc", b"application/grpc+proto", b"application/grpc-web", b"text/html")),
            ),
            (b"te", chance.choice((b"trailers", b"gzip"))),
            (b"authorization", b"Bearer " + self.tokens["predict"].encode()),
        ]
        fields += chance.choice(
            (
                [],
                [(b"grpc-encoding", chance.choice((b"gzip", b"snappy", b"", b"\xff")))],
                [(b"grpc-timeout", chance.choice((b"0n", b"99999999H", b"-1S", b"x")))],
                [(b"grpc-accept-encoding", b"x" * 500)],
                [(b"x-odd", bytes(chance.choices(range(32, 256), k=20)))],
                [(b"user-agent", b"\xf0\x9f\x92\xa9")],
            )
        )
        pieces = [content[:3], content[3:]] if chance.random() < 0.3 else [content]

        def frames(stream: int) -> bytes:
            sent = http2.frame(http2.HEADERS, http2.END_HEADERS, stream, http2.block(fields))
            for number, piece in enumerate(pieces, 1):
                sent += http2.frame(http2.DATA, http2.END_STREAM if number == len(pieces) else 0, stream, piece)
            return sent

        return Call("framing", PREDICTIONS, content, frames=frames)

    def _bearer(self) -> list[tuple[str, str | bytes]]:
        return [("authorization", f"Bearer {self.tokens['predict']}")]

    @staticmethod
    def _predictions(body: bytes) -> bytes:
        request = inference_pb2.PredictionsRequest(model_name=MODEL, input={"data": body})
        content: bytes = request.SerializeToString()
        return content

    @staticmethod
    def _infer() -> Any:
        request = open_inference_grpc_pb2.ModelInferRequest(model_name=MODEL, id="a")
        tensor = request.inputs.add(name="text", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(_TEXT.encode())
        return request


def mutated(chance: random.Random, content: bytes) -> bytes:
    """With one to four changes: bytes flipped, replaced, inserted, taken out, repeated, cut off."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(changed) + 1)
        match chance.randrange(7):
            case 0 if place < len(changed):
                changed[place] ^= 1 << chance.randrange(8)
            case 1 if place < len(changed):
                changed[place] = chance.randrange(256)
            case 2:
                changed[place:place] = chance.randbytes(chance.randint(1, 8))
            case 3:
                del changed[place : place + chance.randint(1, 16)]
            case 4:
                piece = changed[place : place + chance.randint(1, 40)]
                changed[place:place] = piece * chance.choice((1, 2, 30))
            case 5 if chance.random() < 0.3:
                del changed[place:]
            case _:
                changed[place:place] = chance.choice(
                    (b'"', b"{", b"]", b"\\", b"\0", b"\xff", b"1e999", b"null", b"\xed\xa0\x80")
                )
    return bytes(changed)
