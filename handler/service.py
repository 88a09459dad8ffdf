"""The TorchServe side of Marble, and the only module that knows TorchServe: lifecycle, statuses, headers."""

import json
import logging
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from handler import digests, formats, golden
from handler.engine import Engine
from handler.errors import InternalError, RequestError, TooLarge
from handler.events import Events, Trace
from handler.formats import Reply, hugging_face
from handler.formats.canary import Canary
from handler.messages import Media, Model, Piece, Request, Result, Usage, jsonable
from handler.metrics import Metrics, Served, Totals, labels_of

_PIECE = 1 << 18
# What TorchServe would not read as part of a metric's label: its separators, controls, and what is not UTF-8.
_UNSAFE = re.compile(r"[|,:\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# Shares of the labels among the validation set's predictions: what the monitoring compares those of users with.
SHARES = "label-shares.json"
# The header of an answer that says whether more of it follows.
_STREAM_NEXT = "ts_stream_next"
# What TorchServe asks to write that header, by whether more follows; None: the header is left as it is.
_IS_LAST: dict[bool | None, Callable[[bytes], bool | None]] = {
    True: lambda _: False,
    False: lambda _: True,
    None: lambda _: None,
}


class Service:
    """One loaded model in one worker."""

    def __init__(self, context: Any) -> None:
        """Checks the archive's digests, loads the model and replays its golden set; raises if one of them fails."""
        _trim_worker()
        model_dir = Path(context.system_properties["model_dir"])
        digests.verify(model_dir)
        self._engine = Engine(model_dir)
        golden.replay(self._engine, model_dir / golden.FILE_NAME)
        self._canary = Canary(
            golden.read(model_dir / golden.FILE_NAME)[0],
            self._engine.task.drift,
            self._engine.settings.golden_tolerance,
        )
        self._model = Model(
            context.model_name,
            str(context.manifest["model"]["modelVersion"]),
            digests.model_digest(model_dir),
            self._engine.settings.task,
            self._engine.task.nests_single,
        )
        self._events = Events(model=self._model.name, version=self._model.version)
        self._metrics = Metrics(self._engine.task, partial(_write_metrics, self._model))
        settings = self._engine.settings
        facts = {"task": settings.task, "backend": settings.backend, "precision": settings.precision}
        shares = json.loads(path.read_text("utf-8")) if (path := model_dir / SHARES).exists() else {}
        self._metrics.loaded({**facts, "digest": self._model.digest}, shares)
        # What the golden set cost is no user's.
        self._work = self._engine.work
        self._work.take()
        # What became of each request of the batch, by its place in it.
        self._outcomes: dict[int, Result | RequestError] = {}

    def handle(self, rows: Sequence[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Answers one batch: one JSON body per row, in order. A bad row has its own status and hurts no other."""
        started = time.perf_counter()
        headers = [context.get_all_request_header(index) for index in range(len(rows))]
        ids = [context.get_request_id(index) for index in range(len(rows))]
        for index, row_headers in enumerate(headers):
            # gRPC's StreamPredictions2, which ends in an error whatever is answered. An answer would reach a call that
            # may be closed already, and then the worker never gets another request, though it stays READY.
            if formats.is_grpc(row_headers) and context.header_key_sequence_id in row_headers:
                del context.request_ids[index]
        opened = [self._open(row, row_headers) for row, row_headers in zip(rows, headers, strict=True)]
        self._outcomes = {}
        if any(isinstance(request, Request) and request.stream for request, _ in opened):
            bodies = self._stream(opened, headers, context)
        else:
            bodies = self._answer_all(opened, headers, context)
        canaries = [isinstance(reply, Canary) for _, reply in opened]
        self._record(ids, rows, headers, canaries, time.perf_counter() - started)
        return bodies

    def _answer_all(
        self,
        opened: Sequence[tuple[Request | RequestError, Reply]],
        headers: Sequence[Mapping[str, Any]],
        context: Any,
    ) -> list[bytes]:
        """Answers a batch, none of which wants a stream."""
        outcomes = iter(self._predict([request for request, _ in opened if isinstance(request, Request)]))
        return [
            self._respond(
                context,
                index,
                next(outcomes) if isinstance(request, Request) else request,
                reply,
                formats.is_grpc(headers[index]),
            )
            for index, (request, reply) in enumerate(opened)
        ]

    def _record(
        self,
        ids: Sequence[str | None],
        rows: Sequence[Mapping[str, Any]],
        headers: Sequence[Mapping[str, Any]],
        canaries: Sequence[bool],
        seconds: float,
    ) -> None:
        """Counts a batch, and logs its errors and those requests whose callers sample them."""
        served = []
        for index, (request_id, row, canary) in enumerate(zip(ids, rows, canaries, strict=True)):
            protocol: Literal["rest", "grpc"] = "grpc" if formats.is_grpc(headers[index]) else "rest"
            request = Served(self._outcomes[index], protocol, canary)
            served.append(request)
            trace = Trace.read(row, headers[index])
            fields = {"request_id": request_id, "protocol": protocol, "status": request.code}
            if isinstance(request.outcome, RequestError):
                self._events.error(trace, **fields, type=type(request.outcome).__name__)
            elif trace is not None and trace.sampled:
                usage = asdict(request.outcome.usage)
                self._events.request(trace, **fields, seconds=round(seconds, 6), batch=len(rows), **usage)
        self._metrics.batch(served, seconds, self._work.take())

    def _open(self, row: Mapping[str, Any], headers: Mapping[str, Any]) -> tuple[Request | RequestError, Reply]:
        """The request of one row, or what is wrong with it; and how to reply."""
        try:
            request, reply = formats.decode(row, headers, self._canary)
            stream = request.stream and not formats.is_grpc(headers)
            return replace(request, stream=stream, explain=headers.get("explain") == "True"), reply
        except RequestError as error:
            return error, formats.reply_to_unreadable(row, headers)
        except Exception as error:
            self._events.defect(error)
            failure = InternalError("the request could not be read; the server's log has the cause")
            return failure, formats.reply_to_unreadable(row, headers)

    def _stream(
        self,
        opened: Sequence[tuple[Request | RequestError, Reply]],
        headers: Sequence[Mapping[str, Any]],
        context: Any,
    ) -> list[bytes]:
        """Answers a batch some of which want a stream: those as server-sent events, the others as ever."""
        requests = {index: request for index, (request, _) in enumerate(opened) if isinstance(request, Request)}
        outlet = _Outlet(context, [index for index, request in requests.items() if request.stream])

        def answer(index: int, outcome: Result | RequestError) -> None:
            if index in outlet.begun:
                assert isinstance(outcome, RequestError)
                self._outcomes[index] = outcome
                outlet.add(index, _event(hugging_face.stream_error(outcome)), last=True)
            else:
                grpc = formats.is_grpc(headers[index])
                outlet.answer(index, self._respond(context, index, outcome, opened[index][1], grpc))

        for index, (request, _) in enumerate(opened):
            if isinstance(request, RequestError):
                answer(index, request)
        places = list(requests)
        try:
            for step in self._engine.stream(list(requests.values())):
                for place, said in step:
                    index = places[place]
                    if not isinstance(said, Piece):
                        answer(index, said)
                        continue
                    if index not in outlet.begun:
                        self._set_headers(context, index, "text/event-stream", said.usage)
                    outlet.add(index, _event(said.value), last=said.last)
                    if said.last:
                        self._outcomes[index] = Result([None], said.usage)
                outlet.send()
        except Exception as error:
            self._events.defect(error)
            for index in requests.keys() - outlet.done:
                if requests[index].stream:
                    answer(index, InternalError("the model failed; the server's log has the cause"))
                else:
                    [outcome] = self._predict([requests[index]])
                    answer(index, outcome)
            outlet.send()
        return outlet.rest(len(opened))

    def _predict(self, requests: Sequence[Request]) -> list[Result | RequestError]:
        """The engine's outcomes; if the batch as a whole fails, each request is tried alone to find the culprit."""
        try:
            return self._engine.predict(requests)
        except Exception as error:
            if len(requests) > 1:
                return [outcome for request in requests for outcome in self._predict([request])]
            self._events.defect(error)
            return [InternalError("the model failed on this request; the server's log has the cause")]

    def _respond(self, context: Any, index: int, outcome: Result | RequestError, reply: Reply, grpc: bool) -> bytes:
        """Encodes one outcome and sets its status and headers."""
        try:
            body, media_type, usage = self._answer(outcome, reply)
            self._set_headers(context, index, media_type, usage)
            self._outcomes[index] = outcome
        except RequestError as error:
            self._outcomes[index] = error
            context.set_response_status(code=error.code, phrase=None, idx=index)
            body = _encode(reply.error(error, self._model))
            self._set_headers(context, index, "application/json", None)
        if grpc:
            # Without it gRPC StreamPredictions kills the worker. Unary calls ignore it, and nothing but this header
            # would tell the two apart: so both get one whole answer, for a second part would wedge a unary one.
            context.set_response_header(index, _STREAM_NEXT, "false")
        return body

    def _set_headers(self, context: Any, index: int, media_type: str, usage: Usage | None) -> None:
        """What the headers of an answer say; `usage`: None for an error."""
        headers = {
            "x-model-name": self._model.name,
            "x-model-version": self._model.version,
            "x-model-digest": self._model.digest,
        }
        if usage is not None:
            headers |= {
                "x-usage-tokens": str(usage.tokens),
                "x-usage-truncated": str(usage.truncated).lower(),
                "x-usage-windows": str(usage.windows),
            }
        context.set_response_content_type(index, media_type)
        for name, value in headers.items():
            context.set_response_header(index, name, value)

    def _answer(self, outcome: Result | RequestError, reply: Reply) -> tuple[bytes, str, Usage]:
        """The body of a good answer, its media type and usage. Raises RequestError where there is none."""
        if isinstance(outcome, RequestError):
            raise outcome
        try:
            value = reply.answer(outcome, self._model)
            body = value.content if isinstance(value, Media) else _encode(value)
        except RequestError:
            raise
        except Exception as error:
            self._events.defect(error)
            raise InternalError("the answer could not be written; the server's log has the cause") from None
        if len(body) > self._engine.settings.max_response_bytes:
            raise TooLarge(f"the answer has {len(body)} bytes; send fewer inputs in one request")
        return body, value.media_type if isinstance(value, Media) else "application/json", outcome.usage


class _Outlet:
    """Sends what is ready of a batch ahead of the rest.

    TorchServe takes any number of messages for a batch, each about some of its requests. A stream goes on after a
    message in which its header ts_stream_next is "true" and ends with "false", which must not be in its first message;
    an answer without the header is whole.
    The first message without a "true" is the batch's last, so whole answers go ahead only while a stream goes on. A
    request that is done with must not be in a later message.
    """

    def __init__(self, context: Any, streams: Sequence[int]) -> None:
        self.begun: set[int] = set()
        self.done: set[int] = set()
        self._context = context
        self._streams = set(streams)
        self._started: set[int] = set()
        self._ready: dict[int, bytes] = {}

    def add(self, index: int, body: bytes, *, last: bool) -> None:
        """Takes the next part of a stream."""
        self._ready[index] = self._ready.get(index, b"") + body
        self.begun.add(index)
        if last:
            self.done.add(index)

    def answer(self, index: int, body: bytes) -> None:
        """Takes a whole answer."""
        self._ready[index] = body
        self.done.add(index)
        self._streams.discard(index)

    def send(self) -> None:
        """Sends what was taken since, if any of it can go now."""
        ready = self._streams & self._ready.keys()
        following = (self._streams & self.begun) - self.done | ready - self._started
        # The last streams to end are kept open, for the whole answers that may come later: the batch ends them all.
        following = following or ready
        if not self._ready or not following:
            return
        if following.isdisjoint(self._ready):
            self._ready[min(following)] = b""
        ended = (self._streams & self._started & self.done) - following
        self._ready |= dict.fromkeys(ended - ready, b"")
        self._write({index: True if index in following else False if index in ended else None for index in self._ready})
        self._started |= following & ready
        self._streams -= ended

    def rest(self, count: int) -> list[bytes]:
        """What the batch's last message has for each of its `count` requests: TorchServe passes over those done with,
        and ends the streams that are not."""
        return [self._ready.get(index, b"") for index in range(count)]

    def _write(self, follows: Mapping[int, bool | None]) -> None:
        """Sends what is ready; `follows`: whether more follows, None for a whole answer."""
        from ts.protocol.otf_message_handler import create_predict_response

        context, ids = self._context, {index: self._context.request_ids[index] for index in self._ready}
        context.stopping_criteria = {index: _IS_LAST[more] for index, more in follows.items()}
        context.cl_socket.sendall(create_predict_response(self._ready, ids, "Prediction success", 200, context))
        context.stopping_criteria = None
        self._ready = {}
        for index, more in follows.items():
            if not more:
                # The very mapping that TorchServe makes the batch's last message from.
                del context.request_ids[index]


def _encode(value: Any) -> bytes:
    """ASCII JSON: no character a client sent can break the transport. Raises ValueError for NaN and infinities."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=jsonable).encode("ascii")


def _event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data:" + _encode(value) + b"\n\n"


def _write_metrics(model: Model, totals: Totals) -> None:
    """Says on stdout what has been added to each metric, in the lines that TorchServe's frontend looks for there.

    deploy/metrics.yaml declares the metrics; TorchServe goes by the order of the labels, and takes the values apart at
    these characters; it knows no exponent with a plus, which repr writes from 1e16 on.
    """
    end = f"|#hostname:{socket.gethostname()},{int(time.time())}\n"
    lines = []
    for series, value in totals.items():
        labels = ",".join(f"{name}:{_UNSAFE.sub('_', text) or '_'}" for name, text in labels_of(series, model).items())
        lines.append(f"[METRICS]{series[0]}.unit:{float(value)!r}|#{labels}{end}")
    # In one piece, so that no other line can come between.
    sys.stdout.write("".join(lines))
    sys.stdout.flush()


def _trim_worker() -> None:
    """Takes out of TorchServe's worker what it spends on every batch for nothing.

    That is two lines of log and a gauge of the last batch's time, which nobody reads; and a system call for each of the
    hundred fields of a request. Warnings and errors are logged as ever.
    """
    from ts.protocol import otf_message_handler

    logging.getLogger().setLevel(logging.WARNING)
    otf_message_handler._retrieve_buffer = _Receiver().read


class _Receiver:
    """Reads what the frontend sends in large pieces and hands it out in those that the protocol asks for."""

    def __init__(self) -> None:
        self._received = bytearray()

    def read(self, connection: socket.socket, length: int) -> bytearray:
        """The next `length` bytes. Ends the worker, as TorchServe does, when the frontend has gone."""
        while len(self._received) < length:
            piece = connection.recv(_PIECE)
            if not piece:
                sys.exit(0)
            self._received += piece
        found = self._received[:length]
        del self._received[:length]
        return found
