"""Ctrl-C, remembered: what Python raises may be lost in a destructor, or come out of a library as another error."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# The exit code of a command that was interrupted.
INTERRUPTED = 128 + signal.SIGINT

_interrupted = False


@contextmanager
def remembered(*, at_once: bool) -> Iterator[None]:
    """Ctrl-C in this block is sure to be raised by the next `end_if_interrupted`.

    at_once: whether KeyboardInterrupt is raised where the first Ctrl-C falls, too, as it is by any later one.
    """

    def interrupt(number: int, frame: object) -> None:
        global _interrupted
        again, _interrupted = _interrupted, True
        if at_once or again:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_if_interrupted() -> None:
    """Raises KeyboardInterrupt if there has been a Ctrl-C; to be called between two steps."""
    if _interrupted:
        raise KeyboardInterrupt
