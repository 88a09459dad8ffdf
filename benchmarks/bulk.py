"""A file of 100,000 rows, scored by `marble predict --input` while the server and the client are killed.

The rows are of examples/reviews: each is one to four of its texts, drawn with a fixed seed, and no two are the same.
The model is a small one, trained from scratch on the same texts and built in int8: what is measured is the client.
One run scores all of them undisturbed. In the next, SIGKILL ends every process of TorchServe at a third and at two
thirds of the rows, and the client at the half; the server is started again with the program behind scripts/serve, the
client with the same command. The two outputs must be the same, byte for byte. Which requests share a batch is chance,
and a batch's other rows move a row's last digits; so the archive has `batchSize: 1`, and a third run, undisturbed and
with the archive as it was built, shows how far that goes. A run over a tenth of the rows shows whether the client's
memory grows with the file.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.fault_injection.bench import MODEL, Bench, Target
from benchmarks.page import rewritten
from benchmarks.speed import models, servers
from benchmarks.speed.__main__ import machine
from benchmarks.speed.peers import OFFLINE, ROOT, Unavailable
from training.interrupts import INTERRUPTED

RESULTS = ROOT / "benchmarks" / "bulk-results.json"
DOCUMENT = ROOT / "docs" / "bulk.md"
BEGIN, END = "<!-- figures: written by benchmarks/bulk -->", "<!-- end of figures -->"
ROWS, QUICK_ROWS, SEED = 100_000, 2_000, 11
# At which share of the rows what is killed.
KILLS, QUICK_KILLS = ((1 / 3, "server"), (1 / 2, "client"), (2 / 3, "server")), ((1 / 3, "server"),)
# How much more memory all rows may need than a tenth of them.
MOST_GROWTH = 1.1
_SECONDS_BETWEEN_LOOKS = 0.05

_EXAMPLES = """examples:
  benchmarks/bulk            # writes benchmarks/bulk-results.json and the table of docs/bulk.md
  benchmarks/bulk --quick    # 2,000 rows, the server killed once; prints only"""


@dataclass
class Run:
    """One file that was scored. seconds: from the first command to the end of the last one, what is down included.

    peak_mb: the most resident memory that the client had. kills: what was killed, and with how many rows done.
    """

    rows: int
    seconds: float = 0.0
    peak_mb: float = 0.0
    kills: list[tuple[int, str]] = field(default_factory=list)


class Scorer:
    """`marble predict --input` against a server that can be killed."""

    def __init__(self, server: servers.Server) -> None:
        self._server = server
        url, _, self._model = server.url.rpartition("/predictions/")
        marble = Path(sys.executable).with_name("marble")
        self._command = [str(marble), "predict", self._model, "--url", url, "--timeout", "60"]

    def score(self, source: Path, target: Path, rows: int, kills: Sequence[tuple[float, str]] = ()) -> Run:
        """Scores a file and kills on the way. Raises Unavailable if the client fails."""
        run, due = Run(rows), deque(kills)
        begun = time.monotonic()
        client = self._start(source, target)
        try:
            while client.poll() is None:
                run.peak_mb = max(run.peak_mb, peak_mb(client.pid))
                if due and (done := rows_done(target)) >= due[0][0] * rows:
                    _, victim = due.popleft()
                    run.kills.append((done, victim))
                    if victim == "server":
                        self._server.kill()
                        self._server.start()
                    else:
                        client.kill()
                        client.wait()
                        client = self._start(source, target)
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        finally:
            client.kill()
            client.wait()
        run.seconds = round(time.monotonic() - begun, 1)
        if client.returncode != 0 or due:
            raise Unavailable(f"marble predict exited with {client.returncode}, {len(due)} kills yet to come")
        return run

    def _start(self, source: Path, target: Path) -> "subprocess.Popen[bytes]":
        # In the server's folder it finds the key that each start of TorchServe makes.
        command = [*self._command, "--input", str(source), "--output", str(target)]
        environment = {**os.environ, **OFFLINE, "PYTHONPATH": f"{ROOT / 'client'}"}
        return subprocess.Popen(command, cwd=self._server.folder, env=environment, stdin=subprocess.DEVNULL)


