"""Row 7: more requests than the model can answer, over REST through the front door.

wrk offers the load at a fixed rate over many connections that are kept. It has the lowest priority, as it would be on
another machine, and what it could not offer is no overload: a factor without its rate is not met. Beside it a probe
asks at 50 a second and keeps each answer's status and time: wrk's own latencies do not tell those that were refused
from the others.
"""

import json
import resource
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.fault_injection.bench import MODEL, Bench, Target
from benchmarks.fault_injection.load import Load, Outcome, between, percentile, statuses
from benchmarks.fault_injection.site import BODY, Site, SiteError
from server.torchserve import read_properties

_SCRIPT = Path(__file__).with_name("overload.lua")
# Up to as many as the door lets in.
_CLOSED_LOOPS = (8, 16, 32, 64, 128)
_STEADY = 0.8
# How many times the peak is offered, and what share of it must still be answered.
_FACTORS = {2: 0.95, 5: 0.9, 10: 0.8}
# What wrk must have brought of the rate that it was told.
_OFFERED = 0.95
_CONNECTIONS = 256
_PROBES_A_SECOND = 50.0
_SECONDS_TO_REFUSE = 0.05
_SECONDS_TO_BE_NORMAL = 5
_WARM_UP_SECONDS = 5
_REFUSED = ("429", "503")


def overload(bench: Bench) -> tuple[list[Target], Any]:
    """Row 7, with `all_in_flight` as front.properties has it: two full batches of the model."""
    seconds = bench.times(20, 5)
    with bench.site("overload") as site:
        offer(site, 16, 0, _WARM_UP_SECONDS)
        loops = {loop: offer(site, loop, 0, seconds) for loop in _CLOSED_LOOPS}
        peak = max(entry["goodput"] for entry in loops.values())
        steady = phase(site, _STEADY * peak, seconds)
        allowed = 2 * steady["accepted_p99_s"]
        rounds = {factor: phase(site, factor * peak, seconds, allowed) for factor in _FACTORS}
        limits = read_properties(site.folder / "front.properties")
    targets = []
    for factor, share in _FACTORS.items():
        found = rounds[factor]
        goodput = round(found["goodput"] / peak, 3)
        refused, accepted, normal = found["refused_p99_s"], found["accepted_p99_s"], found["seconds_to_normal"]
        named, neither = f"{factor}x", found["others"] + found["broken"]
        targets += [
            Target(
                f"7a-{named}",
                f"goodput at {named} ({found['offered']:.0f}/s offered), of the peak of {peak:.0f}/s",
                goodput,
                f">= {share}",
                goodput >= share and found["offered"] >= _OFFERED * factor * peak,
            ),
            Target(
                f"7b-{named}",
                f"refused at {named} within, p99, s; {neither} neither answered nor refused",
                refused,
                f"<= {_SECONDS_TO_REFUSE}; 0",
                refused <= _SECONDS_TO_REFUSE and neither == 0,
            ),
            Target(
                f"7c-{named}",
                f"accepted at {named}, p99, s ({found['accepted']} probes)",
                accepted,
                f"<= {allowed:.4f}, 2 x at 80 %",
                0 < accepted <= allowed,
            ),
            Target(
                f"7d-{named}",
                f"after {named} normal again, s",
                normal,
                f"<= {_SECONDS_TO_BE_NORMAL}",
                normal <= _SECONDS_TO_BE_NORMAL,
            ),
        ]
    return targets, {
        "peak": peak,
        "all_in_flight": int(limits["all_in_flight"]),
        "closed_loops": loops,
        "steady": steady,
        **{f"{factor}x": found for factor, found in rounds.items()},
    }


def offer(site: Site, connections: int, rate: float, seconds: float) -> dict[str, Any]:
    """Load of wrk, and what processor time it took of whom. rate: a second; 0: as fast as it is answered."""
    before = cpu_seconds(site)
    with generate(site, connections, rate, seconds) as process:
        said, errors = process.communicate()
    return result(said + errors) | {"cpus": used(before, cpu_seconds(site), seconds)}


