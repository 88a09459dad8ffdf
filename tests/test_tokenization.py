"""Tokens: the same as the model's own Hugging Face tokenizer gives, and no token of a long text is lost."""

import csv
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import transformers
from conftest import REVIEWS

from handler.errors import TooLarge
from handler.inputs import Encoded
from handler.inputs.text import TextInputs

ODD = [
    "",
    " ",
    "\t\r\n",
    "\x00",
    "a\x00b\x07\x1b[31mred",
    "\ufeffbyte order mark",
    "zero\u200bwidth\u200djoiner\u00ad",
    "\u202eright to left override",
    "line\u2028separator\u2029",
    "Ünïcödé ÀÉÎ ñ ß İ ﬁ ①",
    "e\u0301 is e with an accent",
    "Очень хороший товар, всем советую!",
    "这家餐厅的菜很好吃，服务也不错。",
    "とても良い商品でした。한국어 리뷰",
    "منتج سيئ جدا ולא מומלץ",
    "ยอดเยี่ยมมาก बहुत अच्छा",
    "👍🏽👨‍👩‍👧‍👦🏳️‍🌈 ٣٤٥",
    "\U0010ffff\ufffe\ufffd",
    "[CLS] [SEP] [MASK] [PAD] [UNK] [cls] [ SEP ]",
    "##ing un##believ",
    "don't can't $9.99 50% #1 @you http://example.com/a?b=c&d=é",
    "x" * 99 + " " + "x" * 100 + " " + "x" * 101,
    "!" * 300,
]


def encode(model: Path, max_length: int, stride: int, texts: Sequence[str]) -> list[Encoded]:
    encoded = TextInputs(model, {}, max_length, stride).encode(texts)
    return [cast(Encoded, entry) for entry in encoded]


def reviews() -> list[str]:
    with (REVIEWS / "test.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def reference(bundle: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(bundle)


@pytest.fixture(scope="module")
def long_texts() -> list[str]:
    """Reviews joined to texts of 80 to 4,000 words, and some that no space divides."""
    texts = reviews()
    joined = [" ".join(texts[start : start + count]) for start, count in ((0, 4), (4, 10), (14, 40), (54, 120))]
    return [*joined, "好吃" * 500, "!" * 777, " ".join(ODD)]


def test_ids_and_types_equal_the_hugging_face_tokenizer(bundle: Path, reference: Any) -> None:
    texts = reviews() + ODD
    expected = reference(texts, truncation=True, max_length=256)
    encoded = encode(bundle, 256, 32, texts)
    assert [text.rows[0].ids for text in encoded] == expected["input_ids"]
    assert [text.rows[0].type_ids for text in encoded] == expected["token_type_ids"]
    assert [text.tokens for text in encoded] == [len(ids) for ids in reference(texts)["input_ids"]]


@pytest.mark.parametrize(("max_length", "stride"), [(256, 32), (128, 0), (24, 4), (16, 7), (8, 3)])
def test_windows_of_long_texts(
    bundle: Path, reference: Any, long_texts: list[str], max_length: int, stride: int
) -> None:
    for text, encoded in zip(long_texts, encode(bundle, max_length, stride, long_texts), strict=True):
        first, *content, last = reference(text)["input_ids"]
        assert encoded.tokens == len(content) + 2
        pieces = []
        for window in encoded.rows:
            assert len(window) <= max_length
            assert (window.ids[0], window.ids[-1]) == (first, last)
            assert set(window.type_ids) == {0}
            pieces.append(window.ids[1:-1])
        assert all(len(piece) == max_length - 2 for piece in pieces[:-1])
        # Put together without what they share, the windows are the text: nothing is lost, nothing comes twice.
        together = list(pieces[0])
        for before, piece in pairwise(pieces):
            assert piece[:stride] == before[len(before) - stride :]
            assert len(piece) > stride
            together += piece[stride:]
        assert together == content


@pytest.mark.parametrize(("words", "windows"), [(0, 1), (1, 1), (253, 1), (254, 1), (255, 2), (476, 2), (477, 3)])
def test_a_text_is_split_only_where_it_is_too_long(bundle: Path, words: int, windows: int) -> None:
    [encoded] = encode(bundle, 256, 32, ["good " * words])
    assert len(encoded.rows) == windows
    assert encoded.overflows == (windows > 1)
    assert encoded.tokens == words + 2


def test_texts_do_not_change_each_other(bundle: Path, long_texts: list[str]) -> None:
    texts = [*ODD, *long_texts, *reviews()[:30]]
    together = encode(bundle, 64, 8, texts)
    for text, encoded in zip(texts, together, strict=True):
        [alone] = encode(bundle, 64, 8, [text])
        assert [window.ids for window in alone.rows] == [window.ids for window in encoded.rows]
        assert alone.tokens == encoded.tokens


def test_padding_and_truncation_saved_with_the_tokenizer_are_not_used(bundle: Path, tmp_path: Path) -> None:
    saved = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 1}
    saved["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    texts = ["", "A fine pair of boots.", "good " * 300]
    expected = [[w.ids for w in text.rows] for text in encode(bundle, 256, 32, texts)]
    assert [[w.ids for w in text.rows] for text in encode(tmp_path, 256, 32, texts)] == expected


def test_a_model_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        encode(tmp_path, 256, 32, [])


def test_a_pair_is_cut_as_the_hugging_face_tokenizer_cuts_it(bundle: Path, reference: Any) -> None:
    pairs = [("a short one", "good " * 60), ("bad " * 60, "a short one"), ("good " * 40, "bad " * 50), ("a", "b")]
    expected = reference(*map(list, zip(*pairs, strict=True)), truncation="longest_first", max_length=64)
    lengths = [len(ids) for ids in reference(*map(list, zip(*pairs, strict=True)))["input_ids"]]
    encoded = [cast(Encoded, entry) for entry in TextInputs(bundle, {}, 64, 8).encode(pairs)]
    assert [[row.ids for row in entry.rows] for entry in encoded] == [[ids] for ids in expected["input_ids"]]
    assert [entry.rows[0].type_ids for entry in encoded] == expected["token_type_ids"]
    assert [entry.tokens for entry in encoded] == lengths
    assert [entry.overflows for entry in encoded] == [True, True, True, False]


def test_windows_over_one_text_of_a_pair(bundle: Path, reference: Any) -> None:
    question, context = "who came?", " ".join(f"word{number}" for number in range(100))
    inputs = TextInputs(bundle, {}, 64, 8, truncation="only_second")
    [encoded] = inputs.encode([(question, context)])
    assert isinstance(encoded, Encoded)
    expected = reference(
        question, context, truncation="only_second", max_length=64, stride=8, return_overflowing_tokens=True
    )
    assert [row.ids for row in encoded.rows] == expected["input_ids"]
    assert len(encoded.rows) > 2
    assert encoded.tokens == len(reference(question, context)["input_ids"])


def test_a_pair_that_leaves_no_room_is_an_error_of_its_own(bundle: Path) -> None:
    inputs = TextInputs(bundle, {}, 64, 8, truncation="only_second")
    good, bad = ("who?", "someone"), ("who " * 90, "someone")
    tight = ("who " * 56, "someone is a long way off")  # room for less than the stride, where tokenizers panics
    outcomes = inputs.encode([good, bad, good, tight])
    assert [type(outcome) for outcome in outcomes] == [Encoded, TooLarge, Encoded, TooLarge]
