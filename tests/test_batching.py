"""Micro-batches: every text once, within the budget, padded as little as the shapes allow."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import Encoding

from handler.batching import fewest_batches, micro_batches, padded
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
        ([9, 3, 10, 2], 64, [[0, 2, 1, 3]]),  # 16 tokens of padding are less than another run
        ([9, 3, 10, 2], 32, [[0, 2], [1, 3]]),
        ([3, 3, 3, 3, 3], 16, [[1, 2], [3, 4], [0]]),
        ([8, 8], 16, [[0, 1]]),
        ([8, 9], 16, [[1], [0]]),
        ([40] * 3 + [8] * 3, 999, [[0, 1, 2], [3, 4, 5]]),  # 96 tokens of padding are more
        ([500, 2, 600], 64, [[2], [0], [1]]),
        ([2, 2, 500], 8, [[2], [0], [1]]),
        ([1, 1], 0, [[0], [1]]),
    ],
)
def test_groups(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    assert micro_batches(lengths, budget) == expected


def test_any_lengths_and_budget() -> None:
    chance = random.Random(0)
    for _ in range(500):
        budget = chance.choice([8, 64, 1000, 4096])
        longest = chance.choice([8, 64, 512])
        streams = chance.choice([1, 2, 8])
        lengths = [chance.randint(1, longest) for _ in range(chance.randint(0, 200))]
        kinds = [chance.randint(0, 2) for _ in lengths]
        groups = micro_batches(lengths, budget, kinds, streams)
        assert all(groups)
        assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
        costs = [len(group) * padded(max(lengths[index] for index in group)) for group in groups]
        assert costs == sorted(costs, reverse=True)
        for group, cost in zip(groups, costs, strict=True):
            assert cost <= budget or len(group) == 1
            assert len({kinds[index] for index in group}) == 1


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 64, []),
        ([70, 1, 5, 3, 2], 999, [[0, 2, 3, 4, 1]]),  # however much of it is padding
        ([70, 1, 5, 3, 2], 80, [[0], [2, 3, 4, 1]]),
        ([8] * 5, 16, [[0, 1], [2, 3], [4]]),
        ([500, 2], 64, [[0], [1]]),
    ],
)
def test_fewest_batches(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    assert fewest_batches(lengths, budget) == expected


def test_little_of_a_batch_is_padding() -> None:
    chance = random.Random(0)
    for _ in range(100):
        lengths = [chance.randint(3, 60) for _ in range(64)]
        groups = micro_batches(lengths, 512, streams=2)
        cost = sum(len(group) * padded(max(lengths[index] for index in group)) for group in groups)
        assert cost <= 1.15 * sum(map(padded, lengths))


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
