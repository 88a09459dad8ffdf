"""The engine in-process: it answers as transformers does, whatever the batch, and one bad input is one error."""

import copy
import csv
import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from backends import Replayed
from conftest import OFFLINE, REVIEWS
from numpy.typing import NDArray

from archiver.gate import GOLDEN_TOLERANCE
from handler.engine import Engine
from handler.errors import (
    InternalError,
    InvalidInput,
    InvalidParameter,
    Overloaded,
    RequestError,
    TooLarge,
    UnreadableRequest,
    UnsupportedMediaType,
)
from handler.messages import Request, Result, Usage
from handler.settings import Settings
from handler.tasks import Part
from handler.tasks.text_classification import TextClassification, TextClassificationParameters

LABELS = ["negative", "neutral", "positive"]
MAX_LENGTH = 256
TEXT = "The room was cold, the staff were warm: I would come back."

SCRIPTS = [
    "Очень хороший товар, всем советую! Доставили быстро.",
    "这家餐厅的菜很好吃，服务也不错，下次还会再来。",
    "とても良い商品でした。ありがとうございます。",
    "배송이 너무 늦고 상자가 찢어져 있었어요.",
    "منتج سيئ جدا ولا أنصح به لأحد",
    "המוצר הגיע שבור ואף אחד לא עונה",
    "यह किताब बहुत अच्छी है",
    "ร้านนี้อร่อยมาก บริการดี",
    "Εξαιρετική εξυπηρέτηση, θα ξαναέρθω",
    "Ĉi tiu libro estas tre bona. Größe stimmt nicht, schade!",
    "👍🏽👨‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301 \u202eabc \u200b\ufeff ﬁ İ ①",
    "[CLS] nice [SEP] [MASK]",
]


# --- what the tests ask, and whom


