"""Row 13: what the network sees of a server, and whether anything keeps what nobody should read.

The row runs as a process of its own, in a network namespace where that is permitted (root, with unshare and ip): there
the server has the whole of a non-loopback address, and no other program has a port of it.

Nothing is: no word of a request's body, headers, query or token, and no secret of the environment, in any file of the
server, in /metrics, /status or a bill of materials, nor in an answer to another request. What may be: the id that a
client gives its request is logged, as are its path and model; and an error quotes what is wrong to its own sender.

    python -m benchmarks.fault_injection.exposure WORK [--namespace]     prints the figures as JSON
"""

import base64
import json
import os
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import requests

from benchmarks.fault_injection.access import V2
from benchmarks.fault_injection.bench import MODEL, STREAMS, Bench, Target
from benchmarks.fault_injection.site import MODEL_INFER, PREDICTIONS, ROOT, Site, message
from marble_client.stubs import inference_pb2, open_inference_grpc_pb2

_REST, _GRPC = 8443, 8444
# Of the ranges that are for documentation: they belong to nobody.
_IPV4, _IPV6 = "198.51.100.7", "2001:db8::7"
# What people set for a server; the first five are named so that config.properties keeps them from the workers.
_ENVIRONMENT = ("MARBLE_PLANTED_SECRET", "AWS_SECRET_ACCESS_KEY", "DATABASE_PASSWORD", "HF_TOKEN", "GCP_CREDENTIALS")
_UNNAMED = ("MARBLE_PLANTED_PLAIN",)
_SECONDS_TO_WRITE = 3


def exposure(bench: Bench) -> tuple[list[Target], Any]:
    """Row 13."""
    permitted = os.geteuid() == 0 and shutil.which("ip") is not None and _succeeds("unshare", "--net", "true")
    module = [sys.executable, "-m", "benchmarks.fault_injection.exposure", str(bench.work)]
    command = ["unshare", "--net", *module, "--namespace"] if permitted else module
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    ports, kept, quoted = found["open"], found["kept"], found["quoted_to_others"]
    how = (
        "all 65,535 ports of IPv4 and IPv6 in a namespace" if permitted else "the listeners of this host, no namespace"
    )
    expected = found["expected"]
    return [
        Target("13a", f"ports open on a non-loopback address ({how})", str(ports), str(expected), ports == expected),
        Target(
            "13b",
            f"of {found['planted']} planted texts and secrets, found in {found['files']} files, metrics and status",
            len(kept),
            "0",
            not kept,
        ),
        Target("13c", f"quoted in an answer to another, of {found['answers']} answers", len(quoted), "0", not quoted),
    ], found


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# --- The network -----------------------------------------------------------------------------------------------------


def make_network() -> None:
    """Two ends of a cable in this namespace, one of which has the addresses."""
    for command in (
        "link set lo up",
        "link add front type veth peer name world",
        f"address add {_IPV4}/24 dev front",
        f"address add {_IPV6}/64 dev front nodad",
        "link set front up",
        "link set world up",
    ):
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def scan(address: str, port: int) -> bool:
    """Whether somebody takes a connection there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for _ in range(5):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.settimeout(2)
            if probe.connect_ex((address, port)) != 0:
                return False
            # A socket that was given the very port it connects to has found itself.
            if probe.getsockname()[:2] != probe.getpeername()[:2]:
                return True
    return False


def own_address() -> str:
    """A non-loopback address of this host, which need not be reachable."""
    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                return entry.address
    return ""


def listeners(site: Site) -> Iterator[tuple[str, int]]:
    """(address, port) of the sockets of all the server's processes: TCP ones that listen, and all of UDP."""
    for process in (
        site.torchserve(),
        *site.workers(),
        *site.nginx(),
        psutil.Process(site.state("front")["supervisor"]),
    ):
        for entry in process.net_connections("inet"):
            if entry.status == psutil.CONN_LISTEN or (entry.type == socket.SOCK_DGRAM and entry.laddr):
                yield entry.laddr.ip.removeprefix("::ffff:"), entry.laddr.port


# --- What is planted -------------------------------------------------------------------------------------------------


