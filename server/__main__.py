"""The program behind `scripts/serve` and `scripts/stop`.

scripts/serve                                   every archive of model_store/
scripts/serve --models reviews=reviews.mar      one of them
scripts/serve --config my.properties --no-auth --foreground
"""

import argparse
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from marble_client import MarbleError, RestClient, find_tokens
from server.archive import Archive, ArchiveError, verify
from server.torchserve import ROOT, Addresses, Logs, Server, ServerError, check_free, start

_POLL_SECONDS = 0.1


def serve(argv: Sequence[str]) -> None:
    """Verifies, starts, waits until every model has answered its canary."""
    arguments = parse(argv)
    config = arguments.config
    if not config.is_file():
        raise ServerError(f"--config {config}: there is no such file")
    archives = [verify(name, arguments.store / file) for name, file in chosen(arguments)]
    check_no_other(config)
    started = time.monotonic()
    server, logs = start(archives, config, arguments.store, tokens=not arguments.no_auth)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        wait_until_ready(server, archives, logs, arguments.timeout)
        print(f"ready in {time.monotonic() - started:.1f} s: {', '.join(server.models)}")
        print(
            f"REST {server.addresses.inference}/predictions/NAME   gRPC {server.addresses.grpc}   process {server.pid}"
        )
        print("tokens: none needed" if arguments.no_auth else "tokens: key_file.json (the marble command finds it)")
        sys.stdout.flush()
        if arguments.foreground:
            stay(server)
    except BaseException:
        server.stop()
        raise


def check_no_other(config: Path) -> None:
    """Raises ServerError if a server of this folder is running, or another program has one of its ports."""
    if running := Server.running():
        raise ServerError(
            f"a server started from this folder is running already (process {running.pid}, models "
            f"{', '.join(running.models)}); stop it with scripts/stop"
        )
    check_free(Addresses.read(config))


def wait_until_ready(server: Server, archives: Sequence[Archive], logs: Logs, timeout: float) -> None:
    """Returns when every model has a READY worker that answers its canary as the golden set says.

    Raises ServerError, with the cause, if the server ends, a model does not load, or the time is over.
    """
    deadline = time.monotonic() + timeout
    waiting = list(archives)
    while waiting:
        if failure := logs.load_failure():
            raise ServerError(failure)
        if server.process() is None:
            raise ServerError(f"TorchServe ended while starting:\n{logs.console()}")
        if time.monotonic() > deadline:
            raise ServerError(f"{waiting[0].name!r} was not ready within {timeout:g} s:\n{logs.console()}")
        if answers(server, waiting[0]):
            waiting.pop(0)
        else:
            time.sleep(_POLL_SECONDS)


def answers(server: Server, archive: Archive) -> bool:
    """Whether a worker is READY and has just answered its canary. Raises ServerError if it answers wrongly."""
    tokens = find_tokens()
    try:
        with RestClient(
            server.addresses.inference, server.addresses.management, tokens.inference, tokens.management
        ) as client:
            if not client.ready(archive.name):
                return False
            client.canary(archive.name)
    except MarbleError as error:
        if error.type == "WrongAnswer":
            raise ServerError(f"{archive.name!r}: {error.message}") from None
        return False  # not up yet; the caller's deadline bounds this
    return True


def stay(server: Server) -> None:
    """Waits until told to end. Raises ServerError if the server ends by itself."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    while server.process() is not None:
        time.sleep(0.5)
    raise ServerError("TorchServe ended by itself; logs/ has the cause")


def chosen(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(name, file) of the archives to serve. Raises ServerError if there is none."""
    given = arguments.models or sorted(path.name for path in arguments.store.glob("*.mar"))
    if not given:
        raise ServerError(f"there is no archive in {arguments.store}/; build one with ./build_mar.sh")
    pairs: list[tuple[str, str]] = []
    for entry in given:
        name, separator, file = entry.partition("=")
        file = file if separator else name if name.endswith(".mar") else f"{name}.mar"
        if Path(file).name != file:
            raise ServerError(f"--models {entry}: name a file inside {arguments.store}/, without its folder")
        name = name.removesuffix(".mar")
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ServerError(f"--models {entry}: {name!r} is no model name; use letters, digits, '_', '-' and '.'")
        if name in dict(pairs):
            raise ServerError(f"--models {entry}: {name!r} is named twice; serve each archive under a name of its own")
        pairs.append((name, file))
    return pairs


def stop() -> None:
    """Stops the server that was started from this folder."""
    server = Server.running()
    if server is None:
        print("no server of this folder is running")
        return
    server.stop()
    print(f"stopped process {server.pid}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of `scripts/serve`."""
    parser = argparse.ArgumentParser(
        prog="scripts/serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="N=N.mar", help="archives to serve (default: all)")
    parser.add_argument("--store", type=Path, default=Path("model_store"), help="folder of the archives")
    parser.add_argument("--config", type=Path, default=ROOT / "config.properties", help="TorchServe's settings")
    parser.add_argument("--no-auth", action="store_true", help="ask for no tokens: behind a proxy that does")
    parser.add_argument("--foreground", action="store_true", help="stay until stopped by a signal")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to become ready (default: 120)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["stop"]:
                stop()
            case ["check"]:
                check_no_other(ROOT / "config.properties")
            case ["serve", *rest]:
                serve(rest)
            case _:
                sys.exit("use scripts/serve or scripts/stop")
    except (ArchiveError, ServerError) as error:
        sys.exit(f"scripts/{sys.argv[1]}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
