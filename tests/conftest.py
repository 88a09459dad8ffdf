"""What the tests share: training and building, the bundle of a text classifier, and two running TorchServes.

train.py, build_mar.sh and scripts/serve are run as processes where a test is about them; whatever else needs a
bundle or an archive calls the same programs in this process, which spares each of them the seconds of its imports.
"""

import contextlib
import ctypes
import gc
import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import huggingface_hub
import psutil
import pytest
import requests
from console_page import axe, browser_environment, chromium, start_console  # noqa: F401
from filelock import FileLock

import marble_client
from handler import cpus
from marble_client.stubs import inference_pb2, inference_pb2_grpc
from server.archive import verify

ROOT = Path(__file__).resolve().parent.parent
REVIEWS = ROOT / "examples" / "reviews"
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
CPUS = cpus.available()


# Files whose tests take or wait for minutes. They come first: at the end the other processes would have nothing to do.
LONGEST = ("test_transcripts.py", "test_faults.py", "test_ray.py", "test_cells.py", "test_console.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, where xdist is told to keep the order (--no-loadscope-reorder)."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Models as small as those of most tests are faster on one thread, and many times so on a busy machine."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def small_processes() -> Iterator[None]:
    """What the tests of a module have freed goes back to the system, rather than that one process keeps the most.

    What is there before them, most of it the modules that are imported, is not looked through again and again: the
    Trainer collects garbage at each turn.
    """
    gc.freeze()
    yield
    gc.unfreeze()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


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


# `train_here` and `build_here` import what they run themselves: a test of the client need not wait for torch.


def train_here(*arguments: object, threads: int = 1) -> None:
    """Runs train.py in this process; its report explains three mistakes: ten take longer than most trainings."""
    import torch

    import train

    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.mistakes.MOST", 3)
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        train.main()


HubClient = Callable[[str], huggingface_hub.InferenceClient]
# What makes a training of a few steps shorter still: nothing is measured or saved on the way.
NO_CHECKPOINTS = ("--eval-strategy", "no", "--save-strategy", "no", "--load-best-model-at-end", "false")


def build_here(bundle: Path, store: Path, name: str, backend: str = "auto", precision: str = "fp32") -> str:
    """Runs the program behind build_mar.sh in this process; returns what it printed. Its timing is short."""
    from archiver.__main__ import main

    given = ("--bundle", bundle, "--store", store, "--name", name, "--backend", backend, "--precision", precision)
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr("archiver.timing._ROUND_SECONDS", 0.1)
        main([str(part) for part in given])
    return printed.getvalue()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets beside the checkout. Required in CI."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{folder} is missing")
        pytest.skip("the shared data sets are not beside this checkout")
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, in one of pytest's processes for all of them."""
    together = "PYTEST_XDIST_WORKER" in os.environ
    folder = (factory.getbasetemp().parent if together else factory.getbasetemp()) / name
    done = folder.with_suffix(".done")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text classifier fine-tuned for a few steps on the shipped reviews."""

    def make(folder: Path) -> None:
        train_here(
            *("--task", "text-classification", "--output-dir", folder / "reviews", *NO_CHECKPOINTS),
            *("--max-steps", 40, "--learning-rate", 2e-4),
            *("--train-file", REVIEWS / "train.csv", "--validation-file", REVIEWS / "validation.csv"),
            threads=CPUS,
        )

    return made_once(tmp_path_factory, "bundles", make) / "reviews"


def build(bundle: Path, store: Path, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs build_mar.sh."""
    return run(ROOT / "build_mar.sh", "--bundle", bundle, "--store", store, *options, **environment)


