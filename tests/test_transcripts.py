"""The commands that README.md, docs/ and examples/ show: each is run, and must still print what is shown.

Training is cut to two steps on fewer reviews, and what is served is torch in fp32, so values differ from those shown;
names, lines and the shape of every answer must not. test_demo_and_deployment has fewer reviews and cuts one build.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import NO_CHECKPOINTS, ROOT, Served, build_here, train_here

from archiver.__main__ import parse as parse_build
from handler import tasks
from scripts import transcripts
from scripts.transcripts import Step
from training.errors import UserError

QUICK = ("--max-steps", 2, "--early-stopping-patience", 0, *NO_CHECKPOINTS)
# A page about servers, which the others share.
DEPLOY = ROOT / "docs" / "deploy.md"
WALKED = [page for page in transcripts.PAGES if page != DEPLOY]
# What a run of a checkout writes.
WRITTEN = {"artifacts", "model_store", "logs", "run", "front", "key_file.json", ".git"}
# Rows of each file of examples/reviews that are used. The other examples are small as they are.
REVIEWS_USED = {"train.csv": 1200, "validation.csv": 150, "test.csv": 50}
Serving = Callable[..., contextlib.AbstractContextManager[Served]]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like this checkout before anything has run in it."""
    for path in ROOT.iterdir():
        if path.name not in WRITTEN | {"examples"}:
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    cut_reviews(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cut_reviews(checkout: Path) -> None:
    """Leaves the first rows of the examples that most pages train on, of every label some."""
    for name, rows in REVIEWS_USED.items():
        path = checkout / "examples" / "reviews" / name
        pd.read_csv(path, dtype=str, keep_default_na=False).head(rows).to_csv(path, index=False)


class Walk:
    """Runs the commands of one page."""

    def __init__(self, checkout: Path, store: Path, serving: Serving, stack: contextlib.ExitStack) -> None:
        self._checkout, self._store, self._serving, self._stack = checkout, store, serving, stack
        self._served: Served | None = None
        self._variables: list[str] = []

    def printed(self, command: str) -> str:
        """What a command prints; nothing for those that start and stop the server, which the tests share."""
        may_fail = command.endswith(" || true")
        match shlex.split(command.removesuffix(" || true").replace("\\\n", " ")):
            case [".venv/bin/python", "train.py", *arguments]:
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    try:
                        train_here(*arguments, *(QUICK if "--train-file" in arguments else ()))
                    except UserError as error:
                        if not may_fail:
                            raise
                        print(f"train.py: {error}")
                return printed.getvalue()
            case ["./build_mar.sh", *arguments]:
                given = parse_build(arguments)
                name = given.name or given.bundle.name
                self._forget(name)
                self._stack.callback(self._forget, name)
                return build_here(given.bundle, self._store, name, "torch").replace(f"{self._store}/", "model_store/")
            case ["scripts/serve", "--models", *archives]:
                self._served = self._stack.enter_context(self._serving(*(pair.partition("=")[0] for pair in archives)))
                (self._checkout / "key_file.json").symlink_to(self._served.folder / "key_file.json")
                return ""
            case ["scripts/stop"]:
                return ""
        if served := self._served:
            command = command.replace("http://127.0.0.1:8080", served.url)
            ways = f"--url {served.url} --management-url {served.management} --grpc-target {served.grpc}"
            command = re.sub(r"(\.venv/bin/marble \w+)", rf"\1 {ways}", command)
            command = command.replace("RestClient(", f'RestClient("{served.url}", ')
        # The hub's client refuses even local addresses in offline mode.
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail"],
            input="\n".join([*self._variables, command, ""]),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        if re.match(r"[A-Z]+=", command):
            self._variables.append(command)
        return done.stdout

    def _forget(self, name: str) -> None:
        """Removes an archive from the shared store, where other tests may build one of the same name."""
        for file in self._store.glob(f"{name}.*"):
            file.unlink()


def lines(output: str) -> list[str]:
    """Lines with numbers, names of backends and precisions masked, without those of choices, epochs and progress."""
    passing = ("  chosen", "  epoch")
    kept = [line for line in transcripts.without_progress(output).splitlines() if not line.startswith(passing)]
    values = r"\b[0-9a-f]{64}\b|(at most )?\d[\w.,]*(-\d+)?( (epochs|steps)\b)?|torch|openvino|fp32|bf16|int8"
    return [" ".join(re.sub(values, "#", line).split()) for line in kept]


def assert_alike(found: Any, shown: Any) -> None:
    """The same keys and types all the way down; of lists, which may have any length, the first entries."""
    number = (int, float)
    assert (isinstance(found, number) and isinstance(shown, number)) or type(found) is type(shown), (found, shown)
    if isinstance(found, dict):
        assert found.keys() == shown.keys()
        for key in found:
            assert_alike(found[key], shown[key])
    elif isinstance(found, list) and found and shown:
        assert_alike(found[0], shown[0])


def assert_fresh(step: Step, found: str) -> None:
    """A command prints what its page shows."""
    shown = step.printed
    if "train.py" in step.command:
        assert lines(found) == lines(shown)
    elif "./build_mar.sh" in step.command:
        # A choice among candidates says the same of several, and has a table of them.
        assert [line for line in lines(found) if line not in lines(shown)] == []
    elif re.search(r"marble (predict|explain)|curl", step.command) and "|" not in step.command:
        for one, other in zip(found.splitlines(), shown.splitlines(), strict=True):
            if other[:1] in "[{":
                assert_alike(json.loads(one), json.loads(other))
            elif other.startswith("marble:"):
                assert lines(one) == lines(other)
    # What else a model writes, or a program makes of it, is its own.


@pytest.mark.parametrize("page", WALKED, ids=lambda page: page.stem)
def test_page(page: Path, checkout: Path, shared_store: Path, serving: Serving) -> None:
    steps = transcripts.steps(page.read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        walk = Walk(checkout, shared_store, serving, stack)
        for step in steps:
            assert_fresh(step, walk.printed(step.command))


@pytest.mark.timeout(900)
def test_demo_and_deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo of README.md and docs/deploy.md, as they stand there, in a copy of this checkout."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of several programs on few CPUs wait for each other
    transcripts.copy_checkout(tmp_path)
    cut_reviews(tmp_path)
    train, *rest = transcripts.steps(DEPLOY.read_text(encoding="utf-8"))
    assert "train.py" in train.command  # which the demo does, too
    # The demo chooses among candidates, and what it built is signed; a second version need not be chosen as well.
    quick = r"\g<0> --backend torch --precision fp32"
    commands = [re.sub(r"^\./build_mar\.sh .*--version.*", quick, step.command) for step in rest]
    demo, *printed = transcripts.run(["scripts/demo", *commands], tmp_path)
    assert "5/5 ask" in demo
    assert "done in" in demo
    for step, found in zip(rest, printed, strict=True):
        if step.printed[:1] in ("[", "{"):
            assert_alike(json.loads(found), json.loads(step.printed))
        else:
            assert lines(found)[-1:] == lines(step.printed)[-1:]


def test_every_task_has_a_walk_through() -> None:
    walked = {page.stem for page in transcripts.PAGES if page.parent.name == "examples"}
    assert walked == tasks.REGISTRY.keys()


@pytest.mark.parametrize("page", transcripts.PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_is_found(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    steps = transcripts.steps(text)
    assert text.count("\n$ ") == sum(not step.command.startswith(".venv/bin/python - <<") for step in steps)
    assert not any(
        step.printed == ""
        for step in steps
        if re.search(r"train\.py|build_mar|bin/marble|curl", step.command) and "--output " not in step.command
    )
