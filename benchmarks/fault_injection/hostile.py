"""Row 8: hostile requests, over REST and gRPC at once, with a canary after every thousand."""

import asyncio
import json
import math
import re
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from benchmarks.fault_injection import http2
from benchmarks.fault_injection.bench import MODEL, Bench, Target
from benchmarks.fault_injection.bodies import json_values
from benchmarks.fault_injection.grpc_calls import Call, GrpcCalls
from benchmarks.fault_injection.rest_requests import Ask, RestRequests
from benchmarks.fault_injection.site import PREDICTIONS, Site, message
from marble_client.stubs import inference_pb2, open_inference_grpc_pb2
from marble_client.wire import CANARY, decode_answer, decode_drift
from server import tokens

SEED = 20_260_101
_BETWEEN_CANARIES = 1000
_SECONDS_TO_ANSWER = 10
_CLIENTS = 24  # of each protocol
_OFFENDERS_KEPT, _ALIKE_KEPT = 100, 5
# What a request that is wrong may be told. 500 and 502 to 504 are never right; 503 is not either: nobody is restarting.
REST_ALLOWED = {200, 400, 401, 403, 404, 405, 413, 414, 415, 422, 429, 431}
# ... and what has its reason: a stream of a model that has none, an unknown Transfer-Encoding or version of HTTP.
REST_EXPLAINED = {501: ("NotSupported", "NotImplemented"), 505: ("VersionNotSupported",)}
GRPC_ALLOWED = {
    "OK",
    "INVALID_ARGUMENT",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
}
# What grpc-java says of bytes that are no message: it throws before there is a request, and either says so or resets
# the stream, which the door cannot tell from a server that is not there.
GRPC_UNREADABLE = {"UNKNOWN", "INTERNAL", "UNAVAILABLE"}
_DOOR_SAYS = "send it again a little later"
# TorchServe's own word for /v2/models/M/versions/V/infer.
_NO_VERSIONS = {"error": "Model versioning is not yet supported."}
# TorchServe says INTERNAL for some things that are the client's fault; these are its words for them.
GRPC_EXPLAINED = {"INTERNAL": re.compile("(?is)model not found|model .*does not exist|model_name is required")}


@dataclass
class Record:
    """What became of the requests."""

    statuses: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    alike: Counter[str] = field(default_factory=Counter)
    offenders: list[dict[str, str]] = field(default_factory=list)
    offended: int = 0
    hangs: int = 0
    controls_wrong: int = 0
    turned_away: int = 0
    longest: float = 0.0

    def note(self, protocol: str, kind: str, status: str, seconds: float) -> None:
        self.statuses[f"{protocol} {status}"] += 1
        self.kinds[f"{protocol} {kind}"] += 1
        self.longest = max(self.longest, seconds)

    def offend(self, number: int, request: Ask | Call, what: str) -> None:
        """Keeps a request that was answered as none should be."""
        self.offended += 1
        self.alike[f"{request.kind}: {what[:60]}"] += 1
        if self.alike[f"{request.kind}: {what[:60]}"] <= _ALIKE_KEPT and len(self.offenders) < _OFFENDERS_KEPT:
            content = request.wire if isinstance(request, Ask) else request.message
            shown = re.sub(rb"marble_[0-9a-f]{16}_[\w-]{43}", b"TOKEN", content)
            self.offenders.append(
                {"number": str(number), "kind": request.kind, "what": what, "request": repr(shown[:2000])}
            )


