"""The table of candidates in the bundle's `report.html`, which no archive holds and no digest covers."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from archiver import optimise
from training.templating import render

_NAME = "report.html"
_TEMPLATE = "candidates.html.j2"
# No text of the report can hold these: all of them are escaped.
_PLACE = re.compile("<!-- candidates -->.*?<!-- end of candidates -->\n", re.DOTALL)


def show(bundle: Path, record: Mapping[str, Any]) -> None:
    """Puts the table in place of the one before. Leaves a report alone that has no place for it, or is not there.

    Warns on stderr if it cannot be written: a build does not fail for it.
    """
    path = bundle / _NAME
    try:
        page = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return
    lines = optimise.lines(record)
    section = render(_TEMPLATE, lines=lines, shipped=optimise.SHIPPED, conditions=record.get("conditions"))
    changed = _PLACE.sub(lambda _: section, page, count=1)
    if changed == page:
        return
    # Beside it first: the report is never half written, and a file that shares its content keeps it.
    partial = path.with_name(f".{_NAME}.partial-{os.getpid()}")
    try:
        partial.write_bytes(changed.encode("utf-8"))
        partial.replace(path)
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror}), so it has no candidates", file=sys.stderr)
