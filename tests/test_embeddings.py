"""Feature extraction and sentence similarity: the vectors that sentence-transformers gives for the same model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from conftest import CPUS, HubClient, Served, train_here
from numpy.typing import NDArray
from text_models import (
    MAX_LENGTH,
    STRIDE,
    answers,
    archive,
    converted,
    naughty_strings,
    real_texts,
    refusal,
    write,
)

from handler.engine import Engine
from handler.formats import hugging_face
from handler.tasks.feature_extraction import SentenceSettings, normalized, settings_files
from training.base_model import resolve
from training.errors import UserError

MODULES = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
LONG = " ".join(f"word{i % 50}" for i in range(150))


def bundled_minilm() -> Path:
    return Path(resolve(None).location)


def run_train(place: Path, task: str, *arguments: Any) -> Path:
    train_here("--task", task, "--output-dir", place, *arguments, threads=CPUS)
    return place


def with_settings(
    folder: Path,
    *,
    modules: Any = MODULES[:2],
    pooling: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> Path:
    """Writes sentence-transformers settings into a model's folder."""
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    config = {"word_embedding_dimension": 32, **(pooling or {"pooling_mode_mean_tokens": True})}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_LENGTH, **(encoder or {})}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(model or {}))
    return folder


def sentences_of(folder: Path) -> sentence_transformers.SentenceTransformer:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def vectors(engine: Engine, texts: list[str], **parameters: Any) -> NDArray[np.float64]:
    return np.array(answers(engine, texts, **parameters))


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[str]:
    return [*real_texts(shared, 34), "", "Ünïcödé, 漢字 and 🙂", LONG]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled MiniLM, as train.py bundles it."""
    return run_train(tmp_path_factory.mktemp("minilm") / "minilm", "feature-extraction")


@pytest.fixture
def tiny(tmp_path: Path, texts: list[str]) -> Callable[..., Path]:
    """A small random model, without settings of its own."""

    def make(family: str = "bert") -> Path:
        place = tmp_path / family
        return write(place, family, transformers.AutoModel, "feature-extraction", [t for t in texts[::6] if t])

    return make


# --- Equal to sentence-transformers ---------------------------------------------------------------------------------


def test_the_bundled_minilm(minilm: Path, texts: list[str]) -> None:
    expected = sentences_of(bundled_minilm()).encode(texts)
    assert len(texts) >= 100
    assert np.abs(vectors(Engine(minilm), texts) - expected).max() < 1e-4
    assert np.abs(vectors(Engine(converted(minilm)), texts) - expected).max() < 1e-4
    settings = Engine(minilm).settings
    assert (settings.max_length, settings.overflow) == (256, "truncate"), "max_length as its own settings say"
    assert np.abs(sentences_of(minilm).encode(texts[:9]) - expected[:9]).max() < 1e-6, "the bundle is one of its models"


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", [*POOLINGS, ["mean", "cls"], ["lasttoken", "max", "weightedmean"]])
def test_poolings(pooling: str | list[str], normalize: bool, tiny: Callable[..., Path], texts: list[str]) -> None:
    folder = with_settings(tiny(), modules=MODULES[: 3 if normalize else 2], pooling={"pooling_mode": pooling})
    expected = sentences_of(folder).encode(texts[-12:])
    assert np.abs(vectors(Engine(folder), texts[-12:]) - expected).max() < 1e-4


def test_poolings_in_older_settings(tiny: Callable[..., Path], texts: list[str]) -> None:
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
    folder = with_settings(tiny("gpt2"), pooling=flags)
    some = [text for text in texts[-12:] if text]
    assert np.abs(vectors(Engine(folder), some) - sentences_of(folder).encode(some)).max() < 1e-4
    with_settings(folder, pooling={"pooling_mode_cls_token": False})
    assert np.abs(vectors(Engine(folder), some) - sentences_of(folder).encode(some)).max() < 1e-4


def test_prompts_and_lower_case(tiny: Callable[..., Path], texts: list[str]) -> None:
    model = {"prompts": {"query": "Search For: ", "none": ""}, "default_prompt_name": "query"}
    folder = with_settings(tiny("roberta"), encoder={"do_lower_case": True}, model=model)
    engine, sentences = Engine(folder), sentences_of(folder)
    some = ["The Quick FOX", *texts[:5]]
    for given in ({}, {"prompt_name": "query"}, {"prompt_name": "none"}):
        assert np.abs(vectors(engine, some, **given) - sentences.encode(some, **given)).max() < 1e-4
    assert np.abs(vectors(engine, some) - vectors(engine, some, prompt_name="none")).max() > 0.01
    code, message = refusal(engine, "a", prompt_name="passage")
    assert code == 422
    assert "'none', 'query'" in message


def test_truncation(minilm: Path) -> None:
    engine, sentences = Engine(minilm), sentences_of(bundled_minilm())
    long = " ".join(f"number {i}" for i in range(300))
    assert np.abs(vectors(engine, [long], truncate=True) - sentences.encode([long])).max() < 1e-4
    sentences.tokenizer.truncation_side = "left"
    left = vectors(engine, [long], truncate=True, truncation_direction="left")
    assert np.abs(left - sentences.encode([long])).max() < 1e-4
    mixed = answers(engine, ["short", long], truncation_direction="left")
    assert np.abs(np.array(mixed[1]) - left[0]).max() < 1e-6
    assert refusal(engine, long, truncate=False)[0] == 413
    code, message = refusal(engine, long, truncate=False, overflow="window")
    assert code == 422
    assert "contradict" in message
    assert refusal(engine, long, truncate=True, overflow="window")[0] == 422


def windows(folder: Path, text: str) -> list[NDArray[np.float64]]:
    """Token vectors of each window of a text, by transformers alone: [tokens, size] each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = tokenizer(text, truncation=True, max_length=MAX_LENGTH, stride=STRIDE, return_overflowing_tokens=True)
    with torch.inference_mode():
        return [model(torch.tensor([ids])).last_hidden_state[0].double().numpy() for ids in rows["input_ids"]]


