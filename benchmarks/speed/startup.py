"""How soon a worker is ready, a killed one is back, and what memory it takes."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import psutil
import requests

from benchmarks.speed.peers import Unavailable
from benchmarks.speed.servers import Server
from server.torchserve import Addresses

_SECONDS_TO_RETURN = 60


@dataclass(frozen=True)
class Restart:
    """One worker that was killed.

    ready_s: seconds from the start of the process that replaced it to READY; back_s: seconds from the kill to READY;
    memory_mb: resident megabytes of the new process then.
    """

    ready_s: float
    back_s: float
    memory_mb: float


def restart(server: Server) -> Restart:
    """Kills the worker of a running TorchServe with SIGKILL and waits for the next. Raises Unavailable without one."""
    folder = server.folder
    management = Addresses.read(folder / "config.properties").management
    key = json.loads((folder / "key_file.json").read_text(encoding="utf-8"))["management"]["key"]
    session = requests.Session()
    session.trust_env = False
    session.headers["Authorization"] = f"Bearer {key}"
    url = f"{management}/models/{server.url.rpartition('/')[2]}"

    def ready() -> int | None:
        """Process id of the worker, if it is READY."""
        [worker] = session.get(url, timeout=10).json()[0]["workers"]
        return int(worker["pid"]) if worker["status"] == "READY" else None

    old = ready()
    if old is None:
        raise Unavailable("its worker is not READY")
    process = psutil.Process(old)
    killed = time.time()
    process.kill()
    while time.time() - killed < _SECONDS_TO_RETURN:
        new = ready()
        if new not in (None, old):
            now, worker = time.time(), psutil.Process(new)
            return Restart(now - worker.create_time(), now - killed, worker.memory_info().rss / 1e6)
        time.sleep(0.01)
    raise Unavailable(f"its worker is not back {_SECONDS_TO_RETURN} s after it was killed")


def summary(restarts: Sequence[Restart]) -> dict[str, float]:
    """Medians, and the slowest."""
    return {
        "restarts": len(restarts),
        "ready_s": round(median(entry.ready_s for entry in restarts), 2),
        "slowest_ready_s": round(max(entry.ready_s for entry in restarts), 2),
        "back_s": round(median(entry.back_s for entry in restarts), 2),
        "slowest_back_s": round(max(entry.back_s for entry in restarts), 2),
        "memory_mb": round(median(entry.memory_mb for entry in restarts), 1),
    }
