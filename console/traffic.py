"""What the models have to do: what the server counts, of the last minute."""

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from marble_client import ModelMetrics

WINDOW_S = 60.0


@dataclass(frozen=True)
class Live:
    """How one model fares. requests: since the server started; the others are of the last minute, None if unknown.

    rate: requests a second; failed: share of them; median, tail: seconds, the 50th and 95th percentile in the handler;
    queue: mean seconds of waiting for a worker.
    """

    requests: int
    rate: float | None = None
    failed: float | None = None
    median: float | None = None
    tail: float | None = None
    queue: float | None = None


class Traffic:
    """What was counted at each look of the last minute, whichever page it was for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looks: deque[tuple[float, Mapping[str, ModelMetrics]]] = deque()

    def add(self, moment: float, counted: Mapping[str, ModelMetrics]) -> None:
        """Takes what is counted now. moment: seconds of a clock that never goes back."""
        with self._lock:
            if self._looks and _began_anew(self._looks[-1][1], counted):
                self._looks.clear()
            self._looks.append((moment, counted))
            # One that is older than the window is kept, so that the window is never shorter for long.
            while len(self._looks) > 2 and self._looks[1][0] <= moment - WINDOW_S:
                self._looks.popleft()

    def live(self) -> dict[str, Live]:
        """How each model fares, by name."""
        with self._lock:
            if not self._looks:
                return {}
            (begin, before), (end, now) = self._looks[0], self._looks[-1]
        return {name: _live(before.get(name, ModelMetrics()), counts, end - begin) for name, counts in now.items()}


def _began_anew(before: Mapping[str, ModelMetrics], now: Mapping[str, ModelMetrics]) -> bool:
    """Whether the server was started in between, which counts from 0."""
    return any(now.get(name, ModelMetrics()).arrivals < counts.arrivals for name, counts in before.items())


def _live(before: ModelMetrics, now: ModelMetrics, seconds: float) -> Live:
    total = sum(now.requests.values())
    if seconds <= 0:
        return Live(total)
    since = now - before
    asked = sum(since.requests.values())
    return Live(
        total,
        asked / seconds,
        since.failed / asked if asked else None,
        since.quantile(0.5),
        since.quantile(0.95),
        since.queue_seconds / since.arrivals if since.arrivals > 0 else None,
    )
