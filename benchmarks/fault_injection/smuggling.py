"""Requests that two servers could take for different numbers of requests, each with a marked one behind it.

Hidden in each is a request that TorchServe would answer if it saw it: it has TorchServe's own key, and names the
model's version, which nobody else here does, so that TorchServe's count of requests tells of it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_injection import http2
from benchmarks.fault_injection.bench import MODEL
from benchmarks.fault_injection.site import BODY, PREDICTIONS, message

_ROUTE = f"/predictions/{MODEL}".encode()
# The version of the archives here, and of no request but the hidden one.
VERSION = "1.0"
_TE = b"Transfer-Encoding: chunked\r\n"


@dataclass(frozen=True, slots=True)
class Hidden:
    """The hidden request and what is around it. token: a client's; key: TorchServe's own."""

    number: int
    token: bytes
    key: bytes
    body: bytes

    @property
    def request(self) -> bytes:
        """What must never be answered."""
        return b"POST %b/%b HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\nX-Request-Id: hidden-%d\r\n" % (
            _ROUTE,
            VERSION.encode(),
            self.key,
            self.number,
        ) + b"Content-Length: %d\r\n\r\n%b" % (len(self.body), self.body)

    @property
    def marked(self) -> bytes:
        """What follows it on its connection, and may be answered."""
        return self.head(b"X-Request-Id: marked-%d\r\nConnection: close\r\n" % self.number) + (
            b"Content-Length: %d\r\n\r\n%b" % (len(self.body), self.body)
        )

    @property
    def ended(self) -> bytes:
        """A body of no chunks, then the hidden request: to one that goes by the length, all of it is a body."""
        return b"0\r\n\r\n" + self.request

    @property
    def chunk(self) -> bytes:
        """The hidden request in a chunk: to one that goes by a length of the first line, it is a request."""
        return b"%x\r\n%b\r\n0\r\n\r\n" % (len(self.request), self.request)

    def head(self, lines: bytes, first: bytes = b"POST " + _ROUTE + b" HTTP/1.1\r\n") -> bytes:
        """The beginning of a request with a client's token."""
        return b"%bHost: x\r\nAuthorization: Bearer %b\r\n%b" % (first, self.token, lines)


Http1 = Callable[[Hidden], bytes]


def _long(lines: bytes) -> Http1:
    """With a length that covers the hidden request, and `lines` that say it ends before."""
    return lambda h: h.head(lines + b"Content-Length: %d\r\n\r\n" % len(h.ended)) + h.ended


def _short(lines: bytes) -> Http1:
    """With a length that ends before the hidden request, and `lines` that say it goes on."""
    return lambda h: h.head(lines + b"Content-Length: %d\r\n\r\n" % h.chunk.index(b"P")) + h.chunk


def _lengths(form: bytes) -> Http1:
    """With an odd length; N stands for what would cover the hidden request."""
    return lambda h: h.head(form.replace(b"N", b"%d" % len(h.request)) + b"\r\n\r\n") + h.request


def _chunks(body: Callable[[Hidden], bytes]) -> Http1:
    return lambda h: h.head(_TE + b"\r\n") + body(h)


def _first(line: bytes, lines: bytes = b"") -> Http1:
    """With another first line."""
    return lambda h: h.head(lines + b"Content-Length: %d\r\n\r\n" % len(h.ended), line) + h.ended


def _extension(h: Hidden) -> bytes:
    """To one for whom a line ends at LF, the second chunk holds the hidden request; else it follows the last chunk."""
    inner = b"0\r\n\r\n" + h.request
    return b"2;\nxx\r\n%02x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner)


