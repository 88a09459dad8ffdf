"""What the front door answers at /live, /ready and /status: an HTTP server on a socket that only nginx is told of."""

import json
import socketserver
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from server.watchdog import Check

# A server that has been unready for so long needs more help than its watchdog can give.
_UNREADY_SECONDS = 300


@dataclass(slots=True)
class Health:
    """What is known now. The supervisor writes it, requests read it; times are those of time.monotonic().

    fresh_seconds: a check that is older proves nothing any more.
    """

    fresh_seconds: float
    checks: Sequence[Check] = ()
    # The supervisor promises to be back by then.
    back_by: float = 0
    ready_at: float = field(default_factory=time.monotonic)
    draining: bool = False
    restarts: int = 0
    workers_ended: int = 0
    certificate_ends: float = 0

    def ready(self) -> bool:
        """Whether every model has just answered its canary."""
        oldest = time.monotonic() - self.fresh_seconds
        return bool(self.checks) and not self.draining and all(c.fault is None and c.at > oldest for c in self.checks)

    def live(self) -> bool:
        """Whether the watchdog is at work and has not tried in vain for minutes."""
        now = time.monotonic()
        return now < self.back_by and (self.draining or now - self.ready_at < _UNREADY_SECONDS)

    def report(self) -> dict[str, Any]:
        """All of it, for people."""
        now = time.monotonic()
        return {
            "ready": self.ready(),
            "live": self.live(),
            "draining": self.draining,
            "restarts": self.restarts,
            "workers_ended": self.workers_ended,
            "certificate_ends": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.certificate_ends)),
            "models": {
                c.model: {"workers": c.workers, "fault": c.fault, "checked_seconds_ago": round(now - c.at, 1)}
                for c in self.checks
            },
        }


class HealthServer(socketserver.ThreadingUnixStreamServer):
    """Answers from `health` until `close`. Raises OSError if the socket cannot be made."""

    daemon_threads = True

    def __init__(self, path: Path, health: Health) -> None:
        self.health = health
        super().__init__(str(path), _Handler)
        path.chmod(0o666)  # nginx's own processes may be another user's
        self._thread = threading.Thread(target=self.serve_forever, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HealthServer

    def do_GET(self) -> None:
        health = self.server.health
        match self.path:
            case "/live":
                self._answer(health.live(), {"live": health.live()})
            case "/ready":
                self._answer(health.ready(), {"ready": health.ready()})
            case _:
                self._answer(True, health.report())

    do_HEAD = do_GET

    def _answer(self, good: bool, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode("ascii")
        self.send_response(200 if good else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: nginx logs requests."""
