"""Summarization and translation: equal to `generate`, whatever the batch; training; every transport."""

import csv
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from conftest import ROOT, HubClient, Served, build_here, train_here
from datasets import Dataset
from scratch_models import reviews, write
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import marble_client
import train
from handler.engine import Engine
from handler.errors import InternalError, InvalidInput, InvalidParameter, Overloaded, RequestError, TooLarge
from handler.messages import Request, Result
from handler.tasks.summarization import Summarization
from training import base_model, tasks
from training.errors import UserError
from training.options import Options
from training.tasks.sequence_to_sequence import rouge_l

FAMILIES = ("t5", "bart", "marian")
PHRASES, MESSAGES = ROOT / "examples" / "phrases", ROOT / "examples" / "messages"
LENGTH = 64


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families") / request.param
    return write(folder, request.param, AutoModelForSeq2SeqLM, "summarization", overflow="truncate", max_new_tokens=40)


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bart") / "bart"
    return write(folder, "bart", AutoModelForSeq2SeqLM, "summarization", overflow="error", max_new_tokens=40)


@cache
def engine_of(folder: Path) -> Engine:
    return Engine(folder)


@cache
def reference_of(folder: Path) -> tuple[Any, Any]:
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def reference(folder: Path, text: str, **parameters: Any) -> str:
    """What `generate` gives to one text."""
    model, tokenizer = reference_of(folder)
    encoded = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    [ids] = model.generate(**inputs, **{"max_new_tokens": 40, **parameters})
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def ask(engine: Engine, text: Any, **parameters: Any) -> Any:
    """The answer to one text. Raises its error."""
    [outcome] = engine.predict([Request([text], parameters)])
    if isinstance(outcome, RequestError):
        raise outcome
    return outcome.predictions[0][engine.task.answer]


def ordinary() -> list[str]:
    return [text for text in reviews("test") if len(text) > 10]


# --- equal to `generate`


def test_greedy_answers_are_those_of_generate(family: Path) -> None:
    texts = ordinary()[:100]
    engine = engine_of(family)
    outcomes = engine.predict([Request([text], {"max_new_tokens": 12}) for text in texts])
    expected = [reference(family, text, max_new_tokens=12) for text in texts]
    assert len(texts) == 100
    assert [outcome.predictions for outcome in outcomes] == [[{"summary_text": text}] for text in expected]
    assert len(set(expected)) > 10


@pytest.mark.parametrize(
    "parameters",
    [
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": 2, "early_stopping": True, "no_repeat_ngram_size": 2},
        {"repetition_penalty": 2},
        {"min_new_tokens": 9, "max_new_tokens": 9},
        {"max_length": 5},
        {"min_length": 20, "max_length": 25},
        {"no_repeat_ngram_size": 1},
    ],
)
def test_parameters_of_generate(family: Path, parameters: dict[str, Any]) -> None:
    floats = {name: float(parameters[name]) for name in ("length_penalty", "repetition_penalty") if name in parameters}
    expected = {**parameters, **floats}
    if "max_length" in parameters:
        expected["max_new_tokens"] = None
    for text in ordinary()[:4]:
        found = ask(engine_of(family), text, **parameters)
        assert found == reference(family, text, **expected)
        assert found == ask(engine_of(family), text, generate_parameters=parameters)


def test_parameters_may_stand_in_both_places(family: Path) -> None:
    [text] = ordinary()[:1]
    found = ask(engine_of(family), text, generate_parameters={"num_beams": 2}, max_new_tokens=7)
    assert found == reference(family, text, num_beams=2, max_new_tokens=7)


def test_sampling_by_a_seed(family: Path) -> None:
    [text] = ordinary()[:1]
    engine = engine_of(family)
    torch.manual_seed(11)
    expected = reference(family, text, do_sample=True, temperature=0.7, top_k=20)
    assert ask(engine, text, temperature=0.7, top_k=20, seed=11) == expected
    answers = {ask(engine, text, temperature=2, seed=seed) for seed in range(5)}
    assert len(answers) == 5
    assert len({ask(engine, text, do_sample=True, temperature=5) for _ in range(5)}) > 1
    assert ask(engine, text, do_sample=False, temperature=5) == reference(family, text)


