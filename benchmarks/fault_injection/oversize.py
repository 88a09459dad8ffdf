"""Row 10: bodies of a gigabyte, of which the server must take next to nothing."""

import time
from collections import Counter
from collections.abc import Callable
from itertools import cycle, islice
from statistics import median
from typing import Any

import psutil

from benchmarks.fault_injection import http2
from benchmarks.fault_injection.bench import MODEL, Bench, Target
from benchmarks.fault_injection.load import Load
from benchmarks.fault_injection.site import PREDICTIONS, Site

_BYTES = 1_000_000_000
_PIECE = bytes(16_000)
_READINGS, _SECONDS_BETWEEN = 9, 0.5
_MIB = 1024 * 1024
# What such a body may be told.
_REFUSED = {"413", "gRPC 8", "reset", "GOAWAY", "closed"}
# TorchServe refuses a message by the length that stands before it, sooner than the door would by what it has counted.
# It resets the stream or says UNKNOWN, and the door can only call the former UNAVAILABLE.
_REFUSED |= {"gRPC 2", "gRPC 14"}


def oversize(bench: Bench) -> tuple[list[Target], Any]:
    """Row 10: 1 GB over HTTP/1.1, HTTP/2 and gRPC, its length declared or not; who grows by it?"""
    count = bench.times(100, 12)
    with bench.site("oversize") as site:
        # Memory that any load takes once does not grow with these bodies: buffers, heaps, compiled code.
        with Load(site, MODEL, rest=8, grpc_calls=8):
            time.sleep(bench.times(30, 10))
        for attack in islice(cycle(_ATTACKS.values()), bench.times(count, 4 * len(_ATTACKS))):
            attack(site)
        before = _memory(site)
        sent: list[dict[str, Any]] = []
        told: list[tuple[str, str]] = []
        for name, attack in islice(cycle(_ATTACKS.items()), count):
            begun = time.monotonic()
            how, much = attack(site)
            told.append((name, how))
            sent.append({"body": name, "told": how, "sent": much, "seconds": round(time.monotonic() - begun, 2)})
        after = _memory(site)
        well = site.predict(site.session()).status_code
    growth = {name: round((after[name] - before[name]) / _MIB, 2) for name in before}
    taken = [name for name, how in told if how not in _REFUSED]
    most = max(entry["sent"] for entry in sent)
    targets = [
        Target("10a", f"bodies of 1 GB that were not refused, of {count}", len(taken), "0", not taken),
        *(
            Target("10b", f"growth of the {name}, MiB", growth[name], "< 1", growth[name] < 1)
            for name in ("worker", "JVM")
        ),
    ]
    return targets, {
        "told": {f"{name}: {how}": number for (name, how), number in sorted(Counter(told).items())},
        "most_sent_MiB": round(most / _MIB, 2),
        "seconds": {"longest": max(entry["seconds"] for entry in sent)},
        "growth_MiB": growth,
        "before_MiB": {name: round(value / _MIB, 1) for name, value in before.items()},
        "answers_after": well,
        "bodies": sent[: len(_ATTACKS)],
    }


def _memory(site: Site) -> dict[str, float]:
    """Resident bytes of each, the median of several readings."""
    readings = []
    for _ in range(_READINGS):
        time.sleep(_SECONDS_BETWEEN)
        [worker] = site.workers()
        nginx = sum(_resident(process) for process in site.nginx())
        readings.append({"worker": _resident(worker), "JVM": _resident(site.torchserve()), "nginx": nginx})
    return {name: median(reading[name] for reading in readings) for name in readings[0]}


def _resident(process: psutil.Process) -> int:
    resident: int = process.memory_info().rss
    return resident


Told = tuple[str, int]


