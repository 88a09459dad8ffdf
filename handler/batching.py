"""Length-sorted micro-batches under a token budget."""

from bisect import bisect_left
from collections.abc import Sequence

# Runtimes cache compiled kernels per shape; multiples of 8 keep the number of shapes small at little padding.
PAD_MULTIPLE = 8


def micro_batches(
    lengths: Sequence[int], token_budget: int, kinds: Sequence[int] | None = None, streams: int = 1
) -> list[list[int]]:
    """Groups sequences of like length: lists of indices into `lengths`, each index once, the longest first.

    kinds: for each sequence, what all sequences of its group must have in common. streams: groups that run at the same
    time; where there are sequences enough, the number of groups is a multiple of it.
    A group of n sequences costs n × (its longest, rounded up to a multiple of 8) tokens, at most `token_budget`, and
    no more than groups of about equal cost need; a single sequence longer than the budget is a group of its own.
    """
    kinds = kinds or [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], kinds[index]))
    groups = _groups(order, lengths, kinds, token_budget)
    count = -(-len(groups) // streams) * streams
    # The lowest limit that makes no more groups: the last one is then no small rest, which a stream would run alone.
    limits = range(PAD_MULTIPLE, token_budget, PAD_MULTIPLE)
    lowest = bisect_left(limits, True, key=lambda limit: len(_groups(order, lengths, kinds, limit)) <= count)
    return groups if lowest == len(limits) else _groups(order, lengths, kinds, limits[lowest])


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 8."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


def _groups(order: Sequence[int], lengths: Sequence[int], kinds: Sequence[int], limit: int) -> list[list[int]]:
    """Groups of at most `limit` tokens, in the order given."""
    groups: list[list[int]] = []
    longest = 0
    for index in order:
        if groups and (len(groups[-1]) + 1) * longest <= limit and kinds[index] == kinds[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = padded(lengths[index])
    return groups