def test_the_models_own_generation_config_is_the_default(bart: Path, tmp_path: Path) -> None:
    for file in bart.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**config, "num_beams": 3, "max_length": 8}))
    [text] = ordinary()[:1]
    assert ask(Engine(tmp_path), text) == reference(bart, text, num_beams=3, max_new_tokens=7)
    assert ask(Engine(tmp_path), text, num_beams=1, max_new_tokens=9) == reference(bart, text, max_new_tokens=9)


def test_blanks_before_punctuation(family: Path) -> None:
    _, tokenizer = reference_of(family)
    engine = engine_of(family)
    task: Any = engine.task
    ids = tokenizer("It is good , is n't it ?")["input_ids"]
    for clean in (True, False):
        expected = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=clean)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task, "_run", lambda rows, source, deadline: [ids] * len(rows))
            assert ask(engine, "a text", clean_up_tokenization_spaces=clean) == expected


# --- whatever the batch


def test_requests_with_parameters_of_their_own_share_a_batch(family: Path) -> None:
    engine = engine_of(family)
    kinds: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"max_new_tokens": 5}, {"temperature": 0.8, "seed": 4}]
    asked = [Request([text], kinds[number % 4]) for number, text in enumerate(ordinary()[:24])]
    together = engine.predict([*asked, Request([7]), Request(["a"], {"top": 1})])
    alone = [engine.predict([request])[0] for request in asked]
    assert [outcome.predictions for outcome in together[:-2]] == [outcome.predictions for outcome in alone]
    assert [type(outcome) for outcome in together[-2:]] == [InvalidInput, InvalidParameter]


def test_small_batches_give_the_same_answers(family: Path) -> None:
    texts = ordinary()[:12]
    [wide] = engine_of(family).predict([Request(texts)])
    [narrow] = Engine(family, token_budget=8).predict([Request(texts)])
    assert wide.predictions == narrow.predictions


# --- long texts


def test_what_is_cut_off_is_said(family: Path) -> None:
    text = "It is not a good film. " * 40
    [result] = engine_of(family).predict([Request([text])])
    assert isinstance(result, Result)
    assert result.usage.truncated
    assert result.usage.tokens == len(reference_of(family)[1](text)["input_ids"])
    assert result.predictions[0]["summary_text"] == reference(family, text)
    [short] = engine_of(family).predict([Request(["It is a good film."])])
    assert not short.usage.truncated


@pytest.mark.parametrize("parameters", [{"overflow": "error"}, {"truncation": "do_not_truncate"}])
def test_a_long_text_is_refused_where_it_must_not_be_cut(family: Path, parameters: dict[str, Any]) -> None:
    with pytest.raises(TooLarge, match="tokens and the model takes 64"):
        ask(engine_of(family), "word " * 200, **parameters)


def test_the_archives_policy_is_the_default(bart: Path) -> None:
    text = "word " * 200
    with pytest.raises(TooLarge):
        ask(engine_of(bart), text)
    for parameters in ({"overflow": "truncate"}, {"truncation": "longest_first"}, {"truncation": "only_first"}):
        assert ask(engine_of(bart), text, **parameters) == reference(bart, text)


# --- what is refused


