"""Pages of the docs that hold a benchmark's figures between two marks."""

from pathlib import Path


def rewritten(page: Path | str, text: str, marks: tuple[str, str], figures: str) -> str:
    """The text of a page with other figures between its marks, the first and the last line of what is written.

    page: its path, for messages. Raises ValueError if the text lacks a mark.
    """
    first, last = marks
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{page} needs the lines {first} and {last}, between which the figures go")
    return f"{before}{first}\n\n{figures}\n\n{last}{after}"
