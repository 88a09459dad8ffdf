"""Token classification: entities as the pipeline of transformers gives them, trained, archived, served, called."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from backends import Replayed
from conftest import CPUS, NO_CHECKPOINTS, HubClient, Served, build_here, train_here
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerBase, pipeline

import train
from archiver import source
from archiver.convert import Converter
from handler.engine import Engine
from handler.errors import InternalError, InvalidInput, InvalidParameter, RequestError, TooLarge, UnreadableRequest
from handler.messages import Request, Result
from handler.tasks.token_classification import TokenClassification as Task
from training import base_model, scratch
from training.errors import UserError
from training.options import Options
from training.tasks import Splits
from training.tasks.token_classification import TokenClassification, align, entities

STRATEGIES = ["none", "simple", "first", "average", "max"]
FAMILIES = ["bert", "roberta"]
LABELS = ["O", "B-person", "I-person", "B-creative-work", "I-creative-work"]
SIZES = "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64"
LENGTH, STRIDE = 64, 16
ODD = [
    "",
    " ",
    "İstanbul'da Élodie e\u0301t\u0301e\u0301 漢字 😀😀 ﬁn",
    "[UNK] <unk> [SEP] </s> [CLS] <s> ##er Ġ",
    "no\u00a0break tab\tline\r\nnul\u200b\u202eend",
    "half-word/slash:colon;semi#hash@at don't",
    "x" * 300,
]

# --- what the tests ask, and whom


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def sentences(shared: Path) -> list[str]:
    """Real sentences, as a user would type them."""
    return [" ".join(row["tokens"]) for row in lines(shared / "wnut17" / "dev.jsonl")]


@pytest.fixture(scope="module")
def naughty(shared: Path) -> list[str]:
    return [row["text"] for row in lines(shared / "naughty_strings" / "naughty.jsonl")]


def tokenizer_of(family: str, texts: list[str]) -> PreTrainedTokenizerBase:
    """The bundled MiniLM's tokenizer, or a byte-level one trained on `texts`."""
    if family == "bert":
        return AutoTokenizer.from_pretrained(base_model.resolve(None).location)
    return scratch.train_tokenizer(scratch.parse_spec("roberta vocab_size=1000"), texts)


