"""The command lines of the scripts that run servers."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from server.tokens import ROLES
from server.torchserve import ROOT


def serve(argv: Sequence[str]) -> argparse.Namespace:
    """That of `scripts/serve`."""
    parser = _parser(
        "serve",
        "Verifies archives, starts TorchServe, and returns when every model has answered its canary.",
        "scripts/serve                                 # every archive of model_store/",
        "scripts/serve --models reviews=reviews.mar    # one of them",
        "scripts/serve --config my.properties --no-auth --foreground",
        "scripts/serve --front                         # behind nginx, with a watchdog: docs/front-door.md",
    )
    _add_archives(parser)
    parser.add_argument("--allow-downgrade", action="store_true", help="with --trust: versions older than the last one")
    parser.add_argument("--no-auth", action="store_true", help="ask for no tokens: behind a proxy that does")
    parser.add_argument(
        "--front",
        type=Path,
        nargs="?",
        const=ROOT / "front.properties",
        metavar="FILE",
        help="behind nginx, watched and restarted; FILE: its settings (default: front.properties)",
    )
    parser.add_argument("--cert", type=Path, metavar="PEM", help="certificate of the front door, with its chain")
    parser.add_argument("--key", type=Path, metavar="PEM", help="its private key, RSA or EC")
    parser.add_argument("--foreground", action="store_true", help="stay until stopped by a signal")
    parser.add_argument("--timeout", type=float, default=120, help="seconds to become ready (default: 120)")
    return parser.parse_args(argv)


def stop(argv: Sequence[str]) -> argparse.Namespace:
    """That of `scripts/stop`."""
    parser = _parser(
        "stop", "Stops the server that was started from this folder, its front door first.", "scripts/stop"
    )
    return parser.parse_args(argv)


def verify(argv: Sequence[str]) -> argparse.Namespace:
    """That of `scripts/verify`."""
    parser = _parser(
        "verify",
        "Verifies archives as scripts/serve does, and starts nothing.",
        "scripts/verify                                # every archive of model_store/",
        "scripts/verify --models reviews=reviews.mar --trust release.pub.pem",
        "scripts/verify --into /srv/models             # and copies them, if all are good",
    )
    _add_archives(parser)
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="copy them there, with the files beside them")
    return parser.parse_args(argv)


def upgrade(argv: Sequence[str]) -> argparse.Namespace:
    """That of `scripts/upgrade`."""
    parser = _parser(
        "upgrade",
        "Serves another version of a model, without a request that fails: docs/operations.md.",
        "scripts/upgrade reviews                       # model_store/reviews.mar, built anew with another --version",
        "scripts/upgrade reviews=reviews-2.mar",
        "scripts/upgrade reviews --share 10            # a tenth of the requests; again without: all",
    )
    parser.add_argument("model", metavar="NAME[=FILE.mar]", help="name it is served under, and the new archive")
    parser.add_argument("--store", type=Path, default=Path("model_store"), help="folder of the archives")
    parser.add_argument(
        "--share", type=_share, metavar="PERCENT", help="a trial: so many of the requests, instead of all (REST)"
    )
    parser.add_argument(
        "--allow-downgrade", action="store_true", help="with --trust: a version older than the last one"
    )
    return parser.parse_args(argv)


def rollback(argv: Sequence[str]) -> argparse.Namespace:
    """That of `scripts/rollback`."""
    parser = _parser("rollback", "Ends a trial, or serves the version before again.", "scripts/rollback reviews")
    parser.add_argument("model", metavar="NAME", help="name it is served under")
    return parser.parse_args(argv)


def token(argv: Sequence[str]) -> argparse.Namespace:
    """That of `scripts/token`."""
    parser = _parser(
        "token",
        "Clients' tokens of the front door. A token is shown once, when it is made; what is kept, in\n"
        "front/tokens.json, is its name, roles, dates and a digest.",
        "scripts/token add shop --role predict --expires-days 90",
        "scripts/token add grafana --role metrics",
        "scripts/token list",
        "scripts/token revoke shop",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adding = commands.add_parser("add", help="make a token and show it, once")
    adding.add_argument("name", metavar="NAME", help="of the client; stands in the log")
    adding.add_argument("--role", action="append", choices=ROLES, required=True, help="what it may do; repeatable")
    adding.add_argument("--expires-days", type=float, metavar="DAYS", help="valid for so long (default: until revoked)")
    commands.add_parser("list", help="names, roles and dates")
    commands.add_parser("revoke", help="refuse a token from now on").add_argument("name", metavar="NAME")
    return parser.parse_args(argv)


def _parser(command: str, description: str, *examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"scripts/{command}",
        description=description,
        epilog="\n  ".join(["examples:" if len(examples) > 1 else "example:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_archives(parser: argparse.ArgumentParser) -> None:
    """Which archives, from where, signed by whom."""
    parser.add_argument("--models", nargs="+", metavar="N=N.mar", help="archives to serve (default: all)")
    parser.add_argument("--store", type=Path, default=Path("model_store"), help="folder of the archives")
    parser.add_argument("--config", type=Path, default=ROOT / "config.properties", help="TorchServe's settings")
    parser.add_argument(
        "--trust", type=Path, metavar="PUBKEY", help="serve only what this key has signed: docs/trust.md"
    )


def _share(text: str) -> float:
    if not re.fullmatch(r"\d{1,3}(\.\d{1,2})?", text) or not 0 < float(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: give percent, above 0 and up to 100")
    return float(text)
