"""Text from the templates beside this file."""

import re
from pathlib import Path
from typing import Any

import jinja2

# Characters that no HTML may hold, not even escaped.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=lambda name: name is not None and "html" in name,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **facts: Any) -> str:
    """A template filled in. In HTML all facts are escaped, and a character that no page may hold is replaced."""
    text = _TEMPLATES.get_template(template).render(**facts)
    return _UNPRINTABLE.sub("\ufffd", text) if "html" in template else text
