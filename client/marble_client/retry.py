"""When to try again, and when to stop.

urllib3's own Retry knows no overall deadline and gRPC's knows nothing of errors in a reply's body, so both
transports share this.
"""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from marble_client.errors import ConnectionFailed, RateLimited, Timeout, Unavailable

TRIES = 3
BACKOFF_S = 0.1

T = TypeVar("T")


class Deadline:
    """A point in time, `seconds` from now, that a whole call with its retries may not pass."""

    def __init__(self, seconds: float) -> None:
        if not 0 < seconds < float("inf"):
            raise ValueError(f"a timeout is a positive number of seconds, not {seconds}")
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left; raises Timeout when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.missed()
        return left

    def allows(self, wait: float) -> bool:
        return time.monotonic() + wait < self._end

    def missed(self) -> Timeout:
        return Timeout(f"no answer within {self.seconds:g} s: the server is stuck, or the timeout too short")


def with_retries(call: Callable[[], T], deadline: Deadline) -> T:
    """Run `call` up to three times: again only after 429, 503 or a refused connection, by the deadline."""
    for tried in range(1, TRIES):
        try:
            return call()
        except (RateLimited, Unavailable, ConnectionFailed) as error:
            if isinstance(error, ConnectionFailed) and error.sent:
                raise
            wait = error.retry_after
            if wait is None:
                # Jitter keeps many callers from coming back in step.
                wait = BACKOFF_S * 2**tried * random.uniform(0.5, 1)
            if not deadline.allows(wait):
                raise
            time.sleep(wait)
    return call()
