"""Rows 2, 3 and 5: processes that are killed, and servers that are shut down, with requests under way."""

import time
from typing import Any

import psutil

from benchmarks.fault_injection.bench import MODEL, Bench, Target
from benchmarks.fault_injection.load import Load, between, percentile, statuses

# A batch of the classifier: what a worker can have taken with it.
BATCH = 64


def kill_workers(bench: Bench) -> tuple[list[Target], Any]:
    """Row 2: `kill -9` of the only worker, again and again, while 24 clients ask."""
    kills: list[tuple[float, float]] = []
    times = bench.times(50, 3)
    with bench.site("kill-workers") as site, Load(site, MODEL, rest=16, grpc_calls=8) as load:
        session = site.session()
        for _ in range(times):
            time.sleep(1)
            [worker] = site.workers()
            killed = time.monotonic()
            worker.kill()
            # An answer shows more than a status: one that came after the worker was gone is the next one's.
            psutil.wait_procs([worker])
            site.wait_until(lambda: site.predict(session).status_code == 200)
            kills.append((killed, time.monotonic() - killed))
    rounds: list[dict[str, Any]] = []
    for killed, seconds in kills:
        failed = [entry for entry in between(load.outcomes, killed, killed + seconds + 1) if not entry.good]
        lost = sum(not refused(entry.status) for entry in failed)
        rounds.append({"seconds_to_answer": round(seconds, 2), "lost": lost, "failed": statuses(failed)})
    hung = max(outcome.seconds for outcome in load.outcomes)
    most = max(round_["lost"] for round_ in rounds)
    recovery = percentile([seconds for _, seconds in kills], 99)
    return [
        Target("2a", f"requests lost with a worker, the most of {times} kills", most, f"<= {BATCH}", most <= BATCH),
        Target("2b", "longest time of any request, s", round(hung, 1), "<= 10", hung <= 10),
        Target("2c", "kill to the next answer, p99, s", round(recovery, 2), "<= 5", recovery <= 5),
    ], rounds


def refused(status: str) -> bool:
    """Whether a request was told at once that nobody is there, which is not to be lost."""
    return status in ("503", "429", "UNAVAILABLE", "RESOURCE_EXHAUSTED")