def test_windows_of_a_long_text_are_averaged_by_their_tokens(tiny: Callable[..., Path]) -> None:
    folder = with_settings(tiny(), modules=MODULES)
    parts = windows(folder, LONG)
    assert len(parts) > 2
    assert len(parts[-1]) < len(parts[0])
    mean = sum(part.sum(axis=0) for part in parts) / sum(map(len, parts))
    assert np.abs(vectors(Engine(folder), [LONG], overflow="window") - normalized(mean)).max() < 1e-5


# --- Without settings: one vector for each token --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_vectors_of_tokens_are_those_of_the_pipeline(family: str, tiny: Callable[..., Path], texts: list[str]) -> None:
    folder = tiny(family)
    pipeline = transformers.pipeline("feature-extraction", model=str(folder))
    some = [text for text in texts if text]
    assert len(some) >= 100
    for place in (folder, converted(folder)):
        for text, found in zip(some, answers(Engine(place), some, overflow="truncate"), strict=True):
            expected = np.array(pipeline(text, truncation=True, tokenize_kwargs={"max_length": MAX_LENGTH}))
            assert np.array(found).shape == expected.shape
            assert np.abs(np.array(found) - expected).max() < 1e-4


def test_vectors_of_tokens_at_unit_length(tiny: Callable[..., Path]) -> None:
    engine = Engine(tiny())
    plain, unit = vectors(engine, ["a few words"]), vectors(engine, ["a few words"], normalize=True)
    assert np.abs(np.linalg.norm(unit, axis=-1) - 1).max() < 1e-9
    assert np.abs(plain / np.linalg.norm(plain, axis=-1, keepdims=True) - unit).max() < 1e-6
    assert "no prompts" in refusal(engine, "a", prompt_name="query")[1]


