"""Models from scratch: what a specification may say, tokenizers that survive saving, and corpora."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import REVIEWS, train_here
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

import train
from training import base_model, corpus, models, scratch
from training.errors import UserError
from training.options import Options

SMALL = {
    "bert": "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64",
    "roberta": "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64",
    "distilbert": "dim=32 n_layers=2 n_heads=2 hidden_dim=64",
    "deberta-v2": "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64",
    "gpt2": "n_embd=32 n_layer=2 n_head=2",
    "phi": "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64",
    "t5": "d_model=32 d_ff=64 num_heads=2 d_kv=16",
    "bart": "d_model=32 encoder_attention_heads=2 decoder_attention_heads=2",
    "marian": "d_model=32 encoder_attention_heads=2 decoder_attention_heads=2",
}
ODD = ["", " ", "a\nb", "  two  blanks ", "Ünïcödé, 漢字 and 🙂", "don't stop", "x" * 300, "e\u0301 \u200b ﬁ İ"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with (REVIEWS / "validation.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


# --- specifications


def test_a_type_and_its_sizes() -> None:
    spec = scratch.parse_spec("bert hidden_size=128 num_hidden_layers=2, num_attention_heads=2,vocab_size=1000")
    assert spec.model_type == "bert"
    config = scratch.build_config(spec)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (128, 2, 1000)


def test_values_of_every_kind() -> None:
    spec = scratch.parse_spec(
        "resnet hidden_sizes=[8, 16] depths=[1,1] layer_type=basic downsample_in_first_stage=true"
    )
    config = scratch.build_config(spec)
    assert (config.hidden_sizes, config.depths) == ([8, 16], [1, 1])
    assert (config.layer_type, config.downsample_in_first_stage) == ("basic", True)
    assert scratch.build_config(scratch.parse_spec("gpt2 resid_pdrop=0.2")).resid_pdrop == 0.2


def test_common_names_of_sizes_are_taken() -> None:
    config = scratch.build_config(scratch.parse_spec("gpt2 hidden_size=64 num_attention_heads=2"))
    assert (config.n_embd, config.n_head) == (64, 2)


@pytest.mark.parametrize("name", [*SMALL, "vit", "resnet", "audio-spectrogram-transformer", "wav2vec2"])
def test_a_type_alone_is_a_small_model(name: str) -> None:
    model = AutoModel.from_config(scratch.build_config(scratch.parse_spec(name)))
    assert 50_000 < sum(weights.numel() for weights in model.parameters()) < 2_000_000


def test_other_types_work_when_sizes_are_given() -> None:
    sizes = "hidden_size=32 intermediate_size=64 num_hidden_layers=2 num_attention_heads=2 num_key_value_heads=2"
    spec = scratch.parse_spec(f"llama {sizes} vocab_size=500")
    tokenizer = scratch.train_tokenizer(spec, ["some words to learn from"] * 3)
    model = AutoModel.from_config(scratch.build_config(spec, tokenizer))
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    with pytest.raises(UserError, match="give the sizes"):
        scratch.parse_spec("llama")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("brt", "no model type 'brt' .close: bert"),
        ("", "no model type ''"),
        ("bert hiden_size=64", "no 'hiden_size' .close: hidden_size"),
        ("bert hidden_size", "'hidden_size' is not a size"),
        ("bert hidden_size=abc", "expected int, got str"),
        ("bert hidden_size=64.5", "expected int, got float"),
        ("bert vocab_size=true", "expected int, got bool"),
        ("bert hidden_size=130", "130.*multiple"),
        ("vit hidden_size=130", "130.*multiple"),
        ("bart d_model=30", "30.*multiple"),
        ("bert hidden_size=0", "hidden_size must be at least 1"),
        ("t5 d_model=-4", "d_model must be at least 1"),
        ("gpt2 n_embd=64 hidden_size=64", "n_embd is given twice"),
        ("gpt2 activation_function=foo", "'foo' is not a value"),
        ("wav2vec2 conv_dim=[3,4]", "convolutional layers"),
        ("bert num_labels=3", "no 'num_labels'"),
    ],
)
def test_what_no_model_can_be_built_from(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scratch.parse_spec(text)


def test_a_base_model_and_from_scratch_exclude_each_other() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        base_model.resolve(str(REVIEWS), "bert")


def test_from_scratch_needs_a_train_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--from-scratch needs a --train-file"):
        train.parse(["--from-scratch", "bert", "--output-dir", str(tmp_path / "model")])


def test_random_weights_learn_at_a_higher_rate(tmp_path: Path) -> None:
    given = ["--train-file", "texts.csv", "--output-dir", str(tmp_path / "model")]
    rates = [
        train.parse([*given, *more])[1].learning_rate
        for more in ([], ["--from-scratch", "bert"], ["--from-scratch", "bert", "--learning-rate", "0.5"])
    ]
    assert rates == [1e-4, 1e-3, 0.5]


def test_train_says_what_is_wrong(tmp_path: Path) -> None:
    data = ("--train-file", REVIEWS / "test.csv", "--output-dir", tmp_path / "model")
    with pytest.raises(UserError, match="close: hidden_size"):
        train_here("--from-scratch", "bert hiden_size=64", *data)


# --- tokenizers


@pytest.mark.parametrize("name", SMALL)
def test_tokenizers_survive_saving(name: str, texts: list[str], tmp_path: Path) -> None:
    spec = scratch.parse_spec(f"{name} {SMALL[name]} vocab_size=600")
    tokenizer = scratch.train_tokenizer(spec, texts)
    config = scratch.build_config(spec, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.is_fast
    assert len(loaded) == len(tokenizer) == config.vocab_size == 600
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.model_max_length == tokenizer.model_max_length <= 512
    for text in texts[:100] + ODD:
        ids = tokenizer(text)["input_ids"]
        assert ids == loaded(text)["input_ids"] == plain.encode(text).ids
        pair = tokenizer(text, "and another")["input_ids"]
        assert pair == loaded(text, "and another")["input_ids"] == plain.encode(text, "and another").ids


@pytest.mark.parametrize("name", SMALL)
def test_tokenizers_are_reproducible(name: str, texts: list[str]) -> None:
    spec = scratch.parse_spec(f"{name} {SMALL[name]} vocab_size=600")
    first, second = (scratch.train_tokenizer(spec, texts).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", SMALL)
def test_special_tokens_are_those_of_the_configuration(name: str, texts: list[str]) -> None:
    spec = scratch.parse_spec(f"{name} {SMALL[name]} vocab_size=600")
    tokenizer = scratch.train_tokenizer(spec, texts)
    config = scratch.build_config(spec, tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id is not None
    assert config.eos_token_id == tokenizer.eos_token_id
    if config.is_encoder_decoder:
        start = {"bart": tokenizer.eos_token_id}.get(name, tokenizer.pad_token_id)
        assert config.decoder_start_token_id == start
    if name == "gpt2":
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
    if name in ("bert", "distilbert"):
        assert tokenizer.tokenize("GOOD") == tokenizer.tokenize("good")
    if name in ("roberta", "gpt2", "phi", "bart", "t5", "marian"):
        text = "A good thing, of parts"
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("name", SMALL)
def test_models_run_at_their_full_length(name: str, texts: list[str]) -> None:
    spec = scratch.parse_spec(f"{name} {SMALL[name]} vocab_size=600")
    tokenizer = scratch.train_tokenizer(spec, texts)
    model = AutoModel.from_config(scratch.build_config(spec, tokenizer)).eval()
    batch = tokenizer([" ".join(texts), "short"], truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[1] == tokenizer.model_max_length
    more = {"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        assert model(**batch, **more).last_hidden_state.isfinite().all()


def test_models_from_scratch_are_seeded(texts: list[str]) -> None:
    base = base_model.resolve(None, f"bert {SMALL['bert']} vocab_size=600")
    found = []
    for seed in (1, 1, 2):
        transformers.set_seed(seed)
        tokenizer = models.load_tokenizer(base, "a model", texts)
        model = models.load(
            base, AutoModel, "a model", tokenizer, **models.attention(Options(task="feature-extraction"))
        )
        found.append(model.get_input_embeddings().weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bert vocab_size=12", "characters alone are [5-9][0-9]"),
        ("gpt2 vocab_size=100", "characters alone are 258"),
        ("t5 vocab_size=50", "not large enough"),
    ],
)
def test_a_vocabulary_too_small_for_the_characters(text: str, message: str, texts: list[str]) -> None:
    with pytest.raises(UserError, match=message):
        scratch.train_tokenizer(scratch.parse_spec(text), texts)


def test_a_model_without_text_has_no_tokenizer() -> None:
    with pytest.raises(UserError, match="not a text model"):
        scratch.train_tokenizer(scratch.parse_spec("vit"), ["text"])


# --- corpora


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo\n".encode())
    assert corpus.read(path) == ["one\n\ntwo\n"]
    assert corpus.lines(corpus.read(path)) == ["one", "two"]


def test_a_table_has_a_document_in_each_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\n{"body": null}\n{"body": " "}\n{"body": "two"}\n', encoding="utf-8")
    assert corpus.read(path, "body") == ["one", "two"]
    with pytest.raises(UserError, match="--text-column"):
        corpus.read(path)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no text"), (b" \n", "no text"), (b"caf\xe9", "not UTF-8"), (None, "no such file")]
)
def test_broken_text_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        corpus.read(path)


def test_a_table_of_numbers_is_no_corpus(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="does not hold texts"):
        corpus.read(path)


def test_the_last_part_is_for_validation() -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    train, validation = corpus.split([text], 0.1, Path("a.txt"))
    assert train[0] + validation[0] == text
    assert validation[0].startswith("line 9")
    assert len(validation[0]) == pytest.approx(0.1 * len(text), abs=10)
    documents = [f"document {number}" for number in range(10)]
    assert corpus.split(documents, 0.2, Path("a.csv")) == (documents[:8], documents[8:])


def test_a_single_line_cannot_be_split() -> None:
    with pytest.raises(UserError, match="--validation-file"):
        corpus.split(["one line\n"], 0.1, Path("a.txt"))


@pytest.mark.parametrize("name", ["bert", "gpt2", "roberta", "t5"])
def test_packing_loses_no_token(name: str, texts: list[str]) -> None:
    tokenizer = scratch.train_tokenizer(scratch.parse_spec(f"{name} {SMALL[name]} vocab_size=600"), texts)
    documents = texts[:40]
    packed = corpus.pack(documents, tokenizer, 32)["input_ids"]
    around = len(tokenizer("")["input_ids"])
    assert [len(block) for block in packed[:-1]] == [32] * (len(packed) - 1)
    assert around < len(packed[-1]) <= 32
    special = set(tokenizer.all_special_ids)
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
    content = [token for block in packed for token in block if token not in special]
    assert content == [token for ids in plain for token in ids if token not in special]
    # One divider between documents, besides what is around each sequence.
    assert sum(map(len, packed)) - around * len(packed) == sum(map(len, plain)) + len(documents) - 1


def test_a_long_document_is_tokenized_in_pieces(texts: list[str]) -> None:
    tokenizer = scratch.train_tokenizer(scratch.parse_spec(f"bert {SMALL['bert']} vocab_size=600"), texts)
    document = "\n".join(texts)
    assert len(document) > 2 * corpus._PIECE
    blocks = corpus.pack([document], tokenizer, 128)["input_ids"]
    ids = [token for block in blocks for token in block[1:-1]]
    assert ids == tokenizer(document, add_special_tokens=False)["input_ids"]


def test_lines_are_sequences_of_their_own(texts: list[str]) -> None:
    tokenizer = scratch.train_tokenizer(scratch.parse_spec(f"bert {SMALL['bert']} vocab_size=600"), texts)
    long = " ".join(["good"] * 20)
    rows: Any = corpus.by_line([f"good\n\n{long}\n"], tokenizer, 16)
    assert rows["length"] == [len(ids) for ids in rows["input_ids"]]
    assert all(ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id for ids in rows["input_ids"])
    assert sum(rows["length"]) - 2 * len(rows) == 21


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("bert hidden_size=160 num_attention_heads=4", "initializer_range", 0.05),
        ("bart d_model=160", "init_std", 0.05),
        ("gpt2 n_embd=40 n_head=4", "initializer_range", 0.1),
        ("gpt2 initializer_range=0.3", "initializer_range", 0.3),
    ],
)
def test_the_first_weights_suit_the_width(text: str, name: str, expected: float) -> None:
    assert getattr(scratch.build_config(scratch.parse_spec(text)), name) == pytest.approx(expected)
