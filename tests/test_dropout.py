"""Dropout of training on a CPU: as torch's in all but the order of its random numbers."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from training import dropout, scratch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_values_are_dropped_as_often_as_asked(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = dropout.Dropout(probability)
    found = layer(torch.ones(300, 401, dtype=dtype))
    assert (found.shape, found.dtype) == ((300, 401), dtype)
    assert float((found == 0).double().mean()) == pytest.approx(probability, abs=0.005)
    assert float(found.max()) == pytest.approx(1 / (1 - probability), rel=0.02)
    # each of the eight values of a random number, and neighbours independently of each other
    parts = (found.flatten()[: 8 * 15_000] == 0).view(-1, 8).double()
    assert parts.mean(dim=0).tolist() == pytest.approx([probability] * 8, abs=0.015)
    assert parts.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03


def test_the_gradient_is_that_of_what_was_kept() -> None:
    values = torch.randn(7, 5, requires_grad=True)
    found = dropout.Dropout(0.4)(values)
    found.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, (found.detach() != 0) / 0.6, rtol=0.01, atol=0)


def test_a_seed_gives_the_same_values_with_any_number_of_threads() -> None:
    values, found, threads = torch.randn(64, 33), [], torch.get_num_threads()
    try:
        for seed, count in ((1, 1), (1, 2), (2, 2)):
            torch.manual_seed(seed)
            torch.set_num_threads(count)
            found.append(dropout.Dropout(0.2)(values))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("probability", [0.0, 1e-9, 1.0])
def test_all_or_nothing(probability: float) -> None:
    values = torch.randn(9)
    assert torch.equal(dropout.Dropout(probability)(values), values * round(1 - probability))
    assert dropout.Dropout(probability)(torch.empty(0, 3)).shape == (0, 3)
    assert dropout.Dropout(0.5)(torch.empty(0, 3)).shape == (0, 3)


def test_nothing_is_dropped_but_in_training() -> None:
    values = torch.randn(9)
    assert torch.equal(dropout.Dropout(0.5).eval()(values), values)


def test_it_takes_the_place_of_torchs_in_a_model() -> None:
    spec = scratch.parse_spec("bert hidden_size=32 num_hidden_layers=2 num_attention_heads=2 hidden_dropout_prob=0.3")
    model = AutoModelForSequenceClassification.from_config(scratch.build_config(spec)).eval()
    ids = torch.arange(12).view(2, 6)
    before, weights = model(input_ids=ids).logits, list(model.state_dict())
    dropout.replace(model)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {dropout.Dropout}
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1, 0.3}
    assert not any(module.training for module in model.modules())
    assert list(model.state_dict()) == weights
    assert torch.equal(model(input_ids=ids).logits, before)
    torch.manual_seed(1)
    assert not torch.allclose(model.train()(input_ids=ids).logits, before)
