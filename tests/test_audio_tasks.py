"""Audio classification and speech recognition: trained, archived, served; the answers are those of transformers."""

import base64
import csv
import io
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import soundfile
import torch
import transformers
from conftest import HubClient, Served, build_here, train_here
from datasets import Dataset
from numpy.typing import NDArray

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
from handler.inputs.sounds import SoundInputs, read_sound
from handler.messages import Request, Result
from handler.settings import Settings
from handler.tasks.speech_recognition import CtcVocabulary, SpeechRecognition
from training import base_model, bundle, sounds
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options
from training.tasks import Splits
from training.tasks.audio_classification import AudioClassification
from training.tasks.speech_recognition import SpeechRecognition as SpeechTraining

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LABELS = [str(digit) for digit in range(10)]
TWO = ["0", "6"]
NAMES: dict[str, Any] = {"id2label": dict(enumerate(LABELS)), "label2id": {name: int(name) for name in LABELS}}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WIDE = {"initializer_range": 0.3}  # weights that give a model preferences, unlike those near zero
CONVOLUTIONS = {"conv_dim": [32] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
EARS = {**SMALL, **WIDE, **CONVOLUTIONS, "classifier_proj_size": 32}
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
MASKED = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
BARE = transformers.Wav2Vec2FeatureExtractor()
CLASSIFIERS: dict[str, tuple[Any, Any]] = {
    "spectrogram": (
        transformers.ASTConfig(max_length=64, num_mel_bins=32, **SMALL, **WIDE, **NAMES),
        transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32, mean=-7.2, std=4.9),
    ),
    "wav2vec2": (transformers.Wav2Vec2Config(**LAYER, **EARS, **NAMES), MASKED),
    "wav2vec2 without a mask": (transformers.Wav2Vec2Config(**EARS, **NAMES), BARE),
    "hubert": (transformers.HubertConfig(**LAYER, **EARS, **NAMES), MASKED),
    "wavlm": (transformers.WavLMConfig(**LAYER, **EARS, num_buckets=16, max_bucket_distance=40, **NAMES), MASKED),
}
RECOGNISERS: dict[str, tuple[Any, Any]] = {
    "wav2vec2": (transformers.Wav2Vec2Config(**LAYER, **EARS), MASKED),
    "wav2vec2 without a mask": (transformers.Wav2Vec2Config(**EARS), BARE),
    "hubert": (transformers.HubertConfig(**LAYER, **EARS), MASKED),
}
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]


@pytest.fixture(scope="module")
def recordings(shared: Path) -> list[Path]:
    """A hundred test recordings of spoken digits."""
    folder = shared / "fsdd"
    with (folder / "index.csv").open(newline="") as file:
        files = [folder / row["path"] for row in csv.DictReader(file) if row["split"] == "test"]
    return files[:100]


@pytest.fixture(scope="module")
def indices(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An index of each split, of two digits: absolute paths, the digit as `label`, its name as `text`."""
    folder = tmp_path_factory.mktemp("digits")
    with (shared / "fsdd" / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for split in ("train", "dev", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "text"])
            writer.writerows(
                [shared / "fsdd" / row["path"], row["label"], WORDS[int(row["label"])]]
                for row in rows
                if row["split"] == split and row["label"] in TWO
            )
    return {split: folder / f"{split}.csv" for split in ("train", "dev", "test")}


def saved(samples: Any, rate: int = 16_000, form: str = "WAV", coding: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=coding)
    return buffer.getvalue()


def noise(seconds: float, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(round(16_000 * seconds)) * 0.1


def samples(content: bytes) -> NDArray[np.float32]:
    """The samples that the pipelines are given: they take no files where ffmpeg is missing."""
    return read_sound(content, 600).decode(16_000)


def vocabulary_file(folder: Path, tokens: Sequence[str] = LETTERS) -> str:
    path = folder / "letters.json"
    path.write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    return str(path)


def classifier(folder: Path, family: str, **settings: Any) -> Path:
    """A bundle's model files and settings, with random weights."""
    config, extractor = CLASSIFIERS[family]
    transformers.set_seed(3)
    folder.mkdir()
    model = transformers.AutoModelForAudioClassification.from_config(config).eval()
    bundle.write_model(folder, model, extractor)
    bundle.write_model_config(folder, "audio-classification", {"max_length": 1500, **settings})
    return folder


def recogniser(folder: Path, family: str, **settings: Any) -> Path:
    config, extractor = RECOGNISERS[family]
    transformers.set_seed(3)
    folder.mkdir()
    config.vocab_size, config.pad_token_id = len(LETTERS), 0
    model = transformers.AutoModelForCTC.from_config(config).eval()
    tokenizer = transformers.Wav2Vec2CTCTokenizer(vocabulary_file(folder))
    bundle.write_model(folder, model, transformers.Wav2Vec2Processor(extractor, tokenizer))
    bundle.write_model_config(folder, "automatic-speech-recognition", {"max_length": 1500, **settings})
    return folder


def predictions(engine: Engine, contents: Sequence[Any], **parameters: Any) -> list[Any]:
    [result] = engine.predict([Request(list(contents), parameters, many=True)])
    assert isinstance(result, Result)
    return list(result.predictions)


def outcome(engine: Engine, value: Any, **parameters: Any) -> Any:
    [result] = engine.predict([Request([value], parameters)])
    return result.predictions[0] if isinstance(result, Result) else result


def by_label(entries: Any) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in entries}


