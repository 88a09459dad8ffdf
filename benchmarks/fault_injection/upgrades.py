"""Row 6: another version of a model, and the one before again, while clients ask."""

import time
from typing import Any

from benchmarks.fault_injection.bench import MODEL, Bench, Target
from benchmarks.fault_injection.load import Load, statuses
from benchmarks.fault_injection.site import SiteError


def upgrade(bench: Bench) -> tuple[list[Target], Any]:
    """scripts/upgrade and scripts/rollback in turns, with 24 clients."""
    file = bench.next_version()
    times = bench.times(10, 1)
    rounds = []
    with bench.site("upgrades") as site, Load(site, MODEL, rest=16, grpc_calls=8) as load:
        session = site.session()
        for _ in range(times):
            for command, expected in (
                (("upgrade", f"{MODEL}={file}", "--store", site.store), "2.0"),
                (("rollback", MODEL), "1.0"),
            ):
                begun = time.monotonic()
                done = site.command(*command)
                seconds = time.monotonic() - begun
                if done.returncode != 0:
                    raise SiteError(f"scripts/{command[0]}: {done.stderr}")
                served = site.predict(session).headers["x-model-version"]
                if served != expected:
                    raise SiteError(f"scripts/{command[0]}: version {served} answers, not {expected}")
                rounds.append({"command": command[0], "version": served, "seconds": round(seconds, 2)})
    failed = [entry for entry in load.outcomes if not entry.good]
    slowest = max(entry.seconds for entry in load.outcomes)
    asked = f"{times} upgrades and {times} rollbacks, {len(load.outcomes)} requests"
    return [
        Target("6a", f"requests that failed in {asked}", len(failed), "0", not failed),
        Target("6b", "longest time of any request, s", round(slowest, 2), "<= 10", slowest <= 10),
    ], {"changes": rounds, "statuses": statuses(load.outcomes)}
