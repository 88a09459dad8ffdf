"""Differentially private training, through train.py: what Opacus is to do, and what must not get into a bundle."""

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import NO_CHECKPOINTS, ROOT, train_here
from opacus.grad_sample import GradSampleHooks
from safetensors.numpy import load_file
from scratch_models import SIZES, write
from test_train import write_csv

import train as program
from handler import golden
from handler.engine import Engine
from training import adapters, private, scratch
from training.errors import UserError
from training.options import TrainerOptions

ROWS, BATCH = 60, 8
# No token is hidden, so that a row's gradient can be computed again.
HOW = ("--max-length", 16, "--per-device-train-batch-size", BATCH, "--bf16", "false", "--token-dropout", 0)
# No epsilon that anybody asks for: next to no noise.
NO_NOISE = 1e12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A body of two layers with its pooler, no head, and no dropout."""
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    place = tmp_path_factory.mktemp("private") / "base"
    return write(place, "bert", transformers.AutoModel, "feature-extraction", silent)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "secrets.csv", ("negative", "positive"), ROWS)


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows none of which are in training."""
    place = write_csv(tmp_path_factory.mktemp("data") / "validation.csv", ("negative", "positive"), 20)
    place.write_text(place.read_text().replace("place", "room"))
    return place


@pytest.fixture
def train(data: Path, validation: Path, base: Path) -> Any:
    """A run in this process; its standard output."""

    def run(place: Path, *options: object, epsilon: float | None = 8, **files: Path) -> str:
        given = {"train": data, "validation": validation, "base": base, **files}
        asked = () if epsilon is None else ("--private-epsilon", epsilon)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            train_here(
                *("--train-file", given["train"], "--validation-file", given["validation"]),
                *("--base-model", given["base"], "--output-dir", place, *asked, *HOW, *options),
            )
        return printed.getvalue()

    return run


def weights(place: Path) -> dict[str, Any]:
    return load_file(place / "model.safetensors")


def metrics(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "metrics.json").read_text())
    return found


