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
from conftest import OFFLINE, ROOT, Served, free_ports, run, succeeded
from transformers import AutoModelForSequenceClassification

from benchmarks import quality_report
from benchmarks.page import rewritten
from benchmarks.quality_experiments import EXPERIMENTS
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


def test_links_lead_somewhere() -> None:
    """Files and headings that pages of this project name."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "client").glob("*.md")]
    pages += [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("**/*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            if "://" in link or link.startswith("mailto:"):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page.name}: {link}"


# Commands that tests/test_transcripts.py does not run as they stand: which test, or what else, runs the like of them.
ELSEWHERE = {
    r"scripts/demo": "tests/test_transcripts.py::test_demo_and_deployment",
    r"scripts/(setup|test)\b": ".ci/run",
    r"scripts/check|\.venv/bin/pre-commit install": ".pre-commit-config.yaml",
    r"pip install \./client": "scripts/setup-console",
    r"marble predict \w+ --input": "tests/test_bulk.py",
    r"marble (predict|explain|ready|models)": "tests/test_client.py",
    r"(CURL_CA_BUNDLE=\S+ )?scripts/console": "tests/test_console.py",
    r"benchmarks/bulk": "tests/test_bulk.py",
    r"scripts/setup-ray|unzip |(time )?\.venv-ray/bin/python examples/bulk": "tests/test_ray.py",
    r"benchmarks/explanations": "tests/test_bench.py",
    r"benchmarks/faults": "tests/test_faults.py",
    r"benchmarks/quality": "tests/test_bench.py",
    r"scripts/bench": "tests/test_bench.py",
    r"apt-get install": ".ci/run",
    r"scripts/(serve|stop|token|upgrade|rollback)|curl |export |openssl |\./build_mar\.sh": (
        "tests/test_transcripts.py::test_demo_and_deployment"
    ),
    r"kill -HUP": "tests/test_front.py",
    r"\.venv/bin/model_signing verify": "tests/test_provenance.py",
    r"cd deploy/monitoring && prometheus": "tests/test_monitoring.py::url",
    r"\.venv/bin/python -m training\.compare": "tests/test_transcripts.py::test_page",
    r"\.venv/bin/python train\.py": "tests/test_transcripts.py::test_page",
    r"cd deploy/kubernetes|kustomize|kubectl": "tests/test_kubernetes.py",
    r"podman": "tests/test_container.py",
    r"useradd|install -d|cp deploy/systemd|cd /var/lib": "tests/test_systemd.py",
}


def test_every_other_command_is_run_somewhere() -> None:
    """Commands in fences without a language; test_kubernetes, test_container and test_systemd check theirs without
    running them, where there is no cluster, no container engine and no systemd in charge."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "client" / "README.md"]
    pages += [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("**/*.md")]
    used = set()
    for page in pages:
        if page == generate_reference.DOCUMENT or page.name == "architecture.md":
            continue
        fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        for fence in (body for language, body in fences if language in ("", "sh")):
            for command in fence.replace("\\\n", " ").splitlines():
                found = [pattern for pattern in ELSEWHERE if re.match(pattern, command)]
                assert found, f"{page.name}: {command}"
                used.update(found[:1])
    assert used == ELSEWHERE.keys()
    for place in ELSEWHERE.values():
        file, _, test = place.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8") or not test, place


def test_programs_of_the_client(served: Served) -> None:
    """Those of the pages about calling, as they stand there but for the server's address; the tokens are found."""
    count = 0
    for page in ("client/README.md", "docs/bulk.md", "docs/monitoring.md", "docs/requests.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for program in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            program = program.replace("http://127.0.0.1:8080", served.url)
            program = program.replace("RestClient(", f'RestClient("{served.url}", "{served.management}", ')
            done = run(sys.executable, "-c", program, cwd=served.folder, HF_HUB_OFFLINE="0")
            assert succeeded(done)
            count += 1
    assert count == 5


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
    results = json.loads(quality_report.RESULTS.read_text(encoding="utf-8"))
    marks, page = (quality_report.BEGIN, quality_report.END), quality_report.DOCS.read_text(encoding="utf-8")
    assert rewritten(quality_report.DOCS, page, marks, quality_report.table(results["rounds"])) == page
    assert results["targets"] == quality_report.targets(results["rounds"])
    rounds = [quality_report.key(entry) for entry in results["rounds"]]
    wanted = [
        quality_report.Round(experiment.name, seed, way)
        for experiment in EXPERIMENTS
        for seed in experiment.seeds
        for way in quality_report.ways(experiment, seed)
    ]
    assert rounds == [round_ for round_ in wanted if round_ in rounds]
    assert {experiment.name for experiment in EXPERIMENTS} == {
        round_.name for round_ in rounds if round_.way == quality_report.OURS
    }
