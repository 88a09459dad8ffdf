"""The docs name what there is: every task, every parameter, every file of tests."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import requests
from conftest import OFFLINE, ROOT, free_ports
from transformers import AutoModelForSequenceClassification

from benchmarks import quality
from handler import tasks
from handler.engine import Engine
from handler.messages import Request, Result
from handler.parameters import CommonParameters
from scripts import generate_reference
from training.tasks import REGISTRY as TRAINED

TEXT = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
ROWS = {match[1]: match[0] for match in re.finditer(r"^\| \[([a-z-]+)\]\(#[a-z-]+\) .*$", TEXT, re.MULTILINE)}


def test_every_task_has_a_row_and_no_other_has() -> None:
    assert ROWS.keys() == tasks.REGISTRY.keys() == TRAINED.keys()


@pytest.mark.parametrize("name", sorted(tasks.REGISTRY))
def test_a_row_is_backed_by_tests_and_a_section(name: str) -> None:
    [file] = re.findall(r"`(tests/test_\w+\.py)`", ROWS[name])
    assert (ROOT / file).is_file()
    [anchor] = re.findall(r"\(#([a-z-]+)\)", ROWS[name])
    sections = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", TEXT, re.MULTILINE)}
    assert anchor in sections


@pytest.mark.parametrize("name", sorted(tasks.REGISTRY))
def test_every_parameter_is_named(name: str) -> None:
    own = {field.name for field in fields(tasks.load(name).Parameters)} - {
        field.name for field in fields(CommonParameters)
    }
    assert [parameter for parameter in sorted(own) if f"`{parameter}`" not in TEXT] == []


def test_the_reference_is_what_the_code_says() -> None:
    assert generate_reference.DOCUMENT.read_text(encoding="utf-8") == generate_reference.render(), (
        "run .venv/bin/python -m scripts.generate_reference"
    )


def test_drawings(bundle: Path, tmp_path: Path) -> None:
    """Each program of docs/drawing.md, as it stands there."""
    text = (ROOT / "docs" / "drawing.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(programs) == 3
    for program in programs:
        command = [sys.executable, "-c", program, str(bundle), "The room was cold."]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, **OFFLINE, "MPLBACKEND": "svg"}, check=True)
    for name in ("attention.svg", "positions.svg"):
        assert (tmp_path / name).read_text(encoding="utf-8").count("<image") >= 1
    graph = (tmp_path / "step.dot").read_text(encoding="utf-8")
    names = set(re.findall(r'label="([\w.]+)", shape=box', graph))
    parameters = {name for name, _ in AutoModelForSequenceClassification.from_pretrained(bundle).named_parameters()}
    assert names == parameters
    assert "NllLossBackward" in graph


def test_the_engine_without_torchserve(bundle: Path, tmp_path: Path) -> None:
    """The server of docs/migrate.md, as it stands there, answers as the engine does."""
    text = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    [program] = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    [port] = free_ports(1)
    command = [sys.executable, "-c", program, str(bundle), str(port)]
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)}
    url, body = f"http://127.0.0.1:{port}/", {"inputs": "The room was cold."}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    answer = requests.post(url, json=body, timeout=60)
                    break
                except requests.ConnectionError:
                    assert server.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            [expected] = Engine(bundle).predict([Request([body["inputs"]])])
            assert isinstance(expected, Result)
            assert answer.json() == [
                [{"label": entry["label"], "score": pytest.approx(entry["score"])} for entry in expected.predictions[0]]
            ]
            refused = requests.post(url, json={"inputs": 7}, timeout=60)
            assert (refused.status_code, refused.json()["type"]) == (422, "InvalidInput")
        finally:
            server.kill()


def test_the_figures_of_quality_are_those_of_its_results() -> None:
    results = json.loads(quality.RESULTS.read_text(encoding="utf-8"))
    assert quality.table_in(quality.DOCS.read_text(encoding="utf-8")) == quality.table(results["rounds"])
    experiments = [experiment.name for experiment in quality.EXPERIMENTS]
    assert [entry["name"] for entry in results["rounds"]] == experiments
    assert [(entry["id"], entry["value"]) for entry in results["targets"]] == [
        (entry["name"], entry["value"]) for entry in results["rounds"]
    ]
