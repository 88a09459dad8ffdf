"""How many CPUs this process really has: in a container that is its quota, not the host's cores."""

import math
import os
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """CPUs that the scheduler gives this process: those of its affinity mask, or fewer where a cgroup has a quota.

    Reads both versions of the control groups (`cpu.max`, `cpu.cfs_quota_us`). root: where /proc and /sys are.
    """
    quotas = [len(os.sched_getaffinity(0)), *_quotas(root)]
    return max(1, math.ceil(min(quotas)))


def cores(root: Path = Path("/")) -> int:
    """Cores of these CPUs: two hyperthreads of one core are one. At most `available`."""
    places = root / "sys/devices/system/cpu"
    try:
        siblings = {
            (places / f"cpu{number}/topology/thread_siblings_list").read_text() for number in os.sched_getaffinity(0)
        }
    except OSError:
        return available(root)
    return min(len(siblings), available(root))


def _quotas(root: Path) -> list[float]:
    """Quotas, in CPUs, of this process's control group and of those that hold it."""
    found = []
    for folder in _control_groups(root):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
            # "max" or -1: no quota.
            if quota.isdecimal() and int(quota) > 0 and int(period) > 0:
                found.append(int(quota) / int(period))
        except (OSError, ValueError):
            continue  # a group without a CPU controller, or one that cannot be read
    return found


def _control_groups(root: Path) -> list[Path]:
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            base = mount
        elif "cpu" in controllers.split(","):
            base = mount / "cpu" if (mount / "cpu").exists() else mount / controllers
        else:
            continue
        # Inside a container the path may be the host's, which is not mounted here: the mount itself always counts.
        relative = Path(path.lstrip("/"))
        groups += [base / part for part in (relative, *relative.parents)] if path != "/" else [base]
    return groups
