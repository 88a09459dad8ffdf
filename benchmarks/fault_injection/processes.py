"""Rows 2, 3 and 5: processes that are killed, and servers that are shut down, with requests under way."""

import os
import signal
import time
from typing import Any

import psutil

from benchmarks.fault_injection.bench import MODEL, Bench, Target
from benchmarks.fault_injection.load import Load, between, percentile, statuses

# A batch of the classifier: what a worker can have taken with it.
BATCH = 64


def kill_workers(bench: Bench) -> tuple[list[Target], Any]:
    """Row 2: `kill -9` of the only worker, again and again, while 24 clients ask."""
    rounds = []
    times = bench.times(50, 3)
    with bench.site("kill-workers") as site, Load(site, MODEL, rest=16, grpc_calls=8) as load:
        for _ in range(times):
            time.sleep(1)
            [worker] = site.workers()
            killed = time.monotonic()
            worker.kill()
            session = site.session()

            def answers() -> bool:
                return site.predict(session).status_code == 200  # noqa: B023  # used at once

            # The first answer of all shows that a worker is READY and at work; `lost` is counted from the clients.
            seconds = site.wait_until(lambda: site.workers() != [] and worker.pid not in pids(site.workers()))
            seconds += site.wait_until(answers)
            rounds.append({"killed": killed, "seconds_to_answer": round(seconds, 2)})
    for entry in rounds:
        lost = [o for o in between(load.outcomes, entry["killed"], entry["killed"] + 15) if not o.good]
        entry["lost"] = statuses(lost)
        entry["lost_with_worker"] = sum(not refused(o.status) for o in lost)
    hung = max(outcome.seconds for outcome in load.outcomes)
    most = max(entry["lost_with_worker"] for entry in rounds)
    recovery = percentile([entry["seconds_to_answer"] for entry in rounds], 99)
    for entry in rounds:
        del entry["killed"]
    return [
        Target("2a", f"requests lost with a worker, the most of {times} kills", most, f"<= {BATCH}", most <= BATCH),
        Target("2b", "longest time of any request, s", round(hung, 1), "<= 10", hung <= 10),
        Target("2c", "kill to the next answer, p99, s", recovery, "<= 5", recovery <= 5),
    ], rounds


def refused(status: str) -> bool:
    """Whether a request was told at once that nobody is there, which is not to be lost."""
    return status in ("503", "429", "UNAVAILABLE", "RESOURCE_EXHAUSTED")


def pids(processes: list[psutil.Process]) -> list[int]:
    return [process.pid for process in processes]