@dataclass
class Planted:
    """Words that stand nowhere else, by what they were planted in; and the answers, by what they answered."""

    words: dict[str, str] = field(default_factory=dict)
    answers: dict[str, bytes] = field(default_factory=dict)

    def word(self, place: str) -> str:
        """A new one."""
        return self.words.setdefault(place, f"planted{secrets.token_hex(12)}")

    def found(self, content: bytes) -> list[str]:
        """The places whose words are in the content, as they are or in base64."""
        return [place for place, word in self.words.items() if any(form in content for form in _forms(word))]


def _forms(word: str) -> list[bytes]:
    """A word and what it is in base64, which depends on where in three bytes it begins."""
    forms = [word.encode()]
    for skipped in range(3):
        encoded = base64.b64encode(b"\0" * skipped + word.encode())
        # Without the characters at both ends, in which its neighbours are, too.
        forms.append(encoded[4 if skipped else 0 : -4])
    return forms


def plant_over_rest(site: Site, planted: Planted) -> None:
    """Texts in good and bad requests of every form, and in headers that clients send."""
    word = planted.word
    predict, route = f"/predictions/{MODEL}", f"/explanations/{MODEL}"
    v2 = json.loads(json.dumps(V2).replace("a fine film", word("v2")))
    bodies: dict[str, tuple[str, Any]] = {
        "good": (predict, {"inputs": f"a {word('good')} film"}),
        "list": (predict, {"inputs": [f"a {word('list')} film", 7, None]}),
        "details": (predict, {"inputs": word("details"), "parameters": {"details": True}}),
        "plain": (predict, f"a {word('plain')} film".encode()),
        "canary": (predict, {"canary": word("canary")}),
        "v1": (f"/v1/models/{MODEL}:predict", {"instances": [word("v1")]}),
        "v1 broken": (f"/v1/models/{MODEL}:predict", {"instances": {"x": word("v1 broken")}}),
        "v2": (f"/v2/models/{MODEL}/infer", v2),
        "v2 broken": (f"/v2/models/{MODEL}/infer", {"inputs": [{"name": word("v2 broken"), "data": [1]}]}),
        "version": (f"/v2/models/{MODEL}/versions/1.0/infer", {"inputs": [{"name": "text", "x": word("version")}]}),
        "explained": (route, {"inputs": word("explained")}),
        "no JSON": (predict, f'{{"inputs": "{word("no JSON")}'.encode()),
        "no UTF-8": (predict, f'{{"inputs": "{word("no UTF-8")}'.encode() + b'\xff\xfe"}'),
        "half a pair": (predict, f'{{"inputs": "{word("half a pair")} \\ud800"}}'.encode()),
        "name of a parameter": (predict, {"inputs": "x", "parameters": {word("name of a parameter"): 1}}),
        "value of a parameter": (predict, {"inputs": "x", "parameters": {"top_k": word("value of a parameter")}}),
        "name of a field": (predict, {"inputs": "x", word("name of a field"): 1}),
        "an input of another kind": (predict, {"inputs": {word("an input of another kind"): 1}}),
        "stream": (f"/predictions/{STREAMS}", {"inputs": word("stream"), "stream": True}),
        "stream refused": (predict, {"inputs": word("stream refused"), "stream": True}),
        "stream broken": (f"/predictions/{STREAMS}", {"inputs": 7, "stream": word("stream broken")}),
        "no model": ("/predictions/nobody", {"inputs": word("no model")}),
        "no route": ("/models", {"inputs": word("no route")}),
        "too large": (predict, {"inputs": word("too large") + "x" * 7_000_000}),
        "a query": (f"{predict}?text={word('a query')}", {"inputs": "x"}),
        "a query of no route": (f"/nowhere?text={word('a query of no route')}", {"inputs": "x"}),
        "a query, too large": (f"{predict}?text={word('a query, too large')}", {"inputs": "x" * 7_000_000}),
        "metrics": (predict, {"inputs": f"[METRICS]{word('metrics')}.Count:1|#Level:Host|#hostname:x,1\n\r"}),
    }
    session = site.session()
    # All of these are answered, whatever they say; the connection may be closed after a body that is too large.
    for place, (path, body) in bodies.items():
        content = {"data": body} if isinstance(body, bytes) else {"json": body}
        ask(planted, place, session, "POST", f"{site.url}{path}", **content)
    for name in (
        "User-Agent",
        "Referer",
        "Cookie",
        "X-Custom",
        "Traceparent",
        "Tracestate",
        "Explain",
        "X-Forwarded-For",
    ):
        header = {name: f"a {word(name)}"}
        ask(planted, name, session, "POST", f"{site.url}{predict}", json={"inputs": "x"}, headers=header)
        # The same where nginx writes what it refuses into its log of errors.
        ask(planted, name, session, "POST", f"{site.url}{predict}", data=b"x" * 7_000_000, headers=header)
    for kind in ("Bearer", "Basic"):
        header = {"Authorization": f"{kind} {word(kind)}"}
        ask(planted, kind, site.session(""), "POST", f"{site.url}{predict}", json={"inputs": "x"}, headers=header)
    form = {"inputs": word("form")}
    ask(planted, "form", session, "POST", f"{site.url}{predict}", data=form)
    ask(planted, "file", session, "POST", f"{site.url}{predict}", files={"data": word("file").encode()})
    hang_up(site, planted)