def _http1(framing: bytes, piece: bytes) -> Callable[[Site], Told]:
    def attack(site: Site) -> Told:
        token = site.tokens["predict"].encode()
        head = b"POST /predictions/%b HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n" % (MODEL.encode(), token)
        sent = 0
        with http2.connect(site.rest, site.certificate) as connection:
            try:
                connection.sendall(head + framing + b"\r\n\r\n")
                while sent < _BYTES:
                    connection.sendall(piece)
                    sent += len(piece)
                    connection.settimeout(0.0001)
                    try:
                        return connection.recv(4096)[9:12].decode() or "closed", sent
                    except TimeoutError:
                        connection.settimeout(30)
            except OSError:
                return "closed", sent
        return "all of it was taken", sent

    return attack


def _http2(port: str, fields: list[tuple[bytes, bytes]], begin: bytes = b"") -> Callable[[Site], Told]:
    """begin: what stands before a gRPC message."""

    def attack(site: Site) -> Told:
        own = [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":authority", b"x"),
            (b"authorization", b"Bearer " + site.tokens["predict"].encode()),
        ]
        sent = 0
        piece = http2.frame(http2.DATA, 0, 1, _PIECE)
        with http2.Connection(getattr(site, port), site.certificate) as connection:
            # What may be sent: for the connection, and for the stream.
            windows = {0: 65535, 1: 65535}
            connection.send(http2.frame(http2.HEADERS, http2.END_HEADERS, 1, http2.block(own + fields)))
            if begin:
                connection.send(http2.frame(http2.DATA, 0, 1, begin))
                windows = {stream: left - len(begin) for stream, left in windows.items()}
            begun = time.monotonic()
            while sent < _BYTES and time.monotonic() < begun + 30:
                may = min(windows.values()) >= len(_PIECE)
                if may and connection.send(piece):
                    sent += len(_PIECE)
                    windows = {stream: left - len(_PIECE) for stream, left in windows.items()}
                for frame in connection.receive(0 if may else 0.5):
                    if frame.kind == http2.WINDOW_UPDATE:
                        windows[frame.stream] += int.from_bytes(frame.payload, "big")
                    elif frame.kind == http2.SETTINGS:
                        windows[1] += _initial_window(frame.payload) - 65535
                    elif frame.kind == http2.HEADERS:
                        code, status = http2.grpc_status_of(frame.payload), http2.status_of(frame.payload)
                        return (f"gRPC {code}" if code is not None else str(status)), sent
                    elif frame.kind == http2.RST_STREAM:
                        return "reset", sent
                if connection.ended:
                    return connection.ended, sent
        return ("all of it was taken" if sent >= _BYTES else "no answer in 30 s"), sent

    return attack


def _initial_window(settings: bytes) -> int:
    """How much of a stream the other side takes before it says more."""
    pairs = {settings[at : at + 2]: settings[at + 2 : at + 6] for at in range(0, len(settings), 6)}
    found = pairs.get(http2.INITIAL_WINDOW_SIZE.to_bytes(2, "big"))
    return int.from_bytes(found, "big") if found else 65535


_REST = [(b":path", f"/predictions/{MODEL}".encode())]
_GRPC = [(b":path", PREDICTIONS.encode()), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
_LENGTH = (b"content-length", b"%d" % _BYTES)
_MESSAGE = b"\0" + _BYTES.to_bytes(4, "big")
_ATTACKS: dict[str, Callable[[Site], Told]] = {
    "HTTP/1.1, declared": _http1(b"Content-Length: %d" % _BYTES, _PIECE),
    "HTTP/1.1, chunked": _http1(b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n" % (len(_PIECE), _PIECE)),
    "HTTP/1.1, one chunk": _http1(b"Transfer-Encoding: chunked\r\n\r\n%x" % _BYTES, _PIECE),
    "HTTP/2, declared": _http2("rest", [*_REST, _LENGTH]),
    "HTTP/2, not declared": _http2("rest", _REST),
    "gRPC, declared": _http2("grpc", [*_GRPC, _LENGTH], _MESSAGE),
    "gRPC, not declared": _http2("grpc", _GRPC, _MESSAGE),
    "gRPC, many messages": _http2("grpc", _GRPC, b"\0\0\0\0\1a\0" + (6_000_000).to_bytes(4, "big")),
}