def reviews() -> list[str]:
    with (REVIEWS / "test.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def long_texts() -> list[str]:
    """Texts of 300 to some 1,000 tokens."""
    words = " ".join(reviews()).split()
    return [" ".join(words[start:end]) for start, end in ((0, 300), (300, 800), (800, 1600))] + ["好吃" * 300]


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[str]:
    """Texts of every length and script, real and naughty."""
    lines = (shared / "naughty_strings" / "naughty.jsonl").read_text(encoding="utf-8").split("\n")
    naughty = [json.loads(line)["text"] for line in lines if line]
    assert len(naughty) == 515
    return naughty[::3] + reviews()[:60] + SCRIPTS + long_texts()


@pytest.fixture(scope="module")
def mixed(texts: list[str]) -> list[str]:
    """A sample of `texts` that holds every kind, in no order."""
    sample = texts[:-17:9] + SCRIPTS + long_texts()
    random.Random(0).shuffle(sample)
    return sample


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    """The reference: torch fp32."""
    return Engine(bundle)


def unpacked(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def archive(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unpacks an archive of the store by its name."""
    return lambda name: unpacked(store / f"{name}.mar", tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def openvino_folder(archive: Callable[[str], Path]) -> Path:
    return archive("reviews-fp32")


@pytest.fixture(scope="module")
def openvino(openvino_folder: Path) -> Engine:
    return Engine(openvino_folder)


def ask(engine: Engine, inputs: Any, **parameters: Any) -> Result:
    """The result of one request that must not fail as a whole; `inputs` is a text or a list of inputs."""
    [result] = engine.predict([Request([inputs] if isinstance(inputs, str) else inputs, parameters)])
    assert isinstance(result, Result)
    return result


def refusal(engine: Engine, inputs: Sequence[Any], **parameters: Any) -> RequestError:
    """The error that one request as a whole must end with; its message is one ASCII line."""
    [error] = engine.predict([Request(inputs, parameters)])
    assert isinstance(error, RequestError)
    assert str(error).isascii()
    assert str(error).isprintable()
    return error


def scores(prediction: Any) -> NDArray[np.float64]:
    """Scores in the order of LABELS."""
    by_label = {entry["label"]: entry["score"] for entry in prediction}
    assert sorted(by_label) == LABELS
    return np.array([by_label[label] for label in LABELS])


def table(engine: Engine, texts: Sequence[str]) -> NDArray[np.float64]:
    """Scores [texts, labels], all texts in one request."""
    return np.stack([scores(prediction) for prediction in ask(engine, texts).predictions])


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    exponentials = np.exp(logits.astype(np.float64))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def logits_of(bundle: Path) -> Callable[[list[int]], NDArray[np.float32]]:
    """Logits of token ids by transformers itself, one sequence at a time and with no padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bundle).eval()

    @torch.inference_mode()
    def logits(ids: list[int]) -> NDArray[np.float32]:
        return np.asarray(model(input_ids=torch.tensor([ids])).logits[0].numpy())

    return logits


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(bundle)


# --- equality


def test_answers_equal_the_transformers_pipeline(engine: Engine, bundle: Path, texts: list[str]) -> None:
    pipeline = transformers.pipeline(
        "text-classification", model=str(bundle), top_k=None, truncation=True, max_length=MAX_LENGTH, device="cpu"
    )
    expected = np.stack([scores(pipeline(text)[0]) for text in texts])
    assert len(texts) >= 200
    np.testing.assert_allclose(table(engine, texts), expected, rtol=0, atol=1e-4)


def test_scores_are_sorted_and_sum_to_one(engine: Engine, mixed: list[str]) -> None:
    for prediction in ask(engine, mixed).predictions:
        found = [entry["score"] for entry in prediction]
        assert found == sorted(found, reverse=True)
        assert sum(found) == pytest.approx(1)
        assert all(type(score) is float for score in found)


def test_openvino_fp32_equals_torch(engine: Engine, openvino: Engine, texts: list[str]) -> None:
    assert (openvino.settings.backend, openvino.settings.precision) == ("openvino", "fp32")
    np.testing.assert_allclose(table(openvino, texts), table(engine, texts), rtol=0, atol=1e-3)


def test_the_archive_of_this_machines_choice_equals_torch(
    engine: Engine, archive: Callable[[str], Path], mixed: list[str]
) -> None:
    """As near as the gate asks of it."""
    chosen = Engine(archive("reviews"))
    tolerance = GOLDEN_TOLERANCE[chosen.settings.precision]
    np.testing.assert_allclose(table(chosen, mixed), table(engine, mixed), rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_bf16_is_near_fp32(engine: Engine, bundle: Path, openvino_folder: Path, mixed: list[str], backend: str) -> None:
    coarse = Engine({"torch": bundle, "openvino": openvino_folder}[backend], precision="bf16")
    np.testing.assert_allclose(table(coarse, mixed), table(engine, mixed), rtol=0, atol=0.05)


def test_the_torch_archive_equals_its_bundle(engine: Engine, archive: Callable[[str], Path], mixed: list[str]) -> None:
    np.testing.assert_allclose(table(Engine(archive("reviews-torch")), mixed), table(engine, mixed), rtol=0, atol=1e-6)


# --- neighbours


@pytest.mark.parametrize("name", ["engine", "openvino"])
def test_answers_do_not_depend_on_neighbours(name: str, mixed: list[str], request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    alone = np.stack([table(engine, [text])[0] for text in mixed])
    np.testing.assert_allclose(table(engine, mixed), alone, rtol=0, atol=1e-5)

    order = random.Random(1).sample(range(len(mixed)), len(mixed))
    np.testing.assert_allclose(table(engine, [mixed[i] for i in order]), alone[order], rtol=0, atol=1e-5)

    requests = [Request(mixed[start : start + 3]) for start in range(0, len(mixed), 3)]
    rows = [scores(row) for result in engine.predict(requests) for row in result.predictions]
    np.testing.assert_allclose(np.stack(rows), alone, rtol=0, atol=1e-5)


def test_each_request_keeps_its_own_parameters(engine: Engine) -> None:
    one, two, three, four = engine.predict(
        [
            Request([TEXT], {"top_k": 1}),
            Request([TEXT]),
            Request([TEXT], {"top_p": 1}),
            Request([TEXT, TEXT], {"function_to_apply": "none", "details": True}),
        ]
    )
    assert isinstance(one, Result)
    assert isinstance(two, Result)
    assert isinstance(three, InvalidParameter)
    assert isinstance(four, Result)
    assert [len(prediction) for prediction in (*one.predictions, *two.predictions, *four.predictions)] == [1, 3, 3, 3]
    assert one.predictions[0][0]["label"] == two.predictions[0][0]["label"]
    assert one.predictions[0][0]["score"] == pytest.approx(two.predictions[0][0]["score"], abs=1e-6)
    assert (one.details, two.details, four.details) == (False, False, True)
    assert sum(entry["score"] for entry in four.predictions[0]) != pytest.approx(1)


def test_nothing_asked_nothing_answered(engine: Engine) -> None:
    assert engine.predict([]) == []


# --- parameters


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 10**30, None])
def test_top_k(engine: Engine, top_k: int | None) -> None:
    [everything] = ask(engine, TEXT).predictions
    [kept] = ask(engine, TEXT, top_k=top_k).predictions
    assert kept == everything[:top_k]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("softmax", softmax),
        ("sigmoid", lambda logits: 1 / (1 + np.exp(-logits))),
        ("none", lambda logits: logits),
        (None, softmax),
    ],
)
def test_function_to_apply(
    engine: Engine,
    tokenizer: Any,
    logits_of: Callable[[list[int]], NDArray[np.float32]],
    function: str | None,
    expected: Callable[[Any], Any],
) -> None:
    for text in ("", TEXT, SCRIPTS[1]):
        right = expected(logits_of(tokenizer(text)["input_ids"]).astype(np.float64))
        [prediction] = ask(engine, text, function_to_apply=function).predictions
        np.testing.assert_allclose(scores(prediction), right, rtol=0, atol=1e-5)