@dataclass
class Step:
    """rows: each row's gradient, by torch alone, as one vector. given: the one that the optimiser gets.

    bias: the head's before the step.
    """

    rows: list[torch.Tensor]
    given: torch.Tensor
    bias: list[float]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The private steps of the test."""
    found: list[Step] = []
    step = private.PrivateTrainer.training_step

    def noted(self: Any, model: Any, inputs: Any, *arguments: Any) -> torch.Tensor:
        # A model of its own, without hooks; there is no dropout.
        twin = type(model)(model.config).eval()
        twin.load_state_dict(model.state_dict())
        learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
        rows = []
        for place in range(len(inputs["labels"])):
            row = {name: tensor[place : place + 1] for name, tensor in inputs.items()}
            slopes = torch.autograd.grad(twin(**row).loss, [twin.get_parameter(name) for name in learning])
            rows.append(flat(slopes))
        bias = model.classifier.bias.tolist()
        loss: torch.Tensor = step(self, model, inputs, *arguments)
        found.append(Step(rows, flat([model.get_parameter(name).grad for name in learning]), bias))
        return loss

    monkeypatch.setattr(private.PrivateTrainer, "training_step", noted)
    return found


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def clipped(step: Step, norm: float) -> torch.Tensor:
    """What a plain loop makes of the rows, without noise."""
    total = torch.zeros_like(step.given)
    for row in step.rows:
        total += row * min(1.0, norm / float(row.norm()))
    return total / BATCH


@pytest.mark.parametrize(("kind", "norm"), [("one", 20.0), ("several", 2.0)])
def test_each_row_is_clipped(kind: str, norm: float, train: Any, tmp_path: Path, steps: list[Step]) -> None:
    """In parts, too: the gradient is that of a plain loop over the rows."""
    files = {}
    if kind == "several":
        for name in ("train", "validation"):
            files[name] = tmp_path / f"{name}.jsonl"
            rows = [
                {"text": f"a {word} {name} {number}", "label": [word, "all"][: 1 + number % 2]}
                for number in range(ROWS // 2)
                for word in ("slow", "warm")
            ]
            files[name].write_text("\n".join(map(json.dumps, rows)))
    how = ("--max-grad-norm", norm, "--most-tokens", 48, "--max-steps", 3, *NO_CHECKPOINTS)
    train(tmp_path / "bundle", *how, epsilon=NO_NOISE, **files)
    norms = torch.stack([row.norm() for step in steps for row in step.rows])
    assert (norms > norm).any()
    assert len(norms) > len(steps)
    for step in steps:
        torch.testing.assert_close(step.given, clipped(step, norm), atol=1e-5 * norm, rtol=1e-3)
    if kind == "one":
        assert (norms < norm).any(), "a row that is not clipped"
        assert not torch.allclose(flat(steps[0].rows[:1]), steps[0].given, atol=1e-3)


def test_the_noise(train: Any, tmp_path: Path, steps: list[Step]) -> None:
    """Its size is that of the accountant, and no step has that of another one."""
    how = ("--max-grad-norm", 0.5, "--max-steps", 3, *NO_CHECKPOINTS)
    printed = train(tmp_path / "bundle", *how)
    record = metrics(tmp_path / "bundle")["private"]
    assert (record["clipping"], record["steps"], record["rate"]) == (0.5, 3, pytest.approx(BATCH / ROWS))
    assert f"noise {record['noise']:.3g}, rows clipped to 0.5, 3 steps" in printed
    noise = torch.stack([step.given - clipped(step, 0.5) for step in steps]) * BATCH / 0.5
    assert noise.shape[1] > 10_000
    for one in noise:
        assert float(one.std()) == pytest.approx(record["noise"], rel=0.03)
        assert abs(float(one.mean())) < 0.05 * record["noise"]
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.05


def test_without_noise_and_clipping_it_is_the_usual_training(train: Any, tmp_path: Path) -> None:
    """All rows in each batch, so that the batches are the same; adapters, so that the embeddings rest in both."""
    how = ("--per-device-train-batch-size", ROWS, "--optim", "sgd", "--learning-rate", 0.3, "--lora", 2)
    how = (*how, "--max-grad-norm", 100, "--max-steps", 5, *NO_CHECKPOINTS)
    train(tmp_path / "private", *how, epsilon=NO_NOISE)
    train(tmp_path / "usual", *how, epsilon=None)
    one, two = (body(tmp_path / name) for name in ("private", "usual"))
    for name, weight in one.items():
        np.testing.assert_allclose(two[name], weight, atol=2e-4, err_msg=name)
    train(tmp_path / "other", *how, "--learning-rate", 0.1, epsilon=NO_NOISE)
    assert max(abs(weight - one[name]).max() for name, weight in body(tmp_path / "other").items()) > 2e-3


def body(place: Path) -> dict[str, Any]:
    """The weights without the head, which a temperature divides."""
    return {name: weight for name, weight in weights(place).items() if not name.startswith("classifier")}


def test_the_seed(train: Any, base: Path, tmp_path: Path) -> None:
    """It is secret, unless --data-seed is given; the embeddings stay as they are."""
    how = ("--max-steps", 3, *NO_CHECKPOINTS)
    printed = [train(tmp_path / name, *how) for name in "ab"]
    printed += [train(tmp_path / name, *how, "--data-seed", seed) for name, seed in (("c", 7), ("d", 7), ("e", 8))]
    a, b, c, d, e = (body(tmp_path / name) for name in "abcde")
    assert all((c[name] == weight).all() for name, weight in d.items())
    for one, two in ((a, b), (b, c), (c, e)):
        assert any((one[name] != weight).any() for name, weight in two.items())
    warned = ["can take the noise away" in text for text in printed]
    assert warned == [False, False, True, True, True]
    assert [metrics(tmp_path / name)["private"]["seeded"] for name in "abcde"] == warned
    before = weights(base)
    stayed = {name for name, weight in before.items() if (a[f"bert.{name}"] == weight).all()}
    assert stayed == {name for name in before if "_embeddings" in name}
    assert len(stayed) == 3


def test_a_run_is_resumed(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint within an epoch of eight steps into the next one, with the same secret batches and noise."""
    saving = (*NO_CHECKPOINTS[:2], *NO_CHECKPOINTS[4:], "--save-strategy", "steps", "--save-steps", 5)
    options, place = ("--max-steps", 10, *saving), tmp_path / "bundle"
    whole: dict[str, Any] = {}

    def stop(model: Any) -> None:
        whole.update({name: weight.numpy().copy() for name, weight in model.state_dict().items()})
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "merge", stop)
        with pytest.raises(UserError, match="stopped"):
            train(place, *options)
    checkpoints = tmp_path / "bundle.checkpoints"
    (checkpoints / "checkpoint-10" / "trainer_state.json").unlink()
    assert (checkpoints / "checkpoint-5" / "private.json").stat().st_mode & 0o077 == 0
    resumed = ("--resume-from-checkpoint", "true")
    for other in (("--max-grad-norm", 2), ("--max-steps", 11), ("--per-device-train-batch-size", 9)):
        with pytest.raises(UserError, match="of other rows or settings"):
            train(place, *options, *other, *resumed)
    train(place, *options, *resumed)
    for name, weight in body(place).items():
        np.testing.assert_allclose(whole[name], weight, atol=1e-6, err_msg=name)
    assert metrics(place)["private"]["steps_done"] == 10

    with monkeypatch.context() as patch:
        patch.setattr(adapters, "merge", stop)
        with pytest.raises(UserError, match="stopped"):
            train(tmp_path / "usual", *options, epsilon=None)
    with pytest.raises(UserError, match="is not of a private training"):
        train(tmp_path / "usual", *options, *resumed)


