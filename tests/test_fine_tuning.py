"""How an encoder is fine-tuned: embeddings that stay, tokens that are hidden, and the average of the weights."""

import contextlib
import inspect
import io
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
from test_train import TINY, save_tiny_base, write_csv
from transformers import TrainerCallback

from training import trainer
from training.averaging import WeightAverage
from training.errors import UserError

EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
PLAIN = ("--freeze-embeddings", "false", "--token-dropout", 0, "--ema-decay", 0, "--head-learning-rate-ratio", 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "data.csv", ("negative", "positive"))


def train(data: Path, place: Path, base: Path, *options: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        train_here("--train-file", data, "--output-dir", place, "--base-model", base, *TINY, *options)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The Trainers that are made."""
    found: list[Any] = []
    build = trainer.build
    monkeypatch.setattr(trainer, "build", lambda *given, **more: found.append(build(*given, **more)) or found[-1])
    return found


@pytest.mark.parametrize("frozen", [True, False])
def test_embeddings_of_tokens_stay_as_they_are(frozen: bool, data: Path, base: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "bundle", base, *NO_CHECKPOINTS, *(() if frozen else PLAIN))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "bundle" / "model.safetensors")
    assert bool((before[EMBEDDINGS.removeprefix("bert.")] == after[EMBEDDINGS]).all()) is frozen
    position = "embeddings.position_embeddings.weight"
    assert (before[position] != after[f"bert.{position}"]).any()
    metrics = json.loads((tmp_path / "bundle" / "metrics.json").read_text(encoding="utf-8"))
    choices = {choice["name"]: choice for choice in metrics["choices"]}
    names = ("freeze_embeddings", "token_dropout", "ema_decay", "head_learning_rate_ratio")
    assert [choices[name]["value"] for name in names] == ([True, 0.1, 0.99, 10] if frozen else [False, 0, 0, 1])
    assert (choices["ema_decay"]["why"] == "as asked for") is not frozen


def test_a_share_of_the_tokens_is_hidden_in_training_alone(
    data: Path, base: Path, tmp_path: Path, built: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    forward = transformers.BertForSequenceClassification.forward

    def looked_at(self: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        seen[self.training].append(input_ids)
        return forward(self, input_ids=input_ids, **more)

    # The Trainer reads the signature to know what the model takes.
    looked_at.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(transformers.BertForSequenceClassification, "forward", looked_at)
    train(data, tmp_path / "bundle", base, "--token-dropout", 0.4, "--max-steps", 40, *NO_CHECKPOINTS)
    tokenizer = built[0].processing_class
    mask, special = tokenizer.mask_token_id, tokenizer.all_special_ids
    trained = torch.cat([ids.flatten() for ids in seen[True]])
    words = ~torch.isin(trained, torch.tensor([special for special in special if special != mask]))
    assert (trained[words] == mask).float().mean().item() == pytest.approx(0.4, abs=0.06)
    assert all((ids[:, 0] == tokenizer.cls_token_id).all() for ids in seen[True])
    assert not (seen[False][0] == mask).any(), "the temperature is fitted to the rows as they are"
    assert len({tuple(ids.flatten().tolist()) for ids in seen[True]}) > 15, "each epoch hides others"


def test_the_model_becomes_the_average_of_its_steps(
    data: Path, base: Path, tmp_path: Path, built: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a plain loop has it; what is measured on the way is the average, too."""
    steps: list[dict[str, torch.Tensor]] = []
    averages: dict[int, dict[str, torch.Tensor]] = {}
    evaluated: dict[int, bool] = {}

    def weights(model: Any) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}

    class Looks(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            averages[0] = weights(model)

        def on_step_end(self, _: Any, state: Any, *__: Any, model: Any, **___: Any) -> None:
            steps.append(weights(model))
            number = len(steps)
            decay = min(0.5, (1 + number) / (10 + number))
            averages[number] = {
                name: decay * averages[number - 1][name] + (1 - decay) * weight for name, weight in steps[-1].items()
            }

    evaluation_loop = transformers.Trainer.evaluation_loop

    def looked_at(self: Any, *given: Any, **more: Any) -> Any:
        if steps and self.state.global_step == len(steps):
            now = weights(self.model)
            evaluated[len(steps)] = all(
                torch.allclose(now[name], weight, atol=1e-6) for name, weight in averages[len(steps)].items()
            )
        return evaluation_loop(self, *given, **more)

    monkeypatch.setattr(transformers.Trainer, "evaluation_loop", looked_at)
    build = trainer.build

    def watched(*given: Any, **more: Any) -> Any:
        made = build(*given, **more)
        made.add_callback(Looks())
        return made

    monkeypatch.setattr(trainer, "build", watched)
    each = ("--eval-strategy", "steps", "--eval-steps", 2, "--save-strategy", "no", "--load-best-model-at-end", "false")
    train(data, tmp_path / "bundle", base, "--ema-decay", 0.5, "--learning-rate", 0.01, *each)
    assert evaluated == {2: True, 4: True}
    final = weights(built[0].model)
    different = [name for name, weight in final.items() if not torch.allclose(weight, averages[4][name], atol=1e-6)]
    # The head is divided by the temperature after the training.
    assert set(different) <= {"classifier.weight", "classifier.bias"}
    assert any(not torch.allclose(weight, final[name]) for name, weight in steps[-1].items())


def test_a_fresh_head_learns_faster_until_it_is_no_longer_fresh(
    data: Path, base: Path, tmp_path: Path, built: list[Any]
) -> None:
    """The pooler before it, too. A model that has been fine-tuned on the same labels goes on with one rate for all."""
    train(data, tmp_path / "bundle", base, *NO_CHECKPOINTS)
    train(data, tmp_path / "again", tmp_path / "bundle", *NO_CHECKPOINTS)
    fresh, again = ({group["initial_lr"]: 0 for group in made.optimizer.param_groups} for made in built)
    assert (list(fresh), list(again)) == ([1e-4, 1e-3], [1e-4])
    names = {id(weight): name for name, weight in built[0].model.named_parameters()}
    groups = built[0].optimizer.param_groups
    fast = {names[id(weight)] for group in groups if group["initial_lr"] == 1e-3 for weight in group["params"]}
    assert {name.split(".")[-3] if "pooler" in name else name.split(".")[0] for name in fast} == {
        "pooler",
        "classifier",
    }
    decayed = {names[id(weight)] for group in groups if group["weight_decay"] for weight in group["params"]}
    assert decayed == {name for name in names.values() if name.endswith("weight") and "LayerNorm" not in name} - {
        EMBEDDINGS
    }
    assert sum(len(group["params"]) for group in groups) == len(names) - 1


@pytest.mark.parametrize("best", [False, True], ids=["the last", "the best"])
def test_a_resumed_run_has_the_average_of_one_that_was_never_stopped(
    best: bool, data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint of the second of four steps; and the best model is the average at its own step."""
    saving = ("--save-strategy", "steps", "--save-steps", 2, "--learning-rate", 0.01, "--save-total-limit", 3)
    measured = ("--eval-strategy", "steps", "--eval-steps", 2, "--metric-for-best-model", "loss")
    options = (*saving, *(measured if best else ("--eval-strategy", "no", "--load-best-model-at-end", "false")))
    train(data, tmp_path / "whole", base, *options)

    def stop(*_: Any, **__: Any) -> None:
        raise UserError("stopped")

    place, checkpoints = tmp_path / "bundle", tmp_path / "bundle.checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(WeightAverage, "on_train_end", stop)
        with pytest.raises(UserError, match="stopped"):
            train(data, place, base, *options)
    assert (checkpoints / "checkpoint-2" / "average.safetensors").is_file()
    (checkpoints / "checkpoint-4" / "trainer_state.json").unlink()
    train(data, place, base, *options, "--resume-from-checkpoint", "true")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "bundle"))
    for name, weight in one.items():
        np.testing.assert_allclose(two[name], weight, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--token-dropout", 1), "--token-dropout 1: give a share below 1"),
        (("--ema-decay", -0.5), "--ema-decay -0.5: give a number below 1"),
        (("--head-learning-rate-ratio", 0), "--head-learning-rate-ratio 0: give a number above 0"),
        (("--task", "fill-mask", "--token-dropout", 0.1), "--token-dropout, --ema-decay and .* leave them out"),
    ],
)
def test_odd_shares_are_refused(
    options: tuple[object, ...], message: str, data: Path, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(data, tmp_path / "bundle", base, *options)


def test_a_tokenizer_without_a_mask_hides_nothing(data: Path, tmp_path: Path) -> None:
    """GPT-2's: the default is left out and says why; what is asked for is refused."""
    gpt2 = write(tmp_path / "gpt2", "gpt2", transformers.AutoModel, "feature-extraction")
    train(data, tmp_path / "bundle", gpt2, *NO_CHECKPOINTS)
    metrics = json.loads((tmp_path / "bundle" / "metrics.json").read_text(encoding="utf-8"))
    [choice] = [choice for choice in metrics["choices"] if choice["name"] == "token_dropout"]
    assert (choice["value"], choice["why"]) == (0.0, "the tokenizer has no mask token")
    with pytest.raises(UserError, match="no mask token to hide others behind"):
        train(data, tmp_path / "other", gpt2, *NO_CHECKPOINTS, "--token-dropout", 0.2)
