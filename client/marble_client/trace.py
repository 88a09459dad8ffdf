"""W3C trace context: a request belongs to its caller's trace, and the server's log says to which."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_current: ContextVar[str | None] = ContextVar("traceparent", default=None)


@contextmanager
def tracing(traceparent: str) -> Iterator[None]:
    """Has the requests of this block carry a `traceparent`, e.g. the one that OpenTelemetry's propagator gives.

    One that is sampled (`-01` at its end) also has the server log the request when it succeeds. Raises ValueError if it
    is not one of https://www.w3.org/TR/trace-context.
    """
    if not _TRACEPARENT.fullmatch(traceparent):
        raise ValueError(f"{traceparent!r} is no traceparent: write 00-<32 hex digits>-<16 hex digits>-<2 hex digits>")
    token = _current.set(traceparent)
    try:
        yield
    finally:
        _current.reset(token)


def traceparent() -> str:
    """That of the block; else the environment's TRACEPARENT; else one of a new trace, which is not sampled."""
    given = _current.get() or os.environ.get("TRACEPARENT", "")
    if _TRACEPARENT.fullmatch(given):
        return given
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
