"""Quality on real data: what models that train.py makes are worth on data they have not seen.

    benchmarks/quality            two seeds; writes benchmarks/quality-results.json
    benchmarks/quality --quick    one seed, one epoch, prints only: shows that it runs, not what it reaches

Reviews → SST-2: a model trained on examples/reviews is scored on SST-2's dev set (../shared/data/sst2), which is about
films only and was written by others. SST-2 has no neutral class, so the probability of `neutral` is left out and the
more probable of the other two is the prediction.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from handler.engine import Engine
from handler.errors import RequestError
from handler.messages import Request

ROOT = Path(__file__).resolve().parent.parent
REVIEWS = ROOT / "examples" / "reviews"
RESULTS = ROOT / "benchmarks" / "quality-results.json"
TARGET = 0.80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, nothing written")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder that holds sst2/")
    arguments = parser.parse_args()
    sst2 = arguments.data / "sst2" / "dev.csv"
    if not sst2.is_file():
        sys.exit(f"benchmarks/quality: {sst2} is missing; name the folder of the data sets with --data")

    rounds = []
    for seed in [42] if arguments.quick else [42, 43]:
        rounds.append(one_round(seed, 1 if arguments.quick else 4, sst2))
        print(json.dumps(rounds[-1]), flush=True)
    accuracy = statistics.mean(entry["sst2_dev_accuracy"] for entry in rounds)
    print(f"SST-2 dev accuracy, mean of {len(rounds)} seed(s): {accuracy:.4f} (target {TARGET})")
    if not arguments.quick:
        RESULTS.write_text(json.dumps(report(rounds), indent=2) + "\n", encoding="utf-8")
        print(f"written to {RESULTS.relative_to(ROOT)}")


def one_round(seed: int, epochs: int, sst2: Path) -> dict[str, Any]:
    """Trains one model through train.py and scores it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "reviews"
        command = [
            *("train.py", "--task", "text-classification", "--train-file", "examples/reviews/train.csv"),
            *("--validation-file", "examples/reviews/validation.csv", "--test-file", "examples/reviews/test.csv"),
            *("--seed", str(seed), "--num-train-epochs", str(epochs)),
        ]
        started = time.monotonic()
        subprocess.run([sys.executable, *command, "--output-dir", str(place)], cwd=ROOT, check=True)
        seconds = time.monotonic() - started
        metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
        return {
            "seed": seed,
            "epochs": epochs,
            "command": " ".join(["python", *command]),
            "seconds": round(seconds, 1),
            "reviews_test_accuracy": metrics["splits"]["test"]["accuracy"],
            "reviews_test_macro_f1": metrics["splits"]["test"]["macro_f1"],
            "majority_baseline_accuracy": majority(metrics["rows_per_label"]["test"]),
            "sst2_dev_accuracy": without_neutral(place, sst2),
        }


def majority(counts: dict[str, int]) -> float:
    """Accuracy of always answering the most frequent label."""
    return max(counts.values()) / sum(counts.values())


def without_neutral(bundle: Path, sst2: Path) -> float:
    """Accuracy of the more probable of negative and positive."""
    rows = pd.read_csv(sst2, keep_default_na=False)
    [outcome] = Engine(bundle).predict([Request(rows["text"].tolist(), many=True)])
    if isinstance(outcome, RequestError):
        raise outcome
    predictions: list[Any] = list(outcome.predictions)
    scores = [{entry["label"]: entry["score"] for entry in prediction} for prediction in predictions]
    found = ["positive" if entry["positive"] > entry["negative"] else "negative" for entry in scores]
    return float((pd.Series(found) == rows["label"]).mean())


def report(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The contents of quality-results.json. The first round has train.py's default seed."""
    what = "accuracy on SST-2 dev of a model trained on examples/reviews, neutral left out"
    values = {
        "reviews-to-sst2": (f"{what}; train.py's default seed", rounds[0]["sst2_dev_accuracy"]),
        "reviews-to-sst2-mean": (
            f"{what}; mean of the seeds",
            statistics.mean(entry["sst2_dev_accuracy"] for entry in rounds),
        ),
    }
    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate")
    return {
        "command": "benchmarks/quality",
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "system": platform.platform()},
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rounds": rounds,
        "targets": [
            {"id": name, "what": text, "value": round(value, 4), "target": TARGET, "met": value >= TARGET}
            for name, (text, value) in values.items()
        ],
    }


if __name__ == "__main__":
    main()
