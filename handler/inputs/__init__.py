"""Inputs: what a client sent, turned into rows of arrays for a model. One file per modality."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from handler.errors import RequestError

Sample = TypeVar("Sample", contravariant=True)


class Row(Protocol):
    """One sequence for the model."""

    def __len__(self) -> int:
        """Positions that the model spends on it (tokens, patches, frames): what a token budget counts."""
        ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample as rows.

    rows: one, or several windows of a long text. tokens: those of the whole text, special tokens counted once; 0 for
    media. overflows: whether the first row holds only the beginning of the sample.
    """

    rows: Sequence[Any]
    tokens: int = 0
    overflows: bool = False


class Inputs(Protocol[Sample]):
    """Samples of one modality to rows, and rows to arrays.

    shapes: shape of every array by input name, -1 where it differs from batch to batch.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def size(self, sample: Sample) -> float:
        """Characters, pixels or seconds: what is rationed before any time is spent on a request."""
        ...

    def encode(self, samples: Sequence[Sample]) -> list[Encoded | RequestError]:
        """Encodes all samples of a batch in one call, in order; a sample that cannot be is its own error."""
        ...

    def collate(self, rows: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """Pads rows to one batch: arrays [batch, …] by input name."""
        ...


@dataclass(frozen=True, slots=True)
class ArrayRow:
    """A row of media: arrays without their batch axis, by input name, and the positions the model spends on them."""

    arrays: Mapping[str, NDArray[np.float32]]
    positions: int

    def __len__(self) -> int:
        return self.positions
