"""How training batches are made: like lengths together, padded, in parts that change nothing, and seeded."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from test_train import save_tiny_base

from benchmarks import training as benchmark
from training import trainer
from training.batches import IGNORED, LengthBuckets, LongestFirst, Padding, TokenRows, parts
from training.errors import UserError
from training.options import Options, TrainerOptions

LENGTHS = np.random.default_rng(0).integers(3, 90, 1003)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def token_rows(lengths: list[int], **columns: Any) -> TokenRows:
    ids = [[101, *range(1000, 1000 + length - 2), 102] for length in lengths]
    return TokenRows(Dataset.from_dict({"input_ids": ids, **columns}))


def test_batches_have_rows_of_like_length_in_no_order() -> None:
    order = list(LengthBuckets(LENGTHS, 16, seed=1, epoch=lambda: 0))
    assert sorted(order) == list(range(len(LENGTHS)))
    batches = [LENGTHS[order[start : start + 16]] for start in range(0, len(order), 16)]
    assert len(batches[-1]) == len(LENGTHS) % 16
    padded = sum(len(batch) * batch.max() for batch in batches)
    assert padded < 1.1 * LENGTHS.sum(), "next to no padding"
    longest = [batch.max() for batch in batches]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3, "neither from short to long nor back"
    assert [LENGTHS[row] for row in LongestFirst(LENGTHS)] == sorted(LENGTHS, reverse=True)


def test_the_order_follows_from_seed_and_epoch() -> None:
    orders = [list(LengthBuckets(LENGTHS, 16, seed, lambda epoch=epoch: epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert list(LengthBuckets(LENGTHS, 16, 1, lambda: 1)) == orders[1]


@pytest.mark.parametrize("amx", [True, False])
def test_rows_are_padded_as_the_tokenizer_pads_them(amx: bool, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    multiple = 8 if amx else 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    texts = ["a warm kind place", "a slow, cold, rude and altogether dreadful place to be in", "good"]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        encoded = tokenizer(texts, [texts[1], texts[2], texts[0]], return_attention_mask=False)
        rows = TokenRows(Dataset.from_dict(dict(encoded)).select([2, 0, 1, 1]))
        batch = Padding(tokenizer)([rows[place] for place in (1, 2, 0)])
        expected = tokenizer(
            texts, [texts[1], texts[2], texts[0]], padding=True, pad_to_multiple_of=multiple, return_tensors="pt"
        )
        assert {name: tensor.tolist() for name, tensor in batch.items()} == {
            name: tensor.tolist() for name, tensor in expected.items()
        }
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    tokens = Padding(tokenizer, labelled_tokens=True)
    short, longer = token_rows([3, 8], labels=[[0, 1, 2], [1] * 8])
    [labels, _] = tokens([short, longer])["labels"].tolist()
    assert labels == [*[IGNORED] * 5, 0, 1, 2], "labels are padded on the side of their tokens"
    several = token_rows([3, 4], labels=[[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    batch = Padding(tokenizer)([several[0], several[1]])
    assert batch["labels"].tolist() == [[0, 1, 0.5], [1, 0, 0]]
    assert batch["labels"].dtype == torch.float32


def test_a_batch_is_split_by_its_tokens() -> None:
    batch = {"input_ids": torch.arange(7 * 16).reshape(7, 16), "labels": torch.arange(7)}
    for most, sizes in ((1000, [7]), (112, [7]), (111, [4, 3]), (48, [3, 2, 2]), (16, [1] * 7), (1, [1] * 7)):
        pieces = parts(batch, most)
        assert [len(piece["labels"]) for piece in pieces] == sizes
        assert torch.equal(torch.cat([piece["input_ids"] for piece in pieces]), batch["input_ids"])


def gradients(base: Path, rows: TokenRows, tokenizer: Any, model: Any, place: Path, **changes: Any) -> dict[str, Any]:
    """The gradients of one optimiser step over all rows, before they are clipped."""
    options = Options(most_tokens=changes.pop("most_tokens", 10_000), early_stopping_patience=0)
    arguments = TrainerOptions(
        str(place), bf16=False, num_train_epochs=1.0, learning_rate=1e-3, max_grad_norm=0, **changes
    )
    found: dict[str, Any] = {}

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            if not found:
                found.update({name: weight.grad.clone() for name, weight in model.named_parameters()})

    built = trainer.build(
        model,
        tokenizer,
        arguments,
        options,
        train=rows,
        validation=None,
        collator=Padding(tokenizer, labelled_tokens=True),
    )
    built.add_callback(Look())
    built.train()
    return found


def test_parts_and_accumulated_batches_have_the_gradient_of_the_whole(base: Path, tmp_path: Path) -> None:
    """Of tokens with labels, too, which are not spread evenly over the rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    lengths = [5, 9, 12, 20, 31, 40, 44, 50]
    labels = [[IGNORED] * (length // 2) + [place % 3] * (length - length // 2) for place, length in enumerate(lengths)]
    rows = token_rows(lengths, labels=labels)

    def step(**changes: Any) -> dict[str, Any]:
        transformers.set_seed(1)
        model = transformers.AutoModelForTokenClassification.from_pretrained(
            base, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        strategies = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        return gradients(base, rows, tokenizer, model, tmp_path, **strategies, **changes)

    whole = step(per_device_train_batch_size=8)
    assert whole["classifier.weight"].abs().max() > 1e-4
    for changes in ({"most_tokens": 60}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        found = step(**{"per_device_train_batch_size": 8, **changes})
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_weights_of_classes_by_hand() -> None:
    assert trainer.weighted(Options(), [0, 0, 0, 1], 2) == {}
    loss = trainer.weighted(Options(class_weights="balanced"), [0, 0, 0, 1], 2)["compute_loss_func"]
    logits, targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.5, 0.0]]), torch.tensor([0, 0, 0, 1])
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = (losses[:3].sum() * 4 / (2 * 3) + losses[3] * 4 / 2) / 4
    torch.testing.assert_close(loss({"logits": logits}, targets), expected)
    with pytest.raises(UserError, match="without a row"):
        trainer.weighted(Options(class_weights="balanced"), [0, 0], 2)


def test_gradients_that_are_no_numbers_do_not_reach_the_weights(base: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=3)
    model.classifier.register_forward_hook(lambda *given: given[2] * math.nan)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    strategies = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    with pytest.raises(UserError, match=r"not finite at step 1 of 1.*lower --learning-rate"):
        gradients(base, token_rows([5], labels=[[0] * 5]), tokenizer, model, tmp_path, **strategies)
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())


def test_a_round_of_the_benchmark(shared: Path, tmp_path: Path) -> None:
    rates = benchmark.speed_round(shared, tmp_path, 0, 16)
    assert rates.keys() == benchmark.WAYS.keys()
    assert min(rates.values()) > 0
    assert benchmark.ratio([{"a": 6, "b": 3}, {"a": 5, "b": 1}, {"a": 9, "b": 3}], "a", "b") == {
        "median": 3,
        "lowest": 2,
        "highest": 5,
    }


def test_the_page_has_the_results_that_are_committed() -> None:
    results = json.loads(benchmark.RESULTS.read_text(encoding="utf-8"))
    assert benchmark.table_in(benchmark.DOCS.read_text(encoding="utf-8")) == benchmark.table(results)
    assert benchmark.targets(results) == results["targets"]
    assert len(results["rounds"]) >= 5
