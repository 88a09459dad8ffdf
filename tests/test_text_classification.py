"""Text classification: one label or several, numbers and pairs of texts, by models of every family."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from conftest import NO_CHECKPOINTS, HubClient, Served, train_here
from sklearn.metrics import f1_score
from text_models import (
    EMOTIONS,
    FAMILIES,
    MAX_LENGTH,
    answers,
    archive,
    converted,
    drift,
    labelled,
    naughty_strings,
    real_texts,
    refusal,
    write,
)

from handler.engine import Engine
from training import evaluation, labelled_texts
from training.base_model import resolve
from training.errors import UserError
from training.options import Options
from training.tasks import Splits

AUTO = transformers.AutoModelForSequenceClassification
SPEC = "bert hidden_size=32 num_hidden_layers=1 num_attention_heads=2 intermediate_size=64 vocab_size=400"


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[str]:
    return real_texts(shared, 40)


def pairs(texts: list[str]) -> list[dict[str, str]]:
    return [{"text": one, "text_pair": other} for one, other in pairwise(texts)]


def reference(folder: Path) -> Callable[..., list[dict[str, Any]]]:
    """The pipeline of transformers for the same model, asked one input at a time."""
    pipeline = transformers.pipeline("text-classification", model=str(folder), top_k=None)

    def ask(value: Any, **options: Any) -> list[dict[str, Any]]:
        found = pipeline(value, truncation=True, max_length=MAX_LENGTH, **options)
        return found[0] if isinstance(found[0], list) else found

    return ask


# --- Equal to the pipeline of transformers --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_its_pipeline(family: str, texts: list[str], tmp_path: Path) -> None:
    folder = write(tmp_path / family, family, AUTO, "text-classification", texts[::6], **labelled("no", "so", "yes"))
    ask = reference(folder)
    single, paired = [ask(text) for text in texts], [ask(pair) for pair in pairs(texts)]
    assert len(single) >= 100
    assert np.std([entries[0]["score"] for entries in single]) > 0.05, "a model of one answer would prove nothing"
    for place in (folder, converted(folder)):
        engine = Engine(place)
        assert drift(engine, texts, single) < 1e-4
        assert drift(engine, pairs(texts), paired) < 1e-4
        assert [entry["label"] for entry in answers(engine, texts[:1])[0]] == [entry["label"] for entry in single[0]]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (EMOTIONS, "multi_label_classification"),
        (["stars"], "regression"),
        (["toxic"], None),
        (["toxic"], "multi_label_classification"),
    ],
)
def test_the_activation_is_that_of_the_pipeline(
    labels: list[str], problem: str | None, texts: list[str], tmp_path: Path
) -> None:
    config = labelled(*labels) | {"problem_type": problem}
    folder = write(tmp_path / "model", "bert", AUTO, "text-classification", texts[::6], **config)
    engine = Engine(folder)
    ask = reference(folder)
    assert drift(engine, texts, [ask(text) for text in texts]) < 1e-4
    for function in ("sigmoid", "softmax", "none"):
        expected = [ask(text, function_to_apply=function) for text in texts[:5]]
        assert drift(engine, texts[:5], expected, function_to_apply=function) < 1e-4


# --- What a client may ask ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emotions(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of several labels with learned thresholds."""
    config = labelled(*EMOTIONS) | {"problem_type": "multi_label_classification"}
    options = {"thresholds": {"joy": 0.9, "anger": 0.2, "love": 0.5, "surprise": 1.0}}
    place = tmp_path_factory.mktemp("emotions") / "emotions"
    return write(place, "bert", AUTO, "text-classification", texts[::6], options=options, **config)


