"""Keeps a front door and a TorchServe running together, and stops them in the order that loses no request."""

import itertools
import json
import logging
import logging.handlers
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

import psutil

from server.front import STATE, Front, State
from server.health import Health, HealthServer
from server.torchserve import LOGS, Server, ServerError, is_worker
from server.watchdog import End, Restart, Timing, Watchdog

LOG = logging.getLogger("watchdog")
_POLL_SECONDS = 0.25
# The longest that a round of checks may take on a busy machine.
_ROUND_SECONDS = 60
# Between restarts that fail.
_BACK_OFF_SECONDS = (1, 2, 5, 10, 30, 60)


class Supervisor:
    """Of one server and its front door, until told to stop."""

    def __init__(self, server: Server, front: Front, launch: Callable[[], Server], launch_seconds: float) -> None:
        """server: one that is ready. launch: starts it anew and returns when it is; within launch_seconds."""
        self._server = server
        self._front = front
        self._launch = launch
        self._launch_seconds = launch_seconds
        s = front.settings
        self._timing = Timing(s.canary_every_seconds, s.canary_within_seconds, s.silent_seconds, s.stuck_seconds)
        self._watchdog = Watchdog(server, self._timing)
        self._health = Health(2 * self._timing.every + self._timing.within)
        self._promise(_ROUND_SECONDS)
        self._reload_asked = False

    def open(self) -> None:
        """Opens the front door. Raises ServerError if nginx does not start."""
        checks, _ = self._watchdog.round()
        self._health.checks = checks
        self._health.certificate_ends = self._front.certificate.ends()
        self._service = HealthServer(self._front.folder / "health.sock", self._health)
        self._front.open(self._server.keys()[0])
        self._front.start()
        LOG.info("open: %s behind REST %s and gRPC %s", ", ".join(self._server.models), *self._addresses())

    def stay(self) -> None:
        """Watches until a signal ends it (SystemExit). SIGHUP: new certificates and tokens."""
        signal.signal(signal.SIGHUP, self._ask_for_reload)
        due = time.monotonic() + self._timing.every
        while True:
            time.sleep(_POLL_SECONDS)
            self._front.rotate_logs()
            if self._reload_asked:
                self._reload()
            if not self._front.alive():
                LOG.error("nginx has ended by itself: starting it anew")
                self._tell_front(self._front.start)
            if self._server.process() is None:
                self._restart(f"TorchServe (process {self._server.pid}) has ended by itself")
            elif time.monotonic() >= due:
                if self._front.files_changed():
                    self._reload()
                self._round()
            else:
                continue
            due = time.monotonic() + self._timing.every

    def stop(self) -> None:
        """Closes the door, lets what came in be answered, then ends TorchServe."""
        self._health.draining = True
        self._promise(3600)
        LOG.info("draining: connections end with an answer, then no new request is taken")
        self._front.drain()
        # A server that was being started is another than the one that is known here.
        (Server.noted() or self._server).stop()
        self._service.close()
        LOG.info("stopped")

    def _round(self) -> None:
        self._promise(_ROUND_SECONDS)
        was = {check.model: check.fault for check in self._health.checks}
        checks, actions = self._watchdog.round()
        self._health.checks = checks
        for check in checks:
            if check.fault is not None and was.get(check.model) is None:
                LOG.warning("%r is not ready: %s", check.model, check.fault)
            elif check.fault is None and was.get(check.model) is not None:
                LOG.info("%r answers again", check.model)
        if self._health.ready():
            self._health.ready_at = time.monotonic()
        for action in actions:
            match action:
                case End(worker, seen):
                    LOG.error("%s: ended, TorchServe starts another", seen)
                    self._health.workers_ended += 1
                    _kill([worker])
                case Restart(seen):
                    self._restart(seen)
                    return

    def _restart(self, seen: str) -> None:
        """Starts TorchServe anew, as often as it takes; the door answers 503 meanwhile."""
        LOG.error("%s: starting it anew", seen)
        began = time.monotonic()
        self._tell_front(self._front.close)
        orphans = [worker for check in self._health.checks for worker in check.workers]
        self._health.checks = ()
        for attempt in itertools.count():
            self._promise(self._launch_seconds + _ROUND_SECONDS + _BACK_OFF_SECONDS[-1])
            self._health.restarts += 1
            try:
                self._server.end(seconds=0)
                # Workers end when their frontend is gone; those that are stopped or stuck do not.
                _kill(orphans)
                self._server = self._launch()
                break
            except ServerError as error:
                LOG.error("TorchServe did not start: %s", error)
                self._server = Server.noted() or self._server
                time.sleep(_BACK_OFF_SECONDS[min(attempt, len(_BACK_OFF_SECONDS) - 1)])
        self._watchdog = Watchdog(self._server, self._timing)
        self._tell_front(lambda: self._front.open(self._server.keys()[0]))
        LOG.info("ready again after %.1f s (process %d)", time.monotonic() - began, self._server.pid)
        self._round()

    def _reload(self) -> None:
        self._reload_asked = False
        self._tell_front(self._reload_front)

    def _reload_front(self) -> None:
        # Known before nginx is told: it would take its time to refuse, and canaries would wait for it.
        self._front.certificate.check()
        self._tell_front(self._front.write_tokens)
        self._front.reload()
        self._health.certificate_ends = self._front.certificate.ends()
        LOG.info("reloaded")

    def _tell_front(self, what: Callable[[], None]) -> None:
        """A door that does not do as it is told (its new certificate is none, say) is no reason to end the server."""
        try:
            what()
        except ServerError as error:
            LOG.error("%s", error)

    def _ask_for_reload(self, _number: int, _frame: FrameType | None) -> None:
        self._reload_asked = True

    def _promise(self, seconds: float) -> None:
        self._health.back_by = time.monotonic() + seconds

    def _addresses(self) -> tuple[str, str]:
        return self._front.settings.rest, self._front.settings.grpc