def ask(planted: Planted, place: str, session: requests.Session, method: str, url: str, **options: Any) -> None:
    """One request; its answer is kept."""
    try:
        answer = session.request(method, url, timeout=60, **options)
        content = answer.content + repr(answer.headers).encode()
    except requests.RequestException as error:
        content = f"closed: {type(error).__name__}".encode()
    planted.answers[place] = planted.answers.get(place, b"") + content


def hang_up(site: Site, planted: Planted) -> None:
    """Half a body, and half a header, whose clients go away."""
    for place, head in (("half a body", "Content-Length: 1000\r\n\r\n"), ("half a header", "X-Half: ")):
        text = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {site.tokens['predict']}\r\n"
        with tls(site) as connection:
            connection.sendall(f"{text}{head}{planted.word(place)}".encode())
            time.sleep(0.2)


def tls(site: Site) -> socket.socket:
    """A connection for bytes that no client would send."""
    context = ssl.create_default_context(cafile=str(site.certificate))
    return context.wrap_socket(
        socket.create_connection(("localhost", site.rest), timeout=30), server_hostname="localhost"
    )


def plant_over_grpc(site: Site, planted: Planted) -> None:
    """The same over gRPC."""
    word = planted.word
    v2 = open_inference_grpc_pb2.ModelInferRequest(model_name=MODEL)
    v2.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(word("gRPC v2").encode())
    named = inference_pb2.PredictionsRequest(model_name=word("gRPC model"), input={"data": b"x"}).SerializeToString()
    inputs = {"data": b"x", word("gRPC name"): word("gRPC name").encode()}
    calls = {
        "gRPC good": (PREDICTIONS, message(MODEL, {"inputs": word("gRPC good")})),
        "gRPC stream": (PREDICTIONS, message(STREAMS, {"inputs": word("gRPC stream"), "stream": True})),
        "gRPC bad": (PREDICTIONS, message(MODEL, {"inputs": {"x": word("gRPC bad")}})),
        "gRPC no JSON": (PREDICTIONS, message(MODEL, f'{{"inputs": {word("gRPC no JSON")}'.encode())),
        "gRPC too large": (PREDICTIONS, message(MODEL, (word("gRPC too large") + "x" * 7_000_000).encode())),
        "gRPC broken": (PREDICTIONS, message(MODEL, {"inputs": word("gRPC broken")}) + b"\x0f" + b"\xff" * 5),
        "gRPC no method": (f"{PREDICTIONS}X", message(MODEL, {"inputs": word("gRPC no method")})),
        "gRPC v2": (MODEL_INFER, v2.SerializeToString()),
        "gRPC name": (
            PREDICTIONS,
            inference_pb2.PredictionsRequest(model_name=MODEL, input=inputs).SerializeToString(),
        ),
        "gRPC model": (PREDICTIONS, named),
    }
    with site.channel() as channel:
        for place, (method, content) in calls.items():
            metadata = (
                ("authorization", f"Bearer {site.tokens['predict']}"),
                ("x-custom", word("gRPC metadata")),
                ("traceparent", word("gRPC metadata")),
            )
            try:
                said = channel.unary_unary(method, None, None)(content, metadata=metadata, timeout=60)
            except grpc.RpcError as error:
                said = (error.details() or "").encode()
            planted.answers[place] = said


