"""How many CPUs a worker takes itself to have: its affinity, or a quota of either version of the control groups."""

import os
from pathlib import Path

import pytest

from handler import cpus
from handler.settings import Settings

HERE = len(os.sched_getaffinity(0))


def machine(root: Path, membership: str, files: dict[str, str]) -> Path:
    """A root folder with one process's control groups."""
    for name, text in {"proc/self/cgroup": membership, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/", {"sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        ("0::/", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, HERE),
        ("0::/", {"sys/fs/cgroup/cpu.max": f"{100 * HERE}00000 100000"}, HERE),
        # The group that holds the process's own has the quota.
        (
            "0::/pod/app",
            {"sys/fs/cgroup/pod/app/cpu.max": "max 100000", "sys/fs/cgroup/pod/cpu.max": "100000 100000"},
            1,
        ),
        # In a container the path is the host's, and only the mount is to be seen.
        ("0::/docker/abc", {"sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        (
            "5:memory:/x\n4:cpu,cpuacct:/x",
            {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"},
            1,
        ),
        (
            "4:cpu:/",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            HERE,
        ),
        ("0::/", {"sys/fs/cgroup/cpu.max": "nonsense"}, HERE),
        ("0::/", {}, HERE),
    ],
)
def test_the_quota_counts(tmp_path: Path, membership: str, files: dict[str, str], expected: int) -> None:
    assert cpus.available(machine(tmp_path, membership, files)) == expected


def test_a_fraction_of_a_cpu_counts_as_one_more(tmp_path: Path) -> None:
    if HERE < 2:
        pytest.skip("needs two CPUs")
    assert cpus.available(machine(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": "120000 100000"})) == 2


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert cpus.available(tmp_path) == HERE


def test_this_machine() -> None:
    assert 1 <= cpus.available() <= HERE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("minWorkers: 1\nhandler: {task: fill-mask}", None),
        ("minWorkers: 1\nmaxWorkers: 2\nhandler: {task: fill-mask}", max(1, cpus.available() // 2)),
        ("minWorkers: 64\nhandler: {task: fill-mask}", max(1, cpus.available() // 64)),
        ("minWorkers: 2\nhandler: {task: fill-mask, threads: 3}", 3),
    ],
)
def test_workers_share_the_cpus(tmp_path: Path, text: str, expected: int | None) -> None:
    (tmp_path / "model-config.yaml").write_text(text, encoding="utf-8")
    settings = Settings.load(tmp_path)
    assert settings.threads == expected
    assert settings.cpu_threads() == (expected or cpus.available())