@pytest.fixture(scope="module")
def stars(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regression of pairs of texts."""
    config = labelled("stars") | {"problem_type": "regression"}
    golden = pairs(texts)[::6]
    place = tmp_path_factory.mktemp("stars") / "stars"
    return write(place, "roberta", AUTO, "text-classification", golden, overflow="window", **config)


def test_a_temperature(texts: list[str], emotions: Path, tmp_path: Path) -> None:
    """Of an archive that says what its head was divided by; and of models that have no use for one."""
    options, labels = {"temperature": 2.5}, labelled("no", "so", "yes")
    folder = write(tmp_path / "model", "bert", AUTO, "text-classification", texts[::6], options=options, **labels)
    engine, ask = Engine(folder), reference(folder)
    assert drift(engine, texts[:20], [ask(text) for text in texts[:20]]) < 1e-4
    assert drift(engine, texts[:20], [ask(text) for text in texts[:20]], temperature=2.5) < 1e-4
    for text in texts[:20]:
        logits = {entry["label"]: entry["score"] for entry in ask(text, function_to_apply="none")}
        for temperature in (1, 5.0):
            [found] = answers(engine, [text], temperature=temperature)
            values = np.exp([2.5 / temperature * logits[entry["label"]] for entry in found])
            assert [entry["score"] for entry in found] == pytest.approx(values / values.sum(), abs=1e-4)
    for value in (0, -1, "hot", 1e9):
        assert refusal(engine, texts[0], temperature=value)[0] == 422
    assert "single label" in refusal(Engine(emotions), texts[0], temperature=1)[1]


def test_training_fits_the_temperature(tmp_path: Path) -> None:
    """A model that learns noise by heart is surer than it is right; its scores are brought down to what it is worth."""
    chance = np.random.default_rng(7)
    words = [f"w{number}" for number in range(30)]
    for name, rows in (("train", 60), ("validation", 200)):
        lines = ["text,label"]
        for _ in range(rows):
            label = chance.integers(2)
            # One word in two says which label it is; one label in five is wrong.
            sign = "good" if label else "bad"
            told = label if chance.random() < 0.8 else 1 - label
            lines.append(f"{' '.join(chance.choice(words, 4))} {sign},{'ab'[told]}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    place = tmp_path / "bundle"
    train_here(
        *("--task", "text-classification", "--from-scratch", SPEC, "--train-file", tmp_path / "train.csv"),
        *("--validation-file", tmp_path / "validation.csv", "--output-dir", place, "--num-train-epochs", "30"),
        *("--learning-rate", "3e-3", *NO_CHECKPOINTS),
    )
    engine = Engine(place)
    temperature = engine.settings.options["temperature"]
    assert temperature > 1.5
    rows = [json.loads(line) for line in (place / "validation.jsonl").read_text(encoding="utf-8").splitlines()]

    def likelihood(**parameters: Any) -> float:
        found = answers(engine, [row["inputs"] for row in rows], **parameters)
        scores = [
            {entry["label"]: entry["score"] for entry in entries}[row["target"]]
            for entries, row in zip(found, rows, strict=True)
        ]
        return float(np.mean(np.log(scores)))

    fitted = likelihood()
    assert fitted > likelihood(temperature=1) + 0.01
    assert fitted > likelihood(temperature=0.8 * temperature)
    assert fitted > likelihood(temperature=1.25 * temperature)
    # Any program that loads the bundle has the same scores.
    ask = reference(place)
    assert drift(engine, [row["inputs"] for row in rows[:20]], [ask(row["inputs"]) for row in rows[:20]]) < 1e-4


def test_thresholds(emotions: Path, texts: list[str]) -> None:
    engine = Engine(emotions)
    limits = {"joy": 0.9, "anger": 0.2, "love": 0.5, "surprise": 1.0}
    everything = answers(engine, texts)
    assert all([entry["label"] for entry in entries] != [] for entries in everything)
    assert {len(entries) for entries in everything} == {4}, "all labels, as the pipeline answers them"
    learned = answers(engine, texts, threshold="learned")
    assert learned == [[e for e in entries if e["score"] >= limits[e["label"]]] for entries in everything]
    assert len({len(entries) for entries in learned}) > 1
    assert answers(engine, texts, threshold=0.6) == [[e for e in row if e["score"] >= 0.6] for row in everything]
    assert answers(engine, texts, threshold=0) == everything
    assert answers(engine, texts, threshold=10**400) == [[]] * len(texts)
    assert answers(engine, texts, threshold="learned", top_k=1) == [entries[:1] for entries in learned]
    assert "threshold" in refusal(engine, "a", threshold="own")[1]


def test_a_model_of_several_labels_without_thresholds_has_the_usual_one(texts: list[str], tmp_path: Path) -> None:
    config = labelled(*EMOTIONS) | {"problem_type": "multi_label_classification"}
    folder = write(tmp_path / "model", "bert", AUTO, "text-classification", texts[::6], **config)
    engine = Engine(folder)
    assert answers(engine, texts, threshold="learned") == answers(engine, texts, threshold=0.5)


def test_other_models_have_no_thresholds(stars: Path) -> None:
    code, message = refusal(Engine(stars), "a", threshold="learned")
    assert code == 422
    assert '"threshold"' in message


@pytest.mark.parametrize(
    "thresholds", [{"joy": 0.5}, [0.5] * 4, {**dict.fromkeys(EMOTIONS, 0.5), "envy": 0.5}, dict.fromkeys(EMOTIONS, "x")]
)
def test_thresholds_that_do_not_fit_the_labels(emotions: Path, thresholds: Any) -> None:
    with pytest.raises(ValueError, match=r"threshold|float"):
        Engine(emotions, options={"thresholds": thresholds})


@pytest.mark.parametrize(
    "value",
    [
        5,
        None,
        ["a", "b"],
        {},
        {"text": 1},
        {"text_pair": "a"},
        {"text": "a", "text_pair": None},
        {"text": "a", "pair": ""},
    ],
)
def test_inputs_that_are_no_texts(emotions: Path, value: Any) -> None:
    code, message = refusal(Engine(emotions), value)
    assert code == 422
    assert '{"text": string, "text_pair": string}' in message


def test_half_a_surrogate_pair(emotions: Path) -> None:
    for value in ("\ud83d", {"text": "a", "text_pair": "\ude42"}):
        assert refusal(Engine(emotions), value)[0] == 400


def test_a_long_pair_cannot_be_split(stars: Path) -> None:
    engine = Engine(stars)
    long = {"text": "one two " * 40, "text_pair": "three four " * 40}
    code, message = refusal(engine, long)
    assert code == 413
    assert "truncate" in message
    assert answers(engine, [long], overflow="truncate")[0][0]["label"] == "stars"
    assert refusal(engine, long, overflow="error")[0] == 413
    assert answers(engine, ["one two " * 40])[0][0]["label"] == "stars", "one text is split into windows"


def test_a_text_without_tokens(texts: list[str], tmp_path: Path) -> None:
    """GPT-2 adds no special tokens, so nothing is left to be asked about."""
    folder = write(tmp_path / "gpt2", "gpt2", AUTO, "text-classification", texts[::6], **labelled("no", "yes"))
    engine = Engine(folder)
    good, bad, other = answers(engine, [texts[0], "", texts[1]])
    assert (bad.code, type(bad).__name__) == (422, "InvalidInput")
    assert [good, other] == [answers(engine, [texts[0]])[0], answers(engine, [texts[1]])[0]]
    assert answers(engine, [{"text": "", "text_pair": texts[0]}]) == [good]


def test_the_drift_of_large_numbers_is_relative(stars: Path) -> None:
    task = Engine(stars).task
    assert task.drift([{"label": "price", "score": 20_000.0}], [{"label": "price", "score": 20_002.0}]) == 1e-4
    assert task.drift([{"label": "price", "score": 0.5}], [{"label": "price", "score": 0.25}]) == 0.25
    assert task.drift([{"label": "price", "score": 0.5}], [{"label": "cost", "score": 0.5}]) == float("inf")


# --- Reading the data -----------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of rows: as lines of JSON, or as the csv text that is given."""

    def make(rows: Any, name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        content = rows if isinstance(rows, str) else "".join(f"{json.dumps(row)}\n" for row in rows)
        path.write_text(content, encoding="utf-8")
        return path

    return make


def splits(train: Path, **options: Any) -> Splits:
    given = Options(train_file=str(train), **{k: str(v) if isinstance(v, Path) else v for k, v in options.items()})
    return labelled_texts.read(given, 42, resolve(None))


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        splits(*arguments, **options)
    return str(caught.value)


def rows_of(label: Callable[[int], Any], **more: Callable[[int], str]) -> list[dict[str, Any]]:
    return [
        {"text": f"text {i}", "label": label(i)} | {name: make(i) for name, make in more.items()} for i in range(20)
    ]


LABELS = [["b"], ["a", "b"], [], ["c", "c", "a"]]


@pytest.mark.parametrize("form", ["labels", "label", "csv", "parquet"])
def test_lists_of_labels(form: str, file: Callable[..., Path], tmp_path: Path) -> None:
    if form == "csv":
        cells = [json.dumps(LABELS[i % 4]).replace('"', '""') for i in range(20)]
        path = file("text,labels\n" + "".join(f'text {i},"{cell}"\n' for i, cell in enumerate(cells)), "train.csv")
    elif form == "parquet":
        import datasets

        path = tmp_path / "train.parquet"
        features = {
            "text": datasets.Value("string"),
            "labels": datasets.List(datasets.ClassLabel(names=["c", "b", "a"])),
        }
        indices = [["cba".index(name) for name in LABELS[i % 4]] for i in range(20)]
        columns = {"text": [f"text {i}" for i in range(20)], "labels": indices}
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    else:
        path = file([{"text": f"text {i}", form: LABELS[i % 4]} for i in range(20)])
    found = splits(path, validation_file=path)
    assert found.labels == ["a", "b", "c"]
    assert found.train is not None
    assert found.train["label"][:4] == [[0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert labelled_texts.problem(found.train) == "multi_label_classification"
    assert (found.metrics, found.primary) == (("macro_f1", "micro_f1", "exact_match"), "macro_f1")


def test_integers_in_lists_are_names_in_order(file: Callable[..., Path]) -> None:
    path = file([{"text": "a", "labels": [10, 2]}, {"text": "b", "labels": [2]}])
    assert splits(path, validation_file=path).labels == ["2", "10"]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ([{"text": f"t{i}", "label": i / 4} for i in range(20)], "train.jsonl"),
        ("text,label\n" + "".join(f"t{i},{i / 4}\n" for i in range(20)), "train.csv"),
    ],
)
def test_numbers_with_a_fraction_are_a_regression(content: Any, name: str, file: Callable[..., Path]) -> None:
    path = file(content, name)
    found = splits(path, validation_file=path)
    assert found.train is not None
    assert labelled_texts.problem(found.train) == "regression"
    assert found.train["label"][:3] == [0.0, 0.25, 0.5]
    assert (found.labels, found.primary) == (["label"], "r2")


def test_ratings_are_classes_unless_one_says_otherwise(file: Callable[..., Path]) -> None:
    path = file("text,stars\n" + "".join(f"t{i},{i % 5}\n" for i in range(20)), "train.csv")
    assert splits(path, label_column="stars").labels == ["0", "1", "2", "3", "4"]
    found = splits(path, label_column="stars", problem_type="regression")
    assert (found.labels, found.primary) == (["stars"], "r2")
    versions = file("text,label\n" + "".join(f"t{i},1.{i % 2}\n" for i in range(20)), "versions.csv")
    assert splits(versions).primary == "r2"
    with pytest.raises(UserError, match="fraction"):
        splits(versions, problem_type="single_label_classification")


@pytest.mark.parametrize("names", labelled_texts.PAIRS)
def test_pairs_by_the_names_of_their_columns(names: tuple[str, str], file: Callable[..., Path]) -> None:
    one, other = names
    path = file([{one: f"one {i}", other: f"other {i}", "label": "ab"[i % 2]} for i in range(20)])
    found = splits(path, validation_file=path)
    assert found.train is not None
    assert (found.train["text"][3], found.train["text_pair"][3]) == ("one 3", "other 3")
    assert labelled_texts.inputs(found.train, 4)[3] == {"text": "one ", "text_pair": "othe"}


def test_pairs_by_options(file: Callable[..., Path]) -> None:
    path = file([{"body": f"b {i}", "title": f"t {i}", "label": "ab"[i % 2]} for i in range(20)])
    found = splits(path, validation_file=path, text_column="body", text_pair_column="title")
    assert found.train is not None
    assert (found.train["text"][0], found.train["text_pair"][0]) == ("b 0", "t 0")
    assert "--text-pair-column" in refused(path, text_column="body", text_pair_column="headline")


def test_pairs_that_are_in_doubt(file: Callable[..., Path]) -> None:
    both = {"premise": "p", "hypothesis": "h", "question": "q", "sentence": "s", "label": "a"}
    assert "--text-pair-column" in refused(file([both]))
    pair = file([{"premise": "p", "hypothesis": "h", "label": "a"}], "pair.jsonl")
    assert "single texts" in refused(pair, validation_file=file([{"text": "t", "label": "a"}], "text.jsonl"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "", "label": ["a"]}, "an empty text"),
        ({"text": "x", "label": None}, "no list of labels"),
        ({"text": "x", "label": [""]}, "neither a name nor an integer"),
        ({"text": "x", "label": [None]}, "neither a name nor an integer"),
    ],
)
def test_rows_without_several_labels(row: dict[str, Any], words: str, file: Callable[..., Path]) -> None:
    path = file([*({"text": f"t{i}", "label": ["a"]} for i in range(5)), row])
    message = refused(path)
    assert words in message
    assert "row 6 " in message
    assert splits(path, validation_file=path, skip_bad_rows=True).skipped == 2


