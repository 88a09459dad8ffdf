"""Training that takes int8 into account, through train.py: what is computed, what is saved, and what the bundle is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import NO_CHECKPOINTS, train_here
from safetensors.numpy import load_file
from scratch_models import write
from test_lora import EACH_EPOCH, inputs_of, scores, train
from test_train import TINY, write_csv

from archiver.convert import Converter
from archiver.source import check
from handler import golden
from handler.backends.openvino import MODEL_FILE
from handler.engine import Engine
from training import quantization, scratch
from training.errors import UserError
from training.options import Options

AWARE = ("--quantization-aware", "true")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("aware") / "base", "bert", transformers.AutoModel, "feature-extraction")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "data.csv", ("negative", "positive"))


class Body(torch.nn.Module):
    """A layer with a number in its name, as a block's."""

    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        layer = torch.nn.Linear(len(weight[0]), len(weight), bias=False)
        layer.weight = torch.nn.Parameter(torch.tensor(weight))
        self.layers = torch.nn.ModuleList([layer])

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.layers[0](values)


def test_what_a_layer_computes() -> None:
    """Weights have a scale for each output, inputs one range, with a zero that is exact."""
    body = Body([[1.27, 0.014, 0.006], [0.0, -12.7, 0.1]])
    quantization.add(body, "text-classification")
    # From -1 to 1.55 in steps of 0.01.
    values = torch.tensor([[1.55, 0.0, -1.0], [0.503, 0.006, -0.004]], requires_grad=True)
    found = body(values)
    rounded = torch.tensor([[1.55, 0.0, -1.0], [0.50, 0.01, 0.0]])
    weights = torch.tensor([[1.27, 0.01, 0.01], [0.0, -12.7, 0.1]])
    torch.testing.assert_close(found, rounded @ weights.T)
    found.sum().backward()
    torch.testing.assert_close(values.grad, weights.sum(dim=0).expand(2, 3))
    torch.testing.assert_close(body.layers[0].weight.grad, rounded.sum(dim=0).expand(2, 3))


def test_the_range_moves_in_training_alone() -> None:
    body = Body([[1.0]])
    quantization.add(body, "fill-mask")
    layer = body.layers[0]
    body(torch.tensor([[-1.0], [3.0]]))
    assert layer.input_range.tolist() == [-1.0, 3.0]
    body(torch.tensor([[5.0], [2.0]]))
    assert layer.input_range.tolist() == pytest.approx([-0.99, 3.02]), "0 is always in it"
    body.eval()
    far = torch.tensor([[100.0]], requires_grad=True)
    found = body(far)
    assert found.item() == pytest.approx(3.02, abs=0.02)
    found.backward()
    assert layer.input_range.tolist() == pytest.approx([-0.99, 3.02])
    assert far.grad.item() == 0, "no gradient beyond the range"
    assert body(torch.zeros(1, 1)).item() == 0


