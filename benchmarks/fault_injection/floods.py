"""Clients that take a server's time and memory rather than its answers: row 9's, run in a process of their own.

They yield the CPU to everything else (nice), as if they ran on another machine: what is measured is the server.
"""

import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.fault_injection import http2
from benchmarks.fault_injection.bench import MODEL
from benchmarks.fault_injection.site import BODY, PREDICTIONS, message

_ROUTE = f"/predictions/{MODEL}".encode()
_STREAMS_AT_ONCE = 50
_MOST_STREAMS = 200_000  # on one connection, before it counts as never ended
_SECONDS_TO_END = 20
# Of a few kB each: together more than Linux buffers for a connection (4 MB), so that the server has to wait.
# Asked for in portions, a second apart: more than a client may ask for at once is refused with a short answer.
_LARGE_ANSWERS, _PORTIONS = 700, 4
# The answers of one such client are work for the server, of those who send nothing none.
_UNREAD_SHARE = 100


@dataclass(frozen=True, slots=True)
class Door:
    """What such clients know: the ports, the certificate, a token or none, and one of another client."""

    rest: int
    grpc: int
    certificate: Path
    token: str
    other_token: str = ""


class Attacker:
    """The process; a context manager."""

    def __enter__(self) -> "Attacker":
        # Not forked: this process has threads.
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=os.nice, initargs=(19,))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def start(self, attack: Callable[..., Any], *arguments: object) -> "Future[Any]":
        """Begins one of the functions below."""
        return self._pool.submit(attack, *arguments)


def ready() -> bool:
    """Does nothing: the process has started when it returns."""
    return True


# --- HTTP/2


def rapid_reset(door: Door, seconds: float) -> list[dict[str, Any]]:
    """Requests that are taken back at once, on one connection after another. Of each: its streams, and its end."""
    fields = [(b":method", b"POST"), (b":scheme", b"https"), (b":path", _ROUTE), (b":authority", b"x")]
    if door.token:
        fields.append((b"authorization", b"Bearer " + door.token.encode()))
    block = http2.block(fields)
    rounds = []
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        streams = 0
        with http2.Connection(door.rest, door.certificate) as connection:
            begun = time.monotonic()
            while not connection.ended and streams < _MOST_STREAMS:
                numbers = range(2 * streams + 1, 2 * (streams + _STREAMS_AT_ONCE) + 1, 2)
                content = b"".join(
                    http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, number, block)
                    + http2.frame(http2.RST_STREAM, 0, number, http2.CANCEL)
                    for number in numbers
                )
                streams += _STREAMS_AT_ONCE
                connection.send(content)
                connection.receive(0)
            rounds.append(_round(connection, begun, streams=streams))
    return rounds


