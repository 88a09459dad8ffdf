"""Runs what the docs show, and writes what it printed into them.

    .venv/bin/python -m scripts.transcripts examples/translation.md
    .venv/bin/python -m scripts.transcripts                             every page: some twenty minutes

A page shows commands in fences of `console`, each after `$ `, with what it printed below; and programs in fences of
`python`, what they printed in the fence of `text` that follows. A page's commands run in one shell, in a copy of this
checkout, so they find what a new user finds. tests/test_transcripts.py runs the pages in a short form and compares.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.md")))
    if "\n```console\n" in page.read_text(encoding="utf-8")
]

_FENCE = re.compile(
    r"^```console\n(?P<console>.*?)^```$|^```python\n(?P<python>.*?)^```\n\n?```text\n(?P<printed>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# A command goes on where its line ends with a backslash, or until the end of a file that it writes; what it printed
# goes on to the next command.
_COMMAND = re.compile(
    r"^\$ (?P<command>.*<<'(?P<end>\w+)'\n(?:.*\n)*?(?P=end)|(?:.*\\\n)*.*)\n(?P<printed>(?:(?!\$ ).*\n)*)",
    re.MULTILINE,
)
_END = "end-of-step"
# How far a command is, which says nothing once it is done.
_PROGRESS = re.compile(r"^  (step \d+ of \d+|.*: \d+ s\b.*)$")


@dataclass(frozen=True)
class Step:
    """A command of a page, what it printed, and where in the page that stands."""

    command: str
    printed: str
    place: slice


def steps(page: str) -> list[Step]:
    """The commands in a page's text, in their order."""
    return [step for fence in _FENCE.finditer(page) for step in _in_fence(fence)]


def _in_fence(fence: re.Match[str]) -> Iterator[Step]:
    if fence["python"] is not None:
        program = f".venv/bin/python - <<'{_END}'\n{fence['python']}{_END}"
        yield Step(program, fence["printed"], slice(*fence.span("printed")))
        return
    begin = fence.start("console")
    for part in _COMMAND.finditer(fence["console"]):
        yield Step(part["command"], part["printed"], slice(begin + part.start("printed"), begin + part.end("printed")))


def rewritten(page: str, found: Sequence[Step], printed: Sequence[str]) -> str:
    """The page's text with other outputs of its steps."""
    for step, output in reversed(list(zip(found, printed, strict=True))):
        page = page[: step.place.start] + output + page[step.place.stop :]
    return page


def without_progress(output: str) -> str:
    """What a command printed without the lines that say how far it is."""
    return "".join(line for line in output.splitlines(keepends=True) if not _PROGRESS.match(line.rstrip()))


def run(commands: Sequence[str], folder: Path) -> list[str]:
    """What each command prints, errors too, in one shell, as if `folder` was /opt/marble.

    Raises SystemExit for one that fails.
    """
    printed = []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(
        ["bash", "-o", "pipefail"],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        for command in commands:
            shell.stdin.write(f"{{ {command}\n}} </dev/null\nstatus=$?\necho\necho {_END} $status\n")
            shell.stdin.flush()
            lines = []
            while not (line := shell.stdout.readline()).startswith(_END):
                if not line:
                    raise SystemExit(f"the shell ended at: {command}")
                lines.append(line)
            # Of the empty line before the end, the newline ends a last line that has none of its own.
            output = "".join(lines).removesuffix("\n")
            output += "" if output.endswith("\n") or not output else "\n"
            if line.split()[1] != "0":
                raise SystemExit(f"failed: {command}\n{output}")
            printed.append(without_progress(output).replace(str(folder), "/opt/marble"))
        shell.stdin.close()
    return printed


def copy_checkout(place: Path) -> None:
    """Copies what git has or would take, and links the environment."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / name)
    (place / ".venv").symlink_to(ROOT / ".venv")


def main() -> None:
    for page in [Path(name).resolve() for name in sys.argv[1:]] or PAGES:
        print(page.relative_to(ROOT), flush=True)
        text = page.read_text(encoding="utf-8")
        found = steps(text)
        with tempfile.TemporaryDirectory() as folder:
            copy_checkout(Path(folder))
            try:
                printed = run([step.command for step in found], Path(folder))
            finally:
                subprocess.run(["scripts/stop"], cwd=folder, capture_output=True)  # where a page failed halfway
        page.write_text(rewritten(text, found, printed), encoding="utf-8")


if __name__ == "__main__":
    main()