@pytest.mark.parametrize(
    "parameters",
    [
        {"generate_parameters": {"tops": 1}},
        {"generate_parameters": {"overflow": "error"}},
        {"generate_parameters": [1]},
        {"generate_parameters": {"num_beams": 2}, "num_beams": 2},
        {"num_beams": 9},
        {"num_beams": 0},
        {"num_beams": True},
        {"temperature": 0},
        {"top_p": 1.5},
        {"max_new_tokens": 41},
        {"max_new_tokens": 0},
        {"max_length": 1},
        {"min_length": 60},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"max_length": 9, "max_new_tokens": 8},
        {"min_length": 9, "min_new_tokens": 8},
        {"truncation": "only_second"},
        {"truncation": "longest_first", "overflow": "truncate"},
        {"overflow": "window"},
        {"src_lang": "en", "tgt_lang": "de"},
        {"seed": -1},
        {"clean_up_tokenization_spaces": 1},
    ],
)
def test_bad_parameters(bart: Path, parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter):
        ask(engine_of(bart), "A text.", **parameters)


@pytest.mark.parametrize("value", [7, None, {"text": "a"}, ["a"]])
def test_bad_inputs(bart: Path, value: Any) -> None:
    with pytest.raises(InvalidInput):
        ask(engine_of(bart), value)


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_an_empty_text_is_answered_as_generate_answers_it(family: Path, text: str) -> None:
    assert ask(engine_of(family), text) == reference(family, text)


def test_too_much_text(bart: Path) -> None:
    outcomes = engine_of(bart).predict([Request(["x" * 1_000_001], {"overflow": "truncate"}), Request(["a film"])])
    assert [type(outcome) for outcome in outcomes] == [TooLarge, Result]


def test_an_answer_that_takes_too_long_is_given_up(bart: Path) -> None:
    engine = Engine(bart, max_generation_seconds=0.0)
    assert [type(outcome) for outcome in engine.predict([Request(["A film."]), Request(["A"])])] == [Overloaded] * 2
    slow = Engine(bart, max_generation_seconds=0.2, max_new_tokens=200)
    slow.predict([Request(["A film."], {"max_new_tokens": 1})])
    started = time.monotonic()
    outcomes = slow.predict([Request([text], {"min_new_tokens": 200, "num_beams": 8}) for text in ordinary()[:30]])
    assert time.monotonic() - started < 5
    assert Overloaded in map(type, outcomes)


@pytest.mark.parametrize("parameters", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_scores_that_are_not_numbers_never_become_an_answer(bart: Path, parameters: dict[str, Any]) -> None:
    engine = Engine(bart)
    task: Any = engine.task
    with torch.no_grad():
        task._model.model.decoder.layers[0].fc1.bias.fill_(float("nan"))
    with pytest.raises(InternalError, match="not a number"):
        ask(engine, "A film.", **parameters)


def test_a_row_of_numbers_is_answered_beside_one_without(bart: Path) -> None:
    engine = Engine(bart)
    task: Any = engine.task
    text, other = ordinary()[:2]
    poisoned = task.tokenizer(text)["input_ids"][3]
    with torch.no_grad():  # of no use to the other text, and the answers begin with another token
        task._model.model.encoder.embed_tokens = torch.nn.Embedding.from_pretrained(
            task._model.model.shared.weight.clone()
        )
        task._model.model.encoder.embed_tokens.weight[poisoned] = float("nan")
    assert poisoned not in task.tokenizer(other)["input_ids"]
    first, second = engine.predict([Request([text]), Request([other])])
    assert isinstance(first, InternalError)
    assert second.predictions[0]["summary_text"] == reference(bart, other)


def test_an_encoder_is_no_model_for_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "bert", "bert", transformers.AutoModelForMaskedLM, "summarization")
    with pytest.raises(ValueError, match="no encoder-decoder"):
        Engine(folder)


def naughty(shared: Path) -> list[str]:
    lines = (shared / "naughty_strings" / "naughty.jsonl").read_text(encoding="utf-8").split("\n")
    return [str(json.loads(line)["text"]) for line in lines if line]


def test_naughty_strings(family: Path, shared: Path) -> None:
    texts = naughty(shared)
    outcomes = engine_of(family).predict([Request([text], {"max_new_tokens": 3}) for text in texts])
    for outcome in outcomes:
        assert isinstance(outcome, Result)
        json.dumps(outcome.predictions).encode()