def _kill(workers: Sequence[int]) -> None:
    """Ends those of these processes that are workers of TorchServe."""
    for worker in workers:
        try:
            process = psutil.Process(worker)
            if is_worker(process):
                process.kill()
        except psutil.NoSuchProcess:
            pass


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(values)


def log_to_file() -> None:
    """Writes what the watchdog sees to logs/watchdog.log: one JSON object a line, five old files of 20 MB."""
    LOGS.mkdir(exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(LOGS / "watchdog.log", maxBytes=20_000_000, backupCount=5)
    handler.setFormatter(_Json())
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)


def detach(arguments: Sequence[str]) -> None:
    """Runs `scripts/serve --foreground` with these arguments in the background; returns when it is ready.

    Raises ServerError with what it said if it ends instead.
    """
    LOGS.mkdir(exist_ok=True)
    output, errors = LOGS / "supervisor.log", LOGS / "supervisor_error.log"
    with output.open("wb") as out, errors.open("wb") as error:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", *arguments, "--foreground"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=error,
            start_new_session=True,
        )
    try:
        # It says all that it has to say at once, when it is ready.
        while output.stat().st_size == 0:
            if process.poll() is not None:
                said = errors.read_text(encoding="utf-8").strip()
                raise ServerError(said.rpartition("scripts/serve: ")[2])
            time.sleep(0.1)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    print(output.read_text(encoding="utf-8"), end="")
    print(errors.read_text(encoding="utf-8"), end="", file=sys.stderr)


def stop_running() -> bool:
    """Stops the supervised server of this working directory; whether there was one."""
    state = State.read()
    if state is None:
        return False
    supervisor = state.supervising()
    if supervisor is not None:
        supervisor.terminate()
        supervisor.wait()
        print(f"stopped process {state.supervisor}")
        return True
    if state.serving() is None:
        STATE.unlink(missing_ok=True)
        return False
    # Its supervisor was killed: the same, in the same order.
    state.drain(60)
    if (server := Server.running()) is not None:
        server.stop()
    print(f"stopped process {state.nginx}, whose supervisor was gone")
    return True
