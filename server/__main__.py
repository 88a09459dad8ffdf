"""The program behind `scripts/serve`, `scripts/stop`, `scripts/verify`, `scripts/token` and `scripts/upgrade`."""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from server import front, options, supervisor, tokens, trust, upgrade
from server.archive import Archive, ArchiveError, verify
from server.readiness import wait_until_ready
from server.torchserve import ROOT, Addresses, Server, ServerError, check_free, read_properties, start


def serve(argv: Sequence[str]) -> None:
    """Verifies, starts, waits until every model has answered its canary."""
    arguments = options.serve(argv)
    config = arguments.config
    if not config.is_file():
        raise ServerError(f"--config {config}: there is no such file")
    if arguments.front is not None and not arguments.foreground:
        supervisor.detach(argv)  # a process of its own, which does the rest
        return
    arguments.trust = arguments.trust or trusted_by(config)
    archives = [verify(name, arguments.store / file) for name, file in chosen(arguments)]
    check_no_other(config)
    if arguments.front is not None:
        serve_behind_front(archives, arguments)
        return
    archives = admitted(archives, arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    try:
        server, logs = start(archives, config, tokens=not arguments.no_auth, trust=arguments.trust)
        wait_until_ready(server, archives, logs, arguments.timeout)
        if arguments.trust is not None:
            trust.remember(archives)
        print(f"ready in {time.monotonic() - started:.1f} s: {', '.join(server.models)}")
        print(
            f"REST {server.addresses.inference}/predictions/NAME   gRPC {server.addresses.grpc}   process {server.pid}"
        )
        print("tokens: none needed" if arguments.no_auth else "tokens: key_file.json (the marble command finds it)")
        sys.stdout.flush()
        if arguments.foreground:
            stay(server)
    except BaseException:
        if (ours := Server.noted()) is not None:
            ours.stop()
        raise


def serve_behind_front(archives: list[Archive], arguments: argparse.Namespace) -> None:
    """Serves behind the front door, supervised, until a signal ends it."""
    settings = front.Settings.read(arguments.front)
    check_free(settings.ports())
    certificate = certificate_of(arguments)
    archives = admitted(archives, arguments)

    def launch() -> Server:
        server, logs = start(archives, arguments.config, tokens=not arguments.no_auth, trust=arguments.trust)
        wait_until_ready(server, archives, logs, arguments.timeout)
        if arguments.trust is not None:
            trust.remember(archives)
        return server

    supervisor.log_to_file()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.monotonic()
    door = None
    try:
        server = launch()
        door = front.Front(settings, certificate, server.addresses, list(server.models))
        watch = supervisor.Supervisor(server, door, launch, arguments.timeout)
        watch.open()
    except BaseException:
        if door is not None:
            door.drain()
        if (ours := Server.noted()) is not None:
            ours.stop()
        raise
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        print(f"ready in {time.monotonic() - started:.1f} s: {', '.join(server.models)}")
        print(f"REST https://{settings.rest}/predictions/NAME   gRPC {settings.grpc} (TLS)   process {os.getpid()}")
        print(f"tokens: {len(tokens.read())}; scripts/token makes and revokes them")
        sys.stdout.flush()
        watch.stay()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # it is stopping, and no faster for a second word
        watch.stop()


def verify_only(argv: Sequence[str]) -> None:
    """Verifies archives as `serve` does and starts nothing; fills a folder with them, if one is named."""
    arguments = options.verify(argv)
    arguments.trust = arguments.trust or trusted_by(arguments.config)
    pairs = chosen(arguments)
    if arguments.into is not None:
        # What is verified are the copies: nobody else can change them.
        arguments.store = trust.fill(arguments.into, [arguments.store / file for _, file in pairs])
    try:
        archives = [verify(name, arguments.store / file) for name, file in pairs]
        if arguments.trust is not None:
            trust.check(archives, arguments.trust)
    except ArchiveError:
        if arguments.into is not None:
            trust.empty(arguments.into)
        raise
    by = f"signed by {arguments.trust}" if arguments.trust else "their checksums are right"
    print(f"verified, {by}: {', '.join(name for name, _ in pairs)}")


def trusted_by(config: Path) -> Path | None:
    """The key that `marble_trust` names in a config.properties; TorchServe itself does not know that setting."""
    value = read_properties(config).get("marble_trust")
    return Path(value) if value else None


def admitted(archives: list[Archive], arguments: argparse.Namespace) -> list[Archive]:
    """The archives in the server's own store; where a key is trusted, copies that it has signed."""
    if arguments.trust is None:
        trust.empty_store()
        return [trust.keep(archive, archive.name) for archive in archives]
    return trust.admit(archives, arguments.trust, allow_downgrade=arguments.allow_downgrade)


def certificate_of(arguments: argparse.Namespace) -> front.Certificate:
    """The one given, or a self-signed one with a warning."""
    if (arguments.cert is None) != (arguments.key is None):
        raise ServerError("--cert and --key go together")
    if arguments.cert is not None:
        return front.Certificate.given(arguments.cert, arguments.key)
    certificate = front.Certificate.self_signed()
    print(
        f"warning: no --cert and --key: clients must be told to trust the self-signed {certificate.certificate}",
        file=sys.stderr,
        flush=True,
    )
    return certificate


def check_no_other(config: Path) -> None:
    """Raises ServerError if a server of this folder is running, or another program has one of its ports."""
    if running := Server.running():
        raise ServerError(
            f"a server started from this folder is running already (process {running.pid}, models "
            f"{', '.join(running.models)}); stop it with scripts/stop"
        )
    check_free(Addresses.read(config).ports())


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
    """Stops the server that was started from this folder, and its front door before it."""
    if supervisor.stop_running():
        return
    server = Server.running()
    if server is None:
        print("no server of this folder is running")
        return
    server.stop()
    print(f"stopped process {server.pid}")


def token(argv: Sequence[str]) -> None:
    """Changes the tokens of the front door; if it is running, it knows at once."""
    arguments = options.token(argv)
    if arguments.command == "list":
        print(tokens.table(tokens.read()))
        return
    if arguments.command == "add":
        days = arguments.expires_days
        expires = None if days is None else int(time.time() + days * 86400)
        print(tokens.add(arguments.name, arguments.role, expires))
        print("shown this once; what is kept is its digest", file=sys.stderr)
    else:
        tokens.revoke(arguments.name)
    state = front.State.read()
    if state is not None and state.serving() is not None:
        front.write_tokens(Path(state.folder))
        front.reload(state.nginx, Path(state.folder))


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["stop", *rest]:
                options.stop(rest)
                stop()
            case ["check"]:
                check_no_other(ROOT / "config.properties")
            case ["serve", *rest]:
                serve(rest)
            case ["verify", *rest]:
                verify_only(rest)
            case ["token", *rest]:
                token(rest)
            case ["upgrade", *rest]:
                upgrade.upgrade(rest)
            case ["rollback", *rest]:
                upgrade.rollback(rest)
            case _:
                sys.exit("use scripts/serve, stop, verify, token, upgrade or rollback")
    except (ArchiveError, ServerError, OSError) as error:  # the last: a file or folder that cannot be used
        sys.exit(f"scripts/{sys.argv[1]}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