def test_numbers_in_lists_are_no_labels(file: Callable[..., Path]) -> None:
    assert "neither a name nor an integer: row 1" in refused(file([{"text": "a", "labels": [0.5]}]))


@pytest.mark.parametrize("label", ["much", "", "nan", "inf"])
def test_rows_without_a_number(label: str, file: Callable[..., Path]) -> None:
    path = file(f"text,label\na,1.5\nb,2\nc,{label}\nd,0.5\n", "train.csv")
    message = refused(path, problem_type="regression")
    assert "1 row(s) with no number as its label: row 3" in message
    found = splits(path, validation_file=path, problem_type="regression", skip_bad_rows=True)
    assert found.train is not None
    assert (found.train["label"][:], found.skipped) == ([1.5, 2.0, 0.5], 2)


def test_pairs_of_which_one_is_empty(file: Callable[..., Path]) -> None:
    path = file([{"text_a": "x", "text_b": " ", "label": "ab"[i % 2]} for i in range(4)])
    assert "4 row(s) with an empty text" in refused(path)


def test_labels_that_teach_nothing(file: Callable[..., Path]) -> None:
    assert "no row has a label" in refused(
        file([{"text": "a", "labels": []}]), problem_type="multi_label_classification"
    )
    same = file(rows_of(lambda i: 1.5))
    assert "the value 1.5" in refused(same)
    unseen = file([{"text": "a", "labels": ["zebra"]}], "other.jsonl")
    assert "'zebra'" in refused(file(rows_of(lambda i: ["a"])), validation_file=unseen)


