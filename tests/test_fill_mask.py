"""Fill-mask: equal to the pipeline of transformers, for every family and transport; pretraining, then fine-tuning."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import transformers
from conftest import NO_CHECKPOINTS, REVIEWS, HubClient, Served, build_here, train_here
from scratch_models import reviews, write
from text_models import converted
from transformers import AutoModelForMaskedLM

import marble_client
from handler import golden
from handler.engine import Engine
from handler.errors import InvalidInput, InvalidParameter, RequestError, TooLarge
from handler.messages import Request, Result
from handler.tasks.fill_mask import FillMask
from training import tasks

FAMILIES = ("bert", "roberta", "distilbert", "deberta-v2")
Fill = dict[str, Any]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families") / request.param
    return write(folder, request.param, AutoModelForMaskedLM, "fill-mask")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bert") / "bert", "bert", AutoModelForMaskedLM, "fill-mask")


@pytest.fixture(scope="module")
def engine(bert: Path) -> Engine:
    return Engine(bert)


def masked_texts(mask: str) -> list[str]:
    """120 reviews with one to three words hidden."""
    chance = random.Random(7)
    texts = []
    for text in [text for text in reviews("test") if 3 < len(text.split()) < 20][:120]:
        words = text.split(" ")
        for place in chance.sample(range(len(words)), chance.choice((1, 1, 2, 3))):
            words[place] = mask
        texts.append(" ".join(words))
    return texts


@cache
def pipeline(folder: Path) -> Any:
    return transformers.pipeline("fill-mask", model=str(folder))


@cache
def engine_of(folder: Path) -> Engine:
    return Engine(folder)


def mask_of(folder: Path) -> str:
    return str(pipeline(folder).tokenizer.mask_token)


def ask(engine: Engine, text: Any, **parameters: Any) -> Any:
    """The prediction for one text. Raises its error."""
    [outcome] = engine.predict([Request([text], parameters)])
    if isinstance(outcome, RequestError):
        raise outcome
    return outcome.predictions[0]


def assert_same(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    assert FillMask.drift(expected, found) <= tolerance
    before, after = (
        [fill for fills in (each if isinstance(each[0], list) else [each]) for fill in fills]
        for each in (expected, found)
    )
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        if one["token"] == other["token"]:  # two that are equally probable may change places
            assert (one["token_str"], one["sequence"]) == (other["token_str"], other["sequence"])
        assert other["score"] == pytest.approx(one["score"], abs=tolerance)


def naughty(shared: Path) -> list[str]:
    lines = (shared / "naughty_strings" / "naughty.jsonl").read_text(encoding="utf-8").split("\n")
    return [str(json.loads(line)["text"]) for line in lines if line]


# --- equal to the pipeline


def test_every_family_fills_as_the_pipeline_does(family: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    train_here("--task", "fill-mask", "--base-model", family, "--output-dir", bundle, "--max-length", 64)
    texts = masked_texts(mask_of(family))
    reference = pipeline(family)(texts)
    assert len(texts) == 120
    for engine in (engine_of(family), Engine(converted(bundle))):
        for outcome, expected in zip(engine.predict([Request([text]) for text in texts]), reference, strict=True):
            assert_same(outcome.predictions[0], expected)
    assert max(fill["score"] for answer in reference for fill in answer if isinstance(fill, dict)) > 0.1


@pytest.mark.parametrize(
    "targets", [["good", "bad", "price"], ["good"], ["Unheardofword", "good", "good", "🙂"], ["  "]]
)
def test_targets_are_taken_as_the_pipeline_takes_them(family: Path, targets: list[str]) -> None:
    text = f"The {mask_of(family)} was good, the staff were not."
    try:
        expected = pipeline(family)(text, targets=targets)
    except ValueError:
        with pytest.raises(InvalidParameter, match="'targets' has no text in it"):
            ask(engine_of(family), text, targets=targets)
    else:
        assert_same(ask(engine_of(family), text, targets=targets), expected)


@pytest.mark.parametrize("top_k", [1, 3, 200])
def test_top_k(family: Path, top_k: int) -> None:
    text = f"A {mask_of(family)} pair of boots."
    found = ask(engine_of(family), text, top_k=top_k)
    assert len(found) == top_k
    assert_same(found, pipeline(family)(text, top_k=top_k))


@pytest.mark.parametrize(
    "text",
    [
        "{0}",
        "{0}{0}",
        "{0} {0} {0}",
        "Ünïcödé 漢字 {0} 🙂",
        "a\n\n{0}\tb",
        "don 't {0} , it 's bad .",
        "[SEP] {0} [PAD] [CLS] </s>",
    ],
)
def test_odd_texts(family: Path, text: str) -> None:
    asked = text.format(mask_of(family))
    assert_same(ask(engine_of(family), asked), pipeline(family)(asked))


def test_decoded_texts_are_cleaned_up_where_the_tokenizer_asks_for_it(bert: Path, tmp_path: Path) -> None:
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "clean_up_tokenization_spaces": True}))
    text = "It's a [MASK] , is n't it ? Yes , it 's !"
    found = ask(Engine(tmp_path), text)
    assert found[0]["sequence"].endswith(", isn't it? yes, it's!")
    assert_same(found, pipeline(tmp_path)(text))


# --- whatever the batch


def test_answers_do_not_depend_on_the_batch(engine: Engine, bert: Path) -> None:
    texts = masked_texts("[MASK]")[:40]
    alone = [ask(engine, text) for text in texts]
    [together] = engine.predict([Request(texts)])
    [narrow] = Engine(bert, token_budget=8).predict([Request(texts)])
    for first, second, third in zip(alone, together.predictions, narrow.predictions, strict=True):
        assert_same(second, first, 1e-5)
        assert_same(third, first, 1e-5)


def test_requests_with_parameters_of_their_own_share_a_batch(engine: Engine) -> None:
    text = "The [MASK] was good."
    first, second, third = engine.predict(
        [Request([text], {"top_k": 2}), Request([text], {"targets": ["the", "was"]}), Request(["no mask"])]
    )
    assert len(first.predictions[0]) == 2
    assert {fill["token_str"] for fill in second.predictions[0]} == {"the", "was"}
    assert isinstance(third, InvalidInput)


# --- long texts


def test_a_mask_in_a_long_text_is_found_wherever_it_is(engine: Engine) -> None:
    words = ["the", "price", "was", "fair", "and", "the", "staff", "were", "kind"] * 60
    for tenth in range(10):
        place = tenth * len(words) // 10 + 3
        text = " ".join([*words[:place], "[MASK]", *words[place + 1 :]])
        [fill] = ask(engine, text, overflow="window", targets=["good"])
        assert fill["sequence"].split() == [*words[:place], "good", *words[place + 1 :]]


def test_a_mask_in_two_windows_is_one_mask(engine: Engine) -> None:
    # Windows of 62 tokens of text go on by 54: the tokens 54 to 61 are in the first and in the second.
    words = ["the"] * 150
    for place in (53, 54, 57, 58, 61, 62):
        text = " ".join([*words[:place], "[MASK]", *words[place:]])
        [fill] = ask(engine, text, overflow="window", targets=["was"])
        assert fill["sequence"] == " ".join([*words[:place], "was", *words[place:]])


def test_windows_fill_a_mask_with_the_text_around_it(engine: Engine) -> None:
    words = ["the"] * 300
    inner = " ".join([*words[:31], "[MASK]", *words[:30]])  # what the window that has it in the middle has
    at_150 = ask(engine, " ".join([*words[:31], "[MASK]", *words]), overflow="window")
    assert [fill["token"] for fill in at_150] == [fill["token"] for fill in ask(engine, inner)]


def test_what_is_cut_off_is_said(engine: Engine) -> None:
    text = "A [MASK] pair of boots. " + "word " * 100
    [result] = engine.predict([Request([text])])
    assert isinstance(result, Result)
    assert result.usage.truncated
    assert result.usage.tokens > 100
    [result] = engine.predict([Request(["word " * 100 + "[MASK]"])])
    assert isinstance(result, InvalidInput)
    assert "[MASK] is behind what the model takes" in str(result)
    assert isinstance(engine.predict([Request([text], {"overflow": "error"})])[0], TooLarge)


# --- what is refused


@pytest.mark.parametrize("text", ["no mask", "", "[mask]", "[MASK", "漢字"])
def test_no_mask(engine: Engine, text: str) -> None:
    with pytest.raises(InvalidInput, match=r"put \[MASK\] where"):
        ask(engine, text)


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 0},
        {"top_k": "5"},
        {"top_k": True},
        {"targets": "good"},
        {"targets": [1]},
        {"targets": []},
        {"tops": 1},
    ],
)
def test_bad_parameters(engine: Engine, parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter):
        ask(engine, "A [MASK].", **parameters)


@pytest.mark.parametrize("value", [7, None, ["a [MASK]"], {"text": "a [MASK]", "more": 1}])
def test_bad_inputs(engine: Engine, value: Any) -> None:
    with pytest.raises(InvalidInput):
        ask(engine, value)


def test_more_fills_than_a_text_may_have(engine: Engine) -> None:
    with pytest.raises(TooLarge, match="510 fills"):
        ask(engine, "[MASK] [MASK] [MASK]", top_k=170)
    with pytest.raises(TooLarge):
        ask(engine, "[MASK]", top_k=10**12)
    assert len(ask(engine, "[MASK]", top_k=10**12, targets=["good", "bad"])) == 2
    with pytest.raises(TooLarge, match="characters"):
        ask(engine, "[MASK]", targets=["x" * 600_000, "y" * 600_000])


def test_half_of_a_surrogate_pair(engine: Engine) -> None:
    outcomes = engine.predict(
        [Request(["[MASK] \ud800"]), Request(["[MASK]"], {"targets": ["\ud800"]}), Request(["[MASK]"])]
    )
    assert [getattr(outcome, "code", 200) for outcome in outcomes] == [400, 400, 200]


def test_naughty_strings(engine: Engine, shared: Path) -> None:
    texts = naughty(shared)
    outcomes = engine.predict([Request([f"{text} [MASK]"], {"overflow": "window"}) for text in texts])
    for outcome in outcomes:
        assert isinstance(outcome, Result | InvalidInput | TooLarge)
        json.dumps(getattr(outcome, "predictions", None)).encode()
    assert sum(isinstance(outcome, Result) for outcome in outcomes) > 0.9 * len(texts)


def test_a_tokenizer_without_a_mask(bert: Path, tmp_path: Path) -> None:
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "mask_token": None}))
    with pytest.raises(ValueError, match="no mask token"):
        Engine(tmp_path)


# --- drift


def test_drift() -> None:
    fills = [{"token": 1, "score": 0.5}, {"token": 2, "score": 0.2}]
    assert FillMask.drift(fills, [{"token": 2, "score": 0.23}, {"token": 1, "score": 0.48}]) == pytest.approx(0.03)
    # Token 3 had at most 0.2 before and 2 has at most 0.21 now.
    assert FillMask.drift(fills, [{"token": 1, "score": 0.5}, {"token": 3, "score": 0.21}]) == pytest.approx(0.01)
    assert FillMask.drift([fills], [fills, fills]) == float("inf")
    assert np.isnan(FillMask.drift(fills, [{"token": 1, "score": float("nan")}, {"token": 2, "score": 0.2}]))


# --- trained by train.py, built by build_mar.sh, served


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT pretrained for some steps on the shipped reviews."""
    place = tmp_path_factory.mktemp("pretrained") / "reviews-lm"
    sizes = "bert hidden_size=32 num_hidden_layers=1 num_attention_heads=2 intermediate_size=64 vocab_size=1000"
    steps = ("--max-steps", 60, "--eval-strategy", "steps", "--eval-steps", 30, "--save-strategy", "steps")
    train_here(
        *("--task", "fill-mask", "--from-scratch", sizes, "--output-dir", place),
        *("--train-file", REVIEWS / "train.csv", "--validation-file", REVIEWS / "validation.csv"),
        *(*steps, "--save-steps", 30, "--learning-rate", 5e-3, "--max-length", 64, "--seed", 3),
    )
    return place


