"""Length-sorted micro-batches under a token budget."""

from collections.abc import Iterator, Sequence

# Runtimes cache compiled kernels per shape; multiples of 8 keep the number of shapes small at little padding.
PAD_MULTIPLE = 8


def micro_batches(lengths: Sequence[int], token_budget: int, kinds: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Groups sequences of like length: yields lists of indices into `lengths`, each index once.

    kinds: for each sequence, what all sequences of its group must have in common.
    A group of n sequences costs n × (its longest, rounded up to a multiple of 8) tokens, at most `token_budget`;
    a single sequence longer than the budget is a group of its own.
    """
    kinds = kinds or [0] * len(lengths)
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], kinds[index])):
        full = (len(group) + 1) * padded(lengths[index]) > token_budget
        if group and (full or kinds[index] != kinds[group[0]]):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def padded(length: int) -> int:
    """`length` rounded up to a multiple of 8."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