HTTP1: dict[str, Http1] = {
    "TE, long CL": _long(_TE),
    "TE, short CL": _short(_TE),
    "long CL, TE": lambda h: h.head(b"Content-Length: %d\r\n" % len(h.ended) + _TE + b"\r\n") + h.ended,
    "TE twice, long CL": _long(_TE + _TE),
    "TE with a space before the colon": _long(b"Transfer-Encoding : chunked\r\n"),
    "TE with a tab before the colon": _short(b"Transfer-Encoding\t: chunked\r\n"),
    "TE on a folded line": _long(b"X-Fold: a\r\n Transfer-Encoding: chunked\r\n"),
    "TE folded before its value": _long(b"Transfer-Encoding:\r\n chunked\r\n"),
    "TE of another coding": _short(b"Transfer-Encoding: xchunked\r\n"),
    "TE chunked, identity": _long(b"Transfer-Encoding: chunked, identity\r\n"),
    "TE identity, chunked": _short(b"Transfer-Encoding: identity, chunked\r\n"),
    "TE identity": _long(b"Transfer-Encoding: identity\r\n"),
    "TE after a vertical tab": _long(b"Transfer-Encoding:\x0bchunked\r\n"),
    "TE in quotes": _long(b'Transfer-Encoding: "chunked"\r\n'),
    "TE and an unknown one": _short(_TE + b"Transfer-Encoding: x\r\n"),
    "an unknown one and TE": _long(b"Transfer-Encoding: x\r\n" + _TE),
    "TE in capitals": _long(b"TRANSFER-ENCODING: CHUNKED\r\n"),
    "TE with an underscore": _long(b"Transfer_Encoding: chunked\r\n"),
    "TE with a NUL in its name": _long(b"Transfer\0-Encoding: chunked\r\n"),
    "TE with a NUL at its end": _short(b"Transfer-Encoding: chunked\0\r\n"),
    "TE with an odd byte": _long(b"Transfer-Encoding: \xffchunked\r\n"),
    "TE behind a bare CR": _long(b"X-Bare: a\rTransfer-Encoding: chunked\r\n"),
    "TE behind a bare LF": _long(b"X-Bare: a\nTransfer-Encoding: chunked\r\n"),
    "TE named by Connection": _long(b"Connection: Transfer-Encoding\r\n" + _TE),
    "TE in HTTP/1.0": _first(b"POST " + _ROUTE + b" HTTP/1.0\r\n", _TE),
    "CL 0 and N": _lengths(b"Content-Length: 0\r\nContent-Length: N"),
    "CL N and 0": _lengths(b"Content-Length: N\r\nContent-Length: 0"),
    "CL 0, N in one": _lengths(b"Content-Length: 0, N"),
    "CL +N": _lengths(b"Content-Length: +N"),
    "CL -0": _lengths(b"Content-Length: -0"),
    "CL 0x0": _lengths(b"Content-Length: 0x0"),
    "CL 0 with words": _lengths(b"Content-Length: 0 bytes"),
    "CL with a space before the colon": _lengths(b"Content-Length : N"),
    "CL with a NUL": _lengths(b"Content-Length: N\0"),
    "CL folded": _lengths(b"Content-Length: 0\r\n N"),
    "CL over 64 bits": _lengths(b"Content-Length: 18446744073709551616"),
    "CL named by Connection": _lengths(b"Connection: Content-Length\r\nContent-Length: N"),
    "CL 0 with an underscore, CL N": _lengths(b"Content_Length: 0\r\nContent-Length: N"),
    "chunk of size 0x0": _chunks(lambda h: b"0x0\r\n\r\n" + h.request),
    "chunk of size -0": _chunks(lambda h: b"-0\r\n\r\n" + h.request),
    "chunk of 65 bits": _chunks(lambda h: b"10000000000000000\r\n\r\n" + h.request),
    "chunk with LF in its extension": _chunks(_extension),
    "chunk without its CRLF": _chunks(lambda h: b"2\r\nxx0\r\n\r\n" + h.request),
    "chunk whose data are longer": _chunks(lambda h: b"1\r\nxx\r\n0\r\n\r\n" + h.request),
    "a length in the trailers": _chunks(lambda h: b"2\r\nxx\r\n0\r\nContent-Length: %d\r\n\r\n" % len(h.marked)),
    "absolute address of another host": _first(b"POST http://127.0.0.1:8081/models HTTP/1.1\r\n"),
    "address with an encoded request": lambda h: (
        (b"POST " + _ROUTE + b"%20HTTP/1.1%0d%0aHost:%20x%0d%0a%0d%0a HTTP/1.1\r\n")
        + h.head(b"Content-Length: %d\r\n\r\n" % len(h.ended), b"")
        + h.ended
    ),
    "two versions": _first(b"POST " + _ROUTE + b" HTTP/1.1 HTTP/1.1\r\n"),
    "first line with a bare CR": _first(b"POST " + _ROUTE + b" HTTP/1.1\rX: y\r\n"),
    "upgrade to h2c": _long(b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"),
    "upgrade to a web socket": _long(b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 777\r\n"),
    "expecting 100-continue": _long(b"Expect: 100-continue\r\n"),
}


Fields = list[tuple[bytes, bytes]]


def _fields(h: Hidden, extra: Fields, path: bytes = _ROUTE, **changed: bytes) -> Fields:
    begin = {b"method": b"POST", b"scheme": b"https", b"path": path, b"authority": b"x"}
    begin.update({name.encode(): value for name, value in changed.items()})
    pseudo = [(b":" + name, value) for name, value in begin.items()]
    return [*pseudo, (b"authorization", b"Bearer " + h.token), *extra]


def _split(h: Hidden) -> bytes:
    """A header's end, a request's end, and the hidden request."""
    return b"a\r\nContent-Length: 0\r\n\r\n" + h.request


# Each gives the headers, and the body.
HTTP2: dict[str, Callable[[Hidden], tuple[Fields, bytes]]] = {
    "h2: length 0, and a body": lambda h: (_fields(h, [(b"content-length", b"0")]), h.request),
    "h2: length too short": lambda h: (_fields(h, [(b"content-length", b"5")]), b"aaaaa" + h.request),
    "h2: length too long": lambda h: (_fields(h, [(b"content-length", b"5000")]), h.request),
    "h2: two lengths": lambda h: (
        _fields(h, [(b"content-length", b"0"), (b"content-length", b"%d" % len(h.request))]),
        h.request,
    ),
    "h2: transfer-encoding": lambda h: (_fields(h, [(b"transfer-encoding", b"chunked")]), h.ended),
    "h2: connection and upgrade": lambda h: (
        _fields(h, [(b"connection", b"upgrade"), (b"upgrade", b"h2c")]),
        h.ended,
    ),
    "h2: CR LF in a value": lambda h: (_fields(h, [(b"x-split", _split(h))]), h.body),
    "h2: LF in a value": lambda h: (_fields(h, [(b"x-split", b"a\nTransfer-Encoding: chunked")]), h.ended),
    "h2: CR in a value": lambda h: (_fields(h, [(b"x-split", b"a\rTransfer-Encoding: chunked")]), h.ended),
    "h2: NUL in a value": lambda h: (_fields(h, [(b"x-split", b"a\0b")]), h.body),
    "h2: CR LF in a name": lambda h: (_fields(h, [(b"x: a\r\ntransfer-encoding", b"chunked")]), h.ended),
    "h2: a colon in a name": lambda h: (_fields(h, [(b"transfer-encoding: chunked\r\nx", b"a")]), h.ended),
    "h2: capitals in a name": lambda h: (_fields(h, [(b"Transfer-Encoding", b"chunked")]), h.ended),
    "h2: CR LF in the path": lambda h: (_fields(h, [], _ROUTE + b" HTTP/1.1\r\nHost: x\r\n\r\n" + h.request), h.body),
    "h2: a space in the path": lambda h: (_fields(h, [], _ROUTE + b" HTTP/1.1"), h.body),
    "h2: CR LF in the method": lambda h: (_fields(h, [], method=h.request + b"POST"), h.body),
    "h2: CR LF in the authority": lambda h: (_fields(h, [], authority=_split(h)), h.body),
    "h2: another scheme": lambda h: (_fields(h, [], scheme=b"http://x/?"), h.body),
    "h2: the path twice": lambda h: (_fields(h, [(b":path", b"/models")]), h.body),
    "h2: a pseudo-header last": lambda h: ([*_fields(h, [])[1:], (b":method", b"POST")], h.body),
    "h2: CONNECT with a protocol": lambda h: (
        _fields(h, [(b":protocol", b"websocket")], method=b"CONNECT"),
        h.request,
    ),
}


def send_http1(port: int, certificate: Path, content: bytes) -> list[bytes]:
    """Sends it on a connection of its own; returns the answers, heads and bodies."""
    received = b""
    with http2.connect(port, certificate) as connection:
        try:
            connection.sendall(content)
            while piece := connection.recv(65536):
                received += piece
        except OSError:
            pass  # a reset is an end like any other, silence is none and shows as no answer
    return re.split(rb"(?=HTTP/1\.1 [1-5][0-9][0-9] )", received)[1:]


def send_http2(
    port: int, certificate: Path, h: Hidden, fields: Fields, body: bytes
) -> tuple[dict[int, str], dict[int, bytes]]:
    """Sends it as stream 1, and a marked request as stream 3; returns status and content of the answer to each."""
    headers = http2.frame(http2.HEADERS, http2.END_HEADERS, 1, http2.block(fields))
    data = http2.frame(http2.DATA, http2.END_STREAM, 1, body)
    following = http2.frame(http2.HEADERS, http2.END_HEADERS, 3, http2.block(_fields(h, [])))
    following += http2.frame(http2.DATA, http2.END_STREAM, 3, h.body)
    told: dict[int, str] = {}
    contents: dict[int, bytes] = {}
    ended: set[int] = set()
    with http2.Connection(port, certificate) as connection:
        connection.send(headers + data + following)
        while not connection.ended and not {1, 3} <= ended:
            frames = connection.receive(10)
            if not frames and not connection.ended:
                break
            for frame in frames:
                if frame.kind == http2.HEADERS and frame.stream not in told:
                    told[frame.stream] = str(http2.status_of(frame.payload))
                elif frame.kind == http2.DATA:
                    contents[frame.stream] = contents.get(frame.stream, b"") + frame.payload
                elif frame.kind == http2.RST_STREAM:
                    told.setdefault(frame.stream, "reset")
                elif frame.kind == http2.GOAWAY:
                    told.setdefault(0, "GOAWAY")
                if frame.kind == http2.RST_STREAM or (frame.kind in (0, 1) and frame.flags & http2.END_STREAM):
                    ended.add(frame.stream)
    return told, contents


# The same of gRPC, which nginx speaks to TorchServe, too.
GRPC: dict[str, Callable[[Hidden], tuple[Fields, bytes]]] = {
    "gRPC: CR LF in a value": lambda h: _call(h, [(b"x-split", _split(h))]),
    "gRPC: CR LF in a name": lambda h: _call(h, [(b"x: a\r\nauthorization", b"Bearer " + h.key)]),
    "gRPC: length 0, and a body": lambda h: _call(h, [(b"content-length", b"0")]),
    "gRPC: transfer-encoding": lambda h: _call(h, [(b"transfer-encoding", b"chunked")]),
}


def _call(h: Hidden, extra: Fields) -> tuple[Fields, bytes]:
    content = message(MODEL, BODY)
    fields = _fields(h, [(b"content-type", b"application/grpc"), (b"te", b"trailers"), *extra], PREDICTIONS.encode())
    return fields, b"\0" + len(content).to_bytes(4, "big") + content
