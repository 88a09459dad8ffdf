"""Length-sorted micro-batches under a token budget."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

# Runtimes cache compiled kernels per shape; multiples of 8 keep the number of shapes small at little padding.
PAD_MULTIPLE = 8


def micro_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Groups sequences of like length: yields lists of indices into `lengths`, each index once.

    A group of n sequences costs n × (its longest, rounded up to a multiple of 8) tokens, at most `token_budget`;
    a single sequence longer than the budget is a group of its own.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * padded(lengths[index]) > token_budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 8."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def collate(encodings: Sequence[Encoding], pad_id: int, max_length: int) -> dict[str, NDArray[np.int64]]:
    """Pads encodings to one length on the right.

    Returns `input_ids`, `attention_mask` and `token_type_ids`, each int64 [batch, length], where length is a
    multiple of 8 unless that would exceed `max_length`.
    """
    length = min(padded(max(len(encoding) for encoding in encodings)), max_length)
    shape = (len(encodings), length)
    arrays = {
        "input_ids": np.full(shape, pad_id, dtype=np.int64),
        "attention_mask": np.zeros(shape, dtype=np.int64),
        "token_type_ids": np.zeros(shape, dtype=np.int64),
    }
    for row, encoding in enumerate(encodings):
        n = len(encoding)
        arrays["input_ids"][row, :n] = encoding.ids
        arrays["attention_mask"][row, :n] = 1
        arrays["token_type_ids"][row, :n] = encoding.type_ids
    return arrays
