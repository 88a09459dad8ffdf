"""benchmarks/quality: a quick run of all three ways, and what is made of its results."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from benchmarks import quality, quality_report
from benchmarks.quality_data import Context
from benchmarks.quality_experiments import EXPERIMENTS
from benchmarks.quality_report import INT8, OURS, TRAINER

SST2 = next(experiment for experiment in EXPERIMENTS if experiment.name == "sst2")
ACCURACY, CALIBRATION = (figure.name for figure in SST2.figures)


def entry(
    seed: int, way: str, accuracy: float, seconds: float | None = None, command: str = "", processor: str = "one"
) -> dict[str, Any]:
    figures = {ACCURACY: accuracy, CALIBRATION: 0.05}
    found = {"name": "sst2", "seed": seed, "way": way, "command": command, "training_seconds": seconds}
    machine = {"processor": processor, "cpus": 2, "system": f"of {way}"}
    return {**found, "machine": machine, "figures": figures, **({"baseline": 0.5} if way == OURS else {})}


ENTRIES = [
    entry(42, OURS, 0.91, 100.0),
    entry(42, TRAINER, 0.88, 400.0),
    entry(42, INT8, 0.90),
    entry(43, OURS, 0.90, 100.0),
    entry(43, TRAINER, 0.87, 350.0),
]


def test_a_quick_run_trains_both_ways_and_builds_an_archive(shared: Path, tmp_path: Path) -> None:
    """On a few rows of WNUT 2017. Nothing in the repository is written."""
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    (tmp_path / "data" / "wnut17").mkdir()
    for name in ("train", "dev", "test"):
        lines = (shared / "wnut17" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:60]
        (tmp_path / "data" / "wnut17" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    before = quality_report.RESULTS.read_bytes()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.quality", "--quick", "--only", "wnut17"),
            *("--data", str(tmp_path / "data"), "--work", str(tmp_path / "work")),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(round_["name"], round_["way"]) for round_ in found] == [
        ("wnut17", OURS),
        ("wnut17", TRAINER),
        ("wnut17", INT8),
    ]
    assert all(0 <= round_["figures"]["entity F1"] <= 1 for round_ in found)
    assert [round_["training_seconds"] is None for round_ in found] == [False, False, True]
    assert (tmp_path / "work" / "wnut17-int8" / "MAR-INF").is_dir()
    assert quality_report.RESULTS.read_bytes() == before


def test_targets_are_means_over_the_seeds() -> None:
    found = {target["id"]: target for target in quality_report.targets(ENTRIES)}
    assert (found[f"sst2: {ACCURACY}"]["value"], found[f"sst2: {ACCURACY}"]["met"]) == (0.905, True)
    assert (found[f"sst2: {CALIBRATION}"]["value"], found[f"sst2: {CALIBRATION}"]["met"]) == (0.05, False)
    int8 = found[f"sst2: {ACCURACY}, int8"]
    assert (int8["value"], int8["target"], int8["met"]) == (0.01, 0.005, False)
    assert f"sst2: {CALIBRATION}, int8" not in found


def test_the_table_has_the_spread_and_the_ratio_of_each_seed() -> None:
    first, second = quality_report.table(ENTRIES).splitlines()[2:]
    assert "| **0.905 (0.900 to 0.910)** | 0.900 | 0.875 (0.870 to 0.880) | 0.900 | majority class | 0.500 |" in first
    assert first.endswith("| 4.0, 3.5 |")
    elsewhere = [*ENTRIES[:-1], entry(43, TRAINER, 0.87, 350.0, processor="another")]
    assert quality_report.table(elsewhere).splitlines()[2].endswith("| 4.0 |")
    assert second.startswith(f"|  | {CALIBRATION} | **0.050 (0.050 to 0.050)** | at most 0.030 (missed) |")


@pytest.mark.parametrize("kept", [True, False], ids=["same command", "another"])
def test_what_is_missing_goes_by_the_command(kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(tmp_path / "data", tmp_path / "work", quick=False)
    command = quality.command(SST2, 42, OURS, context)
    assert command.startswith("python train.py --task text-classification --train-file DATA/sst2/train.csv")
    results = tmp_path / "results.json"
    rounds = [entry(42, OURS, 0.9, command=command if kept else f"{command} --learning-rate 1")]
    results.write_text(json.dumps({"rounds": rounds}), encoding="utf-8")
    monkeypatch.setattr(quality_report, "RESULTS", results)
    assert quality.done(SST2, 42, OURS, context) is kept
    assert not quality.done(SST2, 43, OURS, context)