def test_pretraining_learns(pretrained: Path) -> None:
    metrics = json.loads((pretrained / "metrics.json").read_text())
    losses = [epoch["eval_loss"] for epoch in metrics["epochs"]]
    assert losses[-1] < losses[0] < np.log(1000)  # a model that knows nothing has the logarithm of the vocabulary
    assert metrics["epochs"][-1]["eval_perplexity"] == pytest.approx(np.exp(losses[-1]), rel=0.05)
    assert 0 < metrics["epochs"][-1]["eval_accuracy"] < 1
    scores = metrics["splits"]["validation"]
    assert scores["rows"] > 300
    assert 0 <= scores["accuracy"] <= scores["top_5_accuracy"] <= 1
    assert scores["top_5_accuracy"] > 0


def test_examples_hide_whole_words_that_can_be_guessed(pretrained: Path) -> None:
    rows = [json.loads(line) for line in (pretrained / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = reviews("validation")
    vocabulary = transformers.AutoTokenizer.from_pretrained(pretrained).get_vocab()
    for row in rows:
        before, after = row["inputs"].split("[MASK]")
        assert row["target"] in vocabulary
        assert any(
            text.startswith(before.strip()) and text.strip().endswith(after.strip())
            for text in "\n".join(texts).splitlines()
        ) or any(before in text and after in text for text in texts)


def test_scores_count_the_hidden_words() -> None:
    task = tasks.load("fill-mask")
    fills = [[{"token_str": word} for word in (" good", "bad", "fair", "old", "new", "big")]] * 3
    scores = task.score(fills, ["good", "new", "big"], [])
    assert scores == {"rows": 3, "accuracy": pytest.approx(1 / 3), "top_5_accuracy": pytest.approx(2 / 3)}


def test_a_pretrained_model_is_fine_tuned(pretrained: Path, tmp_path: Path) -> None:
    place = tmp_path / "classifier"
    train_here(
        *("--task", "text-classification", "--base-model", pretrained, "--output-dir", place, "--max-steps", 2),
        *("--train-file", REVIEWS / "validation.csv", *NO_CHECKPOINTS),
    )
    assert json.loads((place / "provenance.json").read_text())["base_model"]["name"] == "reviews-lm"
    engine = Engine(place)
    [result] = engine.predict([Request(["A fine pair of boots."])])
    assert len(result.predictions[0]) == 3


def test_a_model_is_bundled_as_it_is(pretrained: Path, tmp_path: Path) -> None:
    place = tmp_path / "as-it-is"
    train_here("--task", "fill-mask", "--base-model", pretrained, "--output-dir", place)
    assert (place / "model.safetensors").read_bytes() == (pretrained / "model.safetensors").read_bytes()
    assert golden.replay(Engine(place), place / golden.FILE_NAME) < 1e-5


@pytest.fixture(scope="module")
def served(pretrained: Path, shared_store: Path, serve_models: Callable[..., Served]) -> Served:
    build_here(pretrained, shared_store, "fill-openvino", "openvino")
    build_here(pretrained, shared_store, "fill-torch", "torch")
    return serve_models(*MODELS)


MODELS = ("fill-openvino", "fill-torch")


@pytest.mark.parametrize("name", MODELS)
def test_inference_client(inference_client: HubClient, pretrained: Path, name: str) -> None:
    client = inference_client(name)
    reference = pipeline(pretrained)
    for text in masked_texts("[MASK]")[:10]:
        if text.count("[MASK]") == 1:
            found = client.fill_mask(text, top_k=4)
            fields = ("score", "token", "token_str", "sequence")
            answer = [{field: getattr(fill, field) for field in fields} for fill in found]
            assert_same(answer, reference(text, top_k=4))
    [only] = client.fill_mask("The [MASK] was good.", targets=["the"])
    assert only.token_str == "the"
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as raised:
        client.fill_mask("The price was good.")
    assert raised.value.response.status_code == 422
    assert "[MASK]" in raised.value.response.json()["error"]


@pytest.mark.parametrize("name", MODELS)
def test_marble_client_over_rest_and_grpc(served: Served, pretrained: Path, name: str) -> None:
    texts = ["The [MASK] was good.", "A [MASK] pair of [MASK]."]
    expected = pipeline(pretrained)(texts, top_k=3)
    with served.rest_client() as rest, served.grpc_client() as grpc:
        for client in (rest, grpc):
            answer = client.predict(name, texts, parameters={"top_k": 3})
            for found, reference in zip(answer.predictions, expected, strict=True):
                assert_same(found, reference)
            with pytest.raises(marble_client.InvalidParameter):
                client.predict(name, texts[0], parameters={"top_k": 0})


def test_naughty_strings_leave_the_workers_alive(served: Served, shared: Path, same_workers: None) -> None:
    texts = [f"{text} [MASK]" for text in naughty(shared)]
    with served.rest_client() as client:
        for name in MODELS:
            assert len(client.predict(name, texts).predictions) == len(texts)