def test_batches_of_no_rows_and_of_many(train: Any, tmp_path: Path, steps: list[Step]) -> None:
    """Of one row on average: an empty batch is a step as any other, of noise alone."""
    train(tmp_path / "bundle", "--per-device-train-batch-size", 1, "--max-steps", 12, "--data-seed", 3, *NO_CHECKPOINTS)
    sizes = [len(step.rows) for step in steps]
    assert len(sizes) == 12
    assert 0 in sizes
    assert max(sizes) > 1
    empty = steps[sizes.index(0)]
    record = metrics(tmp_path / "bundle")["private"]
    assert float(empty.given.std()) == pytest.approx(record["noise"] * record["clipping"], rel=0.03)


def test_batches_hold_each_row_by_chance() -> None:
    """As often as was said, whatever the others are, and not the same in the next epoch."""
    epochs = iter(range(200))
    sampler = private._Poisson(50, 10, lambda: torch.Generator().manual_seed(next(epochs)))
    batches = [batch for _ in range(200) for batch in sampler]
    assert len(batches) == 200 * len(sampler) == 1000
    counts = np.bincount(np.concatenate(batches), minlength=50)
    assert counts.min() > 140
    assert counts.max() < 260, "a fifth of 1,000"
    sizes = np.array([len(batch) for batch in batches])
    assert sizes.var() == pytest.approx(50 * 0.2 * 0.8, rel=0.2)
    assert batches[:5] != batches[5:10]


def test_a_training_that_ends_early_spends_less(train: Any, tmp_path: Path) -> None:
    wrong = write_csv(tmp_path / "wrong.csv", ("positive", "negative"), 20)
    how = ("--num-train-epochs", 6, "--early-stopping-patience", 1, "--metric-for-best-model", "accuracy")
    printed = train(tmp_path / "bundle", *how, "--learning-rate", 1e-9, validation=wrong)
    record = metrics(tmp_path / "bundle")["private"]
    assert record["steps_done"] < record["steps"] == 48
    assert 0 < record["spent"] < record["epsilon"] - 1
    assert f"epsilon {record['spent']:.2f} at delta" in printed
    assert f"in {record['steps_done']} of 48 steps" in printed


