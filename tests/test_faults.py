"""benchmarks/faults: its committed results, and quick runs of rows that end within seconds."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import run

from benchmarks.fault_injection.__main__ import DOCUMENT, RESULTS, ROWS, document
from benchmarks.fault_injection.bench import MODEL
from benchmarks.fault_injection.soak import second_half_growth


def test_the_page_has_the_results_that_are_committed() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert document(json.loads(RESULTS.read_text(encoding="utf-8")), text) == text
    rows = {line.split("|")[1].strip() for line in text.partition("<!--")[0].splitlines() if line.startswith("| ")}
    assert rows - {"row"} == set(ROWS)


def test_growth_is_that_of_the_second_half() -> None:
    assert second_half_growth([0, 900, 10, 10, 10, 10]) == 0
    assert second_half_growth([0, 0, 0, 10, 20, 30]) == 10


@pytest.mark.parametrize(("row", "counted"), [("3", {"3b"}), ("12", {"12a", "12b"})])
def test_a_quick_run(store: Path, tmp_path: Path, row: str, counted: set[str]) -> None:
    """On the archive that all tests share. Times depend on the machine, so only what is counted must be met."""
    (tmp_path / "store").mkdir()
    for path in store.glob(f"{MODEL}.*"):
        shutil.copy(path, tmp_path / "store")
    output = tmp_path / "results.json"
    command = (sys.executable, "-m", "benchmarks.fault_injection", "--quick", "--only", row)
    done = run(*command, "--work", tmp_path, "--output", output)
    targets = {target["id"]: target for target in json.loads(output.read_text(encoding="utf-8"))["targets"]}
    assert done.returncode == (0 if all(target["met"] for target in targets.values()) else 1), done.stderr
    assert {name for name in counted if targets[name]["met"]} == counted, targets
    assert done.stdout.count("\n") == len(targets)
