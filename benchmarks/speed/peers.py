"""The servers that are compared: an environment for each, how it is started, what it is asked."""

import hashlib
import json
import re
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SERVERS = ROOT / "benchmarks" / "peers"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    # No peer reports its usage to anybody.
    "DO_NOT_TRACK": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "RAY_USAGE_STATS_ENABLED": "0",
    "INFINITY_ANONYMOUS_USAGE_STATS": "0",
}


class Unavailable(Exception):
    """A peer cannot be installed or started here. The message says why."""


@dataclass(frozen=True)
class Peer:
    """A server that is not ours.

    packages: what is installed into `.venv-peer-<environment>`; empty: it runs in `.venv`. A name without a version
    gets that of requirements.lock. command: its command line, with {python}, {bin}, {servers}, {model} and {port}
    filled in. path: of its endpoint. form: its request, with the text in place of None. usual: it is compared as a
    peer in its usual form.
    """

    name: str
    title: str
    environment: str
    packages: Sequence[str]
    command: Sequence[str]
    path: str = "/predict"
    form: Mapping[str, Any] = field(default_factory=lambda: {"inputs": None})
    usual: bool = True

    def body(self, text: str) -> dict[str, Any]:
        """The request for one text, as a JSON value."""
        return {key: fill(value, text) for key, value in self.form.items()}


def fill(value: Any, text: str) -> Any:
    """A part of a request with the text in place of None."""
    if isinstance(value, list):
        return [fill(entry, text) for entry in value]
    return text if value is None else value


_TORCH = ("torch", "transformers", "tokenizers", "numpy")
_MOSEC = (*_TORCH, "openvino", "mosec==0.9.8")

PEERS = (
    Peer(
        "infinity",
        "infinity (torch)",
        "infinity",
        ("torch", "infinity-emb[torch,optimum,server]==0.0.78", "numpy<2"),
        (
            *("{bin}/infinity_emb", "v2", "--model-id", "{model}", "--served-model-name", "model", "--engine", "torch"),
            *("--device", "cpu", "--dtype", "float32", "--no-bettertransformer", "--batch-size", "64"),
            *("--host", "127.0.0.1", "--port", "{port}", "--log-level", "warning"),
        ),
        "/classify",
        {"model": "model", "input": [None]},
    ),
    Peer(
        "litserve",
        "LitServe",
        "litserve",
        (*_TORCH, "litserve==0.2.19"),
        ("{python}", "{servers}/litserve_server.py"),
    ),
    Peer(
        "mosec",
        "mosec",
        "mosec",
        _MOSEC,
        ("{python}", "{servers}/mosec_server.py", "--address", "127.0.0.1", "--port", "{port}", "--timeout", "60000"),
        "/inference",
    ),
    Peer(
        "ray",
        "Ray Serve",
        "ray",
        (*_TORCH, "ray[serve]==2.60.0"),
        ("{python}", "{servers}/ray_server.py"),
    ),
    Peer(
        "bentoml",
        "BentoML",
        "bentoml",
        (*_TORCH, "bentoml>=1.4,<1.5"),
        (
            *("{bin}/bentoml", "serve", "bentoml_server:TextClassifier", "--working-dir", "{servers}"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        form={"inputs": [None]},
    ),
    Peer(
        "fastapi",
        "FastAPI + pipeline",
        "fastapi",
        (*_TORCH, "fastapi", "uvicorn[standard]"),
        ("{python}", "{servers}/fastapi_server.py"),
    ),
    Peer("torchserve", "TorchServe, torch handler, unbatched", "", (), (), "/predictions/model"),
    Peer("torchserve-batched", "TorchServe, torch handler, batched", "", (), (), "/predictions/model"),
    Peer(
        "mosec-openvino",
        "mosec + our OpenVINO model",
        "mosec",
        _MOSEC,
        (
            *("{python}", "{servers}/mosec_openvino_server.py", "--address", "127.0.0.1", "--port", "{port}"),
            *("--timeout", "60000"),
        ),
        "/inference",
        usual=False,
    ),
)


def install(peer: Peer) -> Path:
    """The Python of a peer's environment, which is made when it is not there. Raises Unavailable if it cannot be."""
    if not peer.environment:
        return Path(sys.executable)
    packages = [pinned(package) for package in peer.packages]
    folder = ROOT / f".venv-peer-{peer.environment}"
    python = folder / "bin" / "python"
    stamp = folder / f".set-up-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:16]}"
    if stamp.exists():
        return python
    print(f"installing {' '.join(packages)} into {folder.name}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    # torch goes first and alone, and stays what it is, so that nothing brings in another build.
    torch = [package for package in packages if package.startswith("torch==")]
    for wanted in (torch, [*torch, *packages]):
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise Unavailable(f"pip install {' '.join(wanted)}: {reason[0]}")
    stamp.touch()
    return python


def pinned(package: str) -> str:
    """A requirement with the version of requirements.lock, where it is in there and names none itself."""
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{package}=="):
            return line.split()[0]
    return package


def versions(peer: Peer, python: Path) -> dict[str, str]:
    """Versions of a peer's packages as they are installed."""
    script = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({d.name.replace('_', '-'): d.version for d in m.distributions()}))"
    )
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    names = [re.split(r"[=<>\[]", package)[0] for package in peer.packages or ("torchserve", "torch")]
    return {name: found[name] for name in dict.fromkeys([*names, "transformers"]) if name in found}
