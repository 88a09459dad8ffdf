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
class Feature:
    """A part of a sample that can be hidden from the model.

    key: the same in all windows that have the part. place: what indexes it in an array of the row's positions, e.g.
    its tokens. extent: what this row has of it in terms of the sample, e.g. its characters.
    """

    key: tuple[int, int]
    place: Any
    extent: tuple[int, ...]


class HidableInputs(Inputs[Sample], Protocol[Sample]):
    """Inputs whose samples can be explained: which part of one is how important is told by hiding it."""

    def features(self, sample: Sample, rows: Sequence[Any], most: int) -> list[list[Feature]]:
        """The features of each row of one sample, about `most` of them: the finest parts that allows."""
        ...

    def hide(self, row: Any, features: Sequence[Feature]) -> Row:
        """The row with something neutral in the place of these features, as long as before."""
        ...

    def shown(self, sample: Sample, rows: Sequence[Any], attributions: Sequence[tuple[Feature, float]]) -> Any:
        """How an answer shows the attributions of features, those of all rows together, as a JSON value."""
        ...


@dataclass(frozen=True, slots=True)
class ArrayRow:
    """A row of media: arrays without their batch axis, by input name, and the positions the model spends on them."""

    arrays: Mapping[str, NDArray[np.float32]]
    positions: int

    def __len__(self) -> int:
        return self.positions