@pytest.fixture(scope="module")
def untrained(sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that know nothing, but are sure of it: their labels change from token to token."""
    folders = {}
    for family in FAMILIES:
        transformers.set_seed(0)
        tokenizer = tokenizer_of(family, sentences)
        config = scratch.build_config(
            scratch.parse_spec(f"{family} {SIZES}"),
            tokenizer,
            id2label=dict(enumerate(LABELS)),
            label2id={label: index for index, label in enumerate(LABELS)},
            initializer_range=0.02,
        )
        model = AutoModelForTokenClassification.from_config(config)
        model.classifier.weight.data *= 60
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "model-config.yaml").write_text(
            f"handler: {{task: token-classification, max_length: {LENGTH}, stride: {STRIDE}, overflow: window}}"
        )
        folders[family] = folder
    return folders


@pytest.fixture(scope="module")
def engines(untrained: dict[str, Path]) -> dict[str, Engine]:
    return {family: Engine(folder, threads=1) for family, folder in untrained.items()}


@pytest.fixture(scope="module")
def pipelines(untrained: dict[str, Path]) -> dict[str, Any]:
    """The reference, with our maximum length."""
    made = {}
    for family, folder in untrained.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.model_max_length = LENGTH
        model = AutoModelForTokenClassification.from_pretrained(folder)
        made[family] = pipeline("token-classification", model=model, tokenizer=tokenizer)
    return made


def ask(engine: Engine, text: Any, **parameters: Any) -> Any:
    [result] = engine.predict([Request([text], parameters)])
    assert isinstance(result, Result), result
    return result.predictions[0]


def refusal(engine: Engine, text: Any, **parameters: Any) -> RequestError:
    [error] = engine.predict([Request([text], parameters)])
    assert isinstance(error, RequestError)
    assert str(error).isascii()
    return error


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal in everything, and within 1e-4 in their scores."""
    without = [[{k: v for k, v in entity.items() if k != "score"} for entity in some] for some in (found, expected)]
    assert without[0] == without[1]
    both = [[float(entity["score"]) for entity in some] for some in (found, expected)]
    np.testing.assert_allclose(*both, atol=1e-4)


# --- equality with the pipeline


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_pipeline(
    family: str, strategy: str, engines: dict[str, Engine], pipelines: dict[str, Any], sentences: list[str]
) -> None:
    texts = sentences[:110] + ODD
    requests = [Request([text], {"aggregation_strategy": strategy, "overflow": "truncate"}) for text in texts]
    results = engines[family].predict(requests)
    expected = pipelines[family](texts, aggregation_strategy=strategy)
    assert sum(map(len, expected)) > 500
    for result, entities_ in zip(results, expected, strict=True):
        assert isinstance(result, Result)
        same(result.predictions[0], entities_)


@pytest.mark.parametrize("ignored", [[], ["person", "O"], ["B-person", "I-creative-work"]])
def test_ignored_labels_are_those_of_the_pipeline(
    ignored: list[str], engines: dict[str, Engine], pipelines: dict[str, Any], sentences: list[str]
) -> None:
    for strategy in ("none", "simple"):
        for text in sentences[:10]:
            found = ask(engines["bert"], text, aggregation_strategy=strategy, ignore_labels=ignored)
            same(found, pipelines["bert"](text, aggregation_strategy=strategy, ignore_labels=ignored))


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_merged_as_the_pipeline_does(
    family: str, strategy: str, engines: dict[str, Engine], pipelines: dict[str, Any], sentences: list[str]
) -> None:
    text = " ".join(sentences[:20])
    for stride in (0, STRIDE, 40):
        found = ask(engines[family], text, aggregation_strategy=strategy, stride=stride)
        same(found, pipelines[family](text, aggregation_strategy=strategy, stride=stride))
    assert found[-1]["end"] > 0.9 * len(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_of_a_long_text_is_answered_once(
    family: str, engines: dict[str, Engine], sentences: list[str]
) -> None:
    text = " ".join(sentences[:20])
    tokens = ask(engines[family], text, aggregation_strategy="none", ignore_labels=[])
    whole = engines[family].task.inputs.tokenizer  # type: ignore[attr-defined]
    whole.no_truncation()
    encoding = whole.encode(text)
    whole.enable_truncation(LENGTH, stride=STRIDE)
    assert [token["index"] for token in tokens] == list(range(1, len(encoding) - 1))
    assert [(token["start"], token["end"]) for token in tokens] == encoding.offsets[1:-1]


def test_ignored_labels_do_not_decide_which_window_answers(engines: dict[str, Engine], sentences: list[str]) -> None:
    """What one window is surer to ignore is ignored, whatever the other thinks of it."""
    text = " ".join(sentences[:20])
    every = ask(engines["bert"], text, ignore_labels=[])
    for label in LABELS:
        assert ask(engines["bert"], text, ignore_labels=[label]) == [t for t in every if t["entity"] != label]


def test_offsets_are_exact_whatever_the_normalizer_does(engines: dict[str, Engine]) -> None:
    text = "Zoë İstanbul'da\u00a0e\u0301tait là — 漢字 ＡＢＣ 😀 ok"
    for engine in engines.values():
        tokens = ask(engine, text, aggregation_strategy="none", ignore_labels=[])
        # Byte-level tokens that are parts of one character all have its place.
        places = dict.fromkeys((token["start"], token["end"]) for token in tokens)
        assert "".join("".join(text[start:end] for start, end in places).split()) == "".join(text.split())
    words = ask(engines["bert"], text, aggregation_strategy="none", ignore_labels=[])
    assert [text[word["start"] : word["end"]] for word in words if word["word"] in ("zoe", "漢")] == ["Zoë", "漢"]


# --- what is refused


def test_an_object_with_a_text_is_an_input(engines: dict[str, Engine]) -> None:
    assert ask(engines["bert"], {"text": "Ada went"}) == ask(engines["bert"], "Ada went")


@pytest.mark.parametrize(
    ("text", "parameters", "kind", "says"),
    [
        (7, {}, InvalidInput, "a string"),
        (["a", "list"], {}, InvalidInput, "a string"),
        ("half \ud83d", {}, UnreadableRequest, "surrogate"),
        ("a", {"aggregation_strategy": "best"}, InvalidParameter, "'simple'"),
        ("a", {"ignore_labels": "O"}, InvalidParameter, "a list of strings"),
        ("a", {"ignore_labels": [1]}, InvalidParameter, "a list of strings"),
        ("a", {"stride": -1}, InvalidParameter, "at least 0"),
        ("a", {"stride": LENGTH}, InvalidParameter, "below 62"),
        ("a", {"stride": LENGTH - 2}, InvalidParameter, "below 62"),
        ("a", {"strid": 1}, InvalidParameter, "stride"),
        ("word " * 20_000, {}, TooLarge, "windows"),
        ("word " * 20_000, {"stride": 61}, TooLarge, "stride"),
        ("word " * 100, {"overflow": "error"}, TooLarge, "tokens"),
    ],
)
def test_bad_requests_are_refused(
    text: Any, parameters: dict[str, Any], kind: type[RequestError], says: str, engines: dict[str, Engine]
) -> None:
    error = refusal(engines["bert"], text, **parameters)
    assert type(error) is kind
    assert says in str(error)


def test_requests_with_strides_of_their_own_share_a_batch(engines: dict[str, Engine], sentences: list[str]) -> None:
    text = " ".join(sentences[:10])
    wanted = [{"stride": 3}, {}, {"stride": 40}, {"stride": 99}, {"stride": 3}]
    alone = [engines["bert"].predict([Request([text], parameters)])[0] for parameters in wanted]
    together = engines["bert"].predict([Request([text], parameters) for parameters in wanted])
    assert [type(outcome) for outcome in together] == [Result, Result, Result, InvalidParameter, Result]
    for one, other in zip(alone, together, strict=True):
        if isinstance(one, Result) and isinstance(other, Result):
            same(other.predictions[0], one.predictions[0])
            assert one.usage == other.usage


def test_scores_that_are_no_numbers_never_leave(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arrays: Any) -> dict[str, Any]:
        return {"logits": np.full((*arrays["input_ids"].shape, len(LABELS)), np.nan, dtype=np.float32)}

    monkeypatch.setattr(engines["bert"], "backend", Replayed(broken))
    assert isinstance(refusal(engines["bert"], "a text"), InternalError)


# --- drift


def entity(label: str, score: float, start: int = 0) -> dict[str, Any]:
    return {"entity": label, "score": score, "index": 1, "word": "x", "start": start, "end": start + 1}


@pytest.mark.parametrize(
    ("expected", "found", "drift"),
    [
        ([], [], 0.0),
        ([entity("O", 0.9)], [entity("O", 0.7)], 0.2),
        ([entity("O", 0.9)], [entity("O", float("nan"))], float("nan")),
        # The new label had at most 0.1 before; the old one has at most 0.2 now.
        ([entity("O", 0.9)], [entity("B-person", 0.8)], 0.7),
        # Undecided before and after: nothing need have changed.
        ([entity("O", 0.5)], [entity("B-person", 0.5)], 0.0),
        ([entity("O", 0.3)], [entity("B-person", 0.32)], 0.02),
        ([entity("O", 0.9)], [], float("inf")),
        ([entity("O", 0.9)], [entity("O", 0.9, start=1)], float("inf")),
    ],
)
def test_drift(expected: list[Any], found: list[Any], drift: float) -> None:
    assert Task.drift(expected, found) == pytest.approx(drift, nan_ok=True)


# --- data


def data_file(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(text: str, tags: str) -> dict[str, Any]:
    return {"tokens": text.split(), "ner_tags": tags.split()}


GOOD = row("Ada Lovelace wrote", "B-per I-per O")


def splits(train_file: Path, **options: Any) -> Any:
    return TokenClassification().read(Options(train_file=str(train_file), **options), 0, base_model.resolve(None))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row("Ada wrote", "I-per O"), "begins with B-"),
        (row("Ada wrote", "B-loc I-per"), "begins with B-"),
        (row("Ada wrote", "O"), "more tokens than tags"),
        (row("Ada", "B-per O"), "more tokens than tags"),
        ({"tokens": ["Ada", " "], "ner_tags": ["O", "O"]}, "an empty one"),
        ({"tokens": [], "ner_tags": []}, "no tokens"),
        ({"tokens": None, "ner_tags": ["O"]}, "no list"),
        ({"tokens": ["Ada", None], "ner_tags": ["O", "O"]}, "no list"),
        (row("Ada", "S-per"), "B-TYPE"),
        (row("Ada", "per"), "B-TYPE"),
        (row("Ada", "B-"), "B-TYPE"),
    ],
)
def test_bad_rows_are_named_or_left_out(bad: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = data_file(tmp_path, GOOD, GOOD, bad, GOOD)
    with pytest.raises(UserError, match="row 3") as caught:
        splits(path)
    assert says in str(caught.value)
    found = splits(path, skip_bad_rows=True)
    assert (len(found.train) + len(found.validation), found.skipped) == (3, 1)
    assert found.labels == ["O", "B-per", "I-per"]


def test_a_type_that_only_validation_has_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    path = data_file(tmp_path, GOOD, GOOD)
    validation = data_file(tmp_path / "other", GOOD, row("in Rome", "O B-loc"))
    with pytest.raises(UserError, match=r"other/data\.jsonl.*not trained for: row 2"):
        splits(path, validation_file=str(validation))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row("nothing here", "O O")], "every tag is O"),
        ([GOOD], "cannot be split"),
        ([{"tokens": ["Ada"], "ner_tags": [1]}], "without names"),
        ([{"words": ["Ada"], "ner_tags": ["O"]}], "no column 'tokens'"),
    ],
)
def test_data_that_cannot_be_learnt_from(rows: list[dict[str, Any]], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        splits(data_file(tmp_path, *rows))


def test_other_columns_and_integers_with_names(tmp_path: Path) -> None:
    features = Features(
        {"words": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=["O", "B-per", "I-per"]))}
    )
    rows = Dataset.from_dict({"words": [["Ada", "wrote"]] * 4, "tags": [[1, 0]] * 4}, features=features)
    rows.to_parquet(tmp_path / "data.parquet")
    found = splits(tmp_path / "data.parquet", text_column="words", label_column="tags")
    assert found.train[0] == {"tokens": ["Ada", "wrote"], "tags": ["B-per", "O"]}
    assert TokenClassification().counts(found.train, found.labels) == {"per": 3}