def texts() -> Iterator[str]:
    """Texts without end, no two the same: one to four reviews each."""
    with (ROOT / "examples" / "reviews" / "train.csv").open(encoding="utf-8", newline="") as file:
        reviews = [row["text"] for row in csv.DictReader(file)]
    chance, seen = random.Random(SEED), set[str]()
    while True:
        text = " ".join(chance.sample(reviews, chance.randint(1, 4)))
        if text not in seen:
            seen.add(text)
            yield text


def write_rows(path: Path, count: int) -> Path:
    """A csv of so many rows with the columns id and text."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "text"))
        writer.writerows(zip(map(str, range(count)), texts(), strict=False))
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def rows_done(target: Path) -> int:
    """How many results a run has kept so far."""
    try:
        lines = target.with_name(f"{target.name}.part").read_bytes().splitlines()[1:-1]
    except FileNotFoundError:
        return 0
    return sum(line.count(b'{"prediction"') for line in lines)


def peak_mb(pid: int) -> float:
    """The most resident memory that a process has had; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return round(int(peak[0]) / 1024, 1) if peak else 0.0


def difference(one: Sequence[Mapping[str, str]], other: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Of two outputs: rows with another label, rows with another score, and the largest difference of two scores."""
    pairs = list(zip(one, other, strict=True))
    gaps = [abs(float(first["score"]) - float(second["score"])) for first, second in pairs]
    labels = sum(first["label"] != second["label"] for first, second in pairs)
    return {"labels": labels, "scores": sum(gap > 0 for gap in gaps), "largest": round(max(gaps), 5)}


def prepare(bench: Bench) -> None:
    """Trains and builds the model, unless it is in the store. Raises subprocess.CalledProcessError if it cannot."""
    if (bench.store / f"{MODEL}.mar").exists():
        return
    data, bundle = ROOT / "examples" / "reviews", bench.work / MODEL
    files = (f"--{split}-file={data / split}.csv" for split in ("train", "validation"))
    small = "bert hidden_size=128 num_hidden_layers=2 num_attention_heads=2 intermediate_size=256 vocab_size=4000"
    train = ["train.py", *files, "--from-scratch", small, "--num-train-epochs", "2", "--output-dir", str(bundle)]
    build = ["-m", "archiver", "--bundle", str(bundle), "--backend", "openvino", "--precision", "int8", "--force"]
    for command in ([*train, "--overwrite"], [*build, "--store", str(bench.store)]):
        subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, **OFFLINE}, check=True)


def unshared(bench: Bench) -> Path:
    """The archive with `batchSize: 1`: rows that travel in one request are computed together, and with no others."""
    archive, unpacked = bench.store / f"{MODEL}.mar", bench.work / "unpacked" / MODEL
    with zipfile.ZipFile(archive) as file:
        file.extractall(unpacked)
    return models.variant(models.Model(MODEL, bench.work / MODEL, archive, unpacked), f"{MODEL}-unshared", batchSize=1)


def measure(bench: Bench) -> dict[str, Any]:
    """All runs and what came of them."""
    prepare(bench)
    count = QUICK_ROWS if bench.quick else ROWS
    source, few = write_rows(bench.work / "rows.csv", count), write_rows(bench.work / "few.csv", count // 10)
    runs: dict[str, Run] = {}

    def score(server: servers.Server, name: str, kills: Sequence[tuple[float, str]] = ()) -> list[dict[str, str]]:
        output = bench.work / f"{name}.csv"
        output.unlink(missing_ok=True)
        given, size = (few, count // 10) if name == "tenth" else (source, count)
        runs[name] = Scorer(server).score(given, output, size, kills)
        print(f"{name}: {size} rows in {runs[name].seconds} s", flush=True)
        return rows_of(output)

    server = servers.marble("bulk", "Marble", unshared(bench), bench.work / "unshared")
    server.start()
    try:
        score(server, "tenth")
        expected = score(server, "undisturbed")
        found = score(server, "killed", QUICK_KILLS if bench.quick else KILLS)
    finally:
        server.stop()
    wanted, times = rows_of(source), Counter(row["id"] for row in found)
    output: dict[str, Any] = {
        "lost": sum(times[row["id"]] == 0 for row in wanted),
        "doubled": sum(number > 1 for number in times.values()),
        "moved": sum((a["id"], a["text"]) != (b["id"], b["text"]) for a, b in zip(wanted, found, strict=False)),
        "errors": sum(bool(row["error"]) for row in found),
        "other": sum(a != b for a, b in zip(expected, found, strict=False)),
        "same_bytes": (bench.work / "killed.csv").read_bytes() == (bench.work / "undisturbed.csv").read_bytes(),
    }
    if not bench.quick:
        server = servers.marble("bulk", "Marble", bench.store / f"{MODEL}.mar", bench.work / "shared")
        server.start()
        try:
            output["shared"] = difference(expected, score(server, "shared"))
        finally:
            server.stop()
    return {"runs": {name: asdict(run) for name, run in runs.items()}, "output": output}


def targets(found: Mapping[str, Any]) -> list[Target]:
    """What must hold."""
    output, runs = found["output"], found["runs"]
    growth = round(runs["undisturbed"]["peak_mb"] / runs["tenth"]["peak_mb"], 2)
    none = {
        "lost": "rows that are missing",
        "doubled": "rows that are there twice",
        "moved": "rows that are not those of the input, in its order",
        "errors": "rows with an error",
        "other": "rows that differ from those of the undisturbed run",
    }
    same, memory = output["same_bytes"], "client's peak memory, all rows against a tenth of them"
    return [
        *(Target(name, what, output[name], "0", output[name] == 0) for name, what in none.items()),
        Target("bytes", "both files, byte for byte", "the same" if same else "different", "the same", same),
        Target("memory", memory, growth, f"<= {MOST_GROWTH}", growth <= MOST_GROWTH),
    ]


def table(found: Mapping[str, Any]) -> str:
    """What docs/bulk.md has."""
    lines = ["| run | rows | seconds | rows a second | client's peak memory |", "|---|---|---|---|---|"]
    for name, run in found["runs"].items():
        what = ", ".join(f"{victim} killed at row {row:,}" for row, victim in run["kills"]) or "undisturbed"
        what += ", requests share batches" if name == "shared" else ""
        rate = run["rows"] / run["seconds"]
        lines.append(f"| {what} | {run['rows']:,} | {run['seconds']} | {rate:.0f} | {run['peak_mb']:.0f} MB |")
    lines += ["", "| the output of the killed run | found | target | |", "|---|---|---|---|"]
    for target in found["targets"]:
        met = "met" if target["met"] else "**missed**"
        lines.append(f"| {target['what']} | {target['value']} | {target['target']} | {met} |")
    where, shared = found["machine"], found["output"]["shared"]
    lines += [
        "",
        f"Where requests share batches, {shared['scores']:,} rows have another score, by at most {shared['largest']}, "
        f"and {shared['labels']} another label. {where['processor']}, {where['cpus']} CPUs, server and client on them.",
    ]
    return "\n".join(lines)


def document(found: Mapping[str, Any], text: str) -> str:
    """docs/bulk.md with these figures between its marks. Raises ValueError if it has none."""
    return rewritten("docs/bulk.md", text, (BEGIN, END), table(found))


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    output = arguments.output or (None if arguments.quick else RESULTS)
    with tempfile.TemporaryDirectory(prefix="bulk-") as folder:
        work = (arguments.work or Path(folder)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {
            "command": f"benchmarks/bulk{' --quick' if arguments.quick else ''}",
            "machine": machine(),
            "versions": {
                "python": platform.python_version(),
                **{
                    name: importlib.metadata.version(name)
                    for name in ("torchserve", "openvino", "tokenizers", "requests")
                },
            },
            **measure(Bench(work, arguments.quick)),
        }
    found["targets"] = [asdict(target) for target in targets(found)]
    for target in found["targets"]:
        met = "met" if target["met"] else "MISSED"
        print(f"{target['what']}: {target['value']} (target {target['target']}): {met}")
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if output == RESULTS:
        DOCUMENT.write_text(document(found, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    if not all(target["met"] for target in found["targets"]):
        sys.exit(1)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/bulk",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="2,000 rows, one kill; nothing is written")
    parser.add_argument("--work", type=Path, help="folder of the model and the rows (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="where the results go (default: benchmarks/bulk-results.json)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Unavailable, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks/bulk: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