def pipeline(task: str, folder: Path) -> Callable[..., Any]:
    found: Callable[..., Any] = transformers.pipeline(task, str(folder), device="cpu")  # type: ignore[call-overload]
    return found


def chunks(answer: dict[str, Any]) -> list[tuple[str, float, float]]:
    return [(chunk["text"], *chunk["timestamp"]) for chunk in answer["chunks"]]


# --- the vocabulary of a CTC model

TOKENIZERS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "plain": (LETTERS, {}),
    "lower case": ([token.upper() if len(token) == 1 else token for token in LETTERS], {"do_lower_case": True}),
    "other names": (
        ["[PAD]", "[UNK]", "_", *"abc"],
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "word_delimiter_token": "_", "replace_word_delimiter_char": "-"},
    ),
    "syllables": (["<pad>", "<unk>", "|", "ba", "na", "b", "a"], {}),
    "punctuation": ([*LETTERS, ".", ",", "?"], {"clean_up_tokenization_spaces": True}),
    "a blank": (["<pad>", "<unk>", "|", " ", "a", "b"], {}),
}


@pytest.mark.parametrize(("tokens", "options"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_decoding_equals_the_tokenizer_of_transformers(
    tokens: Sequence[str], options: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = transformers.Wav2Vec2CTCTokenizer(vocabulary_file(tmp_path, tokens), **options)
    tokenizer.save_pretrained(tmp_path)
    size = len(tokens) + 3  # some models have classes that no token stands for
    vocabulary = CtcVocabulary(tmp_path, size)
    rng = np.random.default_rng(1)
    for _ in range(300):
        classes = rng.integers(0, size, rng.integers(1, 30)).repeat(rng.integers(1, 4))
        classes[rng.random(len(classes)) < 0.3] = 0
        wanted = tokenizer.decode(classes, output_char_offsets=True, output_word_offsets=True)
        spans = vocabulary.spans(classes)
        assert vocabulary.text(spans) == wanted.text == tokenizer.decode(classes)
        assert [(s.text, s.start, s.end) for s in spans] == offsets(wanted.char_offsets, "char")
        words = tokenizer._get_word_offsets(wanted.char_offsets, tokenizer.replace_word_delimiter_char)
        assert [(s.text, s.start, s.end) for s in vocabulary.words(spans)] == offsets(words, "word")


def offsets(entries: Any, name: str) -> list[tuple[str, int, int]]:
    return [(entry[name], int(entry["start_offset"]), int(entry["end_offset"])) for entry in entries]


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"deu": {"[PAD]": 0, "|": 1, "a": 2}, "eng": {"b": 0}}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"target_lang": "deu", "added_tokens_decoder": {"3": {"content": "<s>"}}})
    )
    vocabulary = CtcVocabulary(tmp_path, 5)
    assert vocabulary.text(vocabulary.spans(np.array([0, 2, 2, 0, 2, 1, 3, 4, 0]))) == "aa <s><unk>"


