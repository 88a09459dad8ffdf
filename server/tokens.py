"""Clients' tokens of the front door: `scripts/token`.

A token is shown once, when it is made. What is kept, in front/tokens.json, is its name, roles, dates and a digest.

nginx checks it by itself, with the digest that it has for such things (ngx_http_secure_link_module): MD5. What breaks
MD5 is that two texts with one digest can be made, which gives nobody a token. To find a text for a given digest, or 256
random bits by trying, is out of reach.
"""

import base64
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from server.torchserve import ServerError

FOLDER = Path("front")
FILE = FOLDER / "tokens.json"
# What a token may do: ask for predictions, for explanations, scrape metrics; and all of it, and the watchdog's report.
ROLES = ("predict", "explain", "metrics", "admin")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token. Times are seconds since 1970; `expires` is None for one that does not."""

    name: str
    id: str
    digest: str
    roles: list[str]
    created: int
    expires: int | None

    @property
    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires < time.time()


def read(path: Path = FILE) -> list[Token]:
    """All tokens. Raises ServerError if the file is damaged."""
    try:
        return [Token(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise ServerError(f"{path} is damaged ({error}): restore it, or remove it and make new tokens") from None


def add(name: str, roles: Sequence[str], expires: int | None, path: Path = FILE) -> str:
    """Makes a token, writes down its digest and returns it. expires: seconds since 1970.

    Raises ServerError if the name is taken or none.
    """
    if not _NAME.fullmatch(name):
        raise ServerError(f"{name!r} is no name for a client; use up to 64 letters, digits, '_', '-' and '.'")
    with _locked(path):
        tokens = read(path)
        if any(token.name == name for token in tokens):
            raise ServerError(f"there is a token for {name!r} already; revoke it first, or name this one differently")
        identity = secrets.token_hex(8)
        secret = f"marble_{identity}_{secrets.token_urlsafe(32)}"
        tokens.append(Token(name, identity, digest(secret), sorted(set(roles)), int(time.time()), expires))
        _write(tokens, path)
    return secret


def revoke(name: str, path: Path = FILE) -> None:
    """Forgets a token. Raises ServerError if there is none of that name."""
    with _locked(path):
        tokens = read(path)
        left = [token for token in tokens if token.name != name]
        if len(left) == len(tokens):
            raise ServerError(f"there is no token for {name!r}; scripts/token list shows those there are")
        _write(left, path)


def digest(token: str) -> str:
    """As nginx compares it: MD5 in URL-safe base64."""
    value = hashlib.md5(token.encode("ascii"), usedforsecurity=False).digest()
    return base64.urlsafe_b64encode(value).decode("ascii").rstrip("=")


def nginx_maps(tokens: Sequence[Token]) -> str:
    """The maps of nginx that say what is known of a token, by its id. They hold no secret."""
    known = {t.id: t.digest if t.expires is None else f"{t.digest},{t.expires}" for t in tokens}
    maps = [_map("$marble_known", known), _map("$marble_name", {t.id: t.name for t in tokens})]
    for role in ROLES:
        holders = [t for t in tokens if role in t.roles or "admin" in t.roles]
        maps.append(_map(f"$marble_may_{role}", dict.fromkeys((t.id for t in holders), "1")))
    return "".join(maps)


def _map(variable: str, values: Mapping[str, str]) -> str:
    lines = "".join(f'    "{key}" "{value}";\n' for key, value in values.items())
    return f'map $marble_id {variable} {{\n    default "";\n{lines}}}\n'


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(tokens: Sequence[Token], path: Path) -> None:
    write_private(path, json.dumps([asdict(token) for token in tokens], indent=2) + "\n")


def write_private(path: Path, text: str) -> None:
    """Replaces a file by one that its owner alone may read; never is half of it there."""
    # Of this process alone: scripts/token and the watchdog may write the same file at the same time.
    new = path.with_name(f"{path.name}.new-{os.getpid()}")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def table(tokens: Sequence[Token]) -> str:
    """Names, roles and dates."""
    rows = [("NAME", "ROLES", "CREATED", "EXPIRES")]
    for token in tokens:
        expires = "never" if token.expires is None else _date(token.expires) + (" (over)" if token.expired else "")
        rows.append((token.name, ",".join(token.roles), _date(token.created), expires))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{n:{widths[0]}}  {r:{widths[1]}}  {c:{widths[2]}}  {e}" for n, r, c, e in rows)


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