def test_a_split_without_classes_is_seeded(file: Callable[..., Path]) -> None:
    path = file(rows_of(lambda i: i + 0.5))
    found, again = splits(path), splits(path)
    assert found.train is not None
    assert found.validation is not None
    assert sorted(found.train["text"][:] + found.validation["text"][:]) == sorted(f"text {i}" for i in range(20))
    assert found.validation["text"][:] == again.validation["text"][:]  # type: ignore[index]
    assert "too few" in refused(file([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}]), validation_share=0.9)


# --- What is learnt -------------------------------------------------------------------------------------------------


def test_the_threshold_of_one_label_is_the_best() -> None:
    chance = np.random.default_rng(3)
    scores, targets = chance.random((200, 6)), (chance.random((200, 6)) < [0.5, 0.1, 0.02, 0.9, 0, 1]).astype(float)
    scores = (scores + targets) / 2
    found = [evaluation.thresholds(scores[:, [label]], targets[:, [label]])[0] for label in range(6)]
    for label in range(6):
        best = max(f1_score(targets[:, label], scores[:, label] >= s, zero_division=0) for s in scores[:, label])
        assert f1_score(targets[:, label], scores[:, label] >= found[label], zero_division=0) == pytest.approx(best)
        assert np.abs(scores[:, label] - found[label]).min() > 0, "between two scores, not on one"
    assert found[4] == 0.5, "for a label without an example, the usual one"