def variant(bundle: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the bundle with changes to its config.json."""
    for path in bundle.iterdir():
        (folder / path.name).symlink_to(path)
    config = {**json.loads((bundle / "config.json").read_text(encoding="utf-8")), **changes}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("problem", "function"),
    [
        ("single_label_classification", "softmax"),
        ("multi_label_classification", "sigmoid"),
        ("regression", "none"),
        (None, "softmax"),
    ],
)
def test_activation_follows_the_problem_type(
    engine: Engine, bundle: Path, tmp_path: Path, problem: str | None, function: str
) -> None:
    folder = variant(bundle, tmp_path, problem_type=problem)
    changed = Engine(folder)
    [prediction] = ask(changed, TEXT).predictions
    [right] = ask(engine, TEXT, function_to_apply=function).predictions
    assert prediction == right
    pipeline = transformers.pipeline("text-classification", model=str(folder), top_k=None, device="cpu")
    np.testing.assert_allclose(scores(prediction), scores(pipeline(TEXT)[0]), rtol=0, atol=1e-4)
    # The request has the last word.
    [asked] = ask(changed, TEXT, function_to_apply="softmax").predictions
    [softmaxed] = ask(engine, TEXT, function_to_apply="softmax").predictions
    assert asked == softmaxed


def postprocess(bundle: Path, config: dict[str, Any], logits: list[float], **parameters: Any) -> list[dict[str, Any]]:
    """What a model of that config answers to a text it gives these logits for."""
    task = TextClassification(bundle, Settings.load(bundle), config)
    part = Part("a text", [[0]], [{"logits": np.array(logits, dtype=np.float32)}])
    return task.postprocess([part], TextClassificationParameters(**parameters))


@pytest.mark.parametrize(("problem", "score"), [(None, 0.8807970779778823), ("regression", 2.0)])
def test_a_model_with_one_label(bundle: Path, problem: str | None, score: float) -> None:
    found = postprocess(bundle, {"id2label": {"0": "stars"}, "problem_type": problem}, [2.0])
    assert found == [{"label": "stars", "score": pytest.approx(score)}]


def test_labels_are_in_the_order_of_their_numbers(bundle: Path) -> None:
    names = {str(number): f"label {number}" for number in reversed(range(12))}
    found = postprocess(bundle, {"id2label": names}, list(range(12)))
    assert [entry["label"] for entry in found] == [f"label {number}" for number in reversed(range(12))]


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_extreme_logits_give_scores(bundle: Path, function: Any) -> None:
    found = postprocess(bundle, {"id2label": {"0": "a", "1": "b"}}, [-3e38, 3e38], function_to_apply=function)
    assert [entry["label"] for entry in found] == ["b", "a"]
    assert all(np.isfinite(entry["score"]) for entry in found)


def test_equal_scores_keep_the_models_order(bundle: Path) -> None:
    found = postprocess(bundle, {"id2label": {"0": "b", "1": "a", "2": "c"}}, [0, 0, 0])
    assert [entry["label"] for entry in found] == ["b", "a", "c"]


# --- long texts


def words(count: int) -> str:
    """A text of `count` tokens, special ones included."""
    return " ".join(["good", "bad", "poor"][number % 3] for number in range(count - 2))


def test_a_text_of_just_the_maximum_is_not_over_it(engine: Engine) -> None:
    for policy in ("error", "truncate", "window"):
        assert ask(engine, words(MAX_LENGTH), overflow=policy).usage == Usage(MAX_LENGTH, truncated=False, windows=1)


def test_overflow_error(engine: Engine) -> None:
    error = refusal(engine, [words(300)], overflow="error")
    assert isinstance(error, TooLarge)
    assert str(error) == (
        "the text has 300 tokens and the model takes 256; "
        'shorten it, or send the parameter "overflow": "truncate" or "window"'
    )


def test_overflow_truncate_answers_the_first_window_and_says_so(
    engine: Engine, tokenizer: Any, logits_of: Callable[[list[int]], NDArray[np.float32]]
) -> None:
    for text in long_texts():
        result = ask(engine, text, overflow="truncate")
        tokens = len(tokenizer(text)["input_ids"])
        assert tokens > MAX_LENGTH
        assert result.usage == Usage(tokens, truncated=True, windows=1)
        cut = tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        np.testing.assert_allclose(scores(result.predictions[0]), softmax(logits_of(cut)), rtol=0, atol=1e-5)


def test_overflow_window_is_the_length_weighted_mean_of_its_windows(
    bundle: Path, tokenizer: Any, logits_of: Callable[[list[int]], NDArray[np.float32]]
) -> None:
    engine = Engine(bundle, max_length=64, stride=16)
    for text in [*long_texts()[2:], words(65), words(64 + 48 * 3 + 1)]:
        first, *content, last = tokenizer(text)["input_ids"]
        windows = []
        while True:
            windows.append([first, *content[:62], last])
            if len(content) <= 62:
                break
            content = content[62 - 16 :]
        weights = np.array([len(window) for window in windows], dtype=np.float64)
        logits = np.stack([logits_of(window) for window in windows])
        mean = (weights[:, None] * logits).sum(axis=0) / weights.sum()

        result = ask(engine, text, overflow="window", function_to_apply="none")
        assert result.usage == Usage(len(tokenizer(text)["input_ids"]), truncated=False, windows=len(windows))
        np.testing.assert_allclose(scores(result.predictions[0]), mean, rtol=0, atol=1e-4)
        [prediction] = ask(engine, text, overflow="window").predictions
        np.testing.assert_allclose(scores(prediction), softmax(mean), rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["error", "truncate", "window"])
def test_the_archives_policy_holds_where_a_request_names_none(bundle: Path, policy: str) -> None:
    engine = Engine(bundle, overflow=policy)
    for parameters in ({}, {"overflow": None}):
        [result] = engine.predict([Request([words(300)], parameters)])
        if policy == "error":
            assert isinstance(result, TooLarge)
        else:
            assert isinstance(result, Result)
            assert result.usage == Usage(300, truncated=policy == "truncate", windows=1 + (policy == "window"))
    assert ask(engine, words(300), overflow="truncate").usage == Usage(300, truncated=True, windows=1)


def test_usage_is_the_sum_over_all_inputs(engine: Engine) -> None:
    result = ask(engine, [words(10), words(700), words(20)], overflow="window")
    assert result.usage == Usage(730, truncated=False, windows=5)
    result = ask(engine, [words(10), words(700), words(20)], overflow="truncate")
    assert result.usage == Usage(730, truncated=True, windows=3)
    result = ask(engine, [words(10), words(700), words(20)], overflow="error")
    assert result.usage == Usage(730, truncated=False, windows=2)
    assert [isinstance(entry, RequestError) for entry in result.predictions] == [False, True, False]


# --- limits


def test_max_windows(bundle: Path) -> None:
    engine = Engine(bundle, max_windows=2)
    assert ask(engine, words(MAX_LENGTH + 222), overflow="window").usage.windows == 2
    error = refusal(engine, [words(MAX_LENGTH + 223)], overflow="window")
    assert isinstance(error, TooLarge)
    assert str(error) == (
        "the text has 479 tokens in 3 windows and at most 2 windows are taken; split it into several inputs"
    )
    assert ask(engine, words(479), overflow="truncate").usage.truncated


def test_max_inputs(bundle: Path) -> None:
    engine = Engine(bundle, max_inputs=3)
    assert len(ask(engine, ["a"] * 3).predictions) == 3
    error = refusal(engine, ["a"] * 4)
    assert isinstance(error, TooLarge)
    assert str(error) == "4 inputs; send at most 3 in one request"


def test_max_characters(bundle: Path) -> None:
    engine = Engine(bundle, max_characters=20)
    result = ask(engine, ["x" * 10, "é" * 21, "é" * 10])
    assert [isinstance(entry, TooLarge) for entry in result.predictions] == [False, True, False]
    assert str(result.predictions[1]) == "the text has 21 characters; at most 20 are taken"
    error = refusal(engine, ["x" * 10, "é" * 11])
    assert isinstance(error, TooLarge)
    assert str(error) == "the request has 21 characters; at most 20 are taken: send fewer inputs at once"


def test_max_tokens_counts_what_runs(bundle: Path) -> None:
    engine = Engine(bundle, max_tokens=600)
    long = words(1000)
    assert ask(engine, [long, long], overflow="truncate").usage.windows == 2  # 512 tokens run
    for texts, overflow in (([long], "window"), ([long] * 3, "truncate")):
        error = refusal(engine, texts, overflow=overflow)
        assert isinstance(error, TooLarge)
        assert "tokens to run; at most 600 are taken" in str(error)


def test_a_batch_of_large_requests_is_bounded(bundle: Path) -> None:
    """No number of requests may keep the worker past its response timeout; those too many are to be sent again."""
    engine = Engine(bundle, max_tokens=100)
    large, small = Request([words(88)]), Request(["a"])
    *first, fifth, last = engine.predict([large] * 4 + [large, small])
    assert all(isinstance(outcome, Result) for outcome in first)
    assert isinstance(fifth, Overloaded)
    assert fifth.code == 503
    assert isinstance(last, Result)


def test_a_small_token_budget_changes_no_answer(engine: Engine, bundle: Path, mixed: list[str]) -> None:
    frugal = Engine(bundle, token_budget=1)
    np.testing.assert_allclose(table(frugal, mixed[:20]), table(engine, mixed[:20]), rtol=0, atol=1e-5)


# --- bad input

SURROGATE = "half a pair: \ud83d"
EXPECTED = 'an input must be a string, {"text": string} or {"text": string, "text_pair": string}'
BAD: list[tuple[Any, type[RequestError], str]] = [
    (SURROGATE, UnreadableRequest, "the text has half of a surrogate pair at character 13: send whole characters"),
    ("\udcff", UnreadableRequest, "the text has half of a surrogate pair at character 0: send whole characters"),
    (None, InvalidInput, EXPECTED + ", not NoneType"),
    (7, InvalidInput, EXPECTED + ", not int"),
    (True, InvalidInput, EXPECTED + ", not bool"),
    (["a"], InvalidInput, EXPECTED + ", not list"),
    (b"a", UnsupportedMediaType, "this model takes text, not bytes of an image, a sound or another file"),
    ({}, InvalidInput, EXPECTED),
    ({"text": 1}, InvalidInput, EXPECTED + ", not int"),
    ({"text": "a", "text_pair": 1}, InvalidInput, EXPECTED + ", not int"),
    ({"text": "a", "pair": "b"}, InvalidInput, EXPECTED),
    ({"text": "\ud800"}, UnreadableRequest, "half of a surrogate pair"),
]


@pytest.mark.parametrize(("value", "kind", "message"), BAD, ids=[ascii(value) for value, *_ in BAD])
def test_a_bad_input_is_an_error_of_its_own(engine: Engine, value: Any, kind: type[RequestError], message: str) -> None:
    error = refusal(engine, [value])
    assert type(error) is kind
    assert message in str(error)


def test_bad_inputs_do_not_hurt_good_ones(engine: Engine) -> None:
    bad = [value for value, *_ in BAD]
    good = ["", TEXT, "\x00", "a\x00b", *SCRIPTS]
    alone = [ask(engine, text).predictions[0] for text in good]
    inputs = [value for pair in zip(good, bad * 2, strict=False) for value in pair]
    predictions = ask(engine, inputs).predictions
    assert len(predictions) == 2 * len(good)
    for prediction, right in zip(predictions[::2], alone, strict=True):
        np.testing.assert_allclose(scores(prediction), scores(right), rtol=0, atol=1e-5)
    assert [type(entry) for entry in predictions[1::2]] == [kind for _, kind, _ in BAD * 2][: len(good)]


def test_a_request_of_bad_inputs_alone_is_its_first_error(engine: Engine) -> None:
    error, result = engine.predict([Request([SURROGATE, 7, None]), Request([TEXT])])
    assert type(error) is UnreadableRequest
    assert isinstance(result, Result)


def test_a_text_may_come_in_an_object(engine: Engine) -> None:
    assert ask(engine, [{"text": TEXT}]).predictions == ask(engine, TEXT).predictions


@pytest.mark.parametrize("inputs", [[], ()])
def test_no_inputs(engine: Engine, inputs: Sequence[Any]) -> None:
    error = refusal(engine, inputs)
    assert type(error) is InvalidInput
    assert str(error) == "there is nothing to answer: the list of inputs is empty"


def test_a_wrong_parameter_costs_no_model_run(engine: Engine) -> None:
    idle = with_backend(engine, lambda arrays: pytest.fail("the model ran"))
    assert type(refusal(idle, [TEXT], top_k=0)) is InvalidParameter
    assert type(refusal(idle, [TEXT], overflow="cut")) is InvalidParameter


# --- a model gone wrong

Backend = Callable[[Mapping[str, NDArray[np.int64]]], dict[str, NDArray[np.float32]]]


def with_backend(engine: Engine, backend: Backend) -> Engine:
    """The engine with another backend."""
    other = copy.copy(engine)
    other.backend = Replayed(backend)
    return other


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("function", [None, "none", "sigmoid"])
def test_a_score_that_is_not_a_number_is_never_answered(engine: Engine, value: float, function: str | None) -> None:
    """Only the text whose logits are unsound fails."""
    poisoned = 2204  # "good"

    def unsound(arrays: Mapping[str, NDArray[np.int64]]) -> dict[str, NDArray[np.float32]]:
        logits = np.zeros((len(arrays["input_ids"]), 3), dtype=np.float32)
        logits[(arrays["input_ids"] == poisoned).any(axis=1), 1] = value
        return {"logits": logits}

    broken = with_backend(engine, unsound)
    result = ask(broken, ["bad", "good", "poor"], function_to_apply=function)
    assert [type(entry) for entry in result.predictions] == [list, InternalError, list]
    assert type(refusal(broken, ["good"], function_to_apply=function)) is InternalError
    assert type(refusal(broken, [words(300)], overflow="window", function_to_apply=function)) is InternalError


# --- what a worker carries


def test_the_openvino_engine_imports_neither_torch_nor_transformers(openvino_folder: Path, tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
import handler.engine, handler.service, handler.golden, handler.entry
heavy = {"torch", "transformers", "torchvision", "datasets", "sklearn", "pandas", "scipy"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
from handler.messages import Request
[result] = handler.engine.Engine(Path(sys.argv[1])).predict([Request(["A fine pair of boots."])])
print(len(result.predictions[0]))
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(openvino_folder)],
        cwd=tmp_path,
        env=OFFLINE,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["[]", "3", "[]", ""]


# --- folders that are no models


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"backend": "onnx"}, "backend 'onnx' is not one of torch, openvino"),
        ({"precision": "int3"}, "precision 'int3' is not one of those of the torch backend: fp32, bf16, fp16"),
        ({"task": "telepathy"}, r"task 'telepathy' is not one of: .*text-classification"),
    ],
)
def test_settings_that_do_not_exist(bundle: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(bundle, **overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"model-config\.yaml is missing"),
        ("handler: [", "is not valid YAML"),
        ("minWorkers: 1", "has no `handler:` section"),
        ("", "has no `handler:` section"),
        ("- a", "has no `handler:` section"),
        ("handler: {task: t, max_length: 256, max_lenght: 3}", r"unknown handler settings \['max_lenght'\]; known: \["),
        ("handler: {max_length: 256}", "task"),
        ("handler: {task: t, max_length: 64, stride: 32}", "stride 32 must be below half of max_length 64"),
    ],
)
def test_model_config_that_cannot_be_used(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "model-config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Settings.load(tmp_path)


def test_a_bundle_without_weights_is_not_loaded(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Engine(folder)
