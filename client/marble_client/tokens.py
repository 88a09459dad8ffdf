"""Where tokens come from, and how they travel."""

import ipaddress
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

KEY_FILE = Path("key_file.json")
_OPTION = re.compile(r"--?[a-z]*(-[a-z]+)*(=.*)?")


@dataclass(frozen=True)
class Tokens:
    """The tokens found. `origin` says where each came from, or where it was sought, and holds no secret."""

    inference: str | None = field(repr=False)
    management: str | None = field(repr=False)
    origin: str


def find_tokens(
    explicit: str | None = None, key_file: Path = KEY_FILE, *, explicit_management: str | None = None
) -> Tokens:
    """Find both tokens: the explicit one, else the environment's, else the one in TorchServe's key file.

    A relative `key_file` is sought in the working directory, then in its parents; the first one counts.
    A missing or broken file is no error: should the server want a token, `origin` tells where it was sought.
    """
    keys, source = _read_key_file(key_file)
    inference, origin = _choose("--token", explicit, "MARBLE_TOKEN", keys.get("inference"), source)
    management, management_origin = _choose(
        "--management-token", explicit_management, "MARBLE_MANAGEMENT_TOKEN", keys.get("management"), source
    )
    return Tokens(inference, management, f"inference token {origin}; management token {management_origin}")


def attached(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command, `--token X` as `--token=X` where X begins with a dash.

    One in 64 of TorchServe's tokens does, and argparse takes it for an option; whose names are of small letters.
    """
    found: list[str] = []
    for argument in arguments:
        unfinished = found[-1:] in (["--token"], ["--management-token"]) and "--" not in found
        if unfinished and argument.startswith("-") and not _OPTION.fullmatch(argument):
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def bearer(token: str | None) -> str | None:
    """The value of an Authorization header. Raises ValueError, not showing the token, if it cannot be one."""
    if token is None:
        return None
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("a token holds printable ASCII characters only, and no spaces")
    return f"Bearer {token}"


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _choose(
    option: str, explicit: str | None, variable: str, from_file: str | None, source: str
) -> tuple[str | None, str]:
    """A token and where it came from."""
    if explicit:
        return explicit, f"from {option}"
    from_environment = os.environ.get(variable, "").strip()
    if from_environment:
        return from_environment, f"from {variable}"
    if from_file:
        return from_file, f"from {source}"
    return None, f"found neither in {option} nor {variable} nor {source}"


def _read_key_file(key_file: Path) -> tuple[dict[str, str], str]:
    """The keys by kind, and the file they came from or the places that had none."""
    here = Path.cwd()
    for path in (folder / key_file for folder in (here, *here.parents)):
        try:
            content = json.loads(path.read_bytes())
            return {kind: str(content[kind]["key"]) for kind in ("inference", "management")}, str(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError):
            return {}, f"{path} (which is no readable key file)"
    return {}, f"{key_file} in {here} or above"
