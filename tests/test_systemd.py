"""deploy/systemd/marble.service: what systemd itself says of it, and what it does not know. It is not run here."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run

from server.front import Settings
from server.options import serve as parse

UNIT = ROOT / "deploy" / "systemd" / "marble.service"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, as it would be for this checkout: systemd wants its program and its user to exist."""
    if shutil.which("systemd-analyze") is None:
        pytest.fail("systemd-analyze is missing; on Debian: apt-get install systemd")
    text = UNIT.read_text(encoding="utf-8").replace("/opt/marble/", f"{ROOT}/")
    path = tmp_path / "marble.service"
    path.write_text(re.sub(r"(?m)^(User|Group)=marble$", r"\1=root", text), encoding="utf-8")
    return path


def value(key: str) -> str:
    """Of a key that the unit has once, lines that go on joined."""
    [found] = re.findall(rf"(?m)^{key}=((?:.*\\\n)*.*)$", UNIT.read_text(encoding="utf-8"))
    return str(found).replace("\\\n", " ")


def test_systemd_finds_no_fault(unit: Path) -> None:
    done = run("systemd-analyze", "verify", "--man=no", unit)
    mine = [line for line in done.stderr.splitlines() if "marble.service" in line]
    assert (done.returncode, mine) == (0, [])


def test_systemd_would_find_a_fault(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=most"))
    assert "kill mode" in run("systemd-analyze", "verify", "--man=no", unit).stderr


def test_it_is_shut_in(unit: Path) -> None:
    """By systemd's own score, from 0 (shut in) to 100."""
    shutil.copy(UNIT, unit)
    done = run("systemd-analyze", "security", "--offline=true", "--threshold=35", "--no-pager", unit)
    assert done.returncode == 0, done.stdout[-600:]


def test_it_starts_what_there_is(unit: Path) -> None:
    program, *arguments = value("ExecStart").split()
    assert program == "/opt/marble/.venv/bin/python"
    assert arguments[:3] == ["-m", "server", "serve"]
    options = parse(arguments[3:])
    assert options.foreground
    assert options.front
    assert options.trust


def test_it_grants_the_time_that_stopping_takes() -> None:
    drain = Settings.read(ROOT / "front.properties").drain_seconds
    assert int(value("TimeoutStopSec")) >= drain + 5 + 30 + 10
    assert value("KillMode") == "mixed"
    assert subprocess.run(["sh", "-n", "-c", value("ExecReload")], check=True).returncode == 0
