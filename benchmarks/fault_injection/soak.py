"""Row 1: ordinary work for long, over REST and gRPC: nothing fails, nothing grows."""

import json
import os
import threading
import time
import zipfile
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import psutil

from archiver import sign
from benchmarks.fault_injection.bench import MODEL, Bench, Target
from benchmarks.fault_injection.load import Load, percentile, statuses
from benchmarks.fault_injection.site import Site
from handler import digests

SHARE_OF_CAPACITY = 0.7
MOST_GROWTH_MB = 20.0
_MB = 2**20
# The control: a model whose handler keeps something of each request.
_LEAKS = "leaks"
_LEAK_REQUESTS_A_SECOND = 10
# What it keeps in the whole time; linear growth is a quarter of that in the second half, less the mean of that half.
_LEAK_MB = 240
_LEAK = """

_kept = []
_handle = Entry.handle


def _leak(self, rows, context):
    _kept.append(b"x" * {bytes} * len(rows))
    return _handle(self, rows, context)


Entry.handle = _leak
"""


def soak(bench: Bench) -> tuple[list[Target], Any]:
    """Requests at 70 % of what the server can answer, for half an hour or SOAK_MINUTES; memory is read every second.

    Growth is the greatest reading of the second half less the mean of that half. Beside the model a second one leaks on
    purpose, by little a request: were that not seen, a leak of ours would not be either.
    """
    minutes = int(os.environ.get("SOAK_MINUTES", "30"))
    seconds, measured = bench.times(60 * minutes, 40), bench.times(15, 4)
    bench.prepare(MODEL)
    leaking_archive(bench, seconds)
    with bench.site("soak", (MODEL, _LEAKS)) as site:
        with Load(site, MODEL, rest=16, grpc_calls=8) as peak:
            time.sleep(measured)
        capacity = len(peak.outcomes) / measured
        with (
            Load(site, MODEL, rest=16, grpc_calls=8, rate=SHARE_OF_CAPACITY * capacity) as load,
            Load(site, _LEAKS, rest=2, rate=_LEAK_REQUESTS_A_SECOND) as control,
            Memory(site) as memory,
        ):
            time.sleep(seconds)
    growth = {name: second_half_growth(values) for name, values in memory.mb.items()}
    bad = [entry for entry in load.outcomes + control.outcomes if not entry.good]
    most = max(growth["TorchServe"], growth[MODEL])
    return [
        Target("1a", f"not answered, of {len(load.outcomes)} requests", len(bad), "0", not bad),
        Target(
            "1b",
            f"growth of server and worker in {seconds / 60:.3g} minutes, second half, max - mean, MB",
            round(most, 1),
            f"<= {MOST_GROWTH_MB:g}",
            most <= MOST_GROWTH_MB,
        ),
        Target(
            "1c",
            "the same of a worker that leaks on purpose, MB",
            round(growth[_LEAKS], 1),
            f"> {MOST_GROWTH_MB:g}",
            growth[_LEAKS] > MOST_GROWTH_MB,
        ),
    ], {
        "capacity": round(capacity, 1),
        "statuses": statuses(load.outcomes),
        "failed": statuses(bad),
        "p50_ms": round(1e3 * percentile([entry.seconds for entry in load.outcomes], 50), 2),
        "p99_ms": round(1e3 * percentile([entry.seconds for entry in load.outcomes], 99), 2),
        "growth_mb": {name: round(value, 2) for name, value in growth.items()},
        "rss_mb_each_half_minute": {
            name: [round(value) for value in values[::30]] for name, values in memory.mb.items()
        },
    }


class Memory:
    """Resident memory of a site's processes, read each second in a `with` block; `mb` has it by process."""

    def __init__(self, site: Site) -> None:
        status = site.session("admin").get(f"{site.url}/status", timeout=60).json()
        self._processes = {name: [psutil.Process(model["workers"][0])] for name, model in status["models"].items()}
        self._processes |= {"TorchServe": [site.torchserve()], "nginx": site.nginx()}
        self.mb: dict[str, list[float]] = {name: [] for name in self._processes}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="memory")

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._over.wait(1):
            for name, processes in self._processes.items():
                self.mb[name].append(sum(process.memory_info().rss for process in processes) / _MB)


def second_half_growth(values: Sequence[float]) -> float:
    """Maximum less mean of the second half, in the unit of the values."""
    half = values[len(values) // 2 :]
    return max(half) - sum(half) / len(half)


def leaking_archive(bench: Bench, seconds: float) -> None:
    """The classifier's archive, with a handler that keeps `_LEAK_MB` in so many seconds."""
    source, target = bench.store / f"{MODEL}.mar", bench.store / f"{_LEAKS}.mar"
    kept = int(_LEAK_MB * _MB / (seconds * _LEAK_REQUESTS_A_SECOND))
    with zipfile.ZipFile(source) as file:
        members = {entry.filename: file.read(entry) for entry in file.infolist()}
    members["entry.py"] += _LEAK.format(bytes=kept).encode()
    listed = json.loads(members[digests.FILE_NAME])
    folder = bench.work / "leaks"
    folder.mkdir(exist_ok=True)
    changed = folder / "entry.py"
    changed.write_bytes(members["entry.py"])
    listed["entry.py"] = digests.sha256(changed)
    members[digests.FILE_NAME] = json.dumps(listed).encode()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    sign.write_checksum(target)
