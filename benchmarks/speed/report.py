"""From rounds to ratios: targets, the table and the plots of docs/speed.md."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.page import rewritten
from benchmarks.speed.load import Sample

OURS = "marble"
LEANEST = "mosec-openvino"
UNBATCHED = "torchserve"
BEGIN, END = "<!-- begin: written by scripts/bench --report -->", "<!-- end -->"
ITEMS = 32
# As `benchmarks.speed.load.Sample.cpu_ms` names them.
PROCESSES = ("worker", "server", "load generator")


@dataclass(frozen=True)
class Round:
    """One round of measurements. limit: those in-process; samples: by server and load; usual: peers in usual form."""

    limit: Mapping[str, float]
    samples: Mapping[str, Mapping[str, Sample]]
    usual: Sequence[str]

    @classmethod
    def of(cls, value: Mapping[str, Any], usual: Sequence[str]) -> "Round":
        """From its JSON."""
        samples = {
            server: {load: Sample(**sample) for load, sample in loads.items()}
            for server, loads in value["servers"].items()
        }
        return cls(value["limit"], samples, usual)

    def sample(self, server: str, load: str) -> Sample | None:
        """A valid measurement, None if there is none: one with errors is no result."""
        sample = self.samples.get(server, {}).get(load)
        return sample if sample is not None and sample.valid else None

    def rate(self, server: str, load: str) -> float | None:
        """Requests per second."""
        return sample.rate if (sample := self.sample(server, load)) else None

    def p50(self, server: str, load: str) -> float | None:
        """Milliseconds."""
        return sample.p50_ms if (sample := self.sample(server, load)) else None

    def p99(self, server: str, load: str) -> float | None:
        """Milliseconds."""
        return sample.p99_ms if (sample := self.sample(server, load)) else None

    def best_rate(self, load: str) -> float | None:
        """The highest rate of a peer in its usual form."""
        return max((rate for peer in self.usual if (rate := self.rate(peer, load)) is not None), default=None)

    def best_p99(self, load: str) -> float | None:
        """The lowest p99 of a peer in its usual form."""
        return min((p99 for peer in self.usual if (p99 := self.p99(peer, load)) is not None), default=None)


def ratio(over: float | None, under: float | None) -> float | None:
    """over / under, None if one is missing."""
    return None if over is None or not under else over / under


@dataclass(frozen=True)
class Target:
    """A row of the targets: what is measured in one round, and what its median must reach (at most, where a cost)."""

    id: str
    what: str
    target: float
    measure: Callable[[Round], float | None]
    at_most: bool = False


TARGETS = (
    Target(
        "1",
        "REST throughput, 64 connections, SST-2, over the in-process limit in batches of 64",
        0.92,
        lambda r: ratio(r.rate(OURS, "sst2-64"), r.limit.get("sst2")),
    ),
    Target(
        "2",
        "REST throughput, 64 connections, long-tail mix, over the in-process limit in batches of 64",
        0.85,
        lambda r: ratio(r.rate(OURS, "long-64"), r.limit.get("long")),
    ),
    Target(
        "3",
        "REST throughput, 64 connections, SST-2, over the best peer in its usual form",
        5,
        lambda r: ratio(r.rate(OURS, "sst2-64"), r.best_rate("sst2-64")),
    ),
    Target(
        "4",
        "REST throughput, 64 connections, SST-2, over mosec with the same OpenVINO model",
        1.1,
        lambda r: ratio(r.rate(OURS, "sst2-64"), r.rate(LEANEST, "sst2-64")),
    ),
    Target(
        "5",
        "REST throughput, 64 connections, SST-2, over TorchServe with a plain torch handler, unbatched",
        10,
        lambda r: ratio(r.rate(OURS, "sst2-64"), r.rate(UNBATCHED, "sst2-64")),
    ),
    Target(
        "6",
        "REST p50, 1 connection, SST-2, over the in-process p50 of single texts",
        1.8,
        lambda r: ratio(r.p50(OURS, "sst2-1"), r.limit.get("single_ms")),
        at_most=True,
    ),
    Target(
        "7",
        "REST p99, 64 connections, SST-2, over the best p99 of a peer in its usual form",
        0.4,
        lambda r: ratio(r.p99(OURS, "sst2-64"), r.best_p99("sst2-64")),
        at_most=True,
    ),
    Target(
        "8",
        "gRPC throughput, 64 calls at a time, SST-2, over REST throughput",
        0.9,
        lambda r: ratio(r.rate(OURS, "grpc-64"), r.rate(OURS, "sst2-64")),
    ),
    Target(
        "9",
        f"REST p50 of a request with {ITEMS} texts, 1 connection, over the in-process p50 of the same",
        1.15,
        lambda r: ratio(r.p50(OURS, "items-1"), r.limit.get("items_ms")),
        at_most=True,
    ),
    Target(
        "10",
        "in-process throughput over that of torch fp32, same batches of 64, each in its best micro-batches",
        4,
        lambda r: ratio(r.limit.get("sst2"), r.limit.get("torch")),
    ),
)


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median, least and greatest of what is there; None if nothing is."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return {"value": round(statistics.median(found), 3), "min": round(min(found), 3), "max": round(max(found), 3)}


def targets(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """The targets with the median of each round's ratio; those that this run has not measured are left out."""
    found = []
    for target in TARGETS:
        ratios = [target.measure(round_) for round_ in rounds]
        values = spread(ratios)
        if values is None:
            continue
        met = values["value"] <= target.target if target.at_most else values["value"] >= target.target
        found.append(
            {
                "id": target.id,
                "what": target.what,
                **values,
                "target": target.target,
                "bound": "at most" if target.at_most else "at least",
                "met": met,
                "ratios": [None if value is None else round(value, 3) for value in ratios],
            }
        )
    return found