def contents(*folders: Path) -> Iterator[tuple[str, bytes]]:
    """Every file and what is in it."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield str(path.relative_to(folder.parent)), path.read_bytes()


# --- The row ---------------------------------------------------------------------------------------------------------


def measure(work: Path, *, namespace: bool) -> dict[str, Any]:
    """Everything, in the network that this process is in."""
    planted = Planted()
    for name in (*_ENVIRONMENT, *_UNNAMED):
        os.environ[name] = planted.word(f"environment {name}")
    bench = Bench(work, quick=True)
    # A bill of materials that was made where the secrets were.
    store = work / "sites" / "exposed-store"
    shutil.rmtree(store, ignore_errors=True)
    for model in (MODEL, STREAMS):
        build = ["./build_mar.sh", "--bundle", str(bench.work / model), "--store", str(store), "--force"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(build, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
    site = bench.site("exposed", [MODEL, STREAMS], rest=f"0.0.0.0:{_REST}", grpc=f"0.0.0.0:{_GRPC}")
    site.store, site.rest, site.grpc = store, _REST, _GRPC
    for role, token in site.tokens.items():
        planted.words[f"token {role}"] = token[24:]  # after marble_ and the id
    with site:
        bound = sorted(set(listeners(site)))
        if namespace:
            opened = sorted(port for address in (_IPV4, _IPV6) for port in range(1, 65536) if scan(address, port))
        else:
            address = own_address()
            opened = sorted(port for _, port in bound if address and scan(address, port))
        control = f"control{secrets.token_hex(12)}"
        site.predict(site.session(), headers={"X-Request-Id": control})
        plant_over_rest(site, planted)
        plant_over_grpc(site, planted)
        time.sleep(_SECONDS_TO_WRITE)
        admin = site.session("admin")
        seen = [(path, admin.get(f"{site.url}{path}", timeout=30).content) for path in ("/metrics", "/status")]
        folders = [Path(site.state("front")["folder"]), Path(site.state()["scratch"])]
        seen += contents(site.folder, *folders, store)
        hidden = re.compile(_hidden())
        for worker in site.workers():
            lines = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
            seen.append(
                ("environment of a worker", b"\n".join(x for x in lines if hidden.search(x.partition(b"=")[0])))
            )
    seen += [(f"after the end: {name}", content) for name, content in contents(site.folder)]
    if not any(control.encode() in content for _, content in seen):
        raise RuntimeError("a request's id, which is logged, was not found: what is not found proves nothing")
    kept = sorted({f"{place} in {name}" for name, content in seen for place in planted.found(content)})
    others = [
        f"{found} in the answer to {place}"
        for place, answer in planted.answers.items()
        for found in planted.found(answer)
        if found != place
    ]
    own = [place for place, answer in planted.answers.items() if place in planted.found(answer)]
    return {
        "namespace": namespace,
        "open": opened,
        "expected": [_REST, _GRPC],
        "listeners": [f"{address}:{port}" for address, port in bound],
        "planted": len(planted.words),
        "answers": len(planted.answers),
        "files": len(seen),
        "kept": kept,
        "quoted_to_others": others,
        "quoted_to_their_own_sender": own,
    }


def _hidden() -> bytes:
    """What config.properties says must not reach a worker."""
    text = (ROOT / "config.properties").read_text(encoding="utf-8")
    [pattern] = re.findall(r"(?m)^blacklist_env_vars=(.*)$", text)
    return str(pattern).encode()


def main() -> None:
    namespace = "--namespace" in sys.argv[2:]
    if namespace:
        make_network()
    print(json.dumps(measure(Path(sys.argv[1]), namespace=namespace)))


if __name__ == "__main__":
    main()
