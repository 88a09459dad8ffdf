"""gRPC load: keeps so many unary calls of TorchServe's Predictions under way, with the lines of a file in turn.

    python benchmarks/grpc_load.py --target 127.0.0.1:7070 --model reviews --bodies bodies.jsonl

The token is taken from MARBLE_TOKEN. Prints one line of JSON, like speed/wrk.lua.

It writes and reads the frames of HTTP/2 (RFC 9113) itself, on one connection: a load generator takes its time from the
server, whose processor it shares, and a call costs grpc.aio ten times what a request costs wrk.
"""

import argparse
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np

from marble_client.stubs import inference_pb2

_METHOD = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
_SECONDS_TO_ANSWER = 60
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Kinds of frames, and their flags.
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_HEADER_TABLE_SIZE, _INITIAL_WINDOW_SIZE = 1, 4
_FRAME = struct.Struct(">IBI")  # length and kind in one number, flags, stream
_PREFIX = struct.Struct(">BI")  # of a message of gRPC: whether it is compressed, its length
_FIRST_WINDOW = 2**16 - 1
_LARGEST_WINDOW = 2**31 - 1
_LARGEST_FRAME = 2**14
# What a server that was allowed no table of headers writes for status 0.
_OK = b"\x0bgrpc-status\x010"


def messages(model: str, bodies: Sequence[bytes]) -> list[bytes]:
    """A serialized request for each body; serialized once, which leaves the machine to the server."""
    return [
        inference_pb2.PredictionsRequest(model_name=model, input={"data": body}).SerializeToString() for body in bodies
    ]


def is_answer(reply: bytes) -> bool:
    """Whether a serialized reply is a prediction: gRPC says OK for an error of one request, too."""
    return not inference_pb2.PredictionResponse.FromString(reply).prediction.lstrip().startswith(b'{"error"')


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2."""
    return _FRAME.pack(len(payload) << 8 | kind, flags, stream) + payload


def header_block(headers: Sequence[tuple[str, str]]) -> bytes:
    """Headers as literals that are not indexed (RFC 7541, 6.2.2)."""
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in headers)


def _string(text: str) -> bytes:
    """Its length, seven bits of it in the first byte, and the text as it is (RFC 7541, 5.1 and 5.2)."""
    content = text.encode("ascii")
    if (rest := len(content) - 127) < 0:
        return bytes([len(content)]) + content
    length = bytearray([127])
    while rest > 127:
        length.append(rest % 128 + 128)
        rest //= 128
    return bytes([*length, rest]) + content


class Load:
    """Calls under way on one connection.

    latencies: seconds, of calls that were answered in time; replies: theirs, serialized; errors: calls that failed.
    """

    def __init__(self, connection: socket.socket, headers: bytes, requests: Sequence[bytes]) -> None:
        prefixed = [_PREFIX.pack(0, len(request)) + request for request in requests]
        if (longest := max(map(len, prefixed))) > _LARGEST_FRAME:
            raise ValueError(f"a request has {longest} bytes, but a frame takes {_LARGEST_FRAME}: shorten the text")
        self._connection, self._headers = connection, headers
        self._requests, self._streams = cycle(prefixed), count(1, 2)
        self._output = bytearray()
        self._window = _FIRST_WINDOW  # bytes that the server is ready to take
        self._end = 0.0  # of the load, as time.perf_counter has it
        self._sent: dict[int, float] = {}
        self._received: dict[int, bytes] = {}
        self.latencies: list[float] = []
        self.replies: list[bytes] = []
        self.errors = 0

    def run(self, calls: int, seconds: float) -> None:
        """Keeps so many calls under way for so long, and waits for the last of them."""
        settings = struct.pack(">HIHI", _HEADER_TABLE_SIZE, 0, _INITIAL_WINDOW_SIZE, _LARGEST_WINDOW)
        self._output += _PREFACE + frame(_SETTINGS, 0, 0, settings)
        self._output += frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _LARGEST_WINDOW - _FIRST_WINDOW))
        self._end = time.perf_counter() + seconds
        unread = b""
        while True:
            while (
                (now := time.perf_counter()) < self._end and len(self._sent) < calls and self._window >= _LARGEST_FRAME
            ):
                self._call(now)
            if not self._sent and now >= self._end:
                return
            try:
                self._connection.sendall(self._output)
                more = self._connection.recv(2**18)
            except OSError:  # nothing came for too long, or the connection is broken
                more = b""
            if not more:
                self.errors += len(self._sent) or 1
                return
            self._output.clear()
            unread = self._read(unread + more)

    def _call(self, now: float) -> None:
        request, stream = next(self._requests), next(self._streams)
        self._output += frame(_HEADERS, _END_HEADERS, stream, self._headers)
        self._output += frame(_DATA, _END_STREAM, stream, request)
        self._window -= len(request)
        self._sent[stream] = now

    def _read(self, received: bytes) -> bytes:
        """Takes the whole frames of what came; returns the rest."""
        place = 0
        while len(received) >= (start := place + _FRAME.size):
            length_and_kind, flags, stream = _FRAME.unpack_from(received, place)
            if len(received) < (stop := start + (length_and_kind >> 8)):
                break
            self._take(length_and_kind & 0xFF, flags, stream, received[start:stop])
            place = stop
        return received[place:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            self._received[stream] = self._received.get(stream, b"") + payload
        elif kind == _HEADERS and flags & _END_STREAM:
            self._finish(stream, _OK in payload)
        elif kind == _RST_STREAM:
            self._finish(stream, False)
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._output += frame(kind, _ACK, 0, payload if kind == _PING else b"")
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload)

    def _finish(self, stream: int, good: bool) -> None:
        sent, reply = self._sent.pop(stream), self._received.pop(stream, b"")
        now = time.perf_counter()
        if not good:
            self.errors += 1
        elif now <= self._end:
            self.latencies.append(now - sent)
            self.replies.append(reply[_PREFIX.size :])


def load(target: str, model: str, bodies: Sequence[bytes], calls: int, seconds: float) -> dict[str, Any]:
    """Runs the load; see `benchmarks.speed.load.Sample` for what comes back."""
    host, _, port = target.rpartition(":")
    token = os.environ.get("MARBLE_TOKEN")
    headers = header_block(
        [
            *((":method", "POST"), (":scheme", "http"), (":path", _METHOD), (":authority", target)),
            *(("te", "trailers"), ("content-type", "application/grpc")),
            *([("authorization", f"Bearer {token}")] if token else []),
        ]
    )
    with socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found = Load(connection, headers, messages(model, bodies))
        found.run(calls, seconds)
    p50, p99 = np.percentile(found.latencies, [50, 99]) * 1e3 if found.latencies else (0.0, 0.0)
    return {
        "requests": len(found.replies),
        "seconds": seconds,
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "errors": found.errors + sum(not is_answer(reply) for reply in found.replies),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="127.0.0.1:7070", help="host:port")
    parser.add_argument("--model", required=True, help="name of the served model")
    parser.add_argument("--bodies", type=Path, required=True, help="one request body a line")
    parser.add_argument("--calls", type=int, default=64, help="calls under way at a time")
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    bodies = arguments.bodies.read_bytes().splitlines()
    result = load(arguments.target, arguments.model, bodies, arguments.calls, arguments.seconds)
    print(f"RESULT {json.dumps(result)}")


if __name__ == "__main__":
    main()
