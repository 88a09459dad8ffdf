"""What the tests share: one trained bundle, archives built from it, and one running TorchServe.

All of it is made through the front door: train.py, build_mar.sh and the program behind scripts/serve.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REVIEWS = ROOT / "examples" / "reviews"
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def run(
    *command: object, cwd: Path = ROOT, timeout: float = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command, offline; does not raise for a failure."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**OFFLINE, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """Standard output of a command that must have succeeded."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets beside the checkout. Required in CI."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{folder} is missing")
        pytest.skip("the shared data sets are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text classifier fine-tuned for a few steps on the shipped reviews."""
    place = tmp_path_factory.mktemp("bundles") / "reviews"
    succeeded(
        run(
            *(sys.executable, ROOT / "train.py", "--task", "text-classification", "--output-dir", place),
            *("--train-file", REVIEWS / "train.csv", "--validation-file", REVIEWS / "validation.csv"),
            *("--max-steps", 40, "--eval-strategy", "no", "--save-strategy", "no", "--load-best-model-at-end", "false"),
        )
    )
    return place


def build(bundle: Path, store: Path, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs build_mar.sh."""
    return run(ROOT / "build_mar.sh", "--bundle", bundle, "--store", store, *options, **environment)


@pytest.fixture(scope="session")
def store(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with one bundle in three forms: reviews (auto), reviews-fp32 (openvino) and reviews-torch."""
    folder = tmp_path_factory.mktemp("model_store")
    succeeded(build(bundle, folder, "--name", "reviews"))
    succeeded(build(bundle, folder, "--name", "reviews-fp32", "--backend", "openvino", "--precision", "fp32"))
    succeeded(build(bundle, folder, "--name", "reviews-torch", "--backend", "torch", "--precision", "fp32"))
    return folder


@dataclass(frozen=True)
class Served:
    """A running server. folder: its working directory, with logs/ and key_file.json."""

    folder: Path
    url: str
    management: str
    metrics: str
    grpc: str
    grpc_management: str
    token: str
    management_token: str

    def workers(self) -> set[int]:
        """Process ids of its workers."""
        import psutil

        pid = json.loads((self.folder / "run" / "server.json").read_text())["pid"]
        return {
            child.pid
            for child in psutil.Process(pid).children(recursive=True)
            if any("model_service_worker" in part for part in child.cmdline())
        }


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [entry.getsockname()[1] for entry in sockets]
    for entry in sockets:
        entry.close()
    return ports


def write_config(folder: Path, **changes: object) -> tuple[Path, list[int]]:
    """config.properties of the project with ports of its own and `changes`; and the five ports."""
    ports = free_ports(5)
    text = (ROOT / "config.properties").read_text(encoding="utf-8")
    for old, new in zip((8080, 8081, 8082, 7070, 7071), ports, strict=True):
        text = text.replace(f":{old}\n", f":{new}\n").replace(f"_port={old}\n", f"_port={new}\n")
    text += "".join(f"{key}={value}\n" for key, value in changes.items())
    path = folder / "config.properties"
    path.write_text(text, encoding="utf-8")
    return path, ports


def serve(folder: Path, store: Path, config: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Runs the program behind scripts/serve with `folder` as its working directory."""
    return run(*(sys.executable, "-m", "server", "serve", "--store", store, "--config", config, *options), cwd=folder)


def stop(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the program behind scripts/stop."""
    return run(sys.executable, "-m", "server", "stop", cwd=folder)


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Starts servers, each in a folder of its own, and stops them at the end of the session."""
    folders = []

    def start(store: Path, *options: object) -> Served:
        folder = tmp_path_factory.mktemp("server")
        config, ports = write_config(folder)
        folders.append(folder)
        succeeded(serve(folder, store, config, *options))
        keys = json.loads((folder / "key_file.json").read_text())
        return Served(
            folder,
            *(f"http://127.0.0.1:{port}" for port in ports[:3]),
            *(f"127.0.0.1:{port}" for port in ports[3:]),
            keys["inference"]["key"],
            keys["management"]["key"],
        )

    yield start
    for folder in folders:
        stop(folder)


@pytest.fixture(scope="session")
def served(start_server: Callable[..., Served], store: Path) -> Served:
    """One TorchServe with all archives of `store`, shared by the end-to-end tests."""
    return start_server(store)