def hostile(bench: Bench) -> tuple[list[Target], Any]:
    """Row 8: mutated, made-up and infamous requests; is everything alive after them, and answering rightly?"""
    count = bench.times(100_000, 3_000)
    site = bench.site("hostile")
    known = {
        **site.tokens,
        "expired": tokens.add("old", ["predict"], int(time.time()) - 1, site.folder / tokens.FILE),
        "unknown": f"marble_{'0' * 16}_{'A' * 43}",
    }
    values = json_values(SEED, bench.times(3000, 300))
    rest, calls = RestRequests(SEED, known, values), GrpcCalls(SEED, known, values)
    with site:
        before = _processes(site)
        session = site.session()
        known_answer = site.predict(session).json()
        record, canaries_wrong, rounds = Record(), [], []
        begun = time.monotonic()
        half = _BETWEEN_CANARIES // 2
        for first in range(0, count, half):
            numbers = range(first, min(first + half, count))
            at = time.monotonic()
            asyncio.run(_Attack(site, rest, calls, known_answer, record).send(numbers))
            if wrong := _canary(site):
                canaries_wrong.append({"after": 2 * (numbers[-1] + 1), "what": wrong})
            rounds.append(round(time.monotonic() - at, 2))
        seconds = time.monotonic() - begun
        after = _processes(site)
        restarts = site.session("admin").get(f"{site.url}/status", timeout=10).json()
    died = [name for name in before if before[name] != after[name]]
    deaths = len(died) + restarts["restarts"] + restarts["workers_ended"]
    total = 2 * count
    return [
        Target("8a", f"worker, JVM or nginx deaths in {total} hostile requests", deaths, "0", deaths == 0),
        Target("8b", f"requests not ended in {_SECONDS_TO_ANSWER} s", record.hangs, "0", record.hangs == 0),
        Target("8c", "canaries wrong or missing", len(canaries_wrong), "0", not canaries_wrong),
        Target("8d", "answers that are none for a bad request", record.offended, "0", record.offended == 0),
        Target(
            "8e", "valid requests among them answered wrongly", record.controls_wrong, "0", record.controls_wrong == 0
        ),
    ], {
        "seed": SEED,
        "requests": {"rest": count, "grpc": count},
        "seconds": round(seconds),
        "seconds_between_canaries": {"longest": max(rounds), "rounds": len(rounds)},
        "grpc_told_to_send_again": record.turned_away,
        "longest_answer_s": round(record.longest, 2),
        "statuses": dict(sorted(record.statuses.items())),
        "kinds": dict(sorted(record.kinds.items())),
        "processes": {"before": before, "after": after},
        "canaries_wrong": canaries_wrong,
        "offences": dict(record.alike.most_common()),
        "offenders": record.offenders,
    }


def _processes(site: Site) -> dict[str, list[list[float]]]:
    """Process ids, with the time of each one's start, as an id may be used again."""
    return {
        name: [[process.pid, process.create_time()] for process in found]
        for name, found in (("jvm", [site.torchserve()]), ("workers", site.workers()), ("nginx", site.nginx()))
    }


def _canary(site: Site) -> str:
    """What was wrong with the model's golden example, over REST and gRPC; "" if nothing was."""
    headers = {"Content-Type": "application/json"}
    try:
        with site.session() as session:
            answer = session.post(f"{site.url}/predictions/{MODEL}", data=CANARY, headers=headers, timeout=10)
        if answer.status_code != 200:
            return f"REST: {answer.status_code} {answer.text[:300]}"
        decode_drift(decode_answer(answer.content).predictions)
        with site.channel() as channel:
            # As our client does: see _wrong_call for when a call is told to be sent again.
            metadata = (("authorization", f"Bearer {site.tokens['predict']}"),)
            ask = channel.unary_unary(PREDICTIONS, None, None)
            try:
                reply = ask(message(MODEL, CANARY), metadata=metadata, timeout=10)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                reply = ask(message(MODEL, CANARY), metadata=metadata, timeout=10)
        decode_drift(decode_answer(inference_pb2.PredictionResponse.FromString(reply).prediction).predictions)
    except Exception as error:  # whatever it is, the canary did not answer
        return repr(error)[:500]
    return ""