def rounds_of(results: Mapping[str, Any]) -> list[Round]:
    """The rounds of a results file."""
    usual = [name for name, server in results["servers"].items() if server["usual"]]
    return [Round.of(value, usual) for value in results["rounds"]]


def markdown(results: Mapping[str, Any]) -> str:
    """Targets and servers as tables."""
    rounds = rounds_of(results)
    machine = results["machine"]
    lines = [
        f"{len(rounds)} round(s) on {machine['processor']}, {machine['cpus']} cores, {machine['memory_gb']} GB; "
        f"archive: {results['archive']}.",
        "",
        "| # | measure | median | least – greatest | target | met |",
        "|---|---|---|---|---|---|",
    ]
    for entry in results["targets"]:
        lines.append(
            f"| {entry['id']} | {entry['what']} | {entry['value']:.2f} | {entry['min']:.2f} – {entry['max']:.2f} | "
            f"{entry['bound']} {entry['target']:g} | {'yes' if entry['met'] else 'no'} |"
        )
    lines += [
        "",
        "| server | SST-2, 64 connections: req/s | Marble is faster by | p50 / p99, ms | SST-2, 1 connection: p50, ms "
        "| long-tail mix, 64 connections: req/s | Marble is faster by | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, server in results["servers"].items():
        if server.get("task") == "token-classification":
            continue
        if "unavailable" in server:
            lines.append(f"| {server['title']} | not measured: {server['unavailable']} |" + " |" * 6)
            continue
        cells = [
            _number([r.rate(name, "sst2-64") for r in rounds], 0),
            _times([ratio(r.rate(OURS, "sst2-64"), r.rate(name, "sst2-64")) for r in rounds], name),
            " / ".join(_number([measure(r, name, "sst2-64") for r in rounds], 0) for measure in (Round.p50, Round.p99)),
            _number([r.p50(name, "sst2-1") for r in rounds], 1),
            _number([r.rate(name, "long-64") for r in rounds], 0),
            _times([ratio(r.rate(OURS, "long-64"), r.rate(name, "long-64")) for r in rounds], name),
            f"{server['memory_mb']:.0f}",
        ]
        lines.append(f"| {server['title']} | {' | '.join(cells)} |")
    limit = {key: _number([r.limit.get(key) for r in rounds], 0) for key in ("sst2", "sst2_at_once", "long", "torch")}
    single = _number([r.limit.get("single_ms") for r in rounds], 1)
    lines.append(
        f"| in-process, the same archive, batches of 64 | {limit['sst2']} | | | {single} | {limit['long']} | | |"
    )
    lines.append(f"| in-process, the same archive, all texts at once | {limit['sst2_at_once']} | | | | | | |")
    lines.append(f"| in-process, torch fp32, batches of 64 | {limit['torch']} | | | | | | |")
    lines += _others(results, rounds)
    return "\n".join(lines)


def _others(results: Mapping[str, Any], rounds: Sequence[Round]) -> list[str]:
    """gRPC, requests of many items, NER, and the scores."""
    lines = ["", "| Marble besides | req/s | p50, ms | p99, ms |", "|---|---|---|---|"]
    rows = [
        (OURS, "grpc-64", "gRPC, 64 calls at a time, SST-2"),
        (OURS, "items-1", f"REST, 1 connection, {ITEMS} texts a request"),
        ("marble-ner", "wnut17-64", "REST, 64 connections, NER on WNUT 2017"),
        ("marble-ner", "wnut17-1", "REST, 1 connection, NER on WNUT 2017"),
        ("fastapi-ner", "wnut17-64", "FastAPI + pipeline, 64 connections, NER on WNUT 2017"),
        ("fastapi-ner", "wnut17-1", "FastAPI + pipeline, 1 connection, NER on WNUT 2017"),
    ]
    for server, load, title in rows:
        if any(r.sample(server, load) for r in rounds):
            rate, p50, p99 = (
                _number([measure(r, server, load) for r in rounds], 1) for measure in (Round.rate, Round.p50, Round.p99)
            )
            lines.append(f"| {title} | {rate} | {p50} | {p99} |")
    lines += _processor_time(rounds)
    if startup := results.get("startup"):
        ready, slowest_ready, back, slowest_back = (
            f"{startup[key]:.1f} s" for key in ("ready_s", "slowest_ready_s", "back_s", "slowest_back_s")
        )
        lines += [
            "",
            f"After a `kill -9` of the worker (median of {startup['restarts']}): its successor is READY {ready} after "
            f"the start of its process (at most {slowest_ready}), {back} after the kill (at most {slowest_back}), and "
            f"takes {startup['memory_mb']:.0f} MB then.",
        ]
    drifts = [f"{server['title']} {server['drift']:.1e}" for server in results["servers"].values() if "drift" in server]
    if drifts:
        lines += ["", f"Largest difference of a score from `transformers` in fp32: {'; '.join(drifts)}."]
    if batching := results.get("growth", {}).get("batching"):
        lines += [
            "",
            "| batchSize | maxBatchDelay, ms | 64 connections: req/s | p99, ms | 1 connection: p50, ms |",
            "|---|---|---|---|---|",
        ]
        for row in batching:
            lines.append(
                f"| {row['batchSize']} | {row['maxBatchDelay']} | {row['rate']:.0f} | {row['p99_ms']:.0f} | "
                f"{row['single_ms']:.1f} |"
            )
    return lines


def _processor_time(rounds: Sequence[Round]) -> list[str]:
    """What a request costs which process."""
    lines = ["", "| processor time of a request, ms | worker | JVM | load generator |", "|---|---|---|---|"]
    rows = [
        ("sst2-64", "REST, 64 connections, SST-2"),
        ("grpc-64", "gRPC, 64 calls at a time, SST-2"),
        ("sst2-1", "REST, 1 connection, SST-2"),
        ("items-1", f"REST, 1 connection, {ITEMS} texts a request"),
    ]
    for load, title in rows:
        spent = [sample.cpu_ms for r in rounds if (sample := r.sample(OURS, load)) and sample.cpu_ms]
        if spent:
            cells = (_number([cpu_ms[name] for cpu_ms in spent], 2) for name in PROCESSES)
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines if len(lines) > 3 else []


def _number(values: Sequence[float | None], digits: int) -> str:
    found = spread(values)
    return "–" if found is None else f"{found['value']:,.{digits}f}"


def _times(values: Sequence[float | None], name: str) -> str:
    found = spread(values)
    return "" if found is None or name == OURS else f"{found['value']:.1f} × ({found['min']:.1f} – {found['max']:.1f})"


def document(results: Mapping[str, Any], text: str) -> str:
    """docs/speed.md with the tables of these results between its marks. Raises ValueError if it has no marks."""
    return rewritten("docs/speed.md", text, (BEGIN, END), markdown(results))


def plots(results: Mapping[str, Any], folder: Path) -> None:
    """SVG files: speed-peers; and growth: speed-batch, speed-length, speed-connections, speed-workers."""
    import matplotlib

    matplotlib.use("svg")
    # The same results give the same files.
    matplotlib.rcParams |= {"svg.hashsalt": "marble", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    from matplotlib import pyplot

    rounds = rounds_of(results)
    rates = {name: spread([round_.rate(name, "sst2-64") for round_ in rounds]) for name in results["servers"]}
    bars = sorted((rate["value"], name) for name, rate in rates.items() if rate is not None)
    figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
    drawn = axes.barh(
        [results["servers"][name]["title"] for _, name in bars],
        [rate for rate, _ in bars],
        color=["#4338ca" if name == OURS else "#94a3b8" for _, name in bars],
    )
    axes.bar_label(drawn, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="requests per second: MiniLM on SST-2, 64 connections, two cores")
    figure.savefig(folder / "speed-peers.svg", metadata={"Date": None})
    pyplot.close(figure)

    growth = results["growth"]

    def draw(
        name: str, x: str, y: str, lines: Mapping[str, Sequence[tuple[float, float]]], ticks: Sequence[int]
    ) -> None:
        figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel=x, ylabel=y)
        axes.legend(fontsize=7)
        figure.savefig(folder / f"speed-{name}.svg", metadata={"Date": None})
        pyplot.close(figure)

    def line(rows: Sequence[Mapping[str, float]], x: str, y: str) -> list[tuple[float, float]]:
        return [(row[x], row[y]) for row in rows if row.get(y) is not None]

    batch, length, workers = growth["batch"], growth["length"], growth["workers"]
    draw(
        "batch",
        "texts in a request (SST-2)",
        "milliseconds, p50",
        {
            "REST, 1 connection": line(batch, "texts", "rest_ms"),
            "in-process": line(batch, "texts", "limit_ms"),
            "in-process, torch fp32": line(batch, "texts", "torch_ms"),
        },
        [row["texts"] for row in batch],
    )
    draw(
        "length",
        "tokens of the text",
        "milliseconds, p50",
        {
            "REST, 1 connection": line(length, "tokens", "rest_ms"),
            "in-process": line(length, "tokens", "limit_ms"),
            "in-process, torch fp32": line(length, "tokens", "torch_ms"),
        },
        [row["tokens"] for row in length],
    )
    draw(
        "connections",
        "connections (SST-2)",
        "requests per second",
        {
            results["servers"][name]["title"]: line(rows, "connections", "rate")
            for name, rows in growth["connections"].items()
        },
        sorted({row["connections"] for rows in growth["connections"].values() for row in rows}),
    )
    draw(
        "workers",
        "workers, each with cores / workers threads",
        "requests per second",
        {f"{connections} connections": line(workers, "workers", f"rate_{connections}") for connections in (1, 8, 64)},
        [row["workers"] for row in workers],
    )