NO_VOCABULARY: dict[str, tuple[dict[str, str], str]] = {
    "none": ({}, "vocab.json is missing"),
    "broken": ({"vocab.json": "["}, "vocab.json cannot be read"),
    "of another tokenizer": ({"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'}, "not BertTokenizer"),
}


@pytest.mark.parametrize(("files", "message"), NO_VOCABULARY.values(), ids=NO_VOCABULARY)
def test_a_model_without_a_known_vocabulary(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        CtcVocabulary(tmp_path, 5)


def test_a_recogniser_needs_a_model_that_hears_samples(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "ast", "spectrogram")
    with pytest.raises(ValueError, match="hears samples, not spectrograms"):
        SpeechRecognition(folder, Settings.load(folder), json.loads((folder / "config.json").read_text()))


# --- equality with the pipelines


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classification_equals_the_transformers_pipeline(family: str, recordings: list[Path], tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", family)
    reference = pipeline("audio-classification", folder)
    contents = [file.read_bytes() for file in recordings]
    engine = Engine(folder, threads=1)
    found = predictions(engine, contents)
    wanted = [by_label(reference(samples(content))) for content in contents]
    assert max(np.ptp([entry[label] for entry in wanted]) for label in LABELS) > 0.01  # it does listen
    for one, other in zip(found, wanted, strict=True):
        assert by_label(one) == pytest.approx(other, abs=1e-4)
        assert [entry["score"] for entry in one] == sorted((entry["score"] for entry in one), reverse=True)
    for content in contents[:5]:
        raw = reference(samples(content), function_to_apply="none", top_k=3)
        got = outcome(engine, content, function_to_apply="none", top_k=3)
        assert by_label(got) == pytest.approx(by_label(raw), abs=1e-4)
        assert by_label(outcome(engine, content)) == pytest.approx(wanted[contents.index(content)], abs=1e-4)


@pytest.mark.parametrize("family", RECOGNISERS)
def test_recognition_equals_the_transformers_pipeline(family: str, recordings: list[Path], tmp_path: Path) -> None:
    folder = recogniser(tmp_path / "model", family)
    reference = pipeline("automatic-speech-recognition", folder)
    contents = [file.read_bytes() for file in recordings]
    engine = Engine(folder, threads=1)
    found = {kind: predictions(engine, contents, return_timestamps=kind) for kind in ("word", "char")}
    for index, content in enumerate(contents):
        for kind, answers in found.items():
            wanted = reference(samples(content), return_timestamps=kind)
            assert answers[index]["text"] == wanted["text"]
            assert chunks(answers[index]) == chunks(wanted)
    assert len({answer["text"] for answer in found["word"]}) > 50  # it does listen
    assert predictions(engine, contents[:1]) == [{"text": found["word"][0]["text"]}]
    assert predictions(engine, contents[:1], return_timestamps=True) == found["word"][:1]
    assert predictions(engine, contents[:1], return_timestamps=False) == [{"text": found["word"][0]["text"]}]


@pytest.mark.parametrize("family", RECOGNISERS)
def test_long_sounds_are_heard_in_the_windows_of_the_transformers_pipeline(family: str, tmp_path: Path) -> None:
    folder = recogniser(tmp_path / "model", family, max_length=100, stride=34, overflow="window")
    reference = pipeline("automatic-speech-recognition", folder)
    engine = Engine(folder, threads=1)
    for seconds in (1.99, 2.01, 3.5, 7.123):
        content = saved(noise(seconds), coding="FLOAT")
        wanted = reference(
            samples(content), chunk_length_s=2.0, stride_length_s=17 * 320 / 16_000, return_timestamps="char"
        )
        found = outcome(engine, content, return_timestamps="char")
        assert found["text"] == wanted["text"]
        assert chunks(found) == chunks(wanted)


def test_what_becomes_of_a_long_sound(tmp_path: Path) -> None:
    engine = Engine(recogniser(tmp_path / "speech", "wav2vec2", max_length=100, stride=34), threads=1)
    long, short = (saved(noise(4)[: round(16_000 * seconds)], coding="FLOAT") for seconds in (4, 2))
    [result] = engine.predict([Request([long], {"overflow": "truncate"})])
    assert isinstance(result, Result)
    assert (result.usage.truncated, result.usage.windows) == (True, 1)
    assert result.predictions == [outcome(engine, short)]
    [result] = engine.predict([Request([long], {"overflow": "window"})])
    assert isinstance(result, Result)
    assert (result.usage.truncated, result.usage.windows) == (False, 3)
    assert len(result.predictions[0]["text"]) > len(outcome(engine, short)["text"])
    error = outcome(engine, long, overflow="error")
    assert isinstance(error, TooLarge)
    assert "the sound is longer than what the model takes at once" in str(error)
    windows = outcome(Engine(tmp_path / "speech", max_windows=2), long, overflow="window")
    assert isinstance(windows, TooLarge)
    assert "the sound has 3 windows and at most 2 windows are taken" in str(windows)


def test_windows_of_a_classified_sound_are_averaged(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", "spectrogram")
    engine = Engine(folder, threads=1)
    sound = noise(1.6)  # 158 frames
    parts = [saved(sound[start : start + 63 * 160 + 400], coding="FLOAT") for start in (0, 64 * 160, 94 * 160)]
    logits = [by_label(outcome(engine, part, function_to_apply="none")) for part in parts]
    wanted = {label: np.mean([entry[label] for entry in logits]) for label in LABELS}
    content = saved(sound, coding="FLOAT")
    found = outcome(engine, content, function_to_apply="none", overflow="window")
    assert by_label(found) == pytest.approx(wanted, abs=1e-4)
    truncated = by_label(pipeline("audio-classification", folder)(samples(content)))
    assert by_label(outcome(engine, content)) == pytest.approx(truncated, abs=1e-4)


# --- requests


@pytest.fixture(scope="module")
def keywords(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(classifier(tmp_path_factory.mktemp("models") / "keywords", "wav2vec2"), threads=1)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(recogniser(tmp_path_factory.mktemp("models") / "speech", "wav2vec2"), threads=1)


def test_unknown_and_ill_typed_parameters_are_refused(keywords: Engine, speech: Engine) -> None:
    content = saved(noise(0.3))
    cases: list[tuple[Engine, dict[str, Any], str]] = [
        (keywords, {"top_k": 0}, "'top_k' must be at least 1"),
        (keywords, {"function_to_apply": "tanh"}, "'softmax' or 'sigmoid' or 'none'"),
        (keywords, {"return_timestamps": True}, "takes: details, function_to_apply, overflow, top_k"),
        (speech, {"return_timestamps": "segment"}, "'word' or 'char'"),
        (speech, {"generation_parameters": {"num_beams": 2}}, "takes: details, overflow, return_timestamps"),
        (speech, {"chunk_length_s": 30}, "unknown parameter"),
    ]
    for engine, parameters, message in cases:
        error = outcome(engine, content, **parameters)
        assert isinstance(error, InvalidParameter)
        assert message in str(error)


def test_a_sound_that_cannot_be_heard_fails_alone(keywords: Engine, speech: Engine) -> None:
    good, flac = saved(noise(0.3)), saved(noise(0.3), form="FLAC")
    for engine in (keywords, speech):
        requests_ = [
            Request([good]),
            Request([flac[:2000]]),
            Request([good, saved(noise(0.01)), "https://example.org/a.wav", b"text", good], many=True),
            Request([good], {"top": 0}),
            Request([good]),
        ]
        first, cut, several, wrong, last = engine.predict(requests_)
        assert isinstance(first, Result)
        assert isinstance(cut, UnreadableRequest)
        assert isinstance(wrong, InvalidParameter)
        assert isinstance(last, Result)
        assert isinstance(several, Result)
        assert several.predictions[0] == several.predictions[4] == first.predictions[0] == last.predictions[0]
        assert [type(entry) for entry in several.predictions[1:4]] == [InvalidInput, InvalidInput, UnsupportedMediaType]
        assert (last.usage.tokens, last.usage.truncated, last.usage.windows) == (0, False, 1)


def test_seconds_are_rationed_before_anything_is_decoded(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", "spectrogram")
    limited = Engine(folder, threads=1, max_seconds=10)
    broken_if_decoded = saved(np.zeros(8 * 16_000), form="FLAC")[:300]
    [error] = limited.predict([Request([broken_if_decoded] * 2, many=True)])
    assert isinstance(error, TooLarge)
    assert "the request has 16.0 seconds; at most 10 are taken" in str(error)
    [alone] = limited.predict([Request([broken_if_decoded])])
    assert isinstance(alone, UnreadableRequest)
    content = saved(noise(8))
    outcomes = limited.predict([Request([content])] * 7)
    assert [type(entry) for entry in outcomes] == [Result] * 5 + [Overloaded] * 2


def test_a_number_that_is_none_is_an_error_of_the_server(speech: Engine) -> None:
    task = speech.task
    assert isinstance(task, SpeechRecognition)
    [encoded] = task.inputs.encode([task.read(saved(noise(0.3)), None)[0]])
    assert not isinstance(encoded, RequestError)
    logits = np.zeros((20, len(LETTERS)), dtype=np.float32)
    logits[3, 5] = np.nan
    from handler.tasks import Part

    part = Part(None, encoded.rows, [task.keep(encoded.rows[0], {"logits": logits})])
    with pytest.raises(InternalError, match="not a number"):
        task.postprocess([part], task.Parameters())


def test_drift_of_a_text_is_the_share_that_differs() -> None:
    drift = SpeechRecognition.drift
    assert drift({"text": ""}, {"text": ""}) == drift({"text": "abc"}, {"text": "abc"}) == 0
    assert drift({"text": "abcd"}, {"text": "abce"}) == 0.25
    assert drift({"text": "abc"}, {"text": "xyz"}) == drift({"text": "a"}, {"text": ""}) == 1


# --- training


def train(task: str, place: Path, *options: object) -> Path:
    train_here("--task", task, "--output-dir", place, *options)
    return place


@pytest.fixture(scope="module")
def digits(indices: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spectrogram transformer trained from scratch to tell two spoken digits."""
    return train(
        "audio-classification",
        tmp_path_factory.mktemp("bundles") / "digits",
        *("--from-scratch", "audio-spectrogram-transformer hidden_size=64 num_hidden_layers=2 max_length=64"),
        *("--train-file", indices["train"], "--validation-file", indices["dev"], "--test-file", indices["test"]),
        *("--num-train-epochs", 8, "--learning-rate", 1e-3, "--per-device-train-batch-size", 16, "--bf16", "false"),
    )


@pytest.fixture(scope="module")
def words(indices: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A speech recogniser from scratch, trained for a few steps on spoken digits."""
    spec = "wav2vec2 feat_extract_norm=layer do_stable_layer_norm=true hidden_size=32 num_hidden_layers=1 conv_dim="
    return train(
        "automatic-speech-recognition",
        tmp_path_factory.mktemp("bundles") / "words",
        *("--from-scratch", f"{spec}[16,16,16,16,16,16,16]", "--augment", "--learning-rate", 3e-3),
        *("--train-file", indices["test"], "--validation-file", indices["dev"], "--num-train-epochs", 4),
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wav2Vec2 classifier without attention masks, bundled as it is."""
    model = classifier(tmp_path_factory.mktemp("models") / "plain", "wav2vec2 without a mask")
    (model / "model-config.yaml").unlink()
    place = tmp_path_factory.mktemp("bundles") / "plain"
    return train("audio-classification", place, "--base-model", model)


def test_a_classifier_learns_and_says_so(digits: Path) -> None:
    metrics = json.loads((digits / "metrics.json").read_text())
    assert (metrics["primary"], metrics["labels"]) == ("accuracy", TWO)
    assert metrics["rows"] == {"train": 84, "validation": 12, "test": 24}
    assert metrics["splits"]["test"]["accuracy"] > 0.6  # one label always: 0.5
    assert len(metrics["epochs"]) == 8
    extractor = json.loads((digits / "preprocessor_config.json").read_text())
    assert (extractor["max_length"], extractor["num_mel_bins"]) == (64, 64)
    assert -9 < extractor["mean"] < -5  # of these recordings, which are quieter than the published mean
    assert "audio-classification" in (digits / "README.md").read_text()


def test_a_recogniser_learns_and_says_so(words: Path, recordings: list[Path]) -> None:
    metrics = json.loads((words / "metrics.json").read_text())
    losses = [epoch["eval_loss"] for epoch in metrics["epochs"]]
    assert losses[-1] < losses[0]
    scores = metrics["splits"]["validation"]
    assert metrics["primary"] == "word_accuracy"
    assert scores["rows"] == 12
    assert 0 <= scores["word_accuracy"] <= scores["character_accuracy"] <= 1
    assert scores["word_accuracy"] == pytest.approx(max(0, 1 - scores["word_error_rate"]))
    tokens = json.loads((words / "vocab.json").read_text())
    assert sorted(tokens, key=tokens.__getitem__)[5:] == sorted(set("zerosix"))
    content = recordings[0].read_bytes()
    wanted = pipeline("automatic-speech-recognition", words)(samples(content))
    assert outcome(Engine(words, threads=1), content) == wanted


def test_a_model_is_bundled_as_it_is(plain: Path) -> None:
    metrics = json.loads((plain / "metrics.json").read_text())
    assert (metrics["labels"], metrics["rows"], metrics["splits"]) == (LABELS, {}, {})
    golden = [json.loads(line) for line in (plain / "golden.jsonl").read_text().splitlines()]
    assert len(golden) == len(sounds.odd_sounds())
    assert all(len(example["predictions"]) == 10 for example in golden)


def test_error_rates_are_those_of_the_words_and_characters() -> None:
    scores = SpeechTraining().score(
        [{"text": "one too"}, {"text": "three"}, {"text": ""}], ["one two", "three", "a"], []
    )
    assert scores["rows"] == 3
    assert scores["word_error_rate"] == pytest.approx(2 / 4)
    assert scores["character_error_rate"] == pytest.approx(2 / 13)
    assert scores["character_accuracy"] == pytest.approx(11 / 13)
    assert SpeechTraining().score([{"text": "a b c"}], ["x"], [])["word_accuracy"] == 0


def index(folder: Path, *rows: str) -> Path:
    path = folder / "index.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_what_cannot_be_trained_or_served_is_refused(digits: Path, words: Path, tmp_path: Path) -> None:
    nothing, scratch = BaseModel("", "none", None, None), base_model.resolve(None, "wav2vec2")
    for number in range(4):
        (tmp_path / f"{number}.wav").write_bytes(saved(noise(0.2, number)))
    (tmp_path / "cut.flac").write_bytes(saved(noise(0.2), form="FLAC")[:2000])
    (tmp_path / "notes.txt").write_text("a text")
    (tmp_path / "click.wav").write_bytes(saved(noise(0.01)))
    listing = index(tmp_path, "path,label,text", "0.wav,a,one", "cut.flac,b,two", "notes.txt,a,three")
    for task in (AudioClassification(), SpeechTraining()):
        with pytest.raises(UserError, match=r"needs --base-model, .* or --from-scratch"):
            task.read(Options(train_file=str(listing)), 7, nothing)
        with pytest.raises(UserError) as caught:
            task.read(Options(train_file=str(listing)), 7, scratch)
        lines = str(caught.value).splitlines()
        assert [line.partition(": ")[0] for line in lines[1:]] == ["  row 2 (cut.flac)", "  row 3 (notes.txt)"]
    listing = index(tmp_path, "path,text", "0.wav,one", "1.wav,  ")
    with pytest.raises(UserError, match="empty text"):
        SpeechTraining().read(Options(train_file=str(listing)), 7, scratch)
    listing = index(tmp_path, "path,text", "0.wav,one")
    with pytest.raises(UserError, match="too few"):
        SpeechTraining().read(Options(train_file=str(listing)), 7, scratch)
    short = Dataset.from_dict({"path": [str(tmp_path / "click.wav")], "label": [0], "text": ["a"]})
    with pytest.raises(UserError, match=r"click.wav: it lasts 10.0 ms and the model needs at least 25.0 ms"):
        AudioClassification().load(scratch, Splits(short, None, None, ["a", "b"]), Options())
    model, processor = AudioClassification().load(
        base_model.resolve(str(digits)), Splits(None, None, None, ["cat", "dog"]), Options(base_model=str(digits))
    )
    assert model.config.id2label == {0: "cat", 1: "dog"}
    with pytest.raises(UserError, match="a length of its own"):
        AudioClassification().settings(model, processor, Options(max_length=100))


def test_texts_must_be_written_with_the_characters_of_the_base_model(words: Path, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(saved(noise(0.2)))
    rows = {"path": [str(tmp_path / "a.wav")] * 2}
    base = base_model.resolve(str(words))
    known = Splits(Dataset.from_dict({**rows, "text": ["zero  six", "rose"]}), None, None)
    model, processor = SpeechTraining().load(base, known, Options())
    assert processor.tokenizer.get_vocab() == json.loads((words / "vocab.json").read_text())
    assert model.config.vocab_size == len(processor.tokenizer)
    unknown = Splits(Dataset.from_dict({**rows, "text": ["six", "Öl"]}), None, None)
    with pytest.raises(UserError, match="its vocabulary lacks 'lÖ'"):
        SpeechTraining().load(base, unknown, Options())
    # Without a vocabulary of its own the model gets one, and a fresh head for it.
    bare = tmp_path / "bare"
    shutil.copytree(words, bare)
    (bare / "vocab.json").unlink()
    model, processor = SpeechTraining().load(base_model.resolve(str(bare)), unknown, Options())
    assert set("six") | {"Ö", "l"} < processor.tokenizer.get_vocab().keys()
    assert model.lm_head.out_features == len(processor.tokenizer)


def test_training_sounds_are_those_of_the_served_model(digits: Path, recordings: list[Path]) -> None:
    model, processor = AudioClassification().load(
        base_model.resolve(str(digits)), Splits(None, None, None, TWO), Options(base_model=str(digits))
    )
    features = sounds.served(processor, model)
    paths = [str(file) for file in recordings[:6]]
    still, moved = sounds.Sounds(paths, [0] * 6, features), sounds.Sounds(paths, [0] * 6, features, augment=True)
    batch = sounds.collate(features, [still[number] for number in range(6)])
    reader = SoundInputs(digits, Settings.load(digits), model.config.to_dict())
    rows = [encoded.rows[0] for encoded in reader.encode([reader.read(file.read_bytes()) for file in recordings[:6]])]  # type: ignore[union-attr]
    assert np.array_equal(batch["input_values"].numpy(), reader.collate(rows)["input_values"])
    torch.manual_seed(1)
    once, twice = moved[0]["input_values"], moved[0]["input_values"]
    assert once.dtype == np.float32
    assert len(once) != len(twice)
    assert 0.85 < len(once) / len(still[0]["input_values"]) < 1.6


def test_masking_in_time_is_left_off_for_short_sounds(tmp_path: Path) -> None:
    class Arguments:
        train_sampling_strategy = "group_by_length"

    features = sounds.served(MASKED, transformers.Wav2Vec2ForCTC(RECOGNISERS["wav2vec2"][0]))
    for seconds, masks in ((0.2, False), (2.0, True)):
        path = tmp_path / f"{seconds}.wav"
        path.write_bytes(saved(noise(seconds)))
        model = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**LAYER, **EARS))
        sounds.prepare(model, features, Arguments(), Dataset.from_dict({"path": [str(path)]}))  # type: ignore[arg-type]
        assert model.config.apply_spec_augment is masks


# --- archives, served

MODELS = ("digits", "plain", "words", "words-torch")


@pytest.fixture(scope="module")
def archives(digits: Path, words: Path, plain: Path, shared_store: Path) -> Path:
    """A model store with MODELS: all but words-torch on OpenVINO."""
    for name, made, backend in (
        ("digits", digits, "openvino"),
        ("plain", plain, "openvino"),
        ("words", words, "openvino"),
        ("words-torch", words, "torch"),
    ):
        build_here(made, shared_store, name, backend)
    return shared_store


def unpacked(archives: Path, name: str, folder: Path) -> Engine:
    with zipfile.ZipFile(archives / f"{name}.mar") as file:
        file.extractall(folder)
    assert not list(folder.glob("*.safetensors"))
    engine = Engine(folder)
    assert engine.settings.backend == "openvino"
    return engine


@pytest.mark.parametrize("name", ["digits", "plain"])
def test_openvino_classification_equals_the_transformers_pipeline(
    name: str, request: pytest.FixtureRequest, archives: Path, recordings: list[Path], tmp_path: Path
) -> None:
    reference = pipeline("audio-classification", request.getfixturevalue(name))
    contents = [file.read_bytes() for file in recordings]
    for found, content in zip(predictions(unpacked(archives, name, tmp_path), contents), contents, strict=True):
        assert by_label(found) == pytest.approx(by_label(reference(samples(content))), abs=1e-4)


def test_openvino_recognition_equals_the_transformers_pipeline(
    words: Path, archives: Path, recordings: list[Path], tmp_path: Path
) -> None:
    reference = pipeline("automatic-speech-recognition", words)
    contents = [file.read_bytes() for file in recordings]
    engine = unpacked(archives, "words", tmp_path)
    for found, content in zip(predictions(engine, contents, return_timestamps="char"), contents, strict=True):
        wanted = reference(samples(content), return_timestamps="char")
        assert (found["text"], chunks(found)) == (wanted["text"], chunks(wanted))


@pytest.fixture(scope="module")
def served(archives: Path, serve_models: Callable[..., Served]) -> Served:
    return serve_models(*MODELS)


def post(served: Served, model: str, body: Any, content_type: str | None = None) -> requests.Response:
    return served.post(f"/predictions/{model}", body, content_type)


def grpc_prediction(served: Served, model: str, body: bytes) -> Any:
    return json.loads(served.grpc_predictions(model, body))


def same(found: Any, wanted: Any) -> bool:
    """Whether two answers agree: texts exactly, scores nearly."""
    if isinstance(wanted, dict):
        return bool(found == wanted)
    return bool(by_label(found) == pytest.approx(by_label(wanted), abs=1e-6))


@pytest.mark.parametrize("model", MODELS)
def test_every_door_gives_the_same_answer(
    served: Served, model: str, recordings: list[Path], same_workers: None
) -> None:
    content = recordings[7].read_bytes()
    text = base64.b64encode(content).decode()
    wanted = post(served, model, content).json()
    headers = {"Authorization": f"Bearer {served.token}"}
    file = {"data": ("digit.wav", content, "audio/wav")}
    kserve = {"instances": [{"b64": text}]}
    answers = {
        "typed": post(served, model, content, "audio/x-wav").json(),
        "octets": post(served, model, content, "application/octet-stream").json(),
        "base64": post(served, model, {"inputs": text}).json(),
        "data address": post(served, model, {"inputs": f"data:audio/wav;base64,{text}"}).json(),
        "list": post(served, model, {"inputs": [text]}).json()[0],
        "multipart": requests.post(f"{served.url}/predictions/{model}", files=file, headers=headers, timeout=60).json(),
        "kserve v1": served.post(f"/v1/models/{model}:predict", kserve).json()["predictions"][0],
        "grpc": grpc_prediction(served, model, content),
        "grpc, json": grpc_prediction(served, model, json.dumps({"inputs": text}).encode()),
    }
    with served.rest_client() as rest:
        answers["marble rest"] = rest.predict(model, content).predictions
    with served.grpc_client() as remote:
        answers["marble grpc"] = remote.predict(model, content).predictions
    assert {way: same(answer, wanted) for way, answer in answers.items()} == dict.fromkeys(answers, True)


def test_the_hubs_client_classifies_sounds(
    inference_client: HubClient,
    digits: Path,
    recordings: list[Path],
    tmp_path: Path,
) -> None:
    client = inference_client("digits")
    reference = pipeline("audio-classification", digits)
    files = [*recordings[:3], tmp_path / "a.flac", tmp_path / "a.ogg"]
    files[3].write_bytes(saved(noise(0.5), form="FLAC"))
    files[4].write_bytes(saved(np.stack([noise(0.5)] * 2, axis=1), form="OGG"))
    for file in files:
        wanted = by_label(reference(samples(file.read_bytes())))
        for given in (file, str(file), file.read_bytes()):
            found = client.audio_classification(given)
            assert {entry.label: entry.score for entry in found} == pytest.approx(wanted, abs=1e-4)
        [first, second] = client.audio_classification(file, top_k=2, function_to_apply="softmax")
        assert [first.label, second.label] == list(wanted)[:2]
        assert first.score == pytest.approx(wanted[first.label], abs=1e-4)


@pytest.mark.parametrize("model", ["words", "words-torch"])
def test_the_hubs_client_recognises_speech(
    inference_client: HubClient,
    model: str,
    words: Path,
    recordings: list[Path],
) -> None:
    client = inference_client(model)
    reference = pipeline("automatic-speech-recognition", words)
    for file in recordings[:5]:
        wanted = reference(samples(file.read_bytes()), return_timestamps="word")
        for given in (file, str(file), file.read_bytes()):
            assert client.automatic_speech_recognition(given).text == wanted["text"]
        timed = client.automatic_speech_recognition(file, extra_body={"return_timestamps": "word"})
        assert timed.text == wanted["text"]
        assert [(c["text"], *c["timestamp"]) for c in timed.chunks or []] == chunks(wanted)


WAV, FLAC = saved(noise(0.5)), saved(noise(0.5), form="FLAC")
HOURS = struct.pack(">BI", 0xF0, 36_000 * 16_000)
MALFORMED: dict[str, tuple[bytes, str | None, int]] = {
    "zero bytes": (b"", "audio/wav", 400),
    "zero-length wav": (saved(noise(0)), "audio/wav", 400),
    "header alone": (WAV[:44], None, 400),
    "truncated wav": (WAV[:9000], "audio/wav", 400),
    "truncated flac": (FLAC[: len(FLAC) // 2], "audio/flac", 400),
    "truncated ogg": (saved(noise(0.5), form="OGG")[:2000], "audio/ogg", 400),
    "header that promises more": (WAV[:40] + struct.pack("<I", 10**9) + WAV[44:], None, 400),
    "flac that promises more": (FLAC[:21] + struct.pack(">BI", 0xF0, 80_000) + FLAC[26:], "audio/flac", 400),
    "ten hours": (FLAC[:21] + HOURS + FLAC[26:], "audio/flac", 413),
    "eleven minutes of silence": (saved(np.zeros(660 * 8000), 8000, "FLAC"), None, 413),
    "1 Hz": (WAV[:24] + struct.pack("<I", 1) + WAV[28:], "audio/wav", 422),
    "33 channels": (saved(np.zeros((800, 33))), None, 422),
    "too short": (saved(noise(0.01)), None, 422),
    "not a number": (saved(np.full(8000, np.nan), coding="FLOAT"), None, 400),
    "text as a sound": (b"good morning", "audio/wav", 415),
    "mp3": (saved(noise(0.5), form="MP3"), "audio/mpeg", 415),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(40), None, 415),
    "text": (b"good morning", "text/plain", 400),
    "text, no type": (b"good morning", None, 400),
    "address": (b'{"inputs": "http://localhost:8081/models"}', "application/json", 422),
    "number": (b'{"inputs": 7}', "application/json", 422),
    "not base64": (b'{"inputs": "good morning!"}', "application/json", 400),
    "unknown parameter": (b'{"inputs": "QUJD", "parameters": {"k": 1}}', "application/json", 422),
}


def test_malformed_sounds_end_no_worker(served: Served, recordings: list[Path], same_workers: None) -> None:
    for model in MODELS:
        for name, (body, content_type, status) in MALFORMED.items():
            answer = post(served, model, body, content_type)
            assert answer.status_code == status, (name, answer.text)
            assert answer.json()["code"] == status, name
            if body and not (content_type or "").startswith(("text", "application")):
                assert grpc_prediction(served, model, body)["code"] in (400, 413, 415, 422), name
        eight = saved(np.stack([noise(0.5)] * 8, axis=1))
        for good in (recordings[0].read_bytes(), eight):
            assert post(served, model, good).status_code == 200
