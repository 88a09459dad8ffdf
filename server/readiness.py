"""True readiness of a server that is starting: every model has answered its canary."""

import time
from collections.abc import Sequence

from tqdm import tqdm

from marble_client import MarbleError
from server.archive import Archive
from server.torchserve import Logs, Server, ServerError

_POLL_SECONDS = 0.1


def wait_until_ready(server: Server, archives: Sequence[Archive], logs: Logs, timeout: float) -> None:
    """Returns when every model has a READY worker that answers its canary as the golden set says.

    Raises ServerError, with the cause, if the server ends, a model does not load, or the time is over.
    """
    deadline = time.monotonic() + timeout
    waiting = list(archives)
    with tqdm(total=len(waiting), unit=" models", delay=2, leave=False, disable=None) as bar:
        while waiting:
            bar.set_description(f"waiting for {waiting[0].name}", refresh=False)
            bar.update(0)
            if failure := logs.load_failure():
                raise ServerError(failure)
            if server.process() is None:
                raise ServerError(f"TorchServe ended while starting:\n{logs.console()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{waiting[0].name!r} was not ready within {timeout:g} s:\n{logs.console()}")
            if answers(server, waiting[0]):
                waiting.pop(0)
                bar.update()
            else:
                time.sleep(_POLL_SECONDS)


def answers(server: Server, archive: Archive) -> bool:
    """Whether a worker is READY and has just answered its canary. Raises ServerError if it answers wrongly."""
    try:
        with server.client() as client:
            if not client.ready(archive.name):
                return False
            client.canary(archive.name)
    except MarbleError as error:
        if error.type == "WrongAnswer":
            raise ServerError(f"{archive.name!r}: {error.message}") from None
        return False  # not up yet; the caller's deadline bounds this
    return True
