"""Rows 2, 3 and 5: processes that are killed, and servers that are shut down, with requests under way."""

import datetime
import json
import time
from pathlib import Path
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


def kill_torchserve(bench: Bench) -> tuple[list[Target], Any]:
    """Row 3: `kill -9` of the supervised JVM while 24 clients ask, each of them again when it is told to."""
    kills: list[tuple[float, float]] = []
    times = bench.times(10, 2)
    with bench.site("kill-torchserve") as site, Load(site, MODEL, rest=4, grpc_calls=2, rate=100) as load:
        session = site.session()
        for _ in range(times):
            time.sleep(2)
            torchserve = site.torchserve()
            killed = time.monotonic()
            torchserve.kill()
            psutil.wait_procs([torchserve])
            site.wait_until(lambda: site.predict(session).status_code == 200)
            kills.append((killed, time.monotonic() - killed))
    rounds: list[dict[str, Any]] = []
    unclean = 0
    for killed, seconds in kills:
        failed = [entry for entry in between(load.outcomes, killed, killed + seconds + 1) if not entry.good]
        unclean += sum(not refused(entry.status) for entry in failed)
        rounds.append({"seconds_to_answer": round(seconds, 2), "failed": statuses(failed)})
    slowest = max(seconds for _, seconds in kills)
    return [
        Target("3a", f"kill to the next answer, the slowest of {times}, s", round(slowest, 1), "<= 30", slowest <= 30),
        Target("3b", "failed meanwhile with anything but 502, 503 or UNAVAILABLE", unclean, "0", unclean == 0),
    ], rounds


def shut_down(bench: Bench) -> tuple[list[Target], Any]:
    """Row 5: scripts/stop while 24 clients ask.

    Lost is what was sent before the door was told to close, and not answered.
    """
    rounds: list[dict[str, Any]] = []
    times = bench.times(30, 2)
    for number in range(times):
        with bench.site(f"shut-down-{number % 2}") as site, Load(site, MODEL, rest=16, grpc_calls=8, rate=400) as load:
            time.sleep(2)
            begun = time.monotonic()
            done = site.command("stop")
            seconds = time.monotonic() - begun
        closing = closed_at(site.folder)
        lost = [entry for entry in load.outcomes if not entry.good and entry.sent < closing]
        under_way = [entry for entry in load.outcomes if entry.sent < closing <= entry.at]
        rounds.append(
            {
                "seconds": round(seconds, 2),
                "exit": done.returncode,
                "under_way": len(under_way),
                "answered": sum(entry.good for entry in load.outcomes),
                "lost": statuses(lost),
            }
        )
    lost_in_all = sum(sum(entry["lost"].values()) for entry in rounds)
    slowest = max(entry["seconds"] for entry in rounds)
    clean = all(entry["exit"] == 0 for entry in rounds)
    in_flight = sum(entry["under_way"] for entry in rounds)
    what = f"requests lost in {times} shutdowns with {in_flight} in flight"
    return [
        Target("5a", what, lost_in_all, "0", lost_in_all == 0),
        Target("5b", "longest shutdown, s", slowest, "<= 30, exit 0", slowest <= 30 and clean),
    ], rounds


def closed_at(folder: Path) -> float:
    """time.monotonic() when the supervisor wrote that it drains."""
    lines = map(json.loads, (folder / "logs" / "watchdog.log").read_text(encoding="utf-8").splitlines())
    [said] = [line["time"] for line in lines if line["message"].startswith("draining")]
    moment = datetime.datetime.fromisoformat(said).timestamp()
    return time.monotonic() - (time.time() - moment)
