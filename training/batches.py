"""Batches of token sequences with little waste: of like length, in parts that fit memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

IGNORED = -100  # the label that torch's cross-entropy leaves out
TAUGHT = "teacher"  # the column of a teacher's logits: see training/distillation.py
# Batches that are sorted by length together. More leave less padding, fewer mix the texts better.
_POOL = 50

Row = dict[str, Any]


class TokenRows(TorchDataset[Row]):
    """The rows of a tokenized data set as numpy arrays: views of its Arrow memory, which may be a mapped file.

    rows: `input_ids`, and what else a model takes: numbers, or lists of them. taught: a teacher's logits of each row,
    [labels] or [tokens, labels]. lengths: tokens of each row, int64.
    """

    def __init__(self, rows: Dataset, taught: Sequence[NDArray[np.float32]] | None = None) -> None:
        table: pa.Table = rows.with_format("arrow")[:]
        columns = {name: _Column(table[name]) for name in table.column_names}
        self.lengths = columns["input_ids"].lengths()
        self._columns: dict[str, Any] = columns | ({} if taught is None else {TAUGHT: taught})

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Row:
        return {name: column[index] for name, column in self._columns.items()}


class _Column:
    """One column, chunk by chunk, without a copy."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = np.cumsum([0, *map(len, chunks)])
        self._chunks = [
            (chunk.offsets.to_numpy(), chunk.values.to_numpy())
            if pa.types.is_list(chunk.type)
            else (None, chunk.to_numpy())
            for chunk in chunks
        ]

    def __getitem__(self, index: int) -> Any:
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        offsets, values = self._chunks[place]
        row = index - self._starts[place]
        return values[row] if offsets is None else values[offsets[row] : offsets[row + 1]]

    def lengths(self) -> NDArray[np.int64]:
        return np.concatenate([np.diff(offsets) for offsets, _ in self._chunks if offsets is not None]).astype(np.int64)


class Padding:
    """Makes a batch of rows: int64 [rows, tokens], padded on the tokenizer's side, and int64 or float32 [rows, …].

    A teacher's logits of tokens are padded as these are, float32 [rows, tokens, labels]. What multiplies matrices in a
    GPU or with AMX likes sides of multiples of 8; elsewhere there is no more padding than the longest row asks for.

    labelled_tokens: whether each token has one of the `labels`.
    """

    def __init__(self, tokenizer: Any, *, labelled_tokens: bool = False) -> None:
        self._pad = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        if labelled_tokens:
            self._pad["labels"] = IGNORED
        self._left = tokenizer.padding_side == "left"
        self._multiple = 8 if torch.cuda.is_available() or torch.cpu._is_amx_tile_supported() else 1

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        width = -(-max(lengths) // self._multiple) * self._multiple
        places = [slice(width - length, width) if self._left else slice(length) for length in lengths]
        mask = np.zeros((len(rows), width), dtype=np.int64)
        batch: dict[str, NDArray[Any]] = {"attention_mask": mask}
        for row, place in enumerate(places):
            mask[row, place] = 1
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name in self._pad:
                batch[name] = np.full(mask.shape, self._pad[name], dtype=np.int64)
                for row, place in enumerate(places):
                    batch[name][row, place] = values[row]
            elif name == TAUGHT and values[0].ndim > 1:
                batch[name] = np.zeros((*mask.shape, values[0].shape[1]), dtype=np.float32)
                for row, place in enumerate(places):
                    batch[name][row, place] = values[row]
            else:
                stacked = np.stack(values)
                batch[name] = stacked.astype(np.float32 if stacked.dtype.kind == "f" else np.int64)
        return {name: torch.from_numpy(array) for name, array in batch.items()}


class LengthBuckets(Sampler[int]):
    """Rows in an order in which those of one batch are of like length, and the batches in none.

    The order follows from seed and epoch alone, so a run that is resumed goes on with the rows it has not seen.

    batch: rows of an optimiser step, of all processes. epoch: tells which one begins.
    """

    def __init__(self, lengths: NDArray[np.int64], batch: int, seed: int, epoch: Callable[[], int]) -> None:
        self._lengths, self._batch, self._seed, self._epoch = lengths, batch, seed, epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = np.random.default_rng((self._seed, self._epoch()))
        order = chance.permutation(len(self._lengths))
        pool = self._batch * _POOL
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        order = np.concatenate([rows[np.argsort(self._lengths[rows], kind="stable")] for rows in pools])
        batches = [order[start : start + self._batch] for start in range(0, len(order), self._batch)]
        # A smaller one must stay the last: whoever cuts the order into batches counts from its start.
        last = batches.pop() if len(batches[-1]) < self._batch else order[:0]
        places = chance.permutation(len(batches))
        for rows in (*(batches[place] for place in places), last):
            yield from rows.tolist()


class LongestFirst(Sampler[int]):
    """Rows by their length: in batches of them there is next to no padding, and the first one needs most memory."""

    def __init__(self, lengths: NDArray[np.int64]) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        yield from np.argsort(-self._lengths, kind="stable").tolist()


def parts(batch: Mapping[str, Any], most: int) -> list[dict[str, Any]]:
    """A batch in parts of so few rows that none has more than `most` tokens, padding included, or one row."""
    rows, width = batch["input_ids"].shape
    count = min(rows, -(-rows * width // most))
    split = {name: tensor.tensor_split(count) for name, tensor in batch.items()}
    return [{name: pieces[place] for name, pieces in split.items()} for place in range(count)]
