"""Speed against peers and against the limit: everything side by side on one model, in interleaved rounds.

docs/speed.md says what is measured and how to read it.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed import load, models, peers, report, servers, startup
from benchmarks.speed.limit import Limit
from benchmarks.speed.peers import PEERS, ROOT, Unavailable
from benchmarks.speed.servers import Server
from benchmarks.speed.texts import Texts, chunks, write_bodies
from training.interrupts import INTERRUPTED

RESULTS = ROOT / "benchmarks" / "speed-results.json"
DOCUMENT = ROOT / "docs" / "speed.md"
# fp32 servers must give these scores, the others the same label wherever the fp32 scores leave no doubt.
TOLERANCE, CLEAR_MARGIN = 1e-3, 0.4
CHECKED_TEXTS = 128
ROUNDS = 5
RESTARTS = 5
# Texts that 64 connections have under way together: what a server can sort by length at a time.
BATCH = 64
BATCHES = (1, 8, 32, 64)
LENGTHS = (8, 32, 128, 512)
WORKERS = (1, 2)
BATCHING = ((1, 0), (64, 1), (64, 2), (64, 5))
_EXAMPLES = """examples:
  scripts/bench                            # all peers, five rounds; writes benchmarks/speed-results.json, docs/speed*
  scripts/bench --only mosec litserve      # these peers alone, and Marble
  scripts/bench --quick                    # one short round against peers that need no installing; prints only
  scripts/bench --report                   # tables and plots again from benchmarks/speed-results.json"""


class BenchError(Exception):
    """The benchmark cannot go on. The message says why."""


@dataclass(frozen=True)
class Load:
    """What a server is put under. name: its texts and its connections, e.g. "sst2-64"."""

    name: str
    seconds: float
    grpc: bool = False

    @property
    def bodies(self) -> str:
        """Whose requests are sent."""
        return "sst2" if self.grpc else self.name.rpartition("-")[0]

    @property
    def connections(self) -> int:
        """Connections, or calls under way at a time."""
        return int(self.name.rpartition("-")[2])


LOADS = (Load("sst2-1", 1.5), Load("sst2-64", 4), Load("long-64", 5))
OUR_LOADS = (*LOADS, Load("grpc-64", 4, grpc=True), Load("items-1", 2))
NER_LOADS = (Load("wnut17-1", 1.5), Load("wnut17-64", 2))


@dataclass
class Bench:
    """One run. mixes: texts by name; servers: those that can be measured; found: what will be written."""

    work: Path
    quick: bool
    mixes: dict[str, list[str]]
    servers: dict[str, Server] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    def loads(self, server: Server) -> Sequence[Load]:
        """Those that a server is measured under in each round."""
        if server.name.endswith("-ner"):
            return NER_LOADS
        return OUR_LOADS if server.name == report.OURS else LOADS

    def measure(self, server: Server, what: Load) -> load.Sample:
        """Warms a running server up and measures it."""
        self.send(server, what, 1)
        before = cpu_seconds(server)
        sample = self.send(server, what, 2 if self.quick else what.seconds)
        spent = {name: seconds - before[name] for name, seconds in cpu_seconds(server).items()}
        return replace(sample, cpu_ms=rounded({name: 1e3 * s / max(1, sample.requests) for name, s in spent.items()}))

    def send(self, server: Server, what: Load, seconds: float) -> load.Sample:
        """Puts a running server under a load."""
        path = self.work / "bodies" / f"{server.name}-{what.bodies}.jsonl"
        if not path.exists():
            texts = self.mixes[what.bodies.partition("@")[0]]
            values: Any = [server.body(text) for text in texts]
            if what.bodies == "items":
                values = [{"inputs": group} for group in chunks(self.mixes["sst2"], report.ITEMS)]
            write_bodies(path, values)
        sample = self._generate(server, what, path, seconds)
        # What was under way when the time was over is worked off before anything else is measured.
        server.ask("the last text")
        return sample

    def _generate(self, server: Server, what: Load, path: Path, seconds: float) -> load.Sample:
        if what.grpc:
            assert server.grpc is not None
            assert server.token is not None
            model = server.url.rpartition("/")[2]
            return load.grpc(server.grpc, model, path, what.connections, seconds, server.token)
        return load.rest(server.url, path, what.connections, seconds, server.token)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    output = arguments.output or (None if arguments.quick else RESULTS)
    if arguments.report:
        write_report(json.loads((arguments.output or RESULTS).read_text(encoding="utf-8")))
        return
    load.check_wrk()
    if not (arguments.data / "sst2").is_dir():
        raise BenchError(f"{arguments.data}/sst2 is missing; name the folder of the data sets with --data")
    with ExitStack() as stack:
        work = (arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))).absolute()
        work.mkdir(parents=True, exist_ok=True)
        results = run(arguments, work, stack)
    print(report.markdown(results))
    if output is not None:
        output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if output == RESULTS:
        write_report(results)