@dataclass
class _Attack:
    site: Site
    rest: RestRequests
    calls: GrpcCalls
    known: Any
    record: Record

    async def send(self, numbers: range) -> None:
        """Sends so many of each protocol, and notes what comes back."""
        rest, calls = iter(numbers), iter(numbers)
        trusted = ssl.create_default_context(cafile=str(self.site.certificate))
        credentials = grpc.ssl_channel_credentials(self.site.certificate.read_bytes())
        options = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
        async with grpc.aio.secure_channel(f"localhost:{self.site.grpc}", credentials, options) as channel:
            await asyncio.gather(
                *(self._ask(rest, trusted) for _ in range(_CLIENTS)),
                *(self._call(calls, channel) for _ in range(_CLIENTS)),
            )

    # --- REST

    async def _ask(self, numbers: Iterator[int], trusted: ssl.SSLContext) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        for number in numbers:
            ask = self.rest.ask(number)
            begun = time.monotonic()
            kept = False
            try:
                async with asyncio.timeout(_SECONDS_TO_ANSWER):
                    if connection is None:
                        connection = await asyncio.open_connection(
                            "127.0.0.1", self.site.rest, ssl=trusted, server_hostname="localhost"
                        )
                    status, body, kept = await _exchange(*connection, ask)
            except TimeoutError:
                status, body = 0, b"no answer in time"
                self.record.hangs += 1
            except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
                status, body = 0, type(error).__name__.encode()
            if connection is not None and (ask.alone or not kept):
                connection[1].transport.abort()
                connection = None
            self.record.note("REST", ask.kind, str(status or body.decode()), time.monotonic() - begun)
            if wrong := self._wrong(ask, status, body):
                self.record.offend(number, ask, wrong)
        if connection is not None:
            connection[1].transport.abort()

    def _wrong(self, ask: Ask, status: int, body: bytes) -> str:
        """Why this is no answer to such a request; "" if it is one."""
        if ask.control:
            if status == 200 and _same(json.loads(body), self.known):
                return ""
            self.record.controls_wrong += 1
            return f"{status} {body[:300]!r}"
        if status == 0:
            return "" if ask.silent and body != b"no answer in time" else body.decode()
        if status < 400 and status not in REST_ALLOWED:
            return f"{status}"
        if status >= 400 and not ask.headless:
            try:
                said = json.loads(body)
                if said == _NO_VERSIONS:
                    return ""
                code, kind = said["code"], said["type"]
            except (ValueError, KeyError, TypeError):
                return f"{status}, which does not say why: {body[:300]!r}"
            if code != status or not (status in REST_ALLOWED or kind in REST_EXPLAINED.get(status, ())):
                return f"{status} {body[:300]!r}"
        return ""

    # --- gRPC

    async def _call(self, numbers: Iterator[int], channel: grpc.aio.Channel) -> None:
        raw: _Raw | None = None
        for number in numbers:
            call = self.calls.call(number)
            begun = time.monotonic()
            body = b""
            try:
                if call.frames is not None:
                    async with asyncio.timeout(_SECONDS_TO_ANSWER):
                        if raw is None or raw.over:
                            raw = await _Raw.open(self.site)
                        status = await raw.exchange(call)
                    details = ""
                else:
                    status, details, body = await _unary(channel, call)
            except TimeoutError:
                status, details = "DEADLINE_EXCEEDED", ""
                raw = None
            except (OSError, asyncio.IncompleteReadError) as error:
                status, details = type(error).__name__, ""
                raw = None
            if status == "DEADLINE_EXCEEDED":
                self.record.hangs += 1
            self.record.note("gRPC", call.kind, status, time.monotonic() - begun)
            if wrong := self._wrong_call(call, status, details, body):
                self.record.offend(number, call, wrong)
        if raw is not None:
            raw.writer.transport.abort()

    def _wrong_call(self, call: Call, status: str, details: str, body: bytes) -> str:
        if status == "UNAVAILABLE" and _DOOR_SAYS in details and _can_be_read(call):
            # A connection to TorchServe that a broken call had before: its stream is reset late, nginx takes that for
            # the next call's. That one was not answered wrongly, and may be sent again.
            self.record.turned_away += 1
            return ""
        if call.control:
            if status == "OK" and _same(
                json.loads(inference_pb2.PredictionResponse.FromString(body).prediction), self.known
            ):
                return ""
            self.record.controls_wrong += 1
            return f"{status} {details} {body[:300]!r}"
        if call.frames is not None:
            # What is no gRPC may be told so in HTTP's or HTTP/2's words, or in those of _can_be_read.
            return "" if status in GRPC_ALLOWED | GRPC_UNREADABLE | {"reset", "GOAWAY", "closed"} else status
        # An error of one request is OK to TorchServe; the body has its status.
        if status == "OK" and (said := re.search(rb'"code": ?(5\d\d)', body)) and said[1] != b"501":
            return f"{status} {body[:300]!r}"
        if status in GRPC_ALLOWED:
            return ""
        if status in GRPC_UNREADABLE and not _can_be_read(call):
            return ""
        known = GRPC_EXPLAINED.get(status)
        return "" if known is not None and known.search(details) else f"{status} {details[:300]}"


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ask: Ask) -> tuple[int, bytes, bool]:
    """Status, body, and whether the connection goes on. Raises OSError or IncompleteReadError if nothing comes."""
    writer.write(ask.wire)
    status = 100
    while 100 <= status < 200:
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
    lowered = head.lower()
    kept = b"connection: close" not in lowered
    if ask.headless:
        return status, b"", kept
    if found := re.search(rb"\r\ncontent-length: (\d+)", lowered):
        return status, await reader.readexactly(int(found[1])), kept
    if b"transfer-encoding: chunked" in lowered:
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\r\n")
        return status, body, kept
    return status, await reader.read(1_000_000), False


