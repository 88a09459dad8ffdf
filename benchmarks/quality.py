"""Quality on real data: what the models that train.py makes are worth on data they have not seen.

Each experiment trains models through train.py, one for each seed, and scores them on the test split with the engine
that serves them, beside a trivial baseline. Of some the Hugging Face Trainer, with its own defaults, learns the same
rows right after, and an int8 archive of the first model is scored, too. The data sets are those of ../shared/data, or
of the folder named by --data.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import train
from benchmarks.quality_data import ROOT, SEED, Context
from benchmarks.quality_experiments import EXPERIMENTS, SEEDS, Experiment
from benchmarks.quality_report import INT8, OURS, TRAINER, Round, key, record, rounds, table, ways
from benchmarks.speed.__main__ import machine
from handler.engine import Engine
from training import base_model, evaluation, tasks
from training.interrupts import INTERRUPTED

_EXAMPLES = """examples:
  benchmarks/quality                       # every experiment; after each, its figures are written
  benchmarks/quality --only sst2 wnut17    # these alone; the results of the others are kept
  benchmarks/quality --missing             # goes on where an earlier run has ended
  benchmarks/quality --quick               # a few steps each, prints only: shows that it runs"""
QUICK = ("--max-steps", "2", "--eval-strategy", "no", "--save-strategy", "no", "--load-best-model-at-end", "false")
# The files of a bundle that is not to be trained.
_KNOWN = ("--task", "--validation-file", "--test-file")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/quality",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few steps each, one seed, nothing written")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(e.name for e in EXPERIMENTS)}")
    parser.add_argument(
        "--missing", action="store_true", help="only what has no figures yet, or those of older options"
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--work", type=Path, help="folder to keep the bundles in (default: a temporary one)")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse(sys.argv[1:])
    if not (arguments.data / "sst2").is_dir():
        sys.exit(f"benchmarks/quality: {arguments.data}/sst2 is missing; name the folder of the data sets with --data")
    names = [experiment.name for experiment in EXPERIMENTS]
    if unknown := set(arguments.only or ()) - set(names):
        sys.exit(f"benchmarks/quality: no experiment {', '.join(sorted(unknown))}; there are {', '.join(names)}")

    experiments = [entry for entry in EXPERIMENTS if entry.name in (arguments.only or names)]
    with tempfile.TemporaryDirectory() as folder:
        context = Context(arguments.data.absolute(), (arguments.work or Path(folder)).absolute(), arguments.quick)
        context.work.mkdir(parents=True, exist_ok=True)
        for experiment, seed, way in order(experiments, (SEED,) if arguments.quick else SEEDS):
            if arguments.missing and done(experiment, seed, way, context):
                continue
            print(f"== {experiment.name}, seed {seed}: {way}", flush=True)
            found = run(experiment, seed, way, context)
            print(json.dumps(found), flush=True)
            if not arguments.quick:
                record(found)
    if not arguments.quick:
        print(table(rounds()))


def order(experiments: Sequence[Experiment], seeds: Sequence[int]) -> list[tuple[Experiment, int, str]]:
    """What is to be made: all of the first seed, then the other seeds of train.py, then those of the Trainer.

    So a run that is cut short has a whole comparison, and then the spread of what is ours.
    """
    wanted = [
        (experiment, seed, way)
        for seed in seeds
        for experiment in experiments
        if seed in experiment.seeds
        for way in ways(experiment, seed)
    ]
    return sorted(wanted, key=lambda entry: entry[1] != SEED and entry[2] == TRAINER)


def place_of(context: Context, experiment: Experiment, seed: int, way: str) -> Path:
    """The folder of a model: a bundle, or an archive, unpacked."""
    return context.bundle(
        "-".join([experiment.name, *([] if seed == SEED else [str(seed)]), *([] if way == OURS else [way])])
    )


def done(experiment: Experiment, seed: int, way: str, context: Context) -> bool:
    """Whether there are results of the same command."""
    wanted = Round(experiment.name, seed, way)
    return any(
        key(entry) == wanted and entry["command"] == command(experiment, seed, way, context) for entry in rounds()
    )


def run(experiment: Experiment, seed: int, way: str, context: Context) -> dict[str, Any]:
    """Makes one model and measures it."""
    place = place_of(context, experiment, seed, way)
    shutil.rmtree(place, ignore_errors=True)
    given = [*experiment.arguments(context), "--seed", str(seed)]
    seconds = {OURS: train_ours, TRAINER: train_stock, INT8: build_int8}[way](context, given, place)
    found: dict[str, Any] = {
        "name": experiment.name,
        "seed": seed,
        "way": way,
        "command": command(experiment, seed, way, context),
        "training_seconds": seconds,
        "machine": machine(),
        "figures": {figure.name: round(figure.measure(context, place), 4) for figure in experiment.figures},
    }
    if way == OURS:
        found["baseline"] = round(experiment.baseline_value(context, place), 4)
    return found


def command(experiment: Experiment, seed: int, way: str, context: Context) -> str:
    """What a model is made by, without the folders of this machine."""
    if way == INT8:
        return "./build_mar.sh --backend openvino --precision int8 --force"
    program = "python train.py" if way == OURS else "python -m benchmarks.quality_stock"
    line = " ".join([program, *experiment.arguments(context), "--seed", str(seed)])
    return line.replace(str(context.work), "WORK").replace(str(context.data), "DATA")


def call(line: Sequence[str], **more: Any) -> str:
    """Runs a command, whose last line of output is returned; all of them are shown."""
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True, **more)
    assert process.stdout is not None
    last = ""
    for last in process.stdout:
        print(last, end="", flush=True)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, line)
    return last


def train_ours(context: Context, given: Sequence[str], place: Path) -> float:
    """Trains by train.py; returns the seconds of the training."""
    call([sys.executable, "train.py", *given, "--output-dir", str(place), *(QUICK if context.quick else ())])
    seconds: float = json.loads((place / "metrics.json").read_text(encoding="utf-8"))["training_seconds"]
    return seconds


def train_stock(context: Context, given: Sequence[str], place: Path) -> float:
    """Trains by the Trainer as it is, and bundles the model; returns the seconds of the training."""
    model = place.with_name(f"{place.name}-model")
    quick = QUICK[:2] if context.quick else ()
    seconds = call([sys.executable, "-m", "benchmarks.quality_stock", *given, "--output-dir", str(model), *quick])
    known = [part for pair in pairwise(given) if pair[0] in _KNOWN for part in pair]
    call([sys.executable, "train.py", *known, "--base-model", str(model), "--output-dir", str(place)])
    return round(float(seconds), 1)


def build_int8(context: Context, given: Sequence[str], place: Path) -> None:
    """Builds an int8 archive of the bundle that was trained so, unpacks it, and scores it on the test split."""
    bundle, store = place.with_name(place.name.removesuffix(f"-{INT8}")), context.work / "store"
    options = ["--backend", "openvino", "--precision", "int8", "--force"]
    call(["./build_mar.sh", "--bundle", str(bundle), "--store", str(store), "--name", place.name, *options])
    with zipfile.ZipFile(store / f"{place.name}.mar") as file:
        file.extractall(place)
    options_, arguments = train.parse([*given, "--output-dir", str(place)])
    task = tasks.load(options_.task)
    splits = task.read(options_, arguments.seed, base_model.resolve(None))
    assert splits.test is not None
    examples = task.examples(splits.test, splits.labels)
    scores = evaluation.measure(Engine(place), task, examples, splits.labels)
    (place / "metrics.json").write_text(json.dumps({"splits": {"test": scores}}), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"benchmarks/quality: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
