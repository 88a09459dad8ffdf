"""Every command's --help teaches by example, and its examples are what the command takes."""

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence

import pytest
from conftest import ROOT

import train
from archiver.__main__ import parse as build
from benchmarks import bulk, compression, explanations, quality, training
from benchmarks.fault_injection.__main__ import parse as faults
from benchmarks.speed.__main__ import parse as bench
from console.__main__ import parser as console
from marble_client.cli import parser as marble
from server import options
from training import compare

Parse = Callable[[Sequence[str]], object]

COMMANDS: dict[str, Parse] = {
    "python train.py": train.parse,
    "./build_mar.sh": build,
    "python -m training.compare": compare.parse,
    "scripts/serve": options.serve,
    "scripts/stop": options.stop,
    "scripts/verify": options.verify,
    "scripts/token": options.token,
    "scripts/upgrade": options.upgrade,
    "scripts/rollback": options.rollback,
    "scripts/bench": bench,
    "benchmarks/faults": faults,
    "benchmarks/quality": quality.parse,
    "benchmarks/explanations": explanations.parse,
    "benchmarks/bulk": bulk.parse,
    "benchmarks/training": training.parse,
    "benchmarks/compression": compression.parse,
    "scripts/console": console().parse_args,
    "marble": marble().parse_args,
}
# Those of `marble`, which share its parser.
PARTS = ("predict", "explain", "ready", "models")


@pytest.mark.parametrize("command", [*COMMANDS, *(f"marble {part}" for part in PARTS)])
def test_help_teaches_by_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = command if command in COMMANDS else "marble"
    part = command.removeprefix(program).split()
    with pytest.raises(SystemExit) as ended:
        COMMANDS[program]([*part, "--help"])
    assert ended.value.code in (0, None)
    told = capsys.readouterr().out
    found = examples(told, command)
    assert found, told
    for example in found:
        COMMANDS[program]([*part, *example])  # raises SystemExit for what it does not take


def test_the_help_of_train_begins_with_what_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    told = capsys.readouterr().out
    marks = [
        "examples:",
        "  --train-file ",
        "how to train:",
        "  --learning-rate ",
        "every argument of the",
        "--adam-beta1 ",
    ]
    places = [told.index(mark) for mark in marks]
    assert places == sorted(places)
    assert "--train_file" not in told
    assert train.parse(["--train_file", "a.csv", "--output_dir", "b"])[0].train_file == "a.csv"


def test_what_no_command_takes_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for command, parse in COMMANDS.items():
        with pytest.raises(SystemExit) as ended:
            parse(["--output-dir", "a", "--no-such-option"] if parse is train.parse else ["--no-such-option"])
        assert ended.value.code == 2, command
        assert capsys.readouterr().err.startswith("usage: ")


def test_the_demo() -> None:
    told = subprocess.run([ROOT / "scripts" / "demo", "--help"], capture_output=True, text=True, check=True).stdout
    assert examples(told, "scripts/demo") == [[], ["--keep"]]


def examples(told: str, command: str) -> list[list[str]]:
    """The arguments of the command in each line of its help's examples."""
    _, _, rest = told.partition("example")
    lines = rest.replace("\\\n", " ").splitlines()
    start = f"  {re.escape(command)}(?= |$)"
    mine = [line[found.end() :] for line in lines if (found := re.match(start, line))]
    # What follows is the shell's.
    return [shlex.split(re.split(" (?:<|&&) ", line)[0], comments=True) for line in mine]
