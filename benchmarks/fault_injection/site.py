"""A server behind its front door, started and stopped with the project's own commands, and ways to ask it."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import psutil
import requests

from benchmarks.speed.servers import free_ports, torchserve_config
from marble_client.stubs import inference_pb2
from server import tokens
from server.torchserve import is_worker

ROOT = Path(__file__).resolve().parent.parent.parent
PREDICTIONS = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
MODEL_INFER = "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/ModelInfer"
BODY = {"inputs": "A warm, funny film, and the cast is superb."}
_SECONDS_TO_RECOVER = 120
# The door takes 20 probes a second of one address; what it refuses would look like "not ready".
_SECONDS_BETWEEN_PROBES = 0.06
# A load generator is one client, and sends more than one client usually may.
_SETTINGS = {"client_rate": 1_000_000, "client_burst": 100_000, "client_in_flight": 128}


class SiteError(Exception):
    """The server did not do as it was told. The message has what it said."""


class Site:
    """scripts/serve --front in `folder`, with a token of each role, until the end of a `with` block.

    Its certificate is the self-signed one; all ports are free ones of 127.0.0.1. tokens: by the role that they have.
    """

    def __init__(self, folder: Path, store: Path, models: Sequence[str], settings: Mapping[str, object]) -> None:
        self.folder = folder
        self.store = store
        self.models = models
        torchserve_config(folder)
        self.rest, self.grpc = free_ports(2)
        text = (ROOT / "front.properties").read_text(encoding="utf-8")
        own = {"rest": f"127.0.0.1:{self.rest}", "grpc": f"127.0.0.1:{self.grpc}"}
        for key, value in {**_SETTINGS, **own, **settings}.items():
            text = re.sub(rf"(?m)^{key}=.*$", f"{key}={value}", text)
        (folder / "front.properties").write_text(text, encoding="utf-8")
        # The command's own file of tokens: front/tokens.json of its working directory.
        self.tokens = {role: tokens.add(role, [role], None, folder / tokens.FILE) for role in tokens.ROLES}

    def __enter__(self) -> "Site":
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.command("stop")

    def command(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        """Runs the program behind scripts/serve, scripts/stop and the like in the folder; does not raise."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "server", *map(str, arguments)]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def start(self, *options: object) -> None:
        """scripts/serve --front. Raises SiteError with what it said if it fails."""
        named = [f"{name}={name}.mar" for name in self.models]
        given = ("--config", "config.properties", "--front", "front.properties", "--models", *named)
        done = self.command("serve", "--store", self.store, *given, *options)
        if done.returncode != 0:
            raise SiteError(done.stderr)

    @property
    def certificate(self) -> Path:
        """What clients must trust (PEM)."""
        return self.folder / "front" / "self-signed.pem"

    @property
    def url(self) -> str:
        """Of the front door's REST."""
        return f"https://localhost:{self.rest}"

    def session(self, role: str = "predict") -> requests.Session:
        """A client's session, with the role's token; "" for none."""
        session = requests.Session()
        session.trust_env, session.verify = False, str(self.certificate)
        if role:
            session.headers["Authorization"] = f"Bearer {self.tokens[role]}"
        return session

    def predict(self, session: requests.Session, model: str = "reviews", **options: Any) -> requests.Response:
        """One prediction over REST."""
        given: dict[str, Any] = {"json": BODY, "timeout": 60} | options
        return session.post(f"{self.url}/predictions/{model}", **given)

    def channel(self) -> grpc.Channel:
        """A gRPC channel to the front door."""
        credentials = grpc.ssl_channel_credentials(self.certificate.read_bytes())
        return grpc.secure_channel(f"localhost:{self.grpc}", credentials, [("grpc.enable_http_proxy", 0)])

    def state(self, name: str = "server") -> dict[str, Any]:
        """What the server has written down: run/server.json or run/front.json."""
        value: dict[str, Any] = json.loads((self.folder / "run" / f"{name}.json").read_text(encoding="utf-8"))
        return value

    def torchserve(self) -> psutil.Process:
        """The JVM."""
        return psutil.Process(self.state()["pid"])

    def workers(self) -> list[psutil.Process]:
        """The processes of the models."""
        found = []
        for child in self.torchserve().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if is_worker(child):
                    found.append(child)
        return found

    def nginx(self) -> list[psutil.Process]:
        """Its master and the processes that serve."""
        master = psutil.Process(self.state("front")["nginx"])
        return [master, *master.children()]

    def ready(self) -> bool:
        """What /ready says now."""
        time.sleep(_SECONDS_BETWEEN_PROBES)
        try:
            return self.session("").get(f"{self.url}/ready", timeout=10).status_code == 200
        except requests.RequestException:
            return False

    def wait_until(self, condition: Callable[[], bool], seconds: float = _SECONDS_TO_RECOVER) -> float:
        """Returns after how many seconds it held. Raises SiteError, with the watchdog's log, if it never did."""
        begun = time.monotonic()
        while not condition():
            if time.monotonic() - begun > seconds:
                raise SiteError((self.folder / "logs" / "watchdog.log").read_text(encoding="utf-8")[-2000:])
            time.sleep(0.02)
        return time.monotonic() - begun


def message(model: str, body: object = BODY) -> bytes:
    """A serialized request of TorchServe's gRPC."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return inference_pb2.PredictionsRequest(model_name=model, input={"data": data}).SerializeToString()
