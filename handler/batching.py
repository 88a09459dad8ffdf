"""Length-sorted micro-batches under a token budget."""

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

# Runtimes cache compiled kernels per shape; multiples of 8 keep the number of shapes small at little padding.
PAD_MULTIPLE = 8
# Tokens of padding that are worth one run of the model less. On CPUs a run of its own costs about as much.
_RUN_COST = 48
# A stream's share of a batch is looked at in up to so many groups.
_MOST_ROUNDS = 3


def micro_batches(
    lengths: Sequence[int], token_budget: int, kinds: Sequence[int] | None = None, streams: int = 1
) -> list[list[int]]:
    """Groups sequences of like length: lists of indices into `lengths`, each index once, the costliest group first.

    kinds: for each sequence, what all sequences of its group must have in common. streams: groups that run at the same
    time; the groups are such that all streams are done at about the same time.
    A group of n sequences costs n × (its longest, rounded up to a multiple of 8) tokens, at most `token_budget`; one
    sequence longer than that is a group of its own. Shorter sequences join where the padding costs less than a run.
    """
    kinds = kinds or [0] * len(lengths)
    sizes = [padded(length) for length in lengths]
    groups: list[list[int]] = []
    for (size, kind), alike in groupby(
        sorted(range(len(lengths)), key=lambda index: (-sizes[index], kinds[index])),
        key=lambda index: (sizes[index], kinds[index]),
    ):
        bucket = list(alike)
        if groups and kind == kinds[groups[-1][0]] and (sizes[groups[-1][0]] - size) * len(bucket) <= _RUN_COST:
            groups[-1] += bucket
        else:
            groups.append(bucket)

    def cost(group: Sequence[int]) -> int:
        return sizes[group[0]] * len(group)

    def split(limit: int) -> list[list[int]]:
        parts = [part for group in groups for part in _parts(group, max(1, limit // sizes[group[0]]))]
        return sorted(parts, key=cost, reverse=True)

    # Smaller groups cost more runs, but let the streams end closer together.
    share = sum(map(cost, groups)) / streams
    limits = {min(token_budget, math.ceil(share / rounds)) for rounds in range(1, _MOST_ROUNDS + 1)}
    return min(map(split, sorted(limits, reverse=True)), key=lambda parts: _duration(map(cost, parts), streams))


def fewest_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Groups sequences for a model that passes over each group many times: as few groups as the budget allows.

    Lists of indices into `lengths`, the longest first; what a group costs, and a sequence over the budget, is as in
    `micro_batches`.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups and (len(groups[-1]) + 1) * longest <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = padded(lengths[index])
    return groups


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 8."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def _parts(group: Sequence[int], most: int) -> Iterator[list[int]]:
    """A group in parts of about equal size, none with more than `most` members."""
    count = -(-len(group) // most)
    for part in range(count):
        yield list(group[part * len(group) // count : (part + 1) * len(group) // count])


def _duration(costs: Iterable[int], streams: int) -> int:
    """Tokens after which the last stream is done, where each takes the next group when it is free."""
    busy = [0] * streams
    for cost in costs:
        heapq.heapreplace(busy, busy[0] + cost + _RUN_COST)
    return max(busy)
