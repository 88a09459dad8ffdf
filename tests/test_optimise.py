"""What an archive ships: the fastest candidate on this machine that keeps the golden set and the metric, in a table."""

import json
import os
import re
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from conftest import CPUS, Build, Exit
from conftest import build_here as build
from test_build import digest, lines, settings, write_lines

from archiver import gate, optimise, quantize, source, timing
from handler.digests import sha256
from handler.engine import Engine
from handler.messages import Request
from handler.tasks.feature_extraction import FeatureExtraction
from handler.tasks.question_answering import QuestionAnswering
from handler.tasks.sentence_similarity import SentenceSimilarity
from handler.tasks.text_classification import TextClassification
from handler.tasks.token_classification import TokenClassification
from training import defaults

INT8 = ("--backend", "openvino", "--precision", "int8")
FIVE = ["torch fp32", "torch bf16", "openvino fp32", "openvino bf16", "openvino int8"]
# A processor that emulates bf16 is not asked to.
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
ALL = [name for name in FIVE if BF16 or not name.endswith("bf16")]
OPENVINO = [name for name in ALL if name.startswith("openvino")]


def candidates(archive: Path) -> dict[str, Any]:
    """The table in an archive."""
    with zipfile.ZipFile(archive) as file:
        record: dict[str, Any] = json.loads(file.read("candidates.json"))
    return record


# --- The choice