# --- alignment


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_stand_on_the_first_sub_word_of_each_word(family: str) -> None:
    tokens = ["Zyxomma", "sings", "#unbelievable", "Ünïcödé", "x"]
    tags = ["B-person", "I-person", "B-creative-work", "O", "O"]
    tokenizer = tokenizer_of(family, ["sings for x", "never more"])
    [encoding] = tokenizer([" ".join(tokens)]).encodings
    aligned = align(encoding, tokens, tags)
    labelled = {
        " ".join(tokens)[start:end]: tag
        for tag, (start, end) in zip(aligned, encoding.offsets, strict=True)
        if tag is not None
    }
    assert len(encoding) > len(labelled) + 2  # there are later sub-words, besides the two special tokens
    assert list(labelled.values()) == ["B-person", "I-person", "B-creative-work", "I-creative-work", "O", "O"]
    assert list(labelled)[2] == "#"
    assert list(labelled)[3].startswith("u")


def test_windows_of_a_long_sentence_lose_and_repeat_no_label(tmp_path: Path) -> None:
    """Every word of a training sentence is labelled in some window, and nowhere with another tag."""
    tokens = [f"Zyx{number}omma" if number % 3 else "of" for number in range(200)]
    tags = ["O" if number % 3 == 0 else "B-per" if number % 3 == 1 else "I-per" for number in range(200)]
    path = data_file(tmp_path, *[{"tokens": tokens, "ner_tags": tags}] * 2)
    task, base = TokenClassification(), base_model.resolve(None)
    options = Options(train_file=str(path), max_length=48)
    found = task.read(options, 0, base)
    model, tokenizer = task.load(base, found, options)
    arguments = train.parse(["--train-file", str(path), "--output-dir", str(tmp_path / "out")])[1]
    arguments.choose_by(task.metrics)
    trainer = task.trainer(model, tokenizer, found, options, arguments, task.settings(model, tokenizer, options))
    rows: Any = trainer.train_dataset
    windows = [rows[place]["labels"].tolist() for place in range(len(rows))]
    assert len(windows) > 20
    assert max(map(len, windows)) == 48
    [whole] = tokenizer([" ".join(tokens)]).encodings
    labels = {position: tag for position, tag in enumerate(align(whole, tokens, tags)) if tag is not None}
    step = 48 - 2 - 48 // 8
    found_labels: dict[int, set[str]] = {}
    for number, window in enumerate(windows):
        for position, label in enumerate(window):
            if label != -100:
                found_labels.setdefault(number * step + position, set()).add(found.labels[label])
    assert found_labels == {position: {tag} for position, tag in labels.items()}


