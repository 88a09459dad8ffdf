"""Plain text to learn a language from: reading, splitting, and packing into sequences of token ids.

A corpus is a list of documents: a .txt file is one, a table has one in each row of its text column.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from training import data
from training.errors import UserError
from training.options import Options
from training.tasks import Splits

# Documents are tokenized in pieces of about so many characters: together, and without one huge encoding.
_PIECE = 20_000


def read(path: Path, column: str = "text") -> list[str]:
    """The documents of a .txt file (UTF-8, line ends made \\n) or of a csv, tsv, jsonl or parquet file.

    Rows without text are left out. Raises UserError if the file is missing, empty, not UTF-8, or has no such column.
    """
    if path.suffix.lower() == ".txt":
        documents = [_read_text(path)]
    else:
        rows = data.columns(data.read(path), path, {"text": column})["text"]
        if any(text is not None and not isinstance(text, str) for text in rows):
            raise UserError(f"{path}: column {column!r} does not hold texts; name the right one with --text-column")
        documents = [text for text in rows if text is not None]
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise UserError(f"{path}: there is no text in it")
    return documents


def read_splits(options: Options) -> Splits:
    """The files of a run as splits with a column `text`: one row for each document."""
    texts = {name: read(path, options.text_column) for name, path in options.files().items()}
    if "train" in texts and "validation" not in texts:
        path = options.files()["train"]
        texts["train"], texts["validation"] = split(texts["train"], options.validation_share, path)
    rows = {name: Dataset.from_dict({"text": documents}) for name, documents in texts.items()}
    return Splits(rows.get("train"), rows.get("validation"), rows.get("test"))


def split(documents: Sequence[str], share: float, path: Path) -> tuple[list[str], list[str]]:
    """Training and validation documents: the last `share` (0 to 1) of all characters is for validation.

    By position, because neighbouring lines of a text are alike. The cut is between documents, or between the lines of
    a single one. Raises UserError if one of the two would be empty.
    """
    units = documents if len(documents) > 1 else documents[0].splitlines(keepends=True)
    ends = np.cumsum([len(unit) for unit in units])
    cut = 1 + int(np.argmin(np.abs(ends[:-1] - (1 - share) * ends[-1]))) if len(units) > 1 else 1
    parts = list(units[:cut]), list(units[cut:])
    if len(documents) == 1:
        parts = ["".join(parts[0])], ["".join(parts[1])]
    if not all(any(text.strip() for text in part) for part in parts):
        raise UserError(f"{path}: too little text to take a validation split from; give a --validation-file")
    return parts


def lines(documents: Sequence[str]) -> list[str]:
    """The lines of all documents that are not blank, without blanks around them."""
    return [line.strip() for document in documents for line in document.splitlines() if line.strip()]


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """All documents, one after the other, cut into sequences of `length` tokens: a column `input_ids`.

    Each sequence has the tokenizer's special tokens around it, as in `[CLS] … [SEP]`; the last may be shorter.
    Documents are divided by the tokenizer's separator or, if it has none, its end token.
    """
    before, after = _surroundings(tokenizer)
    divider = [token for token in (tokenizer.sep_token_id, tokenizer.eos_token_id) if token is not None][:1]
    parts: list[NDArray[np.int32]] = []
    for index, document in enumerate(documents):
        parts += [np.asarray(divider if index else [], dtype=np.int32), *_token_ids(document, tokenizer)]
    ids = np.concatenate(parts)
    room = length - len(before) - len(after)
    blocks = [[*before, *ids[start : start + room].tolist(), *after] for start in range(0, len(ids), room)]
    return Dataset.from_dict({"input_ids": blocks, "length": [len(block) for block in blocks]})


def by_line(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Each line as a sequence of its own, special tokens around it: a column `input_ids`.

    A line of more than `length` tokens is several sequences: no text is lost.
    """
    encoded = tokenizer(
        lines(documents),
        truncation=True,
        max_length=length,
        return_overflowing_tokens=True,
        return_attention_mask=False,
    )
    blocks = encoded["input_ids"]
    return Dataset.from_dict({"input_ids": blocks, "length": [len(block) for block in blocks]})


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 (byte {error.object[error.start]:#04x}): convert it first, "
            f"e.g. iconv -f latin1 -t utf-8 old.txt > {path.name}"
        ) from None


def _surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the special tokens that the tokenizer puts before and after a text."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(at for at in range(len(whole)) if whole[at : at + len(inner)] == inner)
    return whole[:start], whole[start + len(inner) :]


def _token_ids(document: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[NDArray[np.int32]]:
    """Token ids of a document without special tokens, piece by piece."""
    pieces = list(_pieces(document))
    for start in range(0, len(pieces), 256):
        encoded = tokenizer(
            pieces[start : start + 256], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        yield from (np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"])


def _pieces(document: str) -> Iterator[str]:
    """A document in pieces that end with the line break before a line with text, where tokens end too."""
    start = 0
    for match in re.finditer(r"\n(?=\S)", document):
        if match.end() - start >= _PIECE:
            yield document[start : match.end()]
            start = match.end()
    yield document[start:]