def continuation(door: Door, seconds: float) -> list[dict[str, Any]]:
    """Headers that go on for ever, of each kind in turn, a connection each. Of each: its bytes, and its end."""
    begin = [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/live"), (b":authority", b"x")]
    if door.token:
        begin.append((b"authorization", b"Bearer " + door.token.encode()))
    kinds = {
        "large headers": http2.block([(b"x-large", b"a" * 8000)] * 2),
        "small headers": http2.block([(b"x", b"a")] * 2500),
        "one byte": b"\0",
        "nothing": b"",
    }
    rounds: list[dict[str, Any]] = []
    over = time.monotonic() + seconds
    for kind, payload in cycle(kinds.items()):
        if time.monotonic() > over and len(rounds) >= len(kinds):
            return rounds
        many = 1 if len(payload) > 1000 else 200
        content = http2.frame(http2.CONTINUATION, 0, 1, payload) * many
        sent = 0
        with http2.Connection(door.rest, door.certificate) as connection:
            begun = time.monotonic()
            connection.send(http2.frame(http2.HEADERS, http2.END_STREAM, 1, http2.block(begin)))
            while not connection.ended and time.monotonic() < begun + _SECONDS_TO_END:
                connection.send(content)
                connection.receive(0)
                sent += len(content)
            rounds.append(_round(connection, begun, kind=kind, bytes=sent))
    return rounds


def _round(connection: http2.Connection, begun: float, **what: object) -> dict[str, Any]:
    return {**what, "ended": connection.ended, "seconds": round(time.monotonic() - begun, 2)}


# --- Slow clients


@dataclass(slots=True)
class _Slow:
    """A slow client. drip: what it sends little by little, `drop` bytes a second."""

    kind: str
    socket: socket.socket
    since: float
    frames: http2.Frames | None = None
    drip: bytes = b""
    drop: int = 1
    ended: float | None = None


def slow(door: Door, count: int) -> list[tuple[str, float | None]]:
    """So many slow clients at once, of every kind. Of each: its kind, and seconds until it was closed (None: never).

    Where HTTP/2 is spoken, the end of its request counts, as of any other client's: its connection is idle after it.
    """
    unread = max(1, count // _UNREAD_SHARE)
    clients = [make(door) for make in islice(cycle(_SLOW.values()), count - unread)]
    for _ in range(unread):
        clients.append(_unread(door))
        _watch(clients, _PORTIONS)
    _watch(clients, 4 * _SECONDS_TO_END)
    for client in clients:
        client.socket.close()
    return [(c.kind, None if c.ended is None else round(c.ended - c.since, 2)) for c in clients]


def _watch(clients: Sequence[_Slow], seconds: float) -> None:
    """Notes when clients are closed, until all are or the time is over; those that drip go on with it."""
    begun = dripped = time.monotonic()
    while time.monotonic() < begun + seconds and any(client.ended is None for client in clients):
        time.sleep(0.05)
        drips = time.monotonic() - dripped > 1
        for client in clients:
            if client.ended is None:
                if drips and client.drip:
                    _drip(client)
                if _over(client):
                    client.ended = time.monotonic()
        if drips:
            dripped = time.monotonic()


def trickle(door: Door, count: int, seconds: float) -> dict[str, int]:
    """Clients with a token that send one byte of a body every two seconds, less than the silence that is allowed."""
    clients = [
        _http1(door, "body by drops", _head(door) + b'Content-Length: 500\r\n\r\n{"inputs": "') for _ in range(count)
    ]
    over = time.monotonic() + seconds
    while time.monotonic() < over:
        time.sleep(2)
        for client in clients:
            client.drip = b"a"
            _drip(client)
    closed = sum(_over(client) for client in clients)
    for client in clients:
        client.socket.close()
    return {"clients": count, "seconds": round(seconds), "closed": closed}


def _drip(client: _Slow) -> None:
    try:
        client.socket.send(client.drip[: client.drop])
    except OSError:
        return  # it has been closed, which _over sees, or nobody reads it
    client.drip = client.drip[client.drop :]


def _over(client: _Slow) -> bool:
    """Whether the other side has closed the connection, or ended the request."""
    # The connection's state; reading would make a client that does not read another one.
    state = client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    if state != _ESTABLISHED:
        return True
    if client.frames is None:
        return False
    readable, _, _ = select.select([client.socket], [], [], 0)
    if not readable:
        return False
    try:
        frames = client.frames.feed(client.socket.recv(65536))
    except (ssl.SSLWantReadError, TimeoutError):
        return False
    except OSError:
        return True
    return any(
        frame.kind in (http2.GOAWAY, http2.RST_STREAM)
        or (frame.kind in (http2.DATA, http2.HEADERS) and frame.flags & http2.END_STREAM)
        for frame in frames
    )


_ESTABLISHED = 1  # of Linux' TCP states


def _head(door: Door) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n" % (_ROUTE, door.token.encode())


def _tcp(port: int, kind: str, content: bytes) -> _Slow:
    raw = socket.create_connection(("127.0.0.1", port), timeout=30)
    raw.sendall(content)
    return _Slow(kind, raw, time.monotonic())


def _http1(door: Door, kind: str, content: bytes, drip: bytes = b"") -> _Slow:
    connection = http2.connect(door.rest, door.certificate)
    connection.sendall(content)
    return _Slow(kind, connection, time.monotonic(), drip=drip)


def _unread(door: Door) -> _Slow:
    """Asks for more than the buffers of both sides hold, and takes none of it.

    As another client: the first one has as many requests in flight already as it may.
    """
    connection = http2.connect(door.rest, door.certificate, receive_buffer=4096)
    request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n\r\n" % door.other_token.encode()
    portion = request * _LARGE_ANSWERS
    connection.sendall(portion)
    connection.settimeout(0.01)
    begun = time.monotonic()
    return _Slow("answers not taken", connection, begun, drip=portion * (_PORTIONS - 1), drop=len(portion))


def _http2(port: int, door: Door, kind: str, content: bytes, first: bytes | None = None) -> _Slow:
    connection = http2.Connection(port, door.certificate, first)
    connection.send(content)
    connection.socket.settimeout(0.01)
    return _Slow(kind, connection.socket, time.monotonic(), http2.Frames())


def _preface(door: Door) -> _Slow:
    connection = http2.connect(door.grpc, door.certificate, "h2")
    connection.sendall(http2.PREFACE[:10])
    return _Slow("half a preface", connection, time.monotonic())


def _call(door: Door, sent: float = 1.0, window: int | None = None) -> bytes:
    """A gRPC call of which so much is sent."""
    content = message(MODEL, BODY)
    body = b"\0" + len(content).to_bytes(4, "big") + content
    headers = http2.frame(http2.HEADERS, http2.END_HEADERS, 1, http2.block(_grpc_fields(door)))
    if sent < 1:
        return headers + http2.frame(http2.DATA, 0, 1, body[: int(len(body) * sent)])
    return headers + http2.frame(http2.DATA, http2.END_STREAM, 1, body)


def _grpc_fields(door: Door) -> list[tuple[bytes, bytes]]:
    return [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", PREDICTIONS.encode()),
        (b":authority", b"x"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        (b"authorization", b"Bearer " + door.token.encode()),
    ]


def _rest_fields(door: Door) -> list[tuple[bytes, bytes]]:
    return [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":path", _ROUTE),
        (b":authority", b"x"),
        (b"authorization", b"Bearer " + door.token.encode()),
    ]


def _cut(door: Door, end: int) -> bytes:
    """The first bytes of a frame of headers."""
    return http2.frame(http2.HEADERS, http2.END_HEADERS, 1, http2.block(_rest_fields(door)))[:end]


_SLOW: dict[str, Callable[[Door], _Slow]] = {
    "nothing, REST": lambda d: _tcp(d.rest, "nothing, REST", b""),
    "nothing, gRPC": lambda d: _tcp(d.grpc, "nothing, gRPC", b""),
    "half a greeting": lambda d: _tcp(d.grpc, "half a greeting", b"\x16\x03\x01\x02\0\1\0\1"),
    "half a header": lambda d: _http1(d, "half a header", _head(d)[:60]),
    "a header by drops": lambda d: _http1(d, "a header by drops", _head(d), drip=b"X-Slow: " + b"a" * 1000),
    "half a body": lambda d: _http1(d, "half a body", _head(d) + b'Content-Length: 100\r\n\r\n{"inputs": '),
    "half a chunk": lambda d: _http1(d, "half a chunk", _head(d) + b"Transfer-Encoding: chunked\r\n\r\n50\r\nabc"),
    "half a preface": _preface,
    "half a frame": lambda d: _http2(d.rest, d, "half a frame", _cut(d, 5)),
    "half of HEADERS": lambda d: _http2(d.rest, d, "half of HEADERS", _cut(d, 40)),
    "HEADERS without their end": lambda d: _http2(
        d.grpc, d, "HEADERS without their end", http2.frame(http2.HEADERS, 0, 1, http2.block(_grpc_fields(d)))
    ),
    "no DATA": lambda d: _http2(
        d.rest, d, "no DATA", http2.frame(http2.HEADERS, http2.END_HEADERS, 1, http2.block(_rest_fields(d)))
    ),
    "half a message": lambda d: _http2(d.grpc, d, "half a message", _call(d, sent=0.5)),
    "a window of 0": lambda d: _http2(d.grpc, d, "a window of 0", _call(d), http2.settings(window=0)),
}