@pytest.mark.parametrize("direction", ["right", "left"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_vectors_of_all_tokens_of_a_long_text(family: str, direction: str, tiny: Callable[..., Path]) -> None:
    folder = tiny(family)
    whole = transformers.AutoTokenizer.from_pretrained(folder)(LONG)["input_ids"]
    [[found]] = vectors(Engine(folder), [LONG], overflow="window", truncation_direction=direction)
    assert found.shape == (len(whole), 32)
    if direction == "right":
        parts, special = windows(folder, LONG), int(family == "bert")
        first, last = len(parts[0]) - STRIDE // 2 - special, len(parts[-1]) - (STRIDE + 1) // 2 - special
        assert np.abs(found[:first] - parts[0][:first]).max() < 1e-5
        assert np.abs(found[-last:] - parts[-1][-last:]).max() < 1e-5


# --- Settings -------------------------------------------------------------------------------------------------------


def test_settings_of_the_bundled_minilm() -> None:
    assert SentenceSettings.load(bundled_minilm()) == SentenceSettings(normalize=True, max_length=256)
    assert set(settings_files(bundled_minilm())) == {
        *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"),
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules": [*MODULES[:2], ("Dense", "2_Dense")]}, "Transformer, Pooling, Dense"),
        ({"modules": [("StaticEmbedding", "")]}, "StaticEmbedding"),
        ({"modules": MODULES[:1]}, "Transformer cannot be served"),
        ({"modules": []}, "no modules"),
        ({"modules": [("Transformer", "0_Transformer"), *MODULES[1:]]}, "0_Transformer"),
        ({"pooling": {"pooling_mode": "median"}}, "median"),
        ({"pooling": {"pooling_mode": "mean", "include_prompt": False}}, "include_prompt"),
        ({"model": {"similarity_fn_name": "hamming"}}, "hamming"),
        ({"model": {"prompts": {"a": "b"}, "default_prompt_name": "c"}}, "'c'"),
    ],
)
def test_settings_that_cannot_be_served(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        SentenceSettings.load(with_settings(tmp_path, **settings))


@pytest.mark.parametrize("name", ["modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"])
@pytest.mark.parametrize("content", ["{", "5"])
def test_broken_settings(name: str, content: str, tmp_path: Path) -> None:
    (with_settings(tmp_path) / name).write_text(content)
    with pytest.raises(ValueError, match=name.rpartition("/")[2]):
        SentenceSettings.load(tmp_path)


def test_modules_that_say_nothing(tmp_path: Path) -> None:
    (with_settings(tmp_path) / "modules.json").write_text('[{"idx": 0}, "Pooling"]')
    with pytest.raises(ValueError, match="no type"):
        SentenceSettings.load(tmp_path)


def test_a_model_with_a_decoder(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    with pytest.raises(ValueError, match="decoder"):
        Engine(folder)


@pytest.mark.parametrize("task", ["feature-extraction", "sentence-similarity"])
def test_embeddings_are_not_trained(task: str, tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\na,b\n")
    with pytest.raises(UserError, match="leave --train-file out"):
        run_train(tmp_path / "bundle", task, "--train-file", path)
    if task == "feature-extraction":
        with pytest.raises(UserError, match="nothing to measure"):
            run_train(tmp_path / "bundle", task, "--validation-file", path)
    else:
        path.write_text("text,label\na,0.5\n")
        with pytest.raises(UserError, match="pairs"):
            run_train(tmp_path / "bundle", task, "--validation-file", path)


# --- Sentence similarity --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_as_the_model_measures_it(measure: str, tiny: Callable[..., Path], texts: list[str]) -> None:
    folder = with_settings(tiny(), model={"similarity_fn_name": measure})
    sentences = sentences_of(folder)
    expected = sentences.similarity(sentences.encode(texts[:1]), sentences.encode(texts[1:]))[0].numpy()
    scale = max(1.0, float(np.abs(expected).max()))
    for place in (folder, converted(folder)):
        found = similarities(place, texts[0], texts[1:])
        assert np.abs(np.array(found) - expected).max() < 1e-4 * scale


def similarities(folder: Path, source: str, others: list[str]) -> list[float]:
    engine = Engine(folder, task="sentence-similarity")
    [found] = answers(engine, [{"source_sentence": source, "sentences": others}])
    return found  # type: ignore[no-any-return]


def test_a_model_without_settings_has_its_tokens_averaged(tiny: Callable[..., Path], texts: list[str]) -> None:
    folder = tiny()
    sentences = sentences_of(folder)
    some = [text[:40] for text in texts[:9]]
    expected = sentences.similarity(sentences.encode(some[:1]), sentences.encode(some[1:]))[0].numpy()
    assert np.abs(np.array(similarities(folder, some[0], some[1:])) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("a text", 422),
        ({"source_sentence": "a"}, 422),
        ({"source_sentence": "a", "sentences": "b"}, 422),
        ({"source_sentence": "a", "sentences": []}, 422),
        ({"source_sentence": "a", "sentences": ["b", 5]}, 422),
        ({"source_sentence": None, "sentences": ["b"]}, 422),
        ({"source_sentence": "a", "sentences": ["b"], "more": 1}, 422),
        ({"source_sentence": "a", "sentences": ["b"] * 1025}, 413),
        ({"source_sentence": "\ud83d", "sentences": ["b"]}, 400),
    ],
)
def test_inputs_that_cannot_be_compared(value: Any, code: int, minilm: Path) -> None:
    assert refusal(Engine(minilm, task="sentence-similarity"), value)[0] == code


def test_similarity_is_measured_on_pairs_with_a_score(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rows = [("a cat sleeps", "a cat rests", 0.9), ("a cat sleeps", "the tax is due", 0.1), ("pay up", "pay now", 0.8)]
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    base = with_settings(tiny())
    place = run_train(
        tmp_path / "bundle", "sentence-similarity",
        *("--base-model", base, "--validation-file", path, "--label-column", "score"),
    )  # fmt: skip
    metrics = json.loads((place / "metrics.json").read_text())
    assert metrics["primary"] == "spearman"
    found = [similarities(place, a, [b])[0] for a, b, _ in rows]
    expected = np.corrcoef(np.argsort(np.argsort(found)), [2, 0, 1])[0, 1]
    assert metrics["splits"]["validation"]["spearman"] == pytest.approx(expected)


# --- The Inference API ----------------------------------------------------------------------------------------------


def test_the_api_has_parameters_beside_the_inputs(minilm: Path) -> None:
    body = {"inputs": "a", "normalize": False, "truncate": True, "parameters": {"truncation_direction": "left"}}
    request, _ = hugging_face.decode(body)
    assert request.parameters == {"normalize": False, "truncate": True, "truncation_direction": "left"}
    assert "dimensions" in refusal(Engine(minilm), "a", dimensions=5)[1]


@pytest.fixture(scope="module")
def served(
    minilm: Path, shared_store: Path, serve_models: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory
) -> Served:
    similar = run_train(tmp_path_factory.mktemp("similar") / "similar", "sentence-similarity")
    for folder in (minilm, similar):
        archive(folder, shared_store)
    return serve_models("minilm", "similar")


def test_inference_client_feature_extraction(inference_client: HubClient, minilm: Path) -> None:
    client, sentences = inference_client("minilm"), sentences_of(bundled_minilm())
    some = ["A fine pair of boots.", "word " * 400]
    expected = sentences.encode(some)
    found = client.feature_extraction(some[0])
    assert found.shape == (384,)
    assert np.abs(found - expected[0]).max() < 1e-4
    assert np.abs(client.feature_extraction(some) - expected).max() < 1e-4
    plain = client.feature_extraction(some[0], normalize=False, truncate=True, truncation_direction="right")
    assert np.linalg.norm(plain) > 1.1
    for wrong in ({"prompt_name": "query"}, {"dimensions": 5}):
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="422"):
            client.feature_extraction(some[0], **wrong)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="413"):
        client.feature_extraction(some[1], truncate=False)


def test_inference_client_sentence_similarity(
    inference_client: HubClient,
) -> None:
    sentences = sentences_of(bundled_minilm())
    others = ["Deep learning is so straightforward.", "It rains.", ""]
    expected = sentences.similarity(sentences.encode(["Machine learning is easy."]), sentences.encode(others))[
        0
    ].numpy()
    found = inference_client("similar").sentence_similarity("Machine learning is easy.", others)
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


def test_marble_clients(served: Served) -> None:
    expected = sentences_of(bundled_minilm()).encode(["a text"])[0]
    with served.rest_client() as rest, served.grpc_client() as grpc:
        for client in (rest, grpc):
            found = np.array(client.predict("minilm", "a text").predictions)
            assert np.abs(found - expected).max() < 1e-4
            pair = {"source_sentence": "a text", "sentences": ["a text", "some words"]}
            [same, other] = client.predict("similar", pair).predictions  # type: ignore[misc]
            assert same == pytest.approx(1, abs=1e-4)
            assert other < same


def test_naughty_strings_end_no_worker(served: Served, shared: Path, same_workers: None) -> None:
    strings = naughty_strings(shared)
    for start in range(0, len(strings), 100):
        some = strings[start : start + 100]
        answer = served.post("/predictions/minilm", {"inputs": some})
        assert answer.status_code == 200
        assert np.isfinite(np.array(answer.json())).all()
    for string in strings[::20]:
        body = {"inputs": "a", "prompt_name": string, string: string}
        assert served.post("/predictions/minilm", body).status_code == 422
    body = {"inputs": {"source_sentence": strings[5], "sentences": strings}}
    answer = served.post("/predictions/similar", body)
    assert answer.status_code == 200
    assert len(answer.json()) == len(strings)