def test_thresholds_of_labels_with_many_rows_are_about_the_best() -> None:
    chance = np.random.default_rng(3)
    targets = (chance.random((2000, 4)) < [0.5, 0.1, 0.9, 1]).astype(float)
    scores = (chance.random((2000, 4)) + targets * [0.5, 1, 2, 1]) / 3
    found = evaluation.thresholds(scores, targets)
    for label in range(4):
        # F1 with the highest score alone, with the two highest, and so on: 2 TP / (rows found + rows that are right).
        right = np.cumsum(targets[np.argsort(-scores[:, label]), label])
        best = max(2 * right / (np.arange(1, 2001) + right[-1]))
        assert f1_score(targets[:, label], scores[:, label] >= found[label]) == pytest.approx(best, abs=0.01)


def test_thresholds_of_labels_with_few_rows_are_drawn_to_that_of_all() -> None:
    scores = np.full((300, 3), 0.05)
    targets = np.zeros((300, 3))
    scores[:100, 0], targets[:100, 0] = 0.5, 1  # best between 0.05 and 0.5
    scores[0, 1], targets[0, 1] = 0.95, 1  # best between 0.05 and 0.95, but with the others 0.05 to 0.5
    many, few, none = evaluation.thresholds(scores, targets)
    assert many == pytest.approx(0.275)
    assert few == pytest.approx((1 * 0.5 + 5 * 0.275) / 6)
    assert none == pytest.approx(0.275), "a label without a row has that of all"
    assert evaluation.thresholds(scores, np.zeros((300, 3))) == [0.5] * 3