def test_entities_are_character_spans() -> None:
    assert entities(["Ada", "Love", "in", "Rome", "Oslo"], ["B-per", "I-per", "O", "B-loc", "B-loc"]) == [
        {"entity_group": "per", "start": 0, "end": 8},
        {"entity_group": "loc", "start": 12, "end": 16},
        {"entity_group": "loc", "start": 17, "end": 21},
    ]


def span(kind: str, start: int, end: int) -> dict[str, Any]:
    return {"entity_group": kind, "start": start, "end": end, "score": 0.5}


def test_scores_count_whole_entities() -> None:
    targets = [[span("per", 0, 3), span("per", 4, 8), span("loc", 10, 14)], [], [span("loc", 0, 4)]]
    found = [[span("per", 0, 3), span("per", 4, 7), span("per", 10, 14)], [span("loc", 2, 3)], [span("loc", 0, 4)]]
    labels = ["O", "B-per", "I-per", "B-loc", "I-loc"]
    score = TokenClassification().score(found, targets, labels)
    assert score["rows"] == 3
    assert score["precision"] == pytest.approx(2 / 5)
    assert score["recall"] == pytest.approx(2 / 4)
    assert score["f1"] == pytest.approx(4 / 9)
    assert score["per_label"]["per"] == pytest.approx({"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5, "rows": 2})
    assert score["macro_f1"] == pytest.approx(np.mean([entry["f1"] for entry in score["per_label"].values()]))
    perfect = TokenClassification().score(targets, targets, labels)
    assert perfect["f1"] == 1.0
    assert TokenClassification().score([[], []], [[], []], [])["f1"] == 0.0


# --- trained on a toy pattern, for real


NAMES = ["Zorblax Quimby", "Marnok", "Tilda Vex"]
PLACES = ["Grelland", "Port Ozma"]
TEXT = "the a of river walked slowly under green old bridge and then some rain fell on quiet stones near market"
FILLER = TEXT.split()


def toy_row(source_: random.Random) -> dict[str, Any]:
    tokens: list[str] = []
    tags: list[str] = []
    for _ in range(source_.randint(1, 3)):
        words = source_.choices(FILLER, k=source_.choice([0, 2, 4, 9]))
        kind = source_.choice(["person", "location"])
        name = source_.choice(NAMES if kind == "person" else PLACES).split()
        tokens += words + name
        tags += ["O"] * len(words) + [f"B-{kind}", f"I-{kind}"][: len(name)]
    return {"tokens": tokens, "ner_tags": tags}


def trained(place: Path, *arguments: object, threads: int = 1) -> Path:
    train_here(
        "--task",
        "token-classification",
        "--output-dir",
        place,
        "--bf16",
        "false",
        *NO_CHECKPOINTS,
        *arguments,
        threads=threads,
    )
    return place


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa from scratch that knows the toy names."""
    folder = tmp_path_factory.mktemp("toy")
    generator = random.Random(0)
    path = data_file(folder, *(toy_row(generator) for _ in range(400)))
    specification = f"roberta {SIZES} vocab_size=400 max_position_embeddings=130"
    return trained(
        folder / "bundle",
        *("--train-file", path, "--from-scratch", specification, "--max-steps", 70, "--learning-rate", 1e-2),
    )


@pytest.fixture(scope="module")
def toy_openvino(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openvino")
    Converter(source.check(toy)).write("openvino", "fp32", folder)
    (folder / "model-config.yaml").write_bytes((toy / "model-config.yaml").read_bytes())
    return folder


@pytest.fixture(scope="module", params=["torch", "openvino"])
def toy_engine(request: pytest.FixtureRequest, toy: Path, toy_openvino: Path) -> Engine:
    return Engine(toy if request.param == "torch" else toy_openvino, backend=request.param, threads=1)


def test_training_learns_and_says_how_well(toy: Path) -> None:
    metrics = json.loads((toy / "metrics.json").read_text())
    assert metrics["splits"]["validation"]["f1"] > 0.95
    assert set(metrics["rows_per_label"]["train"]) == {"location", "person"}
    assert metrics["labels"] == ["O", "B-location", "I-location", "B-person", "I-person"]
    [first, *_] = lines(toy / "validation.jsonl")
    for target in first["target"]:
        assert first["inputs"][target["start"] : target["end"]] in NAMES + PLACES
    settings = metrics["settings"]
    assert settings["max_length"] > 100
    assert (settings["stride"], settings["overflow"]) == (settings["max_length"] // 8, "window")


@pytest.mark.parametrize("strategy", ["simple", "average"])
def test_an_entity_at_every_tenth_of_a_long_document(toy_engine: Engine, strategy: str) -> None:
    """5,000 tokens; the name is found at each place, once, and nothing else is."""
    generator = random.Random(1)
    words = generator.choices(FILLER, k=5000)
    engine_tokens = toy_engine.task.inputs.counts([" ".join(words)])[0]  # type: ignore[attr-defined]
    assert engine_tokens >= 5000
    for tenth in range(11):
        before, after = words[: tenth * 500], words[tenth * 500 :]
        text = " ".join([*before, "Zorblax Quimby", *after])
        start = len(" ".join(before)) + bool(before)
        [found] = ask(toy_engine, text, aggregation_strategy=strategy)
        assert (found["start"], found["end"], found["entity_group"]) == (start, start + 14, "person")
        assert found["word"].strip() == "Zorblax Quimby"


def test_all_entities_of_a_long_document_and_no_other(toy_engine: Engine) -> None:
    """Names at every offset from the windows' borders: none is lost, doubled or cut."""
    generator = random.Random(2)
    parts: list[str] = []
    expected = []
    for number in range(400):
        parts += generator.choices(FILLER, k=generator.randint(3, 12))
        expected.append((len(" ".join(parts)) + 1, NAMES[number % 3]))
        parts.append(NAMES[number % 3])
    text = " ".join(parts)
    for stride in (None, 8, 60):
        parameters = {} if stride is None else {"stride": stride}
        found = ask(toy_engine, text, aggregation_strategy="first", **parameters)
        assert [(entry["start"], text[entry["start"] : entry["end"]]) for entry in found] == expected


def test_truncation_is_told(toy_engine: Engine) -> None:
    text = " ".join(["Marnok", *FILLER * 20, "Marnok"])
    [cut] = toy_engine.predict([Request([text], {"overflow": "truncate", "aggregation_strategy": "first"})])
    [whole] = toy_engine.predict([Request([text], {"aggregation_strategy": "first"})])
    assert isinstance(cut, Result)
    assert isinstance(whole, Result)
    assert (cut.usage.truncated, cut.usage.windows, len(cut.predictions[0])) == (True, 1, 1)
    assert (whole.usage.truncated, len(whole.predictions[0])) == (False, 2)
    assert whole.usage.windows > 1


def test_backends_agree(toy: Path, toy_openvino: Path, sentences: list[str]) -> None:
    requests = [Request([text], {"ignore_labels": []}) for text in sentences[:40]]
    first = Engine(toy, threads=1).predict(requests)
    second = Engine(toy_openvino, backend="openvino", threads=1).predict(requests)
    for one, other in zip(first, second, strict=True):
        assert isinstance(one, Result)
        assert isinstance(other, Result)
        assert Task.drift(one.predictions[0], other.predictions[0]) < 1e-4


# --- end to end


@pytest.fixture(scope="module")
def wnut(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM after a few steps on real sentences."""
    folder = tmp_path_factory.mktemp("wnut")
    data = shared / "wnut17"
    path = data_file(folder, *[r for r in lines(data / "train.jsonl") if any(t != "O" for t in r["ner_tags"])][:40])
    (folder / "validation").mkdir()
    validation = data_file(folder / "validation", *lines(data / "dev.jsonl")[:20])
    return trained(
        folder / "bundle",
        *("--train-file", path, "--validation-file", validation, "--max-steps", 4, "--learning-rate", 5e-4),
        *("--per-device-train-batch-size", 8, "--warmup-steps", 1),
        threads=CPUS,
    )


@pytest.fixture(scope="module")
def served(wnut: Path, toy: Path, shared_store: Path, serve_models: Callable[..., Served]) -> Served:
    """A TorchServe with `ner` (BERT, openvino) and `ner-toy` (RoBERTa, torch)."""
    build_here(wnut, shared_store, "ner", "openvino")
    build_here(toy, shared_store, "ner-toy", "torch")
    return serve_models("ner", "ner-toy")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inference_client(inference_client: HubClient, strategy: Any) -> None:
    text = "the river and then Zorblax Quimby walked slowly near Port Ozma"
    found = inference_client("ner-toy").token_classification(text, aggregation_strategy=strategy)
    names = [text[entry.start : entry.end] for entry in found]
    if strategy == "none":
        assert {entry.entity for entry in found} == {"B-person", "I-person", "B-location", "I-location"}
    else:
        assert names == ["Zorblax Quimby", "Port Ozma"]
        assert [entry.entity_group for entry in found] == ["person", "location"]
    assert all(0.5 < entry.score <= 1 for entry in found)


def test_inference_client_equals_the_pipeline_of_the_bundle(
    inference_client: HubClient, wnut: Path, sentences: list[str]
) -> None:
    reference = pipeline("token-classification", model=str(wnut))
    client = inference_client("ner")
    for text in sentences[100:120]:
        found = client.token_classification(text, ignore_labels=[], aggregation_strategy="simple")
        expected = reference(text, ignore_labels=[], aggregation_strategy="simple")
        plain = [{key: getattr(entry, key) for key in expected[0]} for entry in found]
        same(plain, expected)


def test_marble_clients_agree_over_rest_and_grpc(served: Served) -> None:
    texts = ["then Marnok walked near Grelland", "some rain fell", "Tilda Vex"]
    parameters = {"aggregation_strategy": "first"}
    with served.rest_client() as rest, served.grpc_client() as grpc:
        [one, other] = [client.predict("ner-toy", texts, parameters).predictions for client in (rest, grpc)]
        single = rest.predict("ner-toy", texts[0], parameters).predictions
    assert one == other
    assert [len(entities_) for entities_ in one] == [2, 0, 1]
    assert single == one[0]


def test_naughty_strings_end_no_worker(served: Served, naughty: list[str], same_workers: None) -> None:
    for model in ("ner", "ner-toy"):
        with served.rest_client() as client:
            answer = client.predict(model, naughty, {"aggregation_strategy": "average", "ignore_labels": []})
        assert len(answer.predictions) == len(naughty)
        for text, entities_ in zip(naughty, answer.predictions, strict=True):
            assert isinstance(entities_, list)
            assert all(0 <= entry["start"] <= entry["end"] <= len(text) for entry in entities_)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"inputs": "half \\ud83d"}', 400),
        (b'{"inputs": {"tokens": ["a"]}}', 422),
        (b'{"inputs": "a", "parameters": {"aggregation_strategy": "best"}}', 422),
        (b'{"inputs": "a", "parameters": {"stride": 100000}}', 422),
    ],
)
def test_errors_reach_the_client(served: Served, body: bytes, code: int, same_workers: None) -> None:
    answer = served.post("/predictions/ner", body, "application/json")
    assert (answer.status_code, answer.json()["code"]) == (code, code)


@pytest.mark.parametrize(("lead", "offset"), [(1.1, -1.25), (-0.4, 0.0)], ids=["too shy", "as it should be"])
def test_a_head_that_is_too_shy_sees_entities_more_readily(lead: float, offset: float) -> None:
    """Of the offsets that give the best F1 the smallest is taken. lead: by how much "O" wins where an entity is."""
    labels = ["O", "B-place"]
    targets = np.array([[0, 1, 0, 1], [0, 0, 1, -100]])
    logits = np.zeros((2, 4, 2), dtype=np.float32)
    logits[..., 0] = np.where(targets == 1, lead, 2.0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    model.config = SimpleNamespace(num_labels=2)  # type: ignore[assignment]
    before = model[0].bias.detach().clone()
    predicted = SimpleNamespace(predictions=logits, label_ids=targets)
    trained: Any = SimpleNamespace(model=model, eval_dataset=None, predict=lambda _: predicted)
    splits = Splits(None, None, None, labels)
    assert TokenClassification().learned(trained, splits, Options(), {}) == {}
    torch.testing.assert_close(model[0].bias.detach() - before, torch.tensor([offset, 0.0]))