def test_zeros_are_no_trouble() -> None:
    body = Body([[0.0, 0.0]])
    quantization.add(body, "fill-mask")
    assert body(torch.zeros(3, 2)).tolist() == [[0.0]] * 3
    assert body.eval()(torch.zeros(3, 2)).tolist() == [[0.0]] * 3


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("bert", "TokenClassification", {"num_labels": 3}),
    "roberta": ("roberta", "SequenceClassification", {"num_labels": 3}),
    "distilbert": ("distilbert", "QuestionAnswering", {}),
    "deberta": ("deberta-v2", "SequenceClassification", {"num_labels": 3}),
    "masked": ("bert", "MaskedLM", {}),
    "modernbert": (
        "modernbert hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64 vocab_size=300",
        "SequenceClassification",
        {"num_labels": 3, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_every_kind_of_model(kind: str, bf16: bool) -> None:
    """All learn, answer nearly as before, and are as they were in the end."""
    model_type, head, changes = MODELS[kind]
    transformers.set_seed(0)
    config = scratch.build_config(scratch.parse_spec(model_type), **changes)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    inputs = inputs_of(model_type, config)
    before, keys = scores(model, inputs), model.state_dict().keys()
    quantization.add(model, "text-classification")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = model(**inputs)
        aware = next(value for name, value in found.items() if "logits" in name)
        aware.float().square().sum().backward()
    assert not torch.equal(aware.detach().float(), before)
    torch.testing.assert_close(aware.detach().float(), before, atol=0.05 + 0.2 * float(before.std()), rtol=0.1)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(layer.weight.grad is not None and layer.weight.grad.isfinite().all() for layer in linear)
    assert model.state_dict().keys() - keys == {name for name in model.state_dict() if name.endswith(".input_range")}
    assert keys <= model.state_dict().keys()
    quantization.remove(model)
    assert model.state_dict().keys() == keys
    assert torch.equal(scores(model, inputs), before)


def test_the_bundle_is_an_ordinary_model(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the best epoch, chosen as it answers in int8; and build_mar.sh makes int8 of it."""
    wrong, place = write_csv(tmp_path / "wrong.csv", ("positive", "negative")), tmp_path / "bundle"
    seen: dict[str, Any] = {}
    remove = quantization.remove

    def look(model: Any) -> None:
        checkpoints = sorted(tmp_path.glob("bundle.checkpoints/*"), key=lambda path: int(path.name.split("-")[1]))
        seen["saved"] = [load_file(path / "model.safetensors") for path in checkpoints]
        seen["learnt"] = {name: value.numpy().copy() for name, value in model.state_dict().items()}
        remove(model)

    monkeypatch.setattr(quantization, "remove", look)
    how = ("--validation-file", wrong, "--metric-for-best-model", "loss", "--learning-rate", 0.02, "--bf16", "false")
    train(data, place, base, *AWARE, *EACH_EPOCH, *how, "--ema-decay", 0, "--save-total-limit", 5)
    metrics = json.loads((place / "metrics.json").read_text())
    losses = [epoch["eval_loss"] for epoch in metrics["epochs"]]
    best, last = seen["saved"][int(np.argmin(losses))], seen["saved"][-1]
    assert len(seen["saved"]) == 3
    assert min(losses) < losses[-1]
    assert {name: (value == best[name]).all() for name, value in seen["learnt"].items()} == dict.fromkeys(best, True)
    ranges = {name for name in best if name.endswith(".input_range")}
    assert len(ranges) == 2 * 6 + 2, "the blocks, the pooler and the head"
    assert all(best[name].any() and (best[name] != last[name]).any() for name in ranges)

    _, report = transformers.AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
    assert [keys for keys in report.values() if keys] == [], "every weight has its place, and there are no others"
    weights = load_file(place / "model.safetensors")
    assert weights.keys() == best.keys() - ranges
    name = "bert.encoder.layer.0.output.dense.weight"
    assert (weights[name] == best[name]).all()
    assert golden.replay(Engine(place), place / golden.FILE_NAME) <= 1e-5
    chosen = {choice["name"]: choice for choice in metrics["choices"]}
    assert (chosen["quantization_aware"]["value"], chosen["quantization_aware"]["why"]) == (True, "as asked for")
    stage = tmp_path / "int8"
    stage.mkdir()
    Converter(check(place)).write("openvino", "int8", stage)
    assert (stage / MODEL_FILE).exists()


def test_a_run_is_resumed(data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the checkpoint of the second of four steps, to the weights and ranges of a run that was never stopped."""
    saving = (*NO_CHECKPOINTS[:2], *NO_CHECKPOINTS[4:], "--save-strategy", "steps", "--save-steps", 2)
    options, remove = (*AWARE, *TINY, *saving), quantization.remove
    ends: list[dict[str, Any]] = []

    def look(model: Any) -> None:
        ends.append({name: value.numpy().copy() for name, value in model.state_dict().items()})
        remove(model)

    def stop(model: Any) -> None:
        raise UserError("stopped")

    monkeypatch.setattr(quantization, "remove", look)
    train(data, tmp_path / "whole", base, *options)
    place = tmp_path / "bundle"
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "remove", stop)
        with pytest.raises(UserError, match="stopped"):
            train(data, place, base, *options)
    (tmp_path / "bundle.checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    train(data, place, base, *options, "--resume-from-checkpoint", "true")
    whole, resumed = ends
    assert whole.keys() == resumed.keys()
    assert any(name.endswith(".input_range") for name in whole)
    for name, value in whole.items():
        np.testing.assert_allclose(resumed[name], value, atol=1e-6, err_msg=name)


def test_from_scratch_with_a_search(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each trial computes as the training does."""
    made: list[str] = []
    add = quantization.add

    def look(model: Any, task: str) -> None:
        made.append(task)
        add(model, task)

    monkeypatch.setattr(quantization, "add", look)
    place = tmp_path / "bundle"
    sizes = "bert hidden_size=16 num_hidden_layers=1 num_attention_heads=1 intermediate_size=16 vocab_size=300"
    train_here(
        *("--train-file", data, "--output-dir", place, "--from-scratch", sizes, *AWARE, "--search", 1),
        *("--max-steps", 2, "--max-length", 16),
    )
    assert made == ["text-classification"] * 3, "the search's own Trainer, its trial, and the training"
    assert not [name for name in load_file(place / "model.safetensors") if "input_range" in name]


def test_what_is_refused(data: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--quantization-aware needs a --train-file"):
        Options(quantization_aware=True)
    with pytest.raises(UserError, match="--quantization-aware and --lora exclude each other"):
        Options(train_file="data.csv", quantization_aware=True, lora=8)
    with pytest.raises(UserError, match=r"--quantization-aware: it is for .*, not for text-generation"):
        quantization.add(None, "text-generation")
    gpt2 = transformers.AutoModelForSequenceClassification.from_config(
        scratch.build_config(scratch.parse_spec("gpt2"), num_labels=2)
    )
    with pytest.raises(UserError, match=r"this model \(gpt2\) has no linear layers"):
        quantization.add(gpt2, "text-classification")
    with pytest.raises(UserError, match="computed twice"):
        train(data, tmp_path / "bundle", base, *AWARE, *TINY, "--activation-checkpointing", "true")
    assert list(tmp_path.iterdir()) == []