def test_metrics_of_several_labels() -> None:
    labels = ["a", "b", "c"]
    expected, predicted = [["a"], ["a", "b"], [], ["b"]], [["a"], ["b"], ["c"], []]
    figures = evaluation.multi_label_metrics(expected, predicted, labels)
    true = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])
    found = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert figures["macro_f1"] == pytest.approx(f1_score(true, found, average="macro", zero_division=0))
    assert figures["micro_f1"] == pytest.approx(f1_score(true, found, average="micro", zero_division=0))
    assert (figures["rows"], figures["exact_match"]) == (4, 0.25)
    assert figures["per_label"]["a"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "rows": 2}
    assert evaluation.multi_label_metrics([["a"], []], [["a"], []], ["a"])["macro_f1"] == 1.0, "one label alone"


def test_metrics_of_numbers() -> None:
    figures = evaluation.regression_metrics([1.0, 2.0, 4.0], [1.5, 2.0, 3.5])
    assert figures["mean_squared_error"] == pytest.approx(0.5 / 3)
    assert figures["mean_absolute_error"] == pytest.approx(1 / 3)
    assert figures["spearman"] == pytest.approx(1.0)
    assert figures["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1.5, 2, 3.5])[0, 1])
    assert figures["r2"] == pytest.approx(1 - 0.5 / (14 / 3))
    constant = evaluation.regression_metrics([1.0, 2.0], [7.0, 7.0])
    assert (constant["r2"], constant["pearson"], constant["spearman"]) == (0.0, 0.0, 0.0)


@pytest.fixture
def run_train(tmp_path: Path) -> Callable[..., Path]:
    """Runs train.py in this process."""

    def run(*arguments: Any) -> Path:
        place = tmp_path / "bundle"
        train_here("--output-dir", place, "--overwrite", "true", "--bf16", "false", *arguments)
        return place

    return run


def test_several_labels_are_learnt(file: Callable[..., Path], run_train: Callable[..., Path]) -> None:
    """Rare labels too: the head begins with the odds of each, and each gets a threshold."""
    every = {"sun": ("warm", 2), "rain": ("wet", 3), "fog": ("grey", 7)}
    rows = []
    for day in range(240):
        seen = [word for word, (_, days) in every.items() if day % days == 0]
        rows.append({"text": " and ".join(seen) or "night", "labels": [every[word][0] for word in seen]})
    path = file(rows)
    place = run_train("--train-file", path, "--learning-rate", 5e-4, "--num-train-epochs", 2)
    metrics = json.loads((place / "metrics.json").read_text())
    assert metrics["primary"] == "macro_f1"
    assert metrics["splits"]["validation"]["macro_f1"] > 0.9
    assert metrics["settings"]["options"]["thresholds"].keys() == {"grey", "warm", "wet"}
    assert json.loads((place / "config.json").read_text())["problem_type"] == "multi_label_classification"
    engine = Engine(place)
    assert {entry["label"] for entry in answers(engine, ["sun and fog"], threshold="learned")[0]} == {"warm", "grey"}
    archived = converted(place)
    assert drift(Engine(archived), ["sun", "fog"], answers(engine, ["sun", "fog"])) < 1e-4


def test_numbers_are_learnt_whatever_their_scale(file: Callable[..., Path], run_train: Callable[..., Path]) -> None:
    """The head is trained on values of deviation 1 and brought back to the scale of the data."""
    rooms = [("attic", 2000.5), ("flat", 2500.5), ("house", 3000.5)] * 50
    path = file([{"sentence1": room, "sentence2": "by the lake", "rent": rent} for room, rent in rooms])
    given = ("--train-file", path, "--label-column", "rent", *NO_CHECKPOINTS)
    place = run_train(*given, "--from-scratch", SPEC, "--max-steps", 120, "--learning-rate", 1e-2)
    figures = json.loads((place / "metrics.json").read_text())["splits"]["validation"]
    assert figures["r2"] > 0.9
    house = {"text": "house", "text_pair": "by the lake"}
    [[entry]] = answers(Engine(place), [house])
    assert entry["label"] == "rent"
    assert entry["score"] == pytest.approx(3000, abs=150)
    assert drift(Engine(place), ["attic"], [reference(place)("attic")]) < 1e-4

    # Trained further, it goes on where it was.
    kept = place.rename(place.with_name("first"))
    again = run_train(*given, "--base-model", kept, "--max-steps", 1, "--learning-rate", 1e-9)
    [[later]] = answers(Engine(again), [house])
    assert later["score"] == pytest.approx(entry["score"], rel=1e-4)


def test_gpt2_is_trained_with_padding(
    file: Callable[..., Path], run_train: Callable[..., Path], tmp_path: Path
) -> None:
    """It has no padding token of its own, and no bias in its head."""
    base = write(tmp_path / "base", "gpt2", transformers.AutoModel, "feature-extraction", ["good food", "bad food"])
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    del tokenizer["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    rows = [("good " * (1 + i % 7), 10.5) for i in range(40)] + [("bad " * (1 + i % 5), 0.0) for i in range(40)]
    path = file([{"text": text, "label": label} for text, label in rows])
    given = ("--max-steps", 60, "--learning-rate", 3e-3, *NO_CHECKPOINTS)
    place = run_train("--train-file", path, "--base-model", base, *given)
    config = json.loads((place / "config.json").read_text())
    assert config["pad_token_id"] == config["eos_token_id"]
    engine = Engine(place)
    assert json.loads((place / "metrics.json").read_text())["splits"]["validation"]["r2"] > 0.9
    ask = reference(place)
    assert drift(engine, ["good good", "bad"], [ask("good good"), ask("bad")]) < 1e-4


def test_a_trained_model_is_bundled_as_it_is(emotions: Path, run_train: Callable[..., Path], texts: list[str]) -> None:
    place = run_train("--base-model", emotions, "--max-length", MAX_LENGTH)
    assert json.loads((place / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert drift(Engine(place), texts[:9], answers(Engine(emotions), texts[:9])) < 1e-6


@pytest.mark.parametrize("trains", [False, True])
def test_two_labels_with_the_usual_names(
    trains: bool, texts: list[str], run_train: Callable[..., Path], file: Callable[..., Path], tmp_path: Path
) -> None:
    """Transformers leaves them out of config.json, as in many published models."""
    base = write(tmp_path / "base", "bert", transformers.AutoModel, "feature-extraction", texts[::6])
    transformers.set_seed(5)
    AUTO.from_pretrained(base).save_pretrained(base)
    assert "id2label" not in json.loads((base / "config.json").read_text())
    rows = file(rows_of(lambda i: f"LABEL_{i % 2}"))
    given = ("--train-file", rows, "--max-steps", 1, *NO_CHECKPOINTS) if trains else ()
    place = run_train("--base-model", base, "--max-length", MAX_LENGTH, *given)
    assert json.loads((place / "config.json").read_text())["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    ask = reference(base if not trains else place)
    assert drift(Engine(place), texts[:9], [ask(text) for text in texts[:9]]) < 1e-4


# --- Through a server -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(emotions: Path, stars: Path, shared_store: Path, serve_models: Callable[..., Served]) -> Served:
    for folder in (emotions, stars):
        archive(folder, shared_store)
    return serve_models("emotions", "stars")


def test_inference_client(inference_client: HubClient, emotions: Path, texts: list[str]) -> None:
    client = inference_client("emotions")
    for text in texts[:5]:
        found = client.text_classification(text)
        expected = answers(Engine(emotions), [text])[0]
        assert [entry.label for entry in found] == [entry["label"] for entry in expected]
        assert [entry.score for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-4)
    assert len(client.text_classification(texts[0], top_k=2, function_to_apply="none")) == 2


def test_marble_clients_send_pairs(served: Served, stars: Path, texts: list[str]) -> None:
    pair = min(pairs(texts), key=lambda pair: len(pair["text"] + pair["text_pair"]))  # pairs have no windows
    [expected] = answers(Engine(stars), [pair])
    with served.rest_client() as rest, served.grpc_client() as grpc:
        for client in (rest, grpc):
            answer = client.predict("stars", pair)
            assert answer.predictions[0][0]["label"] == "stars"  # type: ignore[index, call-overload]
            assert answer.predictions[0][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-4)  # type: ignore[index, call-overload]
            assert client.classify("emotions", texts[0], top_k=1).predictions[0].label in EMOTIONS


def test_naughty_strings_end_no_worker(served: Served, shared: Path, same_workers: None) -> None:
    strings = naughty_strings(shared)
    bodies: dict[str, Any] = {"emotions": strings, "stars": [{"text": s, "text_pair": s} for s in strings]}
    for name, inputs in bodies.items():
        path = f"/predictions/{name}"
        answer = served.post(path, {"inputs": inputs, "parameters": {"top_k": 1, "overflow": "truncate"}})
        assert answer.status_code == 200
        assert len(answer.json()) == len(strings)
        assert {entry["code"] for entry in answer.json() if isinstance(entry, dict)} <= {422}  # not a token in it
        assert sum(isinstance(entry, list) for entry in answer.json()) > 0.8 * len(strings)
        for hostile in strings[::40]:
            refused = served.post(path, {"inputs": "a", "parameters": {"threshold": hostile, hostile: 1}})
            assert refused.status_code == 422
