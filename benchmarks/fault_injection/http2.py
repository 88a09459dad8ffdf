"""HTTP/2 frames written by hand, as no library would send them, and enough of a reader to see what is answered.

RFC 9113 has the frames, RFC 7541 the compression of headers; what is sent here is never compressed.
"""

import re
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
CANCEL = (8).to_bytes(4, "big")
# A setting: how much of an answer may come before the reader asks for more.
INITIAL_WINDOW_SIZE = 4
# What a frame may hold unless the other side allows more.
MAX_FRAME = 16384
# Statuses that HPACK has in its static table, by the byte that stands for the whole header.
_STATUSES = {0x88: 200, 0x89: 204, 0x8A: 206, 0x8B: 304, 0x8C: 400, 0x8D: 404, 0x8E: 500}
# A status with digits of its own: the name from the table (8), then three characters as they are.
_STATUS = re.compile(rb"[\x08\x18\x48]\x03([1-5][0-9][0-9])")
# "grpc-status" as a string with or without Huffman's code, then digits, which no code makes shorter.
_GRPC_STATUS = re.compile(rb"(?:\x88\x9a\xca\xc8\xb2\x12\x34\xda\x8f|\x0bgrpc-status)[\x01\x02]([0-9]{1,2})")


@dataclass(frozen=True, slots=True)
class Frame:
    """One that was received."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One to send."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Headers, each a literal that nobody is to remember, whatever bytes it is made of."""
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in fields)


def _string(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes((len(text),)) + text
    rest, coded = len(text) - 127, bytearray((127,))
    while rest >= 128:
        coded.append(rest % 128 + 128)
        rest //= 128
    return bytes(coded) + bytes((rest,)) + text


def settings(**changes: int) -> bytes:
    """The first frame of a connection. changes: by `window`, the only one that is used here."""
    values = b"".join(INITIAL_WINDOW_SIZE.to_bytes(2, "big") + value.to_bytes(4, "big") for value in changes.values())
    return frame(SETTINGS, 0, 0, values)


def status_of(headers: bytes) -> int:
    """The HTTP status in a block of headers; 0 if there is none."""
    begin = headers.lstrip(b"\x20\x3f")  # a change of the table's size may come first
    if begin and begin[0] in _STATUSES:
        return _STATUSES[begin[0]]
    found = _STATUS.match(begin)
    return int(found[1]) if found else 0


def grpc_status_of(headers: bytes) -> int | None:
    """The status of a gRPC call in a block of headers or trailers."""
    found = _GRPC_STATUS.search(headers)
    return int(found[1]) if found else None


class Frames:
    """Cuts what is received into frames."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, content: bytes) -> list[Frame]:
        """The frames that are whole by now."""
        rest, found = self._rest, []
        rest += content
        while len(rest) >= 9 and len(rest) >= (end := 9 + int.from_bytes(rest[:3], "big")):
            found.append(Frame(rest[3], rest[4], int.from_bytes(rest[5:9], "big") & 0x7FFFFFFF, bytes(rest[9:end])))
            del rest[:end]
        return found


def connect(port: int, certificate: Path, protocol: str = "", receive_buffer: int = 0) -> ssl.SSLSocket:
    """A TLS connection to 127.0.0.1; protocol: "h2" or "http/1.1", to agree upon. Its deadline is 30 s."""
    raw = socket.socket()
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    raw.settimeout(30)
    raw.connect(("127.0.0.1", port))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context(certificate, protocol).wrap_socket(raw, server_hostname="localhost")


def context(certificate: Path, protocol: str = "") -> ssl.SSLContext:
    """Trusts that certificate alone."""
    trusted = ssl.create_default_context(cafile=str(certificate))
    trusted.maximum_version = ssl.TLSVersion.TLSv1_2  # which sends nothing that it was not asked for
    if protocol:
        trusted.set_alpn_protocols([protocol])
    return trusted


class Connection:
    """One of HTTP/2 that blocks. What ended it stands in `ended`: "GOAWAY", "closed", or nothing yet."""

    def __init__(self, port: int, certificate: Path, first: bytes | None = None) -> None:
        """first: the settings to begin with."""
        self.socket = connect(port, certificate, "h2")
        self._frames = Frames()
        self.ended = ""
        # A first answer of nothing but settings, whose own are acknowledged.
        self.socket.sendall(PREFACE + (first if first is not None else settings()) + frame(SETTINGS, ACK, 0))

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, content: bytes) -> bool:
        """False if the other side has gone, or takes nothing any more."""
        try:
            self.socket.sendall(content)
        except OSError:
            self.ended = self.ended or "closed"
            return False
        return True

    def receive(self, seconds: float) -> list[Frame]:
        """What is there, or comes within so many seconds; at the end of the connection, nothing."""
        try:
            self.socket.settimeout(max(seconds, 0.0001))
            content = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            content = b""
        finally:
            self.socket.settimeout(30)
        if not content:
            self.ended = self.ended or "closed"
        found = self._frames.feed(content)
        if any(entry.kind == GOAWAY for entry in found):
            self.ended = "GOAWAY"
        return found
