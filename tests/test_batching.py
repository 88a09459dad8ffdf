"""Micro-batches: every text once, within the budget, padded as little as the shapes allow."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import Encoding

from handler.batching import micro_batches, padded
from handler.inputs.text import TextInputs


@dataclass
class Tokens:
    """As much of an Encoding as batching needs."""

    ids: list[int]
    type_ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)


def collate(encodings: list[Encoding], pad_id: int, max_length: int, bundle: Path) -> dict[str, Any]:
    config = {"pad_token_id": pad_id, "type_vocab_size": 2}
    return TextInputs(bundle, config, max_length, stride=0).collate(encodings)


def encoding(*ids: int, type_id: int = 0) -> Encoding:
    return cast(Encoding, Tokens(list(ids), [type_id] * len(ids)))


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (1, 8), (7, 8), (8, 8), (9, 16), (250, 256), (257, 264)])
def test_padded_is_the_next_multiple_of_eight(length: int, expected: int) -> None:
    assert padded(length) == expected


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 64, []),
        ([5], 64, [[0]]),
        ([9, 3, 10, 2], 32, [[2, 0], [1, 3]]),
        ([3, 3, 3, 3, 3], 16, [[0, 1], [2, 3], [4]]),
        ([8, 8], 16, [[0, 1]]),
        ([8, 9], 16, [[1], [0]]),
        ([500, 2, 600], 64, [[2], [0], [1]]),
        ([2, 2, 500], 8, [[2], [0], [1]]),
        ([1, 1], 0, [[0], [1]]),
    ],
)
def test_groups(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    assert list(micro_batches(lengths, budget)) == expected


def test_any_lengths_and_budget() -> None:
    chance = random.Random(0)
    for _ in range(500):
        budget = chance.choice([8, 64, 1000, 4096])
        longest = chance.choice([8, 64, 512])
        lengths = [chance.randint(1, longest) for _ in range(chance.randint(0, 200))]
        groups = list(micro_batches(lengths, budget))
        assert all(groups)
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        for group in groups:
            cost = len(group) * padded(max(lengths[index] for index in group))
            assert cost <= budget or len(group) == 1
        in_order = [lengths[index] for group in groups for index in group]
        assert in_order == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("texts", "streams", "expected"),
    [(10, 1, [5, 5]), (10, 2, [5, 5]), (10, 4, [3, 3, 3, 1]), (20, 2, [5, 5, 5, 5]), (3, 4, [1, 1, 1]), (1, 2, [1])],
)
def test_groups_are_even_and_suit_the_streams(texts: int, streams: int, expected: list[int]) -> None:
    """A budget of 64 has room for eight of these texts."""
    assert [len(group) for group in micro_batches([8] * texts, 64, streams=streams)] == expected


def test_the_streams_finish_together() -> None:
    chance = random.Random(0)
    for _ in range(200):
        streams = chance.choice([1, 2, 4])
        lengths = [chance.randint(1, 60) for _ in range(64)]
        groups = micro_batches(lengths, 512, streams=streams)
        costs = [len(group) * padded(max(lengths[index] for index in group)) for group in groups]
        busy = [sum(costs[stream::streams]) for stream in range(streams)]
        assert max(busy) <= 1.3 * sum(costs) / streams


def test_collate_pads_on_the_right(bundle: Path) -> None:
    arrays = collate([encoding(5, 6, 7, type_id=1), encoding(9), encoding(*range(1, 10))], 3, 256, bundle)
    assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
        name: (np.dtype(np.int64), (3, 16)) for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    assert arrays["input_ids"].tolist() == [
        [5, 6, 7] + [3] * 13,
        [9] + [3] * 15,
        [1, 2, 3, 4, 5, 6, 7, 8, 9] + [3] * 7,
    ]
    assert arrays["attention_mask"].tolist() == [[1] * 3 + [0] * 13, [1] + [0] * 15, [1] * 9 + [0] * 7]
    assert arrays["token_type_ids"].tolist() == [[1] * 3 + [0] * 13, [0] * 16, [0] * 16]


@pytest.mark.parametrize(
    ("longest", "max_length", "expected"),
    [
        (1, 256, 8),
        (8, 256, 8),
        (9, 256, 16),
        (250, 256, 256),
        (250, 250, 250),
        (249, 250, 250),
        (8, 10, 8),
        (9, 10, 10),
    ],
)
def test_length_is_a_multiple_of_eight_but_never_over_the_maximum(
    longest: int, max_length: int, expected: int, bundle: Path
) -> None:
    arrays = collate([encoding(*range(longest)), encoding(1)], 0, max_length, bundle)
    assert arrays["input_ids"].shape == (2, expected)


def test_any_encodings_come_back_out_of_their_arrays(bundle: Path) -> None:
    chance = random.Random(1)
    for _ in range(200):
        max_length = chance.choice([16, 100, 250])
        pad_id = chance.choice([0, 1])
        lengths = [chance.randint(1, max_length) for _ in range(chance.randint(1, 9))]
        rows = [[chance.randint(2, 99) for _ in range(length)] for length in lengths]
        arrays = collate([encoding(*row) for row in rows], pad_id, max_length, bundle)
        length = arrays["input_ids"].shape[1]
        assert length <= max_length
        assert length % 8 == 0 or length == max_length
        for row, ids, mask in zip(rows, arrays["input_ids"], arrays["attention_mask"], strict=True):
            assert ids.tolist() == row + [pad_id] * (length - len(row))
            assert mask.tolist() == [1] * len(row) + [0] * (length - len(row))