async def _unary(channel: grpc.aio.Channel, call: Call) -> tuple[str, str, bytes]:
    """Status, details and answer."""
    method = channel.unary_unary(call.method, None, None)
    packed = grpc.Compression.Gzip if call.compressed else None
    try:
        body = await method(call.message, metadata=call.metadata, timeout=_SECONDS_TO_ANSWER, compression=packed)
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or "", b""
    return "OK", "", body


@dataclass
class _Raw:
    """A connection of HTTP/2 for frames made by hand, one stream after another."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    frames: http2.Frames
    stream: int = -1
    over: bool = False

    @classmethod
    async def open(cls, site: Site) -> "_Raw":
        trusted = http2.context(site.certificate, "h2")
        reader, writer = await asyncio.open_connection("127.0.0.1", site.grpc, ssl=trusted, server_hostname="localhost")
        window = http2.frame(http2.WINDOW_UPDATE, 0, 0, (2**30).to_bytes(4, "big"))
        acknowledged = http2.frame(http2.SETTINGS, http2.ACK, 0)
        writer.write(http2.PREFACE + http2.settings() + window + acknowledged)
        return cls(reader, writer, http2.Frames())

    async def exchange(self, call: Call) -> str:
        """A gRPC status by its name, "HTTP 415" and the like, "reset", "GOAWAY" or "closed"."""
        self.stream += 2
        if call.frames is not None:
            self.writer.write(call.frames(self.stream))
        status = "no status"
        while content := await self.reader.read(65536):
            for frame in self.frames.feed(content):
                if frame.kind == http2.GOAWAY:
                    self.over = True
                    return "GOAWAY"
                if frame.stream != self.stream:
                    continue
                if frame.kind == http2.HEADERS:
                    code, http_status = http2.grpc_status_of(frame.payload), http2.status_of(frame.payload)
                    if code is not None:
                        status = _NAMES[code]
                    elif http_status not in (0, 200):
                        status = f"HTTP {http_status}"
                if frame.kind == http2.RST_STREAM:
                    return status if status != "no status" else "reset"
                if frame.flags & http2.END_STREAM and frame.kind in (http2.HEADERS, http2.DATA):
                    return status
        self.over = True
        return "closed"


def _can_be_read(call: Call) -> bool:
    """Whether TorchServe can make a request of the message: it is one of its method, and JSON has its numbers."""
    try:
        if call.method == PREDICTIONS:
            inference_pb2.PredictionsRequest.FromString(call.message)
            return True
        request = open_inference_grpc_pb2.ModelInferRequest.FromString(call.message)
    except DecodeError:
        return False
    numbers = (n for t in request.inputs for n in (*t.contents.fp32_contents, *t.contents.fp64_contents))
    return all(map(math.isfinite, numbers))


_NAMES = {entry.value[0]: entry.name for entry in grpc.StatusCode}


def _same(answer: Any, known: Any) -> bool:
    """Whether two answers of the classifier agree; a neighbour's length changes the last digits of a score."""
    if isinstance(answer, list):
        return isinstance(known, list) and len(answer) == len(known) and all(map(_same, answer, known))
    if not isinstance(answer, dict) or not isinstance(known, dict) or answer.keys() != known.keys():
        return False
    return all(
        abs(answer[key] - known[key]) < 1e-2 if isinstance(known[key], float) else answer[key] == known[key]
        for key in known
    )
