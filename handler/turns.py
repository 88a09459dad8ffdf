"""Answers requests one after another: for models whose answers must not depend on what else is in the batch."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from handler.errors import Overloaded, RequestError
from handler.tasks import Answer


def in_turn(
    requests: Sequence[tuple[Sequence[Any], Any]], answer: Callable[[Any, Any], Answer], seconds: float
) -> list[Answer | RequestError]:
    """`answer(sample, parameters)` for each request of one sample, in order; the RequestError that it raises, if so.

    Whatever, judged by the slowest so far, would not be there after `seconds` is Overloaded.
    """
    outcomes: list[Answer | RequestError] = []
    start = now = time.monotonic()
    slowest = 0.0
    for [sample], parameters in requests:
        if now + slowest - start > seconds:
            outcomes.append(Overloaded("the server is busy with other requests; send this one again in a moment"))
            continue
        try:
            outcomes.append(answer(sample, parameters))
        except RequestError as error:
            outcomes.append(error)
        before, now = now, time.monotonic()
        slowest = max(slowest, now - before)
    return outcomes