def test_drift() -> None:
    assert Summarization.drift({"summary_text": "a"}, {"summary_text": "a"}) == 0
    assert Summarization.drift({"summary_text": "a"}, {"summary_text": "b"}) == float("inf")


# --- languages


@pytest.fixture(scope="module")
def mbart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many languages."""
    folder = tmp_path_factory.mktemp("mbart") / "mbart"
    return write(folder, "mbart", AutoModelForSeq2SeqLM, "translation", max_new_tokens=8)


def test_languages_of_a_model_that_has_them(mbart: Path) -> None:
    engine = engine_of(mbart)
    model, tokenizer = reference_of(mbart)
    text = "It is a good film."
    usual = ask(engine, text)
    for source, target in (("de_DE", "fr_XX"), ("en_XX", "de_DE")):
        tokenizer.src_lang = source
        encoded = tokenizer(text, return_tensors="pt")
        assert encoded["input_ids"][0, -1] == tokenizer.convert_tokens_to_ids(source)
        begin = tokenizer.convert_tokens_to_ids(target)
        [ids] = model.generate(**encoded, forced_bos_token_id=begin, max_new_tokens=8)
        assert ids[1] == begin
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert ask(engine, text, src_lang=source, tgt_lang=target) == expected
    assert ask(engine, text) == usual  # no request leaves its language behind
    with pytest.raises(InvalidParameter, match="must be one of ar_AR, cs_CZ"):
        ask(engine, text, src_lang="en_XX", tgt_lang="xx")
    with pytest.raises(InvalidParameter, match="send both"):
        ask(engine, text, src_lang="en_XX")


# --- reading and scoring


def options(**changes: Any) -> Options:
    return replace(Options(), **changes)


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("task", "row", "more"),
    [
        ("summarization", {"text": "a", "summary": "b"}, {}),
        ("summarization", {"article": "a", "highlights": "b", "id": 1}, {}),
        ("summarization", {"dialogue": "a", "summary": "b"}, {}),
        ("summarization", {"body": "a", "summary": "b"}, {"text_column": "body"}),
        ("summarization", {"body": "a", "head": "b"}, {"text_column": "body", "target_column": "head"}),
        ("translation", {"source": "a", "target": "b"}, {}),
        ("translation", {"text": "a", "target": "b"}, {}),
        ("translation", {"en": "a", "de": "b", "fr": "c"}, {"source_lang": "en", "target_lang": "de"}),
        ("translation", {"translation": {"de": "b", "en": "a"}}, {"source_lang": "en", "target_lang": "de"}),
    ],
)
def test_columns(task: str, row: dict[str, Any], more: dict[str, str], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", row, row)
    found = tasks.load(task).read(options(task=task, train_file=path, **more), 1, base_model.resolve(None))
    assert found.train is not None
    assert found.validation is not None
    assert [*found.train, *found.validation] == [{"text": "a", "target": "b"}] * 2


@pytest.mark.parametrize(
    ("task", "row", "more", "message"),
    [
        ("summarization", {"a": "a", "b": "b"}, {}, "'a', 'b' are not the usual ones"),
        ("summarization", {"text": "a", "b": "b"}, {"target_column": "c"}, "no column 'c'"),
        ("summarization", {"text": "a", "summary": ""}, {}, "empty target"),
        ("summarization", {"text": 1, "summary": "b"}, {}, "empty text"),
        ("translation", {"source": "a", "target": "b"}, {"source_lang": "en"}, "belong together"),
        ("translation", {"source": "a", "target": "b"}, {"source_lang": "en", "target_lang": "de"}, "no columns 'en'"),
        ("translation", {"translation": {"en": "a"}}, {"source_lang": "en", "target_lang": "de"}, "empty target"),
    ],
)
def test_bad_data(task: str, row: dict[str, Any], more: dict[str, str], message: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", row, row)
    with pytest.raises(UserError, match=message):
        tasks.load(task).read(options(task=task, train_file=path, **more), 1, base_model.resolve(None))


def test_a_window_is_no_policy_for_it(bart: Path) -> None:
    task = tasks.load("summarization")
    model, tokenizer = reference_of(bart)
    with pytest.raises(UserError, match="--overflow window"):
        task.settings(model, tokenizer, options(overflow="window"))


def test_targets_longer_than_an_answer_can_be(bart: Path, tmp_path: Path) -> None:
    task: Any = tasks.load("summarization")
    model, tokenizer = reference_of(bart)
    long = Dataset.from_dict({"text": ["a", "b"], "target": ["word " * 300, "b"]})
    splits = tasks.Splits(long, long, None)
    arguments: Any = train.parse(["--output-dir", str(tmp_path / "model")])[1]
    with pytest.raises(UserError, match=r"1 target.* 255 tokens"):
        task.trainer(model, tokenizer, splits, options(), arguments, {"max_length": 64})


def test_rouge_l() -> None:
    assert rouge_l(["The cat sat."], ["the cat sat"]) == 1
    # Four words in common, in order, of six and five.
    assert rouge_l(["the cat sat on the mat"], ["the cat on a mat"]) == pytest.approx(2 * 4 / (6 + 5))
    assert rouge_l(["mat the"], ["the mat"]) == pytest.approx(0.5)
    assert rouge_l(["", "a"], ["a", "a"]) == pytest.approx(0.5)


def test_scores() -> None:
    same = tasks.load("translation").score(
        [{"translation_text": "Der Hund schläft im Garten."}], ["Der Hund schläft im Garten."], []
    )
    assert same == {"rows": 1, "chrf": pytest.approx(1), "bleu": pytest.approx(1)}
    other = tasks.load("summarization").score([{"summary_text": "abc"}], ["xyz"], [])
    assert other == {"rows": 1, "chrf": 0, "rouge_l": 0}


def test_the_shipped_sets_are_split_without_overlap() -> None:
    for folder, size in ((PHRASES, 365), (MESSAGES, 240)):
        rows = []
        for split in ("train", "validation", "test"):
            with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
                rows += [tuple(row.values()) for row in csv.DictReader(file)]
        assert len(rows) == size == len({text for text, _ in rows})
        assert all(text == text.strip() and target == target.strip() for text, target in rows)


# --- trained by train.py, built by build_mar.sh, served


def trained(place: Path, task: str, data: Path, sizes: str, *more: object) -> Path:
    train_here(
        *("--task", task, "--from-scratch", sizes, "--output-dir", place, "--learning-rate", 5e-3, "--seed", 2),
        *("--train-file", data / "train.csv", "--validation-file", data / "validation.csv"),
        *("--num-train-epochs", 6, *more),
    )
    return place


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Marian trained for a moment on the shipped phrases."""
    place = tmp_path_factory.mktemp("bundles") / "phrases"
    sizes = "d_model=32 encoder_layers=1 decoder_layers=1 encoder_attention_heads=2 decoder_attention_heads=2"
    return trained(
        place, "translation", PHRASES, f"marian {sizes} encoder_ffn_dim=64 decoder_ffn_dim=64 vocab_size=300"
    )


