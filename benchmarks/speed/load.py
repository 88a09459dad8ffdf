"""Load on a server: wrk for REST, `benchmarks/grpc_load.py` for gRPC; both post the lines of a file in turn."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_MARK = "RESULT "
_GRACE_SECONDS = 60


class LoadError(Exception):
    """A load generator is missing or failed. The message says how to mend it."""


@dataclass(frozen=True)
class Sample:
    """One measurement.

    requests: answered within `seconds`; p50_ms, p99_ms: their latencies; errors: requests with no answer or a bad one.
    cpu_ms: processor time of one request, by process: "worker" of a TorchServe, "server", "load generator".
    """

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int
    cpu_ms: Mapping[str, float] | None = None

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    @property
    def valid(self) -> bool:
        """Whether there were answers, and no error among them."""
        return self.requests > 0 and self.errors == 0


def check_wrk() -> None:
    """Raises LoadError if wrk is not installed."""
    if shutil.which("wrk") is None:
        raise LoadError("the load generator wrk is not installed: apt-get install wrk")


def rest(url: str, bodies: Path, connections: int, seconds: float, token: str | None = None) -> Sample:
    """Load from so many connections, each of which sends its next request when the last is answered.

    Raises LoadError if wrk fails.
    """
    headers = ["--header", f"Authorization: Bearer {token}"] if token else []
    script = Path(__file__).with_name("wrk.lua")
    command = [
        *("wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{max(1, round(seconds))}s"),
        *("--timeout", "60s", *headers, "--script", str(script), url, "--", str(bodies)),
    ]
    return _run(command, seconds, {})


def grpc(target: str, model: str, bodies: Path, calls: int, seconds: float, token: str) -> Sample:
    """Load of so many concurrent calls. Raises LoadError if the generator fails."""
    command = [
        *(sys.executable, str(ROOT / "benchmarks" / "grpc_load.py"), "--target", target, "--model", model),
        *("--bodies", str(bodies), "--calls", str(calls), "--seconds", str(seconds)),
    ]
    return _run(command, seconds, {"MARBLE_TOKEN": token})


def parse(output: str) -> Sample:
    """The sample in what a generator printed. Raises LoadError if there is none."""
    for line in output.splitlines():
        if line.startswith(_MARK):
            return Sample(**json.loads(line.removeprefix(_MARK)))
    raise LoadError(f"the load generator gave no result: {output.strip()[-500:]}")


def _run(command: list[str], seconds: float, environment: Mapping[str, str]) -> Sample:
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=seconds + _GRACE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Sample(requests=0, seconds=seconds, p50_ms=0.0, p99_ms=0.0, errors=1)
    return parse(done.stdout + done.stderr)
