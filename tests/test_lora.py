"""Larger models: adapters (LoRA) that are added to the weights, and activation checkpointing, through train.py."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import NO_CHECKPOINTS, ROOT, train_here
from safetensors.numpy import load_file
from scratch_models import write
from test_train import TINY, write_csv

from handler import golden
from handler.engine import Engine
from training import adapters, scratch
from training.errors import UserError
from training.options import Options

RANK = 3
TEXTS = ["a slow cold rude place", "a warm quick kind place 7", "?"]
EACH_EPOCH = ("--num-train-epochs", 3, "--per-device-train-batch-size", 16, "--max-length", 16)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A body of two layers with its pooler, and no head."""
    return write(tmp_path_factory.mktemp("lora") / "base", "bert", transformers.AutoModel, "feature-extraction")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "data.csv", ("negative", "positive"))


def train(data: Path, place: Path, base: Path, *options: object) -> str:
    """A run in this process; its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train_here("--train-file", data, "--output-dir", place, "--base-model", base, *options)
    return printed.getvalue()


def logits(model: Any, folder: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    return found


def before_merging(monkeypatch: pytest.MonkeyPatch, look: Callable[[Any], None]) -> None:
    """Has a look at the trained model with its adapters."""
    merge = adapters.merge

    def looked_at(model: Any) -> None:
        look(model)
        merge(model)

    monkeypatch.setattr(adapters, "merge", looked_at)


def test_the_bundle_is_an_ordinary_model_with_the_adapters_of_the_best_epoch(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation with the labels the other way round: the first epoch is the best, though it is not the last."""
    place, wrong = tmp_path / "bundle", write_csv(tmp_path / "wrong.csv", ("positive", "negative"))
    seen: dict[str, Any] = {}

    def look(model: Any) -> None:
        checkpoints = sorted(tmp_path.glob("bundle.checkpoints/*"), key=lambda path: int(path.name.split("-")[1]))
        seen["saved"] = [load_file(path / "model.safetensors") for path in checkpoints]
        assert not any((path / "config.json").exists() for path in checkpoints), "no one takes it for a model"
        seen["learnt"] = {name: weight.numpy().copy() for name, weight in adapters.learnt(model).items()}
        seen["logits"] = logits(model, base)

    before_merging(monkeypatch, look)
    how = ("--validation-file", wrong, "--metric-for-best-model", "loss", "--learning-rate", 0.02, "--bf16", "false")
    printed = train(data, place, base, "--lora", RANK, *EACH_EPOCH, *how, "--save-total-limit", 5)

    best, last = seen["saved"][0], seen["saved"][-1]
    assert len(seen["saved"]) == 3
    assert {name: (weight == best[name]).all() for name, weight in seen["learnt"].items()} == dict.fromkeys(best, True)
    assert any((weight != last[name]).any() for name, weight in seen["learnt"].items())
    learning = sum(weight.size for weight in best.values())
    assert f"  {learning:,} of " in printed
    assert {name.rpartition("bert.")[2].split(".")[0] for name in best} == {"encoder", "pooler", "classifier"}

    metrics = json.loads((place / "metrics.json").read_text())
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
    assert [keys for keys in report.values() if keys] == [], "every weight has its place, and there are no others"
    temperature = metrics["settings"]["options"]["temperature"]
    torch.testing.assert_close(logits(model, place) * temperature, seen["logits"], atol=1e-4, rtol=1e-4)
    assert golden.replay(Engine(place), place / golden.FILE_NAME) <= 1e-5

    before, after = load_file(base / "model.safetensors"), load_file(place / "model.safetensors")
    changes = {name: after[f"bert.{name}"] - weight for name, weight in before.items()}
    linear = {name for name, change in changes.items() if change.ndim == 2 and name.startswith("encoder")}
    assert len(linear) == 2 * 6, "query, key, value and output of attention, and both of feed-forward"
    assert {int(np.linalg.matrix_rank(changes[name], tol=1e-5)) for name in linear} == {RANK}
    others = {name for name, change in changes.items() if change.any()} - linear
    assert others == {"pooler.dense.weight", "pooler.dense.bias"}
    chosen = {choice["name"]: choice for choice in metrics["choices"]}
    assert (chosen["lora"]["value"], chosen["lora"]["why"]) == (RANK, "as asked for")


