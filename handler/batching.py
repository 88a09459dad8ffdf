"""Length-sorted micro-batches under a token budget."""

import math
from collections.abc import Iterator, Sequence

# Runtimes cache compiled kernels per shape; multiples of 8 keep the number of shapes small at little padding.
PAD_MULTIPLE = 8


def micro_batches(
    lengths: Sequence[int], token_budget: int, kinds: Sequence[int] | None = None, streams: int = 1
) -> Iterator[list[int]]:
    """Groups sequences of like length: yields lists of indices into `lengths`, each index once, the longest first.

    kinds: for each sequence, what all sequences of its group must have in common. streams: groups that run at the same
    time; the groups are of like size, and their number suits it, so that none is left to run alone at the end.
    A group of n sequences costs n × (its longest, rounded up to a multiple of 8) tokens, at most `token_budget`;
    a single sequence longer than the budget is a group of its own.
    """
    kinds = kinds or [0] * len(lengths)
    total = sum(map(padded, lengths))
    rounds = math.ceil(total / max(1, streams * token_budget))
    share = total / max(1, rounds * streams)
    group: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], kinds[index])):
        cost = (len(group) + 1) * longest
        # Half a sequence over its share or under it: the groups come out even, and no small one remains.
        full = cost > token_budget or cost - longest / 2 > share
        if group and (full or kinds[index] != kinds[group[0]]):
            yield group
            group = []
        if not group:
            longest = padded(lengths[index])
        group.append(index)
    if group:
        yield group


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 8."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
