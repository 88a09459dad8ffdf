"""Hostile REST requests, made from a seed: row 8."""

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.fault_injection.bench import MODEL
from benchmarks.fault_injection.bodies import HUGGING_FACE, NAUGHTY, RAW_JSON, TEXT, V1, V2, VALID, Bodies, mutated
from benchmarks.fault_injection.site import BODY

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


class RestRequests(Bodies):
    """Makes REST requests."""

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

    def _control(self, chance: random.Random) -> Ask:
        return Ask("control", self._request(HUGGING_FACE, json.dumps(BODY).encode()), control=True)

    def _json(self, chance: random.Random) -> Ask:
        path, body = self.shaped(chance)
        kind = chance.choices((b"application/json", None), (4, 1))[0]
        return Ask("json", self._request(path, body, kind))

    def _mutated(self, chance: random.Random) -> Ask:
        path, value = chance.choice(VALID)
        body = mutated(chance, json.dumps(value, ensure_ascii=False).encode())
        return Ask("mutated", self._request(path, body, chance.choice((b"application/json", None, b"text/plain"))))

    def _raw_json(self, chance: random.Random) -> Ask:
        path = chance.choices((HUGGING_FACE, V1, V2), (3, 1, 1))[0]
        return Ask("raw json", self._request(path, chance.choice(RAW_JSON)))

    def _binary(self, chance: random.Random) -> Ask:
        kind = chance.choice((None, b"image/png", b"audio/wav", b"application/octet-stream", b"application/json"))
        return Ask("media", self._request(HUGGING_FACE, self.file(chance), kind))

    def _typed(self, chance: random.Random) -> Ask:
        path, value = chance.choice(VALID)
        body = chance.choice(
            (json.dumps(value).encode(), TEXT.encode(), chance.choice(NAUGHTY).encode("utf-8", "replace"))
        )
        kind = chance.choice(_CONTENT_TYPES)
        return Ask("content type", self._request(path, body, kind), alone=b"\xff" in kind)

    def _header(self, chance: random.Random) -> Ask:
        path, value = chance.choice(VALID)
        body = json.dumps(value).encode()
        extra = [chance.choice(_HEADERS) for _ in range(chance.randint(1, 3))]
        if any(value == b"gzip" for _, value in extra) and chance.random() < 0.5:
            body = gzip.compress(body)
        # A second length that is shorter or a coding may make the body a next request, which has to be refused.
        names = {name for name, _ in extra}
        silent = bool(names & {b"Content-Length", b"Transfer-Encoding"})
        return Ask("header", self._request(path, body, b"application/json", extra), alone=True, silent=silent)

    def _authorized(self, chance: random.Random) -> Ask:
        path, value = chance.choice(VALID)
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
        path = chance.choice((HUGGING_FACE, chance.choice(_PATHS)))
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
        head = f"POST {HUGGING_FACE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.tokens['predict']}\r\n".encode()
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