@pytest.fixture(scope="module")
def summarizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 trained for a moment on the shipped messages."""
    place = tmp_path_factory.mktemp("bundles") / "messages"
    sizes = "t5 d_model=32 d_ff=64 num_heads=2 d_kv=16 num_layers=1 vocab_size=400"
    return trained(place, "summarization", MESSAGES, sizes, "--source-prefix", "summarize: ", "--max-length", 96)


@pytest.mark.parametrize("name", ["translator", "summarizer"])
def test_training_learns(name: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(name)
    metrics = json.loads((bundle / "metrics.json").read_text())
    losses = [epoch["eval_loss"] for epoch in metrics["epochs"]]
    assert losses[-1] < losses[0]
    assert metrics["epochs"][-1]["eval_token_accuracy"] > 0.1
    scores = metrics["splits"]["validation"]
    assert 0 < scores["chrf"] < 1
    assert metrics["primary"] in scores


def test_answers_may_be_half_as_long_again_as_the_longest_target(translator: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(translator)
    with (PHRASES / "train.csv").open(encoding="utf-8", newline="") as file:
        longest = max(len(tokenizer(row["target"])["input_ids"]) for row in csv.DictReader(file))
    config = json.loads((translator / "generation_config.json").read_text())
    assert config["max_new_tokens"] == longest * 3 // 2


def test_the_prefix_is_put_before_each_text(summarizer: Path) -> None:
    text = "The lamp came without a plug."
    model, tokenizer = reference_of(summarizer)
    encoded = tokenizer(f"summarize: {text}", return_tensors="pt")
    [ids] = model.generate(**encoded)
    assert ask(engine_of(summarizer), text) == tokenizer.decode(ids, skip_special_tokens=True)
    [result] = engine_of(summarizer).predict([Request([text])])
    assert result.usage.tokens == encoded["input_ids"].shape[1]


def test_training_is_reproducible(tmp_path: Path) -> None:
    sizes = "t5 d_model=16 d_ff=16 num_heads=2 d_kv=8 num_layers=1 vocab_size=200"
    rows = [{"source": text, "target": text.upper()} for text in ("one two", "three", "four five", "six")]
    data = ("--train-file", jsonl(tmp_path / "few.jsonl", *rows), "--validation-share", 0.5)
    found = []
    for name in ("one", "other"):
        place = tmp_path / name
        train_here("--task", "translation", "--from-scratch", sizes, "--output-dir", place, "--max-steps", 3, *data)
        found.append([(place / file).read_bytes() for file in ("model.safetensors", "tokenizer.json")])
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def served(translator: Path, summarizer: Path, shared_store: Path, serve_models: Callable[..., Served]) -> Served:
    build_here(translator, shared_store, "phrases", precision="auto")
    build_here(summarizer, shared_store, "messages", precision="auto")
    return serve_models("phrases", "messages")


def test_inference_client(inference_client: HubClient, translator: Path, summarizer: Path) -> None:
    translation = inference_client("phrases")
    text = "The dog is sleeping in the garden."
    found = translation.translation(text, generate_parameters={"num_beams": 2, "max_new_tokens": 9})
    assert found.translation_text == reference(translator, text, num_beams=2, max_new_tokens=9)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as raised:
        translation.translation(text, src_lang="en", tgt_lang="de")
    assert raised.value.response.status_code == 422
    assert "src_lang" in raised.value.response.json()["error"]

    summarization = inference_client("messages")
    message = "The kettle came with a hole in it. Please send me a new one."
    found = summarization.summarization(message, truncation="longest_first", clean_up_tokenization_spaces=False)
    assert found.summary_text == ask(engine_of(summarizer), message)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as raised:
        summarization.summarization(message * 30, truncation="do_not_truncate")
    assert raised.value.response.status_code == 413


def test_marble_client_over_rest_and_grpc(served: Served, translator: Path) -> None:
    texts = ["The dog is sleeping.", "Where is my key?"]
    expected = [{"translation_text": reference(translator, text, max_new_tokens=7)} for text in texts]
    with served.rest_client() as rest, served.grpc_client() as grpc:
        for client in (rest, grpc):
            assert client.predict("phrases", texts, parameters={"max_new_tokens": 7}).predictions == expected
            answer = client.predict("messages", "word " * 300, parameters={"details": True})
            assert answer.usage is not None
            assert answer.usage.truncated
            with pytest.raises(marble_client.InvalidParameter):
                client.predict("phrases", texts[0], parameters={"num_beams": 100})


def test_naughty_strings_leave_the_workers_alive(served: Served, shared: Path, same_workers: None) -> None:
    with served.rest_client() as client:
        for name in ("phrases", "messages"):
            answer = client.predict(name, naughty(shared), parameters={"max_new_tokens": 3})
            assert len(answer.predictions) == len(naughty(shared))