@pytest.fixture(scope="module")
def chosen(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle after a build with `auto`, and its archive."""
    folder = tmp_path_factory.mktemp("chosen")
    bundle = Path(shutil.copytree(tiny_bundle, folder / "small", copy_function=os.link))
    build(bundle, folder / "store", "small", precision="auto")
    return bundle, folder / "store" / "small.mar"


def test_the_fastest_that_passes_is_shipped(chosen: tuple[Path, Path]) -> None:
    bundle, archive = chosen
    record = candidates(archive)
    assert record == json.loads((bundle / "candidates.json").read_text())
    rows = {f"{row['backend']} {row['precision']}": row for row in record["candidates"]}
    assert list(rows) == ALL
    [winner] = [row for row in rows.values() if row["verdict"] == "shipped"]
    made = settings(archive)
    assert (made["backend"], made["precision"]) == (winner["backend"], winner["precision"])
    timed = [row for row in rows.values() if row["throughput"] is not None]
    assert all(row["latency_ms"] > 0 for row in timed)
    assert winner["throughput"] >= (1 - timing.NOISE) * max(row["throughput"] for row in timed)
    assert rows["torch fp32"]["verdict"] in ("passed", "shipped")
    assert rows["openvino int8"]["size"] < rows["torch fp32"]["size"] / 3
    assert record["settings"].items() <= made.items()
    assert made["token_budget"] in (256, 512, 1024, 2048, 4096)
    assert made["golden_tolerance"] == gate.GOLDEN_TOLERANCE[winner["precision"]]


@pytest.mark.parametrize("native", [True, False])
def test_an_emulated_precision_is_no_candidate_unless_asked_for(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    for name in ("bf16", "bf16_on_cpu"):
        monkeypatch.setattr(defaults, name, lambda: (native, "a test says so"))

    def found(backend: str, precision: str) -> list[str]:
        return [str(candidate) for candidate in optimise._candidates(source.check(tiny_bundle), backend, precision)]

    assert found("auto", "auto") == [name for name in FIVE if native or not name.endswith("bf16")]
    assert found("auto", "bf16") == ["torch bf16", "openvino bf16"]
    assert found("openvino", "bf16") == ["openvino bf16"]


def section(bundle: Path) -> tuple[str, str]:
    """What the report says of candidates, and the rest of it."""
    page = (bundle / "report.html").read_text(encoding="utf-8")
    [found] = re.findall("<!-- candidates -->.*<!-- end of candidates -->", page, re.DOTALL)
    return found, page.replace(found, "")


def test_the_report_has_the_candidates(
    chosen: tuple[Path, Path], tiny_bundle: Path, small: Path, tmp_path: Path, build_main: Build
) -> None:
    """Those of the last build. A report that was changed or removed is left alone, and no archive depends on it."""
    before = (tiny_bundle / "report.html").read_bytes()
    shown, rest = section(chosen[0])
    for row in candidates(chosen[1])["candidates"]:
        assert f"{row['backend']} {row['precision']}</th>" in shown
    assert shown.count("<strong>shipped</strong>") == 1
    assert f"{CPUS} CPUs, torch " in shown
    build_main(small, store=tmp_path / "store")
    assert "torch fp32</th>" in section(small)[0]
    assert "It was the only one, so nothing was timed" in section(small)[0]
    assert section(small)[1] == rest
    assert (tiny_bundle / "report.html").read_bytes() == before
    for content in ("<p>mine</p>\r\n", None):
        (small / "report.html").unlink()
        if content is not None:
            (small / "report.html").write_bytes(content.encode())
        build_main(small, store=tmp_path / "other")
        assert sha256(tmp_path / "other" / "small.mar") == sha256(tmp_path / "store" / "small.mar")
        assert (small / "report.html").exists() == (content is not None)
        assert content is None or (small / "report.html").read_bytes() == content.encode()


def test_what_was_measured_is_used_again(chosen: tuple[Path, Path], tmp_path: Path, build_main: Build) -> None:
    bundle, archive = chosen
    printed = build_main(bundle, "--name", "small")
    assert "measured before (remove" in printed
    assert printed.count("converting") == 1
    assert digest(tmp_path / "store" / "small.mar") == digest(archive)


def test_other_conditions_are_measured_anew(
    chosen: tuple[Path, Path],
    tmp_path: Path,
    build_main: Build,
) -> None:
    bundle = Path(shutil.copytree(chosen[0], tmp_path / "small"))
    printed = build_main(bundle, "--backend", "openvino")
    assert [line.split(":")[0] for line in printed.splitlines() if "converting" in line] == OPENVINO
    row = candidates(tmp_path / "store" / "small.mar")
    assert [f"{entry['backend']} {entry['precision']}" for entry in row["candidates"]] == OPENVINO
    (bundle / "candidates.json").write_text("nonsense")
    assert "measured before" not in build_main(bundle, "--backend", "openvino", "--force")


def test_a_bundle_that_cannot_be_written_to(small: Path, build_main: Build) -> None:
    (small / "candidates.json").mkdir()
    printed = build_main(small, "--precision", "fp32", "--backend", "auto")
    assert "cannot be written to" in printed
    assert "shipped" in printed


def test_one_candidate_is_not_timed(small: Path, tmp_path: Path, build_main: Build) -> None:
    printed = build_main(small, *INT8)
    assert "timing" not in printed
    assert not (small / "candidates.json").exists()
    with zipfile.ZipFile(tmp_path / "store" / "small.mar") as file:
        assert "candidates.json" not in file.namelist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backend", "torch", "--precision", "int8"), "torch has no such precision; there are fp32, bf16, fp16"),
        (
            ("--backend", "openvino", "--precision", "fp16"),
            "openvino has no such precision; there are fp32, bf16, int8",
        ),
    ],
)
def test_a_precision_that_the_backend_has_not(
    small: Path,
    build_main: Build,
    options: tuple[str, ...],
    words: str,
) -> None:
    with pytest.raises(Exit, match=f"--precision .*: {words}"):
        build_main(small, *options)


# --- int8


def test_int8_is_the_same_bytes_twice_and_answers_alike(
    small: Path,
    tmp_path: Path,
    build_main: Build,
) -> None:
    for folder in ("one", "two"):
        printed = build_main(small, *INT8, store=tmp_path / folder)
        assert "calibrated on" in printed
    archive = tmp_path / "one" / "small.mar"
    assert digest(archive) == digest(tmp_path / "two" / "small.mar")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "unpacked")
    text = [row["inputs"] for row in lines(small / "validation.jsonl")]
    [before], [after] = (
        Engine(folder).predict([Request(text, many=True)]) for folder in (small, tmp_path / "unpacked")
    )
    assert [entry[0]["label"] for entry in before.predictions] == [entry[0]["label"] for entry in after.predictions]


def test_int8_that_fails_the_gate_is_refused_unless_forced(
    small: Path,
    tmp_path: Path,
    build_main: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(gate.GOLDEN_TOLERANCE, "int8", 0.0)
    with pytest.raises(Exit, match=r"openvino int8 did not pass the quality gate.*--force"):
        build_main(small, *INT8)
    assert list((tmp_path / "store").iterdir()) == []
    assert "warning: built because of --force" in build_main(small, *INT8, "--force")
    printed = build_main(small, "--backend", "openvino", "--force")
    assert "openvino int8 does not pass: golden example" in printed
    assert settings(tmp_path / "store" / "small.mar")["precision"] != "int8"


def test_fp32_ships_where_nothing_else_passes(
    small: Path, tmp_path: Path, build_main: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(bundle: Any, engine: Engine, max_drop: float) -> gate.Verdict:
        verdict = check(bundle, engine, max_drop)
        as_it_was = (engine.settings.backend, engine.settings.precision) == ("torch", "fp32")
        return verdict if as_it_was else replace(verdict, reason="it answers otherwise")

    check = gate.check
    monkeypatch.setattr(gate, "check", spoilt)
    printed = build_main(small, "--precision", "auto")
    assert printed.count("does not pass: it answers otherwise") == len(ALL) - 1
    made = settings(tmp_path / "store" / "small.mar")
    assert (made["backend"], made["precision"]) == ("torch", "fp32")
    verdicts = [row["verdict"] for row in candidates(tmp_path / "store" / "small.mar")["candidates"]]
    assert verdicts == ["shipped", *["it answers otherwise"] * (len(ALL) - 1)]


def test_an_answer_that_int8_changes_is_no_pass(
    small: Path,
    build_main: Build,
) -> None:
    """A golden example of which fp32 was sure and that int8 answers otherwise, though the tolerance allows it."""
    rows = lines(small / "golden.jsonl")
    first = rows[0]["predictions"]
    rows[0]["predictions"] = [
        {"label": first[1]["label"], "score": 0.6},
        {"label": first[0]["label"], "score": 0.4},
    ]
    write_lines(small / "golden.jsonl", rows)
    with pytest.raises(Exit, match="golden example 1 of"):
        build_main(small, *INT8)


def test_layers_go_back_to_floating_point_where_int8_loses_too_much(
    small: Path,
    tmp_path: Path,
    build_main: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain quantization is made to fail; accuracy control is NNCF's own."""

    def spoilt(model: openvino.Model, batches: Any) -> openvino.Model:
        found = quantized(model, batches)
        [result] = found.get_results()
        source = result.input(0).get_source_output()
        flipped = openvino.opset13.multiply(source, openvino.opset13.constant(np.array(-1.0, dtype=np.float32)))
        flipped.output(0).get_tensor().set_names({"logits"})
        source.get_tensor().set_names(set())
        return openvino.Model([flipped.output(0)], found.get_parameters())

    quantized = quantize.quantize
    monkeypatch.setattr(quantize, "quantize", spoilt)
    printed = build_main(small, *INT8)
    assert "trying with layers in floating point" in printed
    assert settings(tmp_path / "store" / "small.mar")["precision"] == "int8"


@pytest.mark.parametrize("rows", [1, 5])
def test_a_small_calibration_set_of_one_class(small: Path, build_main: Build, rows: int) -> None:
    chosen = [{"inputs": row["inputs"]} for row in lines(small / "validation.jsonl") if row["target"] == "negative"]
    write_lines(small / "calibration.jsonl", chosen[:rows])
    assert f"(calibrated on {rows} inputs)" in build_main(small, *INT8, "--force")


def test_a_bundle_without_calibration_or_validation(small: Path, build_main: Build) -> None:
    """The validation set stands in for training inputs, and the golden set for both."""
    (small / "calibration.jsonl").unlink()
    count = len(lines(small / "validation.jsonl"))
    assert f"(calibrated on {count} inputs)" in build_main(small, *INT8)
    write_lines(small / "validation.jsonl", [])
    metrics = json.loads((small / "metrics.json").read_text())
    metrics["splits"] = {}
    (small / "metrics.json").unlink()
    (small / "metrics.json").write_text(json.dumps(metrics))
    assert "no validation set, largest golden drift" in build_main(small, *INT8, "--force")


# --- Without OpenVINO


def test_openvino_missing(small: Path, tmp_path: Path, build_main: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("openvino", "nncf")]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("handler.backends.openvino", "archiver.quantize"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    printed = build_main(small, "--name", "small")
    assert "openvino fp32: import of openvino halted" in printed
    assert settings(tmp_path / "store" / "small.mar")["backend"] == "torch"


def test_a_model_that_openvino_cannot_convert(
    small: Path,
    tmp_path: Path,
    build_main: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(openvino, "convert_model", fail)
    printed = build_main(small, "--precision", "fp32", "--backend", "auto")
    assert "openvino fp32: OpenVINO cannot convert this model (no such operation)" in printed
    assert settings(tmp_path / "store" / "small.mar")["backend"] == "torch"
    with pytest.raises(Exit, match="OpenVINO cannot convert this model"):
        build_main(small, *INT8)


# --- What counts as the same answer


def ranked(**scores: float) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in scores.items()]


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        (ranked(a=0.9, b=0.1), ranked(a=0.6, b=0.4), True),
        (ranked(a=0.9, b=0.1), ranked(b=0.6, a=0.4), False),
        (ranked(a=0.52, b=0.48), ranked(b=0.6, a=0.4), True),  # a tie
        (ranked(a=0.5, b=0.45, c=0.05), ranked(c=0.5, a=0.3, b=0.2), False),
        (ranked(a=0.9), ranked(z=0.9), True),  # below the list there may be anything
        (ranked(), ranked(), True),
        (ranked(a=0.9), ranked(), False),
        ([ranked(a=0.9, b=0.1), ranked(c=0.9, d=0.1)], [ranked(a=0.9, b=0.1), ranked(d=0.9, c=0.1)], False),
        ([ranked(a=0.9, b=0.1)], [ranked(a=0.9, b=0.1), ranked(a=0.9, b=0.1)], False),
    ],
)
def test_ranked_answers(expected: Any, found: Any, same: bool) -> None:
    assert TextClassification.agrees(expected, found) is same


