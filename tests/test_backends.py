"""Backends: micro-batches come back in order whatever runs at the same time; a device that is missing is named.

The tests marked `gpu` need a CUDA GPU and are the only ones that do; what they compare is compared on the CPU as well.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_models
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from handler.backends.openvino import OpenVinoBackend
from handler.backends.torch import device, load_model
from handler.engine import Engine
from handler.messages import Request
from handler.settings import Settings

TEXTS = ["a fine film", "no", "the parcel arrived on tuesday and the box was open " * 3, "yes " * 20, "why not?"] * 8
HAS_GPU = torch.cuda.is_available()
gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("backends") / "bert"
    labels = text_models.labelled("negative", "positive")
    return text_models.write(
        place, "bert", AutoModelForSequenceClassification, "text-classification", TEXTS[:5], **labels
    )


@pytest.fixture(scope="module")
def openvino_folder(folder: Path) -> Path:
    return text_models.converted(folder)


def scores(engine: Engine) -> list[dict[str, float]]:
    """Scores by label of all texts, asked in one request."""
    predictions = text_models.answers(engine, TEXTS)
    return [{entry["label"]: entry["score"] for entry in entries} for entries in predictions]


# --- OpenVINO


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("token_budget", [8, 64, 4096])
def test_streams_change_no_answer(folder: Path, openvino_folder: Path, streams: int, token_budget: int) -> None:
    found = scores(Engine(openvino_folder, threads=3, streams=streams, token_budget=token_budget))
    for one, other in zip(scores(Engine(folder)), found, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def arrays(length: int, rows: int = 1) -> dict[str, Any]:
    """A batch whose texts are one token over and over: the logits tell the lengths apart."""
    shape = (rows, length)
    return {
        "input_ids": np.full(shape, 7, dtype=np.int64),
        "attention_mask": np.ones(shape, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
        "not_an_input": np.zeros(1),
    }


def test_results_come_in_the_order_of_the_batches(openvino_folder: Path) -> None:
    backend = OpenVinoBackend.load(openvino_folder, Settings(task="x", threads=2), ["logits"])
    lengths = [64, 1, 2, 60, 3, 4, 5, 6, 7, 8, 50]
    alone = [next(iter(backend.run([arrays(length)])))["logits"] for length in lengths]
    assert len({tuple(logits[0]) for logits in alone}) == len(lengths)
    together = list(backend.run(arrays(length) for length in lengths))
    assert len(together) == len(lengths)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one, other["logits"], atol=1e-5)
    assert list(backend.run([])) == []


def test_the_next_batch_is_taken_while_one_is_computed(openvino_folder: Path) -> None:
    backend = OpenVinoBackend.load(openvino_folder, Settings(task="x", threads=2), ["logits"])
    taken: list[int] = []

    def batches() -> Iterator[dict[str, Any]]:
        for number in range(12):
            taken.append(number)
            yield arrays(8)

    results = backend.run(batches())
    next(results)
    assert len(taken) > backend.streams
    assert len(list(results)) == 11


def test_a_run_that_is_given_up_leaves_the_backend_usable(openvino_folder: Path) -> None:
    backend = OpenVinoBackend.load(openvino_folder, Settings(task="x", threads=2), ["logits"])

    def broken() -> Iterator[dict[str, Any]]:
        for _ in range(3):
            yield arrays(64, rows=8)
        raise RuntimeError("no more")

    for _ in range(5):
        with pytest.raises(RuntimeError, match="no more"):
            list(backend.run(broken()))
        given_up = backend.run(arrays(64, rows=8) for _ in range(9))
        next(given_up)
        del given_up
    assert len(list(backend.run(arrays(8) for _ in range(9)))) == 9


# --- torch


def test_the_device() -> None:
    assert device("cpu").type == "cpu"
    assert device("auto").type == ("cuda" if HAS_GPU else "cpu")
    with pytest.raises(ValueError, match="device 'tpu' is not one of auto, cpu, cuda"):
        device("tpu")


def test_a_missing_gpu_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device cuda: torch .* finds no GPU; check the driver .* or set the device"):
        Engine(folder, device="cuda")
    assert scores(Engine(folder, device="auto")) == scores(Engine(folder, device="cpu"))


def test_half_precision_needs_a_gpu(folder: Path) -> None:
    with pytest.raises(ValueError, match="precision fp16 needs a GPU"):
        Engine(folder, device="cpu", precision="fp16")


def test_a_compiled_model_gives_the_same_scores(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile with shapes of all kinds, but for the minute that its C++ compiler would take."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for one, other in zip(scores(Engine(folder)), scores(Engine(folder, compile=True)), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05), ("fp16", 0.02)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_the_scores_of_the_cpu(folder: Path, precision: str, tolerance: float, compiled: bool) -> None:
    found = scores(Engine(folder, device="cuda", precision=precision, compile=compiled))
    for one, other in zip(scores(Engine(folder, device="cpu")), found, strict=True):
        assert one == pytest.approx(other, abs=tolerance)


@gpu
def test_a_gpu_writes_the_text_of_the_cpu(tmp_path: Path) -> None:
    place = text_models.write(tmp_path / "gpt2", "gpt2", AutoModelForCausalLM, "text-generation", TEXTS[:5])
    asked = [
        Request([TEXTS[0]], {"max_new_tokens": 8, "do_sample": False}),
        Request([TEXTS[0]], {"max_new_tokens": 8, "do_sample": True, "seed": 3}),
    ]
    found = [Engine(place, device=name).predict(asked) for name in ("cpu", "cuda")]
    assert [entry.predictions for entry in found[0]] == [entry.predictions for entry in found[1]]  # type: ignore[union-attr]


@gpu
def test_a_model_on_a_gpu(folder: Path) -> None:
    assert load_model(folder, Settings(task="x"), "AutoModelForSequenceClassification").device.type == "cuda"
