"""Looks after a running TorchServe: asks every model for its canary, and ends what no longer answers.

TorchServe calls a worker READY until its connection breaks, and answers /ping while nothing else works. The canary is a
request like any other, so it proves the whole way: frontend, queue, worker and model.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil

from marble_client import MarbleError
from server.torchserve import Server, ServerError

_MANAGEMENT_SECONDS = 3
# A worker that waits for work spends next to no time on a CPU.
_IDLE_SHARE = 0.02
_WRONG_ANSWERS = 3
# Workers of a model that may be ended in vain before the whole server is started anew.
_WORKERS_ENDED = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds; front.properties has their meaning."""

    every: float
    within: float
    silent: float
    stuck: float


@dataclass(frozen=True, slots=True)
class Check:
    """What was found of a model: the process ids of its READY workers, and why it is not ready (None: it is).

    at: time.monotonic() when its canary was answered, or not.
    """

    model: str
    workers: list[int]
    fault: str | None
    at: float
    managed: bool = True
    wrong: bool = False


@dataclass(frozen=True, slots=True)
class Restart:
    """The server must be started anew, because of this."""

    seen: str


@dataclass(frozen=True, slots=True)
class End:
    """This worker must be ended, because of this; TorchServe starts it anew."""

    worker: int
    seen: str


@dataclass(slots=True)
class _Worker:
    cpu_seconds: float
    at: float
    quiet_since: float


@dataclass(slots=True)
class History:
    """What is remembered of a model between checks. Times are those of time.monotonic()."""

    well_at: float
    wrong: int = 0
    ended: int = 0
    unmanaged_since: float | None = None
    workers: dict[int, _Worker] = field(default_factory=dict)


class Watchdog:
    """Checks, and says what to do; it does nothing itself."""

    def __init__(self, server: Server, timing: Timing) -> None:
        """Of a server whose models have just answered."""
        self._server = server
        self._timing = timing
        now = time.monotonic()
        self._models = {name: History(now) for name in server.models}

    def round(self) -> tuple[list[Check], list[Restart | End]]:
        """Checks all models at once; returns what was found and what to do about it."""
        with ThreadPoolExecutor(len(self._models)) as pool:
            checks = list(pool.map(self._check, self._models))
        actions: list[Restart | End] = []
        for check in checks:
            actions += judge(check, self._models[check.model], self._timing, self._processes(check))
        return checks, actions

    def _check(self, model: str) -> Check:
        """Asks the management API for the model's workers, and the model for its canary."""
        managed = True
        workers: list[int] = []
        try:
            workers = ready_workers(self._server.manage("GET", f"/models/{model}", timeout=_MANAGEMENT_SECONDS))
        except (ServerError, TypeError, KeyError):
            managed = False
        if not workers:
            why = "no worker is READY" if managed else "TorchServe's management does not answer"
            return Check(model, workers, why, time.monotonic(), managed)
        try:
            with self._server.client(self._timing.within) as client:
                client.canary(model)
        except MarbleError as error:
            return Check(model, workers, error.message, time.monotonic(), wrong=error.type == "WrongAnswer")
        return Check(model, workers, None, time.monotonic())

    def _processes(self, check: Check) -> dict[int, float]:
        """CPU seconds of each READY worker that is a process of the server."""
        found = {}
        for pid in check.workers:
            try:
                process = psutil.Process(pid)
                if self._server.pid in (parent.pid for parent in process.parents()):
                    times = process.cpu_times()
                    found[pid] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return found


def ready_workers(description: Sequence[Mapping[str, Any]]) -> list[int]:
    """Process ids of the READY workers in what the management API says of a model."""
    return [worker["pid"] for version in description for worker in version["workers"] if worker["status"] == "READY"]


def judge(check: Check, history: History, timing: Timing, cpu_seconds: Mapping[int, float]) -> list[Restart | End]:
    """What to do after a check, of which `history` takes note. cpu_seconds: of the READY workers, by process id."""
    now = check.at
    for pid, spent in cpu_seconds.items():
        known = history.workers.get(pid)
        idle = known is not None and spent - known.cpu_seconds <= _IDLE_SHARE * (now - known.at)
        quiet_since = known.quiet_since if known is not None and idle else now
        history.workers[pid] = _Worker(spent, now, quiet_since)
    history.workers = {pid: worker for pid, worker in history.workers.items() if pid in cpu_seconds}
    if check.managed:
        history.unmanaged_since = None
    elif history.unmanaged_since is None:
        history.unmanaged_since = now
    if check.fault is None:
        history.well_at, history.wrong, history.ended = now, 0, 0
        return []
    unwell = now - history.well_at
    history.wrong = history.wrong + 1 if check.wrong else 0
    if history.unmanaged_since is not None:
        if now - history.unmanaged_since >= timing.silent:
            return [Restart(f"TorchServe's management has not answered for {now - history.unmanaged_since:.0f} s")]
        return []
    if history.ended >= _WORKERS_ENDED or (not history.workers and unwell >= timing.stuck):
        return [Restart(f"{check.model!r} has had no worker that answers for {unwell:.0f} s: {check.fault}")]
    if history.wrong >= _WRONG_ANSWERS:
        why, culprits = "gives wrong answers", list(history.workers)
    elif unwell >= timing.stuck:
        why, culprits = f"has answered nothing for {unwell:.0f} s", list(history.workers)
    elif unwell >= timing.silent:
        # One that computes may have a queue before it; one that does not has stopped, or waits for what never comes.
        culprits = [pid for pid, worker in history.workers.items() if now - worker.quiet_since >= timing.silent]
        why = f"is READY, has answered nothing and computed nothing for {timing.silent:g} s"
    else:
        return []
    if culprits:
        # Those that take their place have the same time again.
        history.well_at, history.wrong, history.workers = now, 0, {}
        history.ended += 1
    return [End(pid, f"worker {pid} of {check.model!r} {why} ({check.fault})") for pid in culprits]