def run(arguments: argparse.Namespace, work: Path, stack: ExitStack) -> dict[str, Any]:
    """Prepares, checks and measures everything; what comes back is what is written."""
    begun = time.monotonic()
    quick = arguments.quick
    model = models.prepare("sst2", arguments.data, work, quick)
    texts = Texts(arguments.data, model.bundle, model.settings.max_length)
    mixes = {"sst2": texts.sst2(), "long": texts.long_tail(), "wnut17": texts.wnut17()}
    mixes["items"] = mixes["sst2"]
    bench = Bench(work, quick, mixes)
    for path in (work / "bodies").glob("*.jsonl"):
        path.unlink()
    found = bench.found
    found["command"] = " ".join(["scripts/bench", *(["--quick"] if quick else []), *only(arguments)])
    found["machine"] = machine()
    found["versions"] = {
        name: importlib.metadata.version(name) for name in ("torchserve", "torch", "transformers", "openvino", "nncf")
    }
    found["archive"] = (
        f"{model.settings.backend} {model.settings.precision}, {model.archive.stat().st_size / 1e6:.1f} MB"
    )
    found["texts"] = {name: texts.describe(mixes[name]) for name in ("sst2", "long", "wnut17")}
    found["servers"] = {}

    limit, torch = (stack.enter_context(Limit(folder)) for folder in (model.unpacked, model.bundle))
    checked = [text for name in ("sst2", "long") for text in mixes[name][: CHECKED_TEXTS // 2]]
    expected = dict(zip(checked, torch.scores(checked), strict=True))
    for server in wanted(arguments, model, work, found):
        admit(bench, server, expected, stack)
    if report.OURS not in bench.servers:
        raise BenchError(f"Marble itself: {found['servers'][report.OURS]['unavailable']}")

    seconds = 0.5 if quick else 1.5
    fastest = {
        "sst2": limit.fastest(mixes["sst2"], seconds / 2, BATCH),
        "long": limit.fastest(mixes["long"], seconds / 2, BATCH),
        "torch": torch.fastest(mixes["sst2"], seconds / 2, BATCH),
    }
    found["limit_settings"] = fastest
    found["rounds"] = []
    for number in range(1 if quick else ROUNDS):
        print(f"round {number + 1}, {time.monotonic() - begun:.0f} s after the start", flush=True)
        found["rounds"].append(
            {
                "limit": {
                    "sst2": limit.throughput(mixes["sst2"], seconds, fastest["sst2"], BATCH),
                    "sst2_at_once": limit.throughput(mixes["sst2"], seconds, fastest["sst2"], len(mixes["sst2"])),
                    "long": limit.throughput(mixes["long"], seconds, fastest["long"], BATCH),
                    "torch": torch.throughput(mixes["sst2"], seconds, fastest["torch"], BATCH),
                    "single_ms": limit.latency([[text] for text in mixes["sst2"]], seconds),
                    "items_ms": limit.latency(chunks(mixes["sst2"], report.ITEMS), seconds),
                },
                "servers": {name: measured(bench, server) for name, server in bench.servers.items()},
            }
        )
    for name, server in bench.servers.items():
        server.start()
        found["servers"][name] |= {"idle_cpu": server.idle_cpu, "memory_mb": server.memory()}
        server.rest()
    ours = bench.servers[report.OURS]
    ours.start()
    found["startup"] = startup.summary([startup.restart(ours) for _ in range(1 if quick else RESTARTS)])
    if not quick:
        found["growth"] = growth(bench, model, texts, limit, torch)
    found["targets"] = report.targets(report.rounds_of(found))
    found["minutes"] = round((time.monotonic() - begun) / 60, 1)
    return found


def wanted(arguments: argparse.Namespace, model: models.Model, work: Path, found: dict[str, Any]) -> list[Server]:
    """The servers to compare, not started; a peer that cannot be installed is written down with the reason."""
    chosen = [servers.marble(report.OURS, "Marble", model.archive, work / "servers" / report.OURS)]
    precision = {"bf16": "bf16"}.get(model.settings.precision, "f32")
    for peer in PEERS:
        if (arguments.only and peer.name not in arguments.only) or (arguments.quick and peer.environment):
            continue
        if peer.name == report.LEANEST and model.settings.backend != "openvino":
            found["servers"][peer.name] = described(peer.title, False, "the archive has no OpenVINO model")
            continue
        try:
            python = peers.install(peer)
            folder = model.bundle if peer.usual else model.unpacked
            server = servers.of_peer(peer, python, folder, work / "servers" / peer.name, model.settings.task, precision)
        except Unavailable as error:
            found["servers"][peer.name] = described(peer.title, peer.usual, str(error))
            continue
        found["versions"][peer.name] = peers.versions(peer, python)
        chosen.append(server)
    if arguments.quick or arguments.only:
        return chosen
    ner = models.prepare("wnut17", arguments.data, work, arguments.quick)
    chosen.append(servers.marble("marble-ner", "Marble, NER", ner.archive, work / "servers" / "marble-ner"))
    [pipeline] = [peer for peer in PEERS if peer.name == "fastapi"]
    place = work / "servers" / "fastapi-ner"
    try:
        named = servers.of_peer(pipeline, peers.install(pipeline), ner.bundle, place, ner.settings.task, precision)
    except Unavailable as error:
        found["servers"]["fastapi-ner"] = described("FastAPI + pipeline, NER", False, str(error))
        return chosen
    named.name, named.title, named.usual = "fastapi-ner", "FastAPI + pipeline, NER", False
    return [*chosen, named]


def described(title: str, usual: bool, unavailable: str | None = None) -> dict[str, Any]:
    """The entry of a server in the results."""
    return {"title": title, "usual": usual, **({"unavailable": unavailable} if unavailable else {})}


def admit(bench: Bench, server: Server, expected: Mapping[str, Mapping[str, float]], stack: ExitStack) -> None:
    """Starts a server, compares its scores and takes it in; one that fails is written down with the reason."""
    entry = bench.found["servers"][server.name] = described(server.title, server.usual)
    stack.callback(server.stop)
    try:
        print(f"starting {server.title}", flush=True)
        begun = time.monotonic()
        server.start()
        entry["seconds_to_start"] = round(time.monotonic() - begun, 1)
        if server.name.endswith("-ner"):
            entry["task"] = "token-classification"
        else:
            entry["drift"] = compare(server, expected)
    except Unavailable as error:
        entry["unavailable"] = str(error)
        server.stop()
        return
    bench.servers[server.name] = server
    for what in bench.loads(server):
        bench.send(server, what, 1)
    server.rest()


def compare(server: Server, expected: Mapping[str, Mapping[str, float]]) -> float:
    """The largest difference of a score from that of fp32, by text. Raises Unavailable if the answers are others."""
    drifts = [disagreement(scores, servers.scores(server.ask(text)), server.exact) for text, scores in expected.items()]
    return round(max(drifts), 6)


def disagreement(expected: Mapping[str, float], given: Mapping[str, float], exact: bool) -> float:
    """The largest difference between two sets of scores.

    Raises Unavailable if it is too large for an fp32 server, or if another server answers another label though the
    expected scores leave no doubt.
    """
    if expected.keys() != given.keys():
        raise Unavailable(f"it answers the labels {sorted(given)} and should answer {sorted(expected)}")
    drift = max(abs(expected[label] - given[label]) for label in expected)
    if exact and drift > TOLERANCE:
        raise Unavailable(f"its scores differ from those of transformers by {drift:.4f}, more than {TOLERANCE}")
    first, second = sorted(expected.values())[-1], sorted(expected.values())[-2]
    if first - second > CLEAR_MARGIN and max(expected, key=expected.__getitem__) != max(given, key=given.__getitem__):
        raise Unavailable(f"it answers another label where fp32 is sure ({first:.2f} against {second:.2f})")
    return drift


def cpu_seconds(server: Server) -> dict[str, float]:
    """Processor seconds spent so far by a server and by the load generators, which are children of this process."""
    generators = psutil.Process().cpu_times()
    return {**server.cpu_seconds(), "load generator": generators.children_user + generators.children_system}


def measured(bench: Bench, server: Server) -> dict[str, Any]:
    """All loads of one round on one server."""
    server.start()
    samples = {what.name: asdict(bench.measure(server, what)) for what in bench.loads(server)}
    server.rest()
    for name, sample in samples.items():
        if not load.Sample(**sample).valid:
            print(f"  {server.title}, {name}: no result: {sample}", flush=True)
    return samples


def growth(bench: Bench, model: models.Model, texts: Texts, limit: Limit, torch: Limit) -> dict[str, Any]:
    """Time against batch size, text length, connections and workers."""
    print("growth", flush=True)
    ours = bench.servers[report.OURS]
    ours.start()
    found: dict[str, Any] = {"batch": [], "length": [], "connections": {}, "workers": [], "batching": []}
    for size in BATCHES:
        groups = chunks(bench.mixes["sst2"], size)
        found["batch"].append({"texts": size, **growing(bench, ours, f"batch{size}", groups, limit, torch)})
    for tokens in (n for n in LENGTHS if n <= model.settings.max_length):
        groups = [[text] for text in texts.of_length(tokens)]
        found["length"].append({"tokens": tokens, **growing(bench, ours, f"length{tokens}", groups, limit, torch)})
    for name in (report.OURS, report.LEANEST, report.UNBATCHED):
        if name not in bench.servers:
            continue
        server = bench.servers[name]
        server.start()
        found["connections"][name] = [
            {"connections": count, **point(bench.measure(server, Load(f"sst2-{count}", 3)))}
            for count in (1, 8, 64, 256)
        ]
        server.rest()
    cpus = len(os.sched_getaffinity(0))
    for workers in WORKERS:
        threads = max(1, cpus // workers)
        changes = {"minWorkers": workers, "maxWorkers": workers, "handler": {"threads": threads}}
        with variant(bench, model, f"workers-{workers}", changes) as server:
            rates = {f"rate_{n}": bench.measure(server, Load(f"sst2-{n}", 3)).rate for n in (1, 8, 64)}
        found["workers"].append({"workers": workers, "threads": threads, **rounded(rates)})
    for size, delay in BATCHING:
        changes = {"batchSize": size, "maxBatchDelay": delay}
        with variant(bench, model, f"batching-{size}-{delay}", changes) as server:
            full, single = (bench.measure(server, Load(f"sst2-{n}", 3)) for n in (64, 1))
        found["batching"].append({**changes, **point(full), "single_ms": single.p50_ms})
    return found


def growing(
    bench: Bench, server: Server, name: str, groups: list[list[str]], limit: Limit, torch: Limit
) -> dict[str, float]:
    """Median milliseconds of requests of one size: over REST, in-process, and in-process with torch."""
    path = bench.work / "bodies" / f"{server.name}-{name}.jsonl"
    write_bodies(path, [{"inputs": group} for group in groups])
    rest = bench.measure(server, Load(f"{name}-1", 2))
    return rounded({"rest_ms": rest.p50_ms, "limit_ms": limit.latency(groups, 1), "torch_ms": torch.latency(groups, 1)})


class variant:
    """Marble on the archive with other settings, running within a with-block."""

    def __init__(self, bench: Bench, model: models.Model, name: str, changes: dict[str, Any]) -> None:
        archive = models.variant(model, name, **changes)
        self._server = servers.marble(name, name, archive, bench.work / "servers" / name)

    def __enter__(self) -> Server:
        self._server.start()
        return self._server

    def __exit__(self, *_: object) -> None:
        self._server.stop()


def point(sample: load.Sample) -> dict[str, float]:
    """A point of a curve."""
    return rounded({"rate": sample.rate, "p50_ms": sample.p50_ms, "p99_ms": sample.p99_ms, "errors": sample.errors})


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Three decimals are more than a measurement gives."""
    return {name: round(value, 3) for name, value in values.items()}


def machine() -> dict[str, Any]:
    """Processor, cores, the instructions that matter to inference, and memory."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    telling = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "processor": info.get("model name", platform.machine()),
        "cpus": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in telling if flag in info.get("flags", "").split()],
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def only(arguments: argparse.Namespace) -> list[str]:
    return ["--only", *arguments.only] if arguments.only else []


def write_report(results: dict[str, Any]) -> None:
    """The tables and plots of docs/speed.md."""
    DOCUMENT.write_text(report.document(results, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    if "growth" in results:
        report.plots(results, DOCUMENT.parent)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one short round; nothing written without --output")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PEER", help=f"of {', '.join(names)}")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--work", type=Path, help="folder to keep models in, and to find them in (default: temporary)")
    parser.add_argument("--output", type=Path, help=f"file to write (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument(
        "--report", action="store_true", help="write docs/speed.md and its plots again; measure nothing"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BenchError, load.LoadError) as error:
        sys.exit(f"scripts/bench: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"scripts/bench: {Path(error.cmd[0]).name} {Path(error.cmd[1]).name} failed, as said above")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
