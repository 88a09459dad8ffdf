"""What making a model smaller costs and gives: fewer layers, a teacher, adapters (LoRA), int8, training for int8.

SST-2 and MiniLM. Each model is trained by train.py and built for OpenVINO by build_mar.sh. What is compared is what is
served: the size of the archive, texts a second through its engine in this process, and the accuracy on the dev split,
which no training has seen. The engines take turns in each round of the measurement of speed.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset, disable_progress_bars
from safetensors import safe_open

from benchmarks.page import rewritten
from benchmarks.quality_data import ROOT, SEED
from benchmarks.speed.__main__ import machine
from handler.engine import Engine
from training import evaluation, tasks
from training.interrupts import INTERRUPTED

_EXAMPLES = """examples:
  benchmarks/compression            # writes benchmarks/compression-results.json and the table of docs/training.md
  benchmarks/compression --quick    # few rows and steps, prints only: shows that it runs"""
RESULTS = ROOT / "benchmarks" / "compression-results.json"
DOCUMENT = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- figures: written by benchmarks/compression -->", "<!-- end of figures -->"
ROWS, ROUNDS, QUICK_ROWS, QUICK_TEXTS = 2000, 3, 96, 64
_FULL = ("--num-train-epochs", "4")
# Where a run of few steps has nothing to choose an epoch by.
_QUICK = ("--max-steps", "3", "--eval-strategy", "no", "--save-strategy", "no", "--load-best-model-at-end", "false")
_TASK = "text-classification"
_LEARNING = re.compile(r"^ +([\d,]+) of [\d,]+ weights learn$", re.MULTILINE)


@dataclass(frozen=True)
class Way:
    """One model. options: of train.py, {} standing for the folder of bundles; bundle: another way's, if it is its."""

    what: str
    options: tuple[str, ...] = ()
    bundle: str | None = None
    precision: str = "fp32"


TEACHER = "teacher"
WAYS = {
    TEACHER: Way("MiniLM, 6 layers"),
    "layers": Way("3 of its layers", ("--layers", "3")),
    "distilled": Way("3 layers, the first row as teacher", ("--layers", "3", "--teacher", f"{{}}/{TEACHER}")),
    "lora": Way("6 layers, adapters of rank 8", ("--lora", "8")),
    "int8": Way("the first row in int8", bundle=TEACHER, precision="int8"),
    "aware": Way("6 layers, quantization-aware, in int8", ("--quantization-aware", "true"), precision="int8"),
}


def call(command: Sequence[str]) -> str:
    """Standard output of a command. Raises subprocess.CalledProcessError if it fails, which has said why."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def train(name: str, files: Sequence[str], work: Path, quick: bool) -> dict[str, Any]:
    """Trains one model into its folder; how many weights learnt, and the seconds of the training."""
    place = work / name
    options = [option.format(work) for option in WAYS[name].options]
    command = [sys.executable, "train.py", "--task", _TASK, *files, *options, "--seed", str(SEED)]
    printed = call([*command, "--output-dir", str(place), *(_QUICK if quick else _FULL)])
    with safe_open(place / "model.safetensors", "np") as weights:
        names = [key for key in weights.keys() if not key.endswith("word_embeddings.weight")]  # noqa: SIM118
        shapes = [weights.get_slice(key).get_shape() for key in names]
    told = _LEARNING.search(printed)
    learnt = int(told[1].replace(",", "")) if told else sum(map(math.prod, shapes))
    metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    return {"weights_learnt": learnt, "training_seconds": metrics["training_seconds"]}


def build(name: str, work: Path) -> tuple[Engine, float]:
    """Builds one archive: its engine, and its size in MB."""
    way, store = WAYS[name], work / "store"
    options = ("--backend", "openvino", "--precision", way.precision, "--force")
    bundle = work / (way.bundle or name)
    call(["./build_mar.sh", "--bundle", str(bundle), "--store", str(store), "--name", name, *options])
    archive, unpacked = store / f"{name}.mar", work / "unpacked" / name
    with zipfile.ZipFile(archive) as file:
        file.extractall(unpacked)
    return Engine(unpacked), round(archive.stat().st_size / 1e6, 1)


def measure(data: Path, work: Path, quick: bool) -> dict[str, dict[str, Any]]:
    """The figures of each model."""
    rows, dev = (Dataset.from_csv(str(data / "sst2" / f"{split}.csv")) for split in ("train", "dev"))
    rows = rows.shuffle(seed=SEED).select(range(QUICK_ROWS if quick else ROWS))
    dev = dev.select(range(QUICK_TEXTS if quick else len(dev)))
    files: list[str] = []
    for option, split in (("--train-file", rows), ("--test-file", dev)):
        files += [option, str(work / f"{option}.csv")]
        split.to_csv(files[-1])
    found: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        found[name] = train(name, files, work, quick) if way.bundle is None else {}
        print(f"{way.what}: {json.dumps(found[name])}", flush=True)
    engines: dict[str, Engine] = {}
    for name in WAYS:
        engines[name], found[name]["archive_mb"] = build(name, work)
    cut = {"overflow": "truncate"}
    examples = [{"inputs": row["text"], "parameters": cut, "target": row["label"]} for row in dev]
    task, labels = tasks.load(_TASK), sorted(set(dev["label"]))
    for name, engine in engines.items():
        scores = evaluation.measure(engine, task, examples, labels)
        found[name] |= {"accuracy": round(scores["accuracy"], 4), "texts_per_second": []}
    for number in range(1 if quick else ROUNDS):
        names = [*WAYS][number % len(WAYS) :] + [*WAYS][: number % len(WAYS)]
        for name in names:
            started = time.perf_counter()
            evaluation.predict(engines[name], examples)
            rate = len(examples) / (time.perf_counter() - started)
            found[name]["texts_per_second"].append(round(rate, 1))
    return found


def table(found: Mapping[str, Any]) -> str:
    """What docs/training.md has."""
    lines = [
        "| model | archive | weights that learnt | trained in | texts a second | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in found["models"].items():
        learnt = f"{entry['weights_learnt'] / 1e6:.1f} million" if "weights_learnt" in entry else ""
        seconds = f"{entry['training_seconds']:.0f} s" if "training_seconds" in entry else ""
        rates = entry["texts_per_second"]
        speed = f"{median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
        figures = f"{entry['archive_mb']:.0f} MB | {learnt} | {seconds} | {speed} | {100 * entry['accuracy']:.1f} %"
        lines.append(f"| {WAYS[name].what} | {figures} |")
    where = found["machine"]
    lines += [
        "",
        f"{found['rows']} rows of SST-2, four epochs, one seed. {where['processor']}, {where['cpus']} CPUs.",
    ]
    return "\n".join(lines)


def document(found: Mapping[str, Any], text: str) -> str:
    """docs/training.md with these figures between its marks. Raises ValueError if it has none."""
    return rewritten(DOCUMENT, text, (BEGIN, END), table(found))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/compression",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few rows and steps, nothing written")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse(sys.argv[1:])
    if not (arguments.data / "sst2").is_dir():
        sys.exit(f"benchmarks/compression: {arguments.data}/sst2 is missing; name the data sets' folder with --data")
    disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="compression-") as folder:
        found: dict[str, Any] = {
            "command": f"benchmarks/compression{' --quick' if arguments.quick else ''}",
            "machine": machine(),
            "rows": QUICK_ROWS if arguments.quick else ROWS,
            "models": measure(arguments.data.absolute(), Path(folder), arguments.quick),
        }
    print(table(found))
    if not arguments.quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        DOCUMENT.write_text(document(found, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"benchmarks/compression: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