def generate(site: Site, connections: int, rate: float, seconds: float) -> "subprocess.Popen[str]":
    """Starts wrk."""
    token = f"Authorization: Bearer {site.tokens['predict']}"
    command = [
        *(
            "nice",
            "-n",
            "19",
            "wrk",
            "--threads",
            "1",
            "--connections",
            str(connections),
            "--duration",
            f"{round(seconds)}s",
        ),
        *("--timeout", "10s", "--header", token, "--script", str(_SCRIPT), f"{site.url}/predictions/{MODEL}"),
        *("--", json.dumps(BODY), str(rate)),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(said: str) -> dict[str, Any]:
    """What wrk found: rates a second. Raises SiteError if it failed."""
    for line in said.splitlines():
        if line.startswith("RESULT "):
            value: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            seconds = value["seconds"]
            value["offered"] = round(value["requests"] / seconds, 1)
            value["goodput"] = round((value["requests"] - value["refused"]) / seconds, 1)
            return value
    raise SiteError(f"wrk gave no result: {said[-500:]}")


def phase(site: Site, rate: float, seconds: float, allowed: float | None = None) -> dict[str, Any]:
    """A load of so much a second, probed; then, if `allowed` is given, how long it takes until all is normal again.

    allowed: the longest that a normal answer takes.
    """
    with ExitStack() as stack:
        load = stack.enter_context(Load(site, MODEL, rest=32, rate=_PROBES_A_SECOND))
        before = cpu_seconds(site)
        begun = time.monotonic()
        with generate(site, _CONNECTIONS, rate, seconds) as process:
            said, errors = process.communicate()
        ended = time.monotonic()
        found = result(said + errors) | {"cpus": used(before, cpu_seconds(site), ended - begun)}
        if allowed is not None:
            time.sleep(_SECONDS_TO_BE_NORMAL + 2)
    # The first second is wrk's, which makes its connections.
    probes = between(load.outcomes, begun + 1, ended)
    accepted = [probe.seconds for probe in probes if probe.good]
    refused = [probe.seconds for probe in probes if probe.status in _REFUSED]
    found |= {
        "wanted": round(rate, 1),
        "probes": statuses(probes),
        "accepted": len(accepted),
        "accepted_p50_s": percentile(accepted, 50),
        "accepted_p99_s": percentile(accepted, 99),
        "refused_p50_s": percentile(refused, 50),
        "refused_p99_s": percentile(refused, 99),
        "others": len(probes) - len(accepted) - len(refused),
    }
    if allowed is not None:
        found["seconds_to_normal"] = normal_after(load.outcomes, ended, allowed)
    return found


def normal_after(outcomes: Sequence[Outcome], ended: float, allowed: float) -> float:
    """Seconds to the first whole second in which all probes were answered, within the time allowed."""
    step = 0.1
    last = max(outcome.at for outcome in outcomes)
    begin = ended
    while begin + 1 <= last:
        second = between(outcomes, begin, begin + 1)
        if second and all(probe.good and probe.seconds <= allowed for probe in second):
            return round(begin - ended, 1)
        begin += step
    return round(last - ended, 1)


def cpu_seconds(site: Site) -> dict[str, float]:
    """Processor time that each has had; that of nginx with its processes that have ended."""
    nginx = site.nginx()
    ended = sum(nginx[0].cpu_times()[2:4])
    groups = {"nginx": nginx, "JVM": [site.torchserve()], "worker": site.workers(), "probe": [psutil.Process()]}
    spent = {name: sum(sum(process.cpu_times()[:2]) for process in group) for name, group in groups.items()}
    spent["nginx"] += ended
    # Those that have ended, wrk among them.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent | {"wrk": children.ru_utime + children.ru_stime}


def used(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
    """How many processors each has had in that time."""
    return {name: round((after[name] - before[name]) / seconds, 2) for name in before}
