"""The TorchServe side of Marble, and the only module that knows TorchServe: lifecycle, statuses, headers."""

import json
import logging
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handler import digests, formats, golden
from handler.engine import Engine
from handler.errors import InternalError, NotSupported, RequestError, TooLarge
from handler.formats import Reply
from handler.messages import Media, Model, Request, Result, jsonable


class Service:
    """One loaded model in one worker."""

    def __init__(self, context: Any) -> None:
        """Checks the archive's digests, loads the model and replays its golden set; raises if one of them fails."""
        _quiet_worker_log()
        model_dir = Path(context.system_properties["model_dir"])
        digests.verify(model_dir)
        self._engine = Engine(model_dir)
        golden.replay(self._engine, model_dir / golden.FILE_NAME)
        self._model = Model(
            context.model_name,
            str(context.manifest["model"]["modelVersion"]),
            digests.model_digest(model_dir),
            self._engine.task.nests_single,
        )

    def handle(self, rows: Sequence[Mapping[str, Any]], context: Any) -> list[bytes]:
        """Answers one batch: one JSON body per row, in order. A bad row has its own status and hurts no other."""
        headers = [context.get_all_request_header(index) for index in range(len(rows))]
        opened = [_open(row, row_headers) for row, row_headers in zip(rows, headers, strict=True)]
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

    def _predict(self, requests: Sequence[Request]) -> list[Result | RequestError]:
        """The engine's outcomes; if the batch as a whole fails, each request is tried alone to find the culprit."""
        try:
            return self._engine.predict(requests)
        except Exception as error:
            if len(requests) > 1:
                return [outcome for request in requests for outcome in self._predict([request])]
            _log_without_text(error)
            return [InternalError("the model failed on this request; the server's log has the cause")]

    def _respond(self, context: Any, index: int, outcome: Result | RequestError, reply: Reply, grpc: bool) -> bytes:
        """Encodes one outcome and sets its status and headers."""
        media_type = "application/json"
        headers = {
            "x-model-name": self._model.name,
            "x-model-version": self._model.version,
            "x-model-digest": self._model.digest,
        }
        try:
            body, media_type, usage = self._answer(outcome, reply)
            headers |= usage
        except RequestError as error:
            context.set_response_status(code=error.code, phrase=None, idx=index)
            body = _encode(reply.error(error, self._model))
        if grpc:
            # Without it gRPC StreamPredictions kills the worker of a model that does not stream; unary calls ignore it.
            headers["ts_stream_next"] = "false"
        context.set_response_content_type(index, media_type)
        for name, value in headers.items():
            context.set_response_header(index, name, value)
        return body

    def _answer(self, outcome: Result | RequestError, reply: Reply) -> tuple[bytes, str, dict[str, str]]:
        """The body of a good answer, its media type and its usage headers. Raises RequestError where there is none."""
        if isinstance(outcome, RequestError):
            raise outcome
        try:
            value = reply.answer(outcome, self._model)
            body = value.content if isinstance(value, Media) else _encode(value)
        except RequestError:
            raise
        except Exception as error:
            _log_without_text(error)
            raise InternalError("the answer could not be written; the server's log has the cause") from None
        if len(body) > self._engine.settings.max_response_bytes:
            raise TooLarge(f"the answer has {len(body)} bytes; send fewer inputs in one request")
        return (
            body,
            value.media_type if isinstance(value, Media) else "application/json",
            {
                "x-usage-tokens": str(outcome.usage.tokens),
                "x-usage-truncated": str(outcome.usage.truncated).lower(),
                "x-usage-windows": str(outcome.usage.windows),
            },
        )


def _open(row: Mapping[str, Any], headers: Mapping[str, Any]) -> tuple[Request | RequestError, Reply]:
    """The request of one row, or what is wrong with it; and how to reply."""
    try:
        if headers.get("explain") == "True":
            raise NotSupported("this model gives no explanations; ask it for predictions")
        return formats.decode(row, headers)
    except RequestError as error:
        return error, formats.reply_to_unreadable(row, headers)
    except Exception as error:
        _log_without_text(error)
        failure = InternalError("the request could not be read; the server's log has the cause")
        return failure, formats.reply_to_unreadable(row, headers)


def _encode(value: Any) -> bytes:
    """ASCII JSON: no character a client sent can break the transport. Raises ValueError for NaN and infinities."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"), default=jsonable).encode("ascii")


def _log_without_text(error: Exception) -> None:
    """Where an unexpected error came from. Its message may quote the request, so only its type is written."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    print(f"{frames}{type(error).__name__} in a request", file=sys.stderr, flush=True)


def _quiet_worker_log() -> None:
    """Drops the line TorchServe's worker logs for every batch; warnings, errors and metrics still pass."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: record.levelno > logging.INFO or "[METRICS]" in str(record.msg))
