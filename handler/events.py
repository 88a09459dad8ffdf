"""The worker's log: one JSON object a line on stderr, which TorchServe writes to a file. Never a request's text.

Every line begins with a brace, so that none can be taken for a metric, and is ASCII without control characters.
"""

import json
import re
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
# Lines about good requests that one worker writes in a second, whatever its clients ask for.
_MOST_REQUESTS = 20


@dataclass(frozen=True, slots=True)
class Trace:
    """The caller's place in a distributed trace, after https://www.w3.org/TR/trace-context.

    span_id: the caller's span. sampled: whether the caller records this request and would have others record it.
    """

    trace_id: str
    span_id: str
    sampled: bool

    @classmethod
    def read(cls, row: Mapping[str, Any], headers: Mapping[str, Any]) -> "Trace | None":
        """From the header `traceparent`, or, as TorchServe hands no gRPC metadata on, from the input of that name.

        None if there is none or it is malformed.
        """
        # The spelling of the standard, and that of HTTP/1 libraries which capitalise every name.
        # TorchServe puts the media type of an input among the headers, so inputs come first.
        value = row.get("traceparent") or headers.get("traceparent") or headers.get("Traceparent")
        if isinstance(value, bytes | bytearray):
            value = value[:100].decode("ascii", errors="replace")
        match = _TRACEPARENT.fullmatch(value) if isinstance(value, str) else None
        return cls(match[1], match[2], bool(int(match[3], 16) & 1)) if match else None


class Events:
    """Writes the events of one worker. facts: what every line says, e.g. the model."""

    def __init__(self, **facts: str) -> None:
        self._facts = facts
        self._second, self._written = 0, 0

    def request(self, trace: Trace, **fields: Any) -> None:
        """A good request whose caller samples its trace; in a second with many of them only some are written."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._written = second, 0
        if self._written < _MOST_REQUESTS:
            self._written += 1
            self._write("request", trace, fields)

    def error(self, trace: Trace | None, **fields: Any) -> None:
        """A request that failed."""
        self._write("error", trace, fields)

    def defect(self, error: Exception) -> None:
        """Where an unexpected error came from. Its message may quote the request, so only its type is written."""
        frames = "".join(traceback.format_tb(error.__traceback__))
        self._write("defect", None, {"message": f"{type(error).__name__} in a request", "traceback": frames})

    def _write(self, event: str, trace: Trace | None, fields: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        traced = {"trace_id": trace.trace_id, "span_id": trace.span_id} if trace is not None else {}
        line = json.dumps({"time": now, "event": event, **self._facts, **traced, **fields})
        print(line, file=sys.stderr, flush=True)