@pytest.fixture(scope="session")
def store(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with one bundle in three forms: reviews (auto), reviews-fp32 (openvino) and reviews-torch."""

    def make(folder: Path) -> None:
        # A copy, because what `auto` measures is written into the bundle.
        measured = shutil.copytree(bundle, tmp_path_factory.mktemp("measured") / "reviews", copy_function=os.link)
        build_here(measured, folder, "reviews", precision="auto")
        build_here(bundle, folder, "reviews-fp32", "openvino")
        build_here(bundle, folder, "reviews-torch", "torch")

    return made_once(tmp_path_factory, "model_store", make)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a very small model that knows two classes well: it is built in a second."""
    from test_train import save_tiny_base, write_csv

    folder = tmp_path_factory.mktemp("tiny")
    data = write_csv(folder / "data.csv", ("negative", "positive"))
    files = ("--train-file", data, "--output-dir", folder / "small", "--base-model", save_tiny_base(folder / "base"))
    sizes = ("--max-length", 32, "--max-steps", 60, "--learning-rate", 0.005, "--validation-share", 0.3)
    # At ten times this rate a head of random weights gets stuck with one seed in ten.
    train_here(*files, *sizes, *NO_CHECKPOINTS, "--head-learning-rate-ratio", 1)
    assert json.loads((folder / "small" / "metrics.json").read_text())["splits"]["validation"]["accuracy"] == 1
    return folder / "small"


@pytest.fixture
def small(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_bundle` to spoil; replace its files, do not write into them: they are links."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "small", copy_function=os.link))


class Exit(Exception):
    """A build that was refused; the message."""


Build = Callable[..., str]


@pytest.fixture
def build_main(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Build:
    """Runs the program behind build_mar.sh as `__main__` in this process, which spares each case the imports.

    Without options it builds for torch in fp32. Returns what it printed, errors last. Raises Exit for `sys.exit(…)`,
    which prints a message and exits with 1; test_the_exit_code_and_the_message_of_a_process proves it once.
    """

    def call(bundle: Path, *options: object, store: Path = tmp_path / "store") -> str:
        given = options or ("--backend", "torch", "--precision", "fp32")
        monkeypatch.setattr(sys, "argv", ["build_mar.sh", *map(str, ("--bundle", bundle, "--store", store, *given))])
        monkeypatch.delitem(sys.modules, "archiver.__main__", raising=False)  # which test_…_one_build_at_a_time imports
        message: Any = None
        try:
            runpy.run_module("archiver", run_name="__main__")
        except SystemExit as ended:
            message = ended.code
        printed = capfd.readouterr()
        if message is not None:
            assert re.fullmatch(r"build_mar\.sh: [^\n]+", message)
            raise Exit(f"{message}\n{printed.err}")
        return printed.out + printed.err

    return call


@dataclass(frozen=True)
class Served:
    """A running server. folder: its working directory, with logs/ and key_file.json. models: those the tests ask."""

    folder: Path
    url: str
    management: str
    metrics: str
    grpc: str
    grpc_management: str
    token: str
    management_token: str
    models: tuple[str, ...]

    def workers(self) -> set[int]:
        """Process ids of the workers of `models` that are alive."""
        pid = json.loads((self.folder / "run" / "server.json").read_text())["pid"]
        alive = {
            child.pid
            for child in psutil.Process(pid).children(recursive=True)
            if any("model_service_worker" in part for part in child.cmdline())
        }
        described = [self.manage("GET", f"/models/{name}").json() for name in self.models]
        return alive & {worker["pid"] for [version] in described for worker in version["workers"]}

    def manage(self, method: str, path: str) -> requests.Response:
        """A call to the management API that must succeed."""
        headers = {"Authorization": f"Bearer {self.management_token}"}
        answer = requests.request(method, f"{self.management}{path}", headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer

    def post(self, path: str, body: Any, content_type: str | None = None, **options: Any) -> requests.Response:
        """POSTs bytes as they are, anything else as JSON. options: those of requests.post."""
        headers = {"Authorization": f"Bearer {self.token}"} | ({"Content-Type": content_type} if content_type else {})
        data = {"data": body} if isinstance(body, bytes) else {"json": body}
        return requests.post(f"{self.url}{path}", **data, headers=headers, timeout=60, **options)

    def grpc_predictions(self, model: str, body: bytes) -> bytes:
        """Unary TorchServe gRPC."""
        with grpc.insecure_channel(self.grpc) as channel:
            stub = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
            request = inference_pb2.PredictionsRequest(model_name=model, input={"data": body})
            return bytes(stub.Predictions(request, metadata=self.metadata(), timeout=60).prediction)

    def metadata(self) -> list[tuple[str, str]]:
        """What a gRPC call must carry."""
        return [("protocol", "gRPC"), ("authorization", f"Bearer {self.token}")]

    def rest_client(self) -> marble_client.RestClient:
        """Marble's own client over REST."""
        return marble_client.RestClient(self.url, self.management, self.token, self.management_token, timeout=60)

    def grpc_client(self) -> marble_client.GrpcClient:
        """Marble's own client over gRPC."""
        return marble_client.GrpcClient(self.grpc, self.grpc_management, self.token, timeout=60)


def write_settings(path: Path, **changes: object) -> Path:
    """front.properties with `changes`."""
    text = (ROOT / "front.properties").read_text(encoding="utf-8")
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^{key}=.*$", f"{key}={value}", text)
        assert count == 1, key
    path.write_text(text, encoding="utf-8")
    return path


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
    """Starts servers of these models, each in a folder of its own, and stops them at the end of the session.

    settings: changes to config.properties.
    """
    folders = []

    def start(store: Path, *models: str, **settings: object) -> Served:
        folder = tmp_path_factory.mktemp("server")
        config, ports = write_config(folder, **settings)
        folders.append(folder)
        succeeded(serve(folder, store, config, "--models", *models))
        keys = json.loads((folder / "key_file.json").read_text())
        return Served(
            folder,
            *(f"http://127.0.0.1:{port}" for port in ports[:3]),
            *(f"127.0.0.1:{port}" for port in ports[3:]),
            keys["inference"]["key"],
            keys["management"]["key"],
            models,
        )

    yield start
    for folder in folders:
        stop(folder)


@pytest.fixture(scope="session")
def served(start_server: Callable[..., Served], store: Path) -> Served:
    """A TorchServe with all archives of `store`, its settings those of the project."""
    return start_server(store, "reviews", "reviews-fp32", "reviews-torch")


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model store behind `serve_models`."""
    return tmp_path_factory.mktemp("shared_store")


@pytest.fixture(scope="session")
def _add_models(start_server: Callable[..., Served], shared_store: Path) -> Callable[..., Served]:
    servers: list[Served] = []

    def add(*models: str) -> Served:
        if not servers:
            servers.append(start_server(shared_store, *models))
            return servers[0]
        server = replace(servers[0], models=models)

        def load(name: str) -> None:
            archive = verify(name, shared_store / f"{name}.mar")
            place = server.folder / "run" / "store" / archive.path.name
            place.unlink(missing_ok=True)  # of tests that are done
            os.link(archive.path, place)
            server.manage("POST", f"/models?url={name}.mar&model_name={name}&initial_workers=1&synchronous=true")
            with server.rest_client() as client:
                client.canary(name)

        with ThreadPoolExecutor(CPUS) as pool:
            list(pool.map(load, models))
        return server

    return add


@pytest.fixture(scope="session")
def serving(_add_models: Callable[..., Served]) -> Callable[..., contextlib.AbstractContextManager[Served]]:
    """Serves archives of `shared_store`, by their names, within a `with` block.

    All tests share one TorchServe, because a JVM takes seconds to start. The first models are served as scripts/serve
    does it; later ones are registered, which config.properties forbids, after the same checks.
    """

    @contextlib.contextmanager
    def serve(*models: str) -> Iterator[Served]:
        server = _add_models(*models)
        try:
            yield server
        finally:
            for name in models:
                server.manage("DELETE", f"/models/{name}")

    return serve


@pytest.fixture(scope="module")
def serve_models(
    serving: Callable[..., contextlib.AbstractContextManager[Served]],
) -> Iterator[Callable[..., Served]]:
    """Serves archives as `serving` does, until the tests of the module are done."""
    with contextlib.ExitStack() as stack:
        yield lambda *models: stack.enter_context(serving(*models))


@pytest.fixture
def same_workers(served: Served) -> Iterator[None]:
    """The test must leave every worker alive and well: the same process ids after as before, and the canary answered.

    `served` is the one of the test's module.
    """
    before = served.workers()
    assert len(before) == len(served.models)
    yield
    assert served.workers() == before
    with served.rest_client() as client:
        for name in served.models:
            client.canary(name)


@pytest.fixture
def inference_client(served: Served, monkeypatch: pytest.MonkeyPatch) -> HubClient:
    """The hub's own client of a served model."""
    # It refuses even local addresses in offline mode.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return lambda model: huggingface_hub.InferenceClient(model=f"{served.url}/predictions/{model}", token=served.token)