def test_a_run_is_resumed(data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the checkpoint of the second of four steps, to the weights of a run that was never stopped."""
    saving = (*NO_CHECKPOINTS[:2], *NO_CHECKPOINTS[4:], "--save-strategy", "steps", "--save-steps", 2)
    options = ("--lora", RANK, *TINY, *saving)
    train(data, tmp_path / "whole", base, *options)

    def stop(model: Any) -> None:
        raise UserError("stopped")

    place, checkpoints = tmp_path / "bundle", tmp_path / "bundle.checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "merge", stop)
        with pytest.raises(UserError, match="stopped"):
            train(data, place, base, *options)
    (checkpoints / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        train(data, tmp_path / "other", checkpoints / "checkpoint-2")
    train(data, place, base, *options, "--resume-from-checkpoint", "true")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "bundle"))
    for name, weight in one.items():
        np.testing.assert_allclose(two[name], weight, atol=1e-6, err_msg=name)


# Of each kind of body and head: the class, its config's changes, and what learns besides the adapters.
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("bert", "TokenClassification", {"num_labels": 3}, "classifier"),
    "roberta": ("roberta", "SequenceClassification", {"num_labels": 3}, "classifier"),
    "distilbert": ("distilbert", "QuestionAnswering", {}, "qa_outputs"),
    "deberta": ("deberta-v2", "SequenceClassification", {"num_labels": 3}, "pooler classifier"),
    "masked": ("bert", "MaskedLM", {}, "cls"),
    "gpt2": ("gpt2", "CausalLM", {}, ""),
    "untied": ("gpt2", "CausalLM", {"tie_word_embeddings": False}, ""),
    "t5": ("t5", "Seq2SeqLM", {}, ""),
    "bart": ("bart", "Seq2SeqLM", {}, ""),
    "vit": ("vit", "ImageClassification", {"num_labels": 3}, "classifier"),
    "ast": ("audio-spectrogram-transformer", "AudioClassification", {"num_labels": 3}, "classifier"),
    "wav2vec2": ("wav2vec2", "CTC", {"vocab_size": 20}, "lm_head"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model(kind: str, tmp_path: Path) -> None:
    """Adapters change nothing at first, learn, and are added to the weights, in a model with the keys that it had."""
    model_type, head, changes, learning = MODELS[kind]
    transformers.set_seed(0)
    config = scratch.build_config(scratch.parse_spec(model_type), **changes)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    inputs = inputs_of(model_type, config)
    keys = model.state_dict().keys()
    with torch.no_grad():
        first = scores(model, inputs)
        adapters.add(model, RANK)
        assert torch.equal(scores(model, inputs), first)
        outside = {name.split(".")[1] for name in adapters.learnt(model) if "lora_" not in name}
        outside |= {name.split(".")[0] for name in adapters.learnt(model) if "lora_" not in name}
        assert set(learning.split()) <= outside
        assert learning or not outside
        for name, weight in adapters.learnt(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        adapted = scores(model, inputs)
        adapters.merge(model)
        assert not torch.allclose(adapted, first, atol=1e-3)
        torch.testing.assert_close(scores(model, inputs), adapted, atol=2e-4, rtol=2e-4)
    assert model.state_dict().keys() == keys
    assert adapters.learnt(model) is None
    model.save_pretrained(tmp_path)
    assert scores(type(model).from_pretrained(tmp_path).eval(), inputs).allclose(adapted, atol=2e-3)


def scores(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or the first of them."""
    with torch.no_grad():
        found: torch.Tensor = next(value for name, value in model(**inputs).items() if "logits" in name)
    return found


def inputs_of(model_type: str, config: Any) -> dict[str, torch.Tensor]:
    if model_type == "vit":
        return {"pixel_values": torch.randn(2, config.num_channels, config.image_size, config.image_size)}
    if model_type == "wav2vec2":
        return {"input_values": torch.randn(2, 4000)}
    if model_type.startswith("audio"):
        return {"input_values": torch.randn(2, config.max_length, config.num_mel_bins)}
    ids = torch.randint(5, 200, (2, 9))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {})}


def test_a_generating_model_through_the_front_door(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "gpt2", transformers.AutoModelForCausalLM, "text-generation")
    corpus, place = tmp_path / "corpus.txt", tmp_path / "bundle"
    corpus.write_text("\n".join(f"a warm kind place {number}" for number in range(400)))
    how = ("--task", "text-generation", "--max-length", 32, "--lora", 4, "--max-steps", 3, *NO_CHECKPOINTS)
    assert "weights learn" in train(corpus, place, base, *how)
    assert golden.replay(Engine(place), place / golden.FILE_NAME) <= 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (base, place))
    changed = {name for name, weight in before.items() if (after[name] != weight).any()}
    assert {name.split(".")[-1] for name in changed} == {"weight"}
    assert all(".h." in name for name in changed)


@pytest.mark.parametrize("lora", [(), ("--lora", RANK)], ids=["whole", "lora"])
def test_activation_checkpointing_changes_nothing(
    lora: tuple[object, ...], data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and weights, in parts, too; and it is really on."""
    on: list[bool] = []
    before_merging(monkeypatch, lambda model: on.append(model.is_activation_checkpointing))
    how = (*TINY, *NO_CHECKPOINTS, *lora, "--most-tokens", 32, "--logging-strategy", "steps", "--logging-steps", 1)
    train(data, tmp_path / "without", base, *how)
    train(data, tmp_path / "with", base, *how, "--activation-checkpointing", "true")
    assert on == [False, True]
    without, with_it = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("without", "with"))
    assert len(without["training_loss"]) == 4
    for one, two in zip(without["training_loss"], with_it["training_loss"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    for name, weight in one.items():
        np.testing.assert_allclose(two[name], weight, atol=1e-5, err_msg=name)


def test_what_is_refused(data: Path, base: Path, tmp_path: Path) -> None:
    cases = [
        ({"lora": 0}, "--lora 0: give 1 or more"),
        ({"lora": 8, "from_scratch": "bert"}, "--lora needs a base model"),
        ({"lora": 8, "train_file": None}, "--lora needs a --train-file"),
    ]
    for options, words in cases:
        with pytest.raises(UserError, match=words):
            Options(**{"train_file": "data.csv", **options})
    resnet = transformers.ResNetForImageClassification(scratch.build_config(scratch.parse_spec("resnet")))
    with pytest.raises(UserError, match=r"--lora 8: this model \(resnet\) has no linear layers"):
        adapters.add(resnet, 8)
    with pytest.raises(UserError, match="--lora 0"):
        train(data, tmp_path / "bundle", base, "--lora", 0)
    assert list(tmp_path.iterdir()) == []


def test_peft_is_no_part_of_serving() -> None:
    files = [*(ROOT / "handler").rglob("*.py"), *(ROOT / "archiver").rglob("*.py")]
    assert [file.name for file in files if "peft" in file.read_text(encoding="utf-8")] == []