def test_answers_of_other_tasks() -> None:
    answer = {"answer": "Berlin", "score": 0.8, "start": 3, "end": 9}
    assert QuestionAnswering.agrees(answer, {**answer, "score": 0.2})
    assert QuestionAnswering.agrees([answer], [answer])
    entity = {"entity": "B-PER", "score": 0.9, "index": 1, "start": 0, "end": 3}
    assert TokenClassification.agrees([entity], [{**entity, "score": 0.5}])
    assert not TokenClassification.agrees([entity], [{**entity, "entity": "B-LOC", "score": 0.9}])
    assert not TokenClassification.agrees([entity], [{**entity, "start": 1}])
    assert not TokenClassification.agrees([entity], [])
    assert TokenClassification.agrees([{**entity, "score": 0.5}], [{**entity, "entity": "B-LOC", "score": 0.5}])
    many, changed = [{**entity, "index": index} for index in range(200)], {**entity, "entity": "B-LOC", "score": 0.9}
    assert TokenClassification.agrees(many, [changed, changed, *many[2:]])
    assert not TokenClassification.agrees(many, [changed, changed, changed, *many[3:]])
    assert FeatureExtraction.agrees([1.0, 0.0], [0.99, 0.05])
    assert not FeatureExtraction.agrees([1.0, 0.0], [0.0, 1.0])
    assert not FeatureExtraction.agrees([[1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]])
    assert SentenceSimilarity.agrees([0.5, 0.1], [0.55, 0.05])
    assert not SentenceSimilarity.agrees([0.5, 0.1], [0.7, 0.1])
