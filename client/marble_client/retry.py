"""When to try again, and when to stop.

urllib3's own Retry knows no overall deadline and gRPC's knows nothing of errors in a reply's body, so all
transports share this.
"""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from marble_client.errors import ConnectionFailed, MarbleError, RateLimited, Timeout, Unavailable

TRIES = 3
BACKOFF_S = 0.1
LONGEST_PAUSE_S = 5.0
WORKER_DIED = "InternalServerException"  # TorchServe's name for it

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


def pause(error: MarbleError, tried: int, deadline: Deadline) -> float:
    """Seconds until a call that failed `tried` times is tried again. Raises `error` when it is not to be.

    At most three tries: again only after 429, 503 or a refused connection, by the deadline.
    """
    refused = isinstance(error, ConnectionFailed) and not error.sent
    if tried < TRIES and (refused or isinstance(error, (RateLimited, Unavailable))):
        wait = _back_off(error, tried)
        if deadline.allows(wait):
            return wait
    raise error


def with_retries(call: Callable[[], T], deadline: Deadline) -> T:
    """Run `call`, again as `pause` has it."""
    tried = 0
    while True:
        try:
            return call()
        except MarbleError as error:
            tried += 1
            wait = pause(error, tried, deadline)
        time.sleep(wait)


class Patience:
    """What has a call wait through a server's trouble, such as a restart: for so many seconds after its first failure.

    Only for calls that change nothing, as predictions: one that may have reached the server is sent again.
    """

    def __init__(self, seconds: float) -> None:
        Deadline(seconds)  # refuses what can be none
        self._seconds = seconds
        self._deadline: Deadline | None = None
        self._tried = 0

    def pause(self, error: MarbleError) -> float:
        """Seconds until the next try. Raises `error` if it does not pass by waiting, or patience is at its end."""
        if _passes(error):
            self._deadline = self._deadline or Deadline(self._seconds)
            self._tried += 1
            wait = _back_off(error, self._tried)
            if self._deadline.allows(wait):
                return wait
        raise error


def _passes(error: MarbleError) -> bool:
    """Whether an error is the server's trouble of the moment, whatever was asked."""
    if isinstance(error, (RateLimited, Unavailable, ConnectionFailed, Timeout)):
        return True
    return error.code == 502 or error.type == WORKER_DIED  # 502 is what a proxy says of a server that is down


def _back_off(error: MarbleError, tried: int) -> float:
    """The server's advice, else longer with every try."""
    if error.retry_after is not None:
        return error.retry_after
    # Jitter keeps many callers from coming back in step.
    return float(min(BACKOFF_S * 2.0 ** min(tried, 16), LONGEST_PAUSE_S) * random.uniform(0.5, 1))
