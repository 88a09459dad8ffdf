"""Writes docs/reference.md from the code: commands, settings, parameters, errors, metrics. A test holds it to them."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from handler import errors, tasks
from handler.explain import ExplanationParameters
from handler.metrics import METRICS
from handler.parameters import CommonParameters, described
from handler.settings import Settings
from marble_client import cli
from training.interrupts import INTERRUPTED
from training.options import Options, TrainerOptions

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reference.md"
_COMMANDS = (
    "./build_mar.sh",
    "scripts/serve",
    "scripts/stop",
    "scripts/verify",
    "scripts/upgrade",
    "scripts/rollback",
    "scripts/token",
    ".venv/bin/marble predict",
    ".venv/bin/marble explain",
    ".venv/bin/marble ready",
    ".venv/bin/marble models",
)


def render() -> str:
    """The whole document."""
    parts = [
        "# Reference",
        "Written by `scripts/generate_reference.py` from the code; a test fails where the two differ. "
        "`config.properties` and `front.properties` say of each of their keys what it is for.",
        "## Exit codes",
        "The same of every command; what went wrong, and how to mend it, stands on stderr. `marble predict --input` "
        "goes on when it is given again ([bulk.md](bulk.md)), `train.py` with `--resume-from-checkpoint true`.",
        _table(("code", "meaning"), _exit_codes()),
        "No command prints colours. Bars of progress are for terminals alone.",
        "## train.py",
        "Besides these, every argument of the Hugging Face Trainer.",
        _table(("argument", "default", ""), _arguments()),
        *(part for command in _COMMANDS for part in (f"## {command.rpartition('bin/')[2]}", _help(command))),
        "## Settings of an archive",
        "The section `handler:` of a bundle's `model-config.yaml`.",
        _table(("setting", "default", ""), _settings()),
        "## Parameters of requests",
        "What each means stands in [tasks.md](tasks.md) and [requests.md](requests.md).",
        _table(("task", "parameter", "values"), _parameters()),
        "## Errors",
        _table(("status", "type", ""), _errors()),
        "## Metrics",
        "All have the labels `model` and `version`; [monitoring.md](monitoring.md) says what each counts.",
        _table(("metric", "further labels"), ((f"`{name}`", ", ".join(labels)) for name, labels in METRICS.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _help(command: str) -> str:
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command.split(), "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return f"```\n{done.stdout.strip()}\n```"


def _arguments() -> Iterator[tuple[str, str, str]]:
    own = [field for field in fields(TrainerOptions) if field.name in TrainerOptions.__annotations__]
    for field in (*fields(Options), *own):
        yield f"`--{field.name.replace('_', '-')}`", _default(field), field.metadata["help"]


def _settings() -> Iterator[tuple[str, str, str]]:
    names = "|".join(field.name for field in fields(Settings))
    # The docstring has "name: meaning" for each, one after the other.
    pieces = re.split(rf"(?:^\s*|[.;]\s+)({names}): ", str(Settings.__doc__), flags=re.MULTILINE)
    meanings = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    for field in fields(Settings):
        yield f"`{field.name}`", _default(field), " ".join(meanings[field.name].split()).rstrip(".")


def _default(field: Field[Any]) -> str:
    if field.default is MISSING:
        return "" if field.default_factory is MISSING else f"`{field.default_factory()}`"
    return "" if field.default is None else f"`{field.default}`"


def _parameters() -> Iterator[tuple[str, str, str]]:
    common = {field.name for field in fields(CommonParameters)}
    for name, values in described(CommonParameters):
        yield "every task of texts", f"`{name}`", values
    for name, values in described(ExplanationParameters):
        yield "explanations", f"`{name}`", values
    for task in tasks.REGISTRY:
        for name, values in described(tasks.load(task).Parameters):
            if name not in common:
                yield task, f"`{name}`", values


def _exit_codes() -> Iterator[tuple[str, str]]:
    yield f"{cli.OK}", "done"
    yield f"{cli.REFUSED}", "not done, or for `marble`: the server said no, for one input at least, or is not ready"
    yield f"{cli.USAGE}", "wrong usage; for `marble` also a file that cannot be read or written"
    yield f"{cli.UNREACHABLE}", "`marble` alone: the server cannot be reached, or does not answer in time"
    yield f"{INTERRUPTED}", "interrupted by Ctrl-C: nothing is left half-written, no server is left half-started"
    yield f"{128 + signal.SIGTERM}", "`scripts/serve` alone: told to end before it was ready"


def _errors() -> Iterator[tuple[int, str, str]]:
    known = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RequestError)]
    for kind in sorted(known[1:], key=lambda kind: (kind.code, kind.__name__)):
        yield kind.code, f"`{kind.__name__}`", str(kind.__doc__).splitlines()[0]


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