@pytest.mark.parametrize(("epsilon", "batch", "steps"), [(8, 8, 40), (1, 8, 40), (0.05, 60, 3), (30, 100, 200)])
def test_no_more_is_spent_than_asked_for(epsilon: float, batch: int, steps: int) -> None:
    found = private.guarantee(epsilon, 60, batch, steps, 1.0)
    assert found.delta == pytest.approx(60**-1.1)
    spent = [found.spent(count) for count in (0, steps // 2, steps)]
    assert 0 == spent[0] < spent[1] < spent[2]
    assert 0.9 * epsilon < spent[2] <= epsilon


def test_the_figures_are_those_of_the_gaussian_mechanism() -> None:
    """All rows in each batch: Mironov's bound ("Rényi Differential Privacy", 2017), which the accountant improves."""
    found = private.guarantee(4, 60, 60, 10, 1.0)
    orders = np.linspace(1.01, 60, 5000)
    bound = np.min(10 * orders / (2 * found.noise**2) + np.log(1 / found.delta) / (orders - 1))
    assert 0.7 * bound < found.spent(10) <= bound
    assert private.guarantee(4, 60, 6, 10, 1.0).noise < found.noise, "rows that are seldom seen need less noise"


def test_no_noise_is_enough() -> None:
    with pytest.raises(UserError, match=r"no noise is enough for 1000000 steps over 1000000 rows"):
        private.guarantee(1e-6, 10**6, 10**6, 10**6, 1.0)


def test_the_bundle_holds_no_row_of_training(train: Any, tmp_path: Path, data: Path, steps: list[Step]) -> None:
    """Neither texts nor counts, losses or digests; it is served as any other."""
    few = tmp_path / "few.csv"
    lines = data.read_text().splitlines()
    # Rows that repeat would be shown in the report; the labels are out of balance.
    few.write_text("\n".join([*lines, *lines[1::2], lines[1]]))
    place = tmp_path / "bundle"
    printed = train(place, "--num-train-epochs", 1, train=few)
    assert "repeat another" in printed
    assert "membership: AUC" in printed
    assert steps[0].bias == [0, 0]
    found = metrics(place)
    assert set(found["rows_per_label"]) == {"validation"}
    assert (found["training_loss"], found["membership"]) == ([], None)
    assert found["findings"]["duplicates"] == {}
    assert set(json.loads((place / "provenance.json").read_text())["data"]) == {"validation"}
    digest = hashlib.sha256(few.read_bytes()).hexdigest()
    for file in place.iterdir():
        content = file.read_bytes()
        assert b"rude place" not in content, file.name
        assert digest.encode() not in content, file.name
    assert b"rude room" in (place / "validation.jsonl").read_bytes()
    assert golden.replay(Engine(place), place / golden.FILE_NAME) <= 1e-5
    said = f"epsilon {found['private']['spent']:.2f}"
    assert said in (place / "report.html").read_text()
    assert said in (place / "README.md").read_text()


def test_pairs(train: Any, tmp_path: Path) -> None:
    files = {}
    for name in ("train", "validation"):
        files[name] = tmp_path / f"{name}.csv"
        rows = [f"a {name} {n},it is {n % 2},{('entailment', 'not_entailment')[n % 2]}" for n in range(20)]
        files[name].write_text("\n".join(["premise,hypothesis,label", *rows]))
    place = tmp_path / "bundle"
    train(place, "--task", "zero-shot-classification", "--max-steps", 2, *NO_CHECKPOINTS, **files)
    assert metrics(place)["private"]["steps_done"] == 2
    assert golden.replay(Engine(place), place / golden.FILE_NAME) <= 1e-5


MODELS = {"bert": {}, "roberta": {}, "distilbert": {}, "gpt2": {}}


@pytest.mark.parametrize("kind", MODELS)
def test_models_whose_rows_are_told_apart(kind: str) -> None:
    model = classifier(kind)
    hooks = GradSampleHooks(model)
    private._check_rows(model, hooks)
    assert [name for name, weight in model.named_parameters() if weight.grad is not None] == []


def test_a_model_that_mixes_rows_is_refused() -> None:
    """Its relative positions are one tensor for all rows, through layers that learn."""
    changes = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
    model = classifier("deberta-v2", **changes)
    with pytest.raises(UserError, match=r"\(deberta-v2\) the gradients of single rows cannot be told"):
        private._check_rows(model, GradSampleHooks(model))


def classifier(kind: str, **changes: Any) -> Any:
    """A small model, its embeddings frozen."""
    transformers.set_seed(0)
    config = scratch.build_config(scratch.parse_spec(f"{kind} {SIZES[kind]}"), num_labels=3, pad_token_id=0, **changes)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    private.freeze_embeddings(model)
    return model


REFUSED = {
    "--folds 3": "--folds do not go together",
    "--search 2": "--search do not go together",
    "--teacher somewhere": "--teacher do not go together",
    "--class-weights balanced": "--class-weights do not go together",
    "--from-scratch bert": "--from-scratch do not go together",
    "--gradient-accumulation-steps 2": "--gradient-accumulation-steps do not go together",
    "--activation-checkpointing true": "--activation-checkpointing do not go together",
    "--gradient-checkpointing true": "--activation-checkpointing do not go together",
    "--ignore-data-skip true": "--ignore-data-skip do not go together",
    "--max-grad-norm 0": "needs a --max-grad-norm",
    "--optim adafactor": "not adafactor",
    "--task token-classification": "only text-classification and zero-shot-classification",
    "--private-epsilon 0": "--private-epsilon 0: give a number above 0",
    "--private-epsilon nan": "--private-epsilon nan: give a number above 0",
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_breaks_the_guarantee_is_refused(option: str) -> None:
    given = ["--output-dir", "bundle", "--private-epsilon", "8", "--train-file", "a.csv", "--validation-file", "b.csv"]
    program.parse(given)
    with pytest.raises(UserError, match=REFUSED[option]):
        program.parse([*given, *option.split()])


def test_what_it_cannot_be_without() -> None:
    given = ["--output-dir", "bundle", "--private-epsilon", "8"]
    with pytest.raises(UserError, match="needs a --train-file"):
        program.parse(given)
    with pytest.raises(UserError, match="needs a --validation-file of rows that are no secret"):
        program.parse([*given, "--train-file", "a.csv"])


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainerOptions, "world_size", 2)
    given = ["--output-dir", "bundle", "--private-epsilon", "8", "--train-file", "a.csv", "--validation-file", "b.csv"]
    with pytest.raises(UserError, match="torchrun do not go together"):
        program.parse(given)


def test_numbers_are_refused(train: Any, tmp_path: Path) -> None:
    files = {name: write_csv(tmp_path / f"{name}.csv", (0.5, 1.5), 20) for name in ("train", "validation")}
    with pytest.raises(UserError, match="on the scale of the rows"):
        train(tmp_path / "bundle", "--max-steps", 1, **files)


def test_opacus_is_no_part_of_serving() -> None:
    files = [*(ROOT / "handler").rglob("*.py"), *(ROOT / "archiver").rglob("*.py")]
    assert [file.name for file in files if "opacus" in file.read_text(encoding="utf-8")] == []
