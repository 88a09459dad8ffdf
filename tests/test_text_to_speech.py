"""Text to speech: the sounds that transformers makes, the same for one seed whatever the neighbours, within limits."""

import base64
import csv
import io
import json
import shutil
import time
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from conftest import REVIEWS, HubClient, Served, build_here, train_here
from safetensors.torch import load_file, save_file
from transformers import VitsModel, VitsTokenizer

import marble_client
from archiver import __main__ as archiver
from handler import golden
from handler.engine import Engine
from handler.errors import InternalError, InvalidInput, InvalidParameter, Overloaded, RequestError, TooLarge
from handler.messages import Media, Request, Result
from handler.tasks import Answer
from handler.tasks import text_to_speech as task
from handler.turns import in_turn
from training.errors import UserError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundles") / "speech"
    train_here("--task", "text-to-speech", "--from-scratch", "vits", "--output-dir", place, "--seed", 3)
    return place


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return Engine(bundle, threads=1)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """A hundred real texts, each the beginning of a review."""
    with (REVIEWS / "train.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"][:60] for row in csv.DictReader(file)][:100]


def ask(engine: Engine, text: Any, **parameters: Any) -> Result | RequestError:
    [outcome] = engine.predict([Request([text], parameters)])
    return outcome


def spoken(outcome: Result | RequestError) -> bytes:
    assert isinstance(outcome, Result), outcome
    [media] = outcome.predictions
    assert isinstance(media, Media)
    assert media.media_type == "audio/wav"
    return media.content


def samples(content: bytes) -> np.ndarray:
    return task.from_wav(content)[1]


def test_sounds_are_those_of_the_pipeline(engine: Engine, bundle: Path, sentences: list[str]) -> None:
    pipeline: Any = transformers.pipeline("text-to-speech", model=str(bundle))
    outcomes = engine.predict([Request([text], {"seed": seed}) for seed, text in enumerate(sentences)])
    for seed, (text, outcome) in enumerate(zip(sentences, outcomes, strict=True)):
        torch.manual_seed(seed)
        expected = pipeline(text)
        rate, found = task.from_wav(spoken(outcome))
        assert rate == expected["sampling_rate"]
        assert found.shape == (expected["audio"].size,)
        assert np.abs(found - expected["audio"].ravel()).max() <= 1e-4


def test_a_sound_is_a_wav_of_the_length_that_the_model_implies(engine: Engine, bundle: Path) -> None:
    text = "A pair of boots, at last."
    model, tokenizer = VitsModel.from_pretrained(bundle), VitsTokenizer.from_pretrained(bundle)
    torch.manual_seed(9)
    with torch.inference_mode():
        expected = model.eval()(**tokenizer(text, return_tensors="pt"))
    with wave.open(io.BytesIO(spoken(ask(engine, text, seed=9)))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, model.config.sampling_rate)
        assert file.getnframes() == int(expected.sequence_lengths[0]) > 1000


def test_a_sound_depends_on_its_seed_alone(engine: Engine) -> None:
    texts = ["One.", "A much longer text than the others, with a comma.", "Two?", "One."]
    before = torch.random.get_rng_state()
    alone = [spoken(ask(engine, text, seed=7)) for text in texts]
    [together] = engine.predict([Request(texts, {"seed": 7})])
    assert isinstance(together, Result)
    assert [media.content for media in together.predictions] == alone
    apart = engine.predict([Request([text], {"seed": seed}) for text, seed in zip(texts, (7, 1, 7, 2), strict=True)])
    assert spoken(apart[0]) == alone[0]
    assert spoken(apart[2]) == alone[2]
    assert spoken(apart[1]) != alone[1]
    assert spoken(apart[3]) != alone[3]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_seed_it_is_the_usual_one(engine: Engine) -> None:
    assert spoken(ask(engine, "Hello")) == spoken(ask(engine, "Hello", seed=task.USUAL_SEED))
    spoken(ask(engine, "Hello", seed=2**64 - 1))


def test_a_faster_speaker_needs_less_time(engine: Engine) -> None:
    usual, fast, slow = (
        len(samples(spoken(ask(engine, "Hello there, you.", **rate))))
        for rate in ({}, {"speaking_rate": 4.0}, {"speaking_rate": 0.5})
    )
    assert fast < usual < slow
    assert usual == len(samples(spoken(ask(engine, "Hello there, you.", speaking_rate=1))))


def test_usage_counts_tokens(engine: Engine) -> None:
    result = ask(engine, "abc")
    assert isinstance(result, Result)
    assert (result.usage.tokens, result.usage.truncated) == (7, False)  # blanks stand around every letter


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"temperature": 0.5}, "speaking_rate"),
        ({"do_sample": True}, "seed"),
        ({"generate_kwargs": {}}, "seed"),
        ({"speaking_rate": 0.1}, "0.25"),
        ({"speaking_rate": 9}, "4"),
        ({"speaking_rate": "fast"}, "a number"),
        ({"seed": -1}, "0"),
        ({"seed": 2**64}, str(2**64 - 1)),
        ({"speaker_id": 0}, "one voice"),
        ({"overflow": "truncate"}, "'error'"),
    ],
)
def test_other_parameters_are_refused(engine: Engine, parameters: dict[str, Any], said: str) -> None:
    outcome = ask(engine, "Hello", **parameters)
    assert isinstance(outcome, InvalidParameter)
    assert said in str(outcome)


@pytest.mark.parametrize("text", ["", "   ", "漢字", "🙂\n\t"])
def test_a_text_without_anything_to_speak_is_refused(engine: Engine, text: str) -> None:
    outcome = ask(engine, text)
    assert isinstance(outcome, InvalidInput)
    assert "alphabet" in str(outcome)


@pytest.mark.parametrize("value", [5, None, {"text": "a"}, ["a"], b"RIFF"])
def test_anything_but_a_string_is_refused(engine: Engine, value: Any) -> None:
    outcome = ask(engine, value)
    assert isinstance(outcome, RequestError)
    assert outcome.code in (415, 422)


def test_a_text_that_is_too_long_is_refused(engine: Engine) -> None:
    most = engine.settings.max_length
    outcome = ask(engine, "a" * (most // 2))
    assert isinstance(outcome, TooLarge)
    assert str(most) in str(outcome)
    outcome = ask(engine, "a" * (engine.settings.max_characters + 1))
    assert isinstance(outcome, TooLarge)
    assert "characters" in str(outcome)
    good, bad = engine.predict([Request(["Fine."]), Request(["a" * most])])
    assert spoken(good) == spoken(ask(engine, "Fine."))
    assert isinstance(bad, TooLarge)


def test_a_sound_that_would_be_too_long_is_refused_before_it_is_made(bundle: Path, engine: Engine) -> None:
    text = "How long does this take?"
    seconds = len(samples(spoken(ask(engine, text)))) / VitsModel.config_class().sampling_rate
    tight = Engine(bundle, threads=1, max_seconds=1.5 * seconds)
    spoken(ask(tight, text))
    outcome = ask(tight, text, speaking_rate=0.25)
    assert isinstance(outcome, TooLarge)
    assert f"{1.5 * seconds:g} seconds" in str(outcome)
    spoken(ask(tight, text))


def with_weights(bundle: Path, place: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The bundle with changed weights."""
    shutil.copytree(bundle, place)
    weights = load_file(place / "model.safetensors")
    change(weights)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("name", ["decoder.conv_post.weight", "text_encoder.embed_tokens.weight"])
def test_unsound_weights_are_an_error_of_the_server(bundle: Path, tmp_path: Path, name: str) -> None:
    broken = with_weights(bundle, tmp_path / "broken", lambda weights: weights[name].fill_(torch.nan))
    outcome = ask(Engine(broken, threads=1), "Hello")
    assert isinstance(outcome, InternalError)
    assert "unsound" in str(outcome)


def test_golden_sounds_tell_other_weights(bundle: Path, tmp_path: Path) -> None:
    assert golden.replay(Engine(bundle), bundle / golden.FILE_NAME) <= 1e-3
    texts = [example["inputs"] for example in golden.read(bundle / golden.FILE_NAME)]
    assert len(texts) == 5
    # Pitch and volume alone: durations, and so lengths, stay.
    other = with_weights(bundle, tmp_path / "other", lambda weights: weights["decoder.conv_post.weight"].mul_(0.9))
    with pytest.raises(golden.GoldenMismatch):
        golden.replay(Engine(other), bundle / golden.FILE_NAME)


def test_drift() -> None:
    sound = np.linspace(-1, 1, 500, dtype=np.float32)
    one, louder, shorter, other_rate = (
        base64.b64encode(task.to_wav(values, rate)).decode()
        for values, rate in ((sound, 8000), (sound * 1.01, 8000), (sound[:-1], 8000), (sound, 16000))
    )
    drift = task.TextToSpeech.drift
    assert drift(one, one) == 0
    assert 1e-3 < drift(one, louder) < 0.01
    assert drift(one, shorter) == drift(one, other_rate) == float("inf")


def test_samples_beyond_the_scale_are_clipped() -> None:
    content = task.to_wav(np.array([-3, -1, 0, 0.5, 1, 3], dtype=np.float32), 8000)
    assert samples(content) == pytest.approx([-1, -1, 0, 0.5, 1, 1], abs=1e-4)


def test_voices_of_a_model_that_has_several(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "voices"
    shutil.copytree(bundle, place)
    config = transformers.VitsConfig.from_pretrained(bundle, num_speakers=2, speaker_embedding_size=8)
    torch.manual_seed(0)
    VitsModel(config).save_pretrained(place)
    engine = Engine(place, threads=1)
    none, first, second = (
        spoken(ask(engine, "Who is it?", **voice)) for voice in ({}, {"speaker_id": 0}, {"speaker_id": 1})
    )
    assert len({none, first, second}) == 3
    for wrong in (-1, 2):
        outcome = ask(engine, "Who is it?", speaker_id=wrong)
        assert isinstance(outcome, InvalidParameter)
        assert "0 to 1" in str(outcome)


@pytest.mark.parametrize(("option", "program"), [("phonemize", "phonemizer"), ("is_uroman", "uroman")])
def test_a_program_that_the_tokenizer_needs_is_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, program: str
) -> None:
    monkeypatch.setattr(task, f"is_{program}_available", lambda: False)
    place = tmp_path / "needy"
    shutil.copytree(bundle, place)
    config = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**config, option: True}))
    with pytest.raises(ValueError, match=f"pip install {program}"):
        Engine(place)
    with pytest.raises(UserError, match=f"--base-model needy.*pip install {program}"):
        train_here("--task", "text-to-speech", "--base-model", place, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_bundled_as_it_is(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "again"
    train_here("--task", "text-to-speech", "--base-model", bundle, "--output-dir", place)
    assert (place / "model.safetensors").read_bytes() == (bundle / "model.safetensors").read_bytes()
    assert (place / "vocab.json").read_bytes() == (bundle / "vocab.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "needs --base-model"),
        (("--from-scratch", "vits", "--train-file", REVIEWS / "train.csv"), "cannot train VITS"),
        (("--from-scratch", "vits", "--overflow", "window"), "--overflow window"),
        (("--from-scratch", "bert"), "takes vits"),
        (("--from-scratch", "vits hidden_sizes=3"), "hidden_size"),
    ],
)
def test_what_cannot_be_bundled_is_refused(tmp_path: Path, arguments: tuple[object, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_here("--task", "text-to-speech", "--output-dir", tmp_path / "out", *arguments)


def test_it_runs_on_torch_only(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch backend only"):
        Engine(bundle, backend="openvino")
    with pytest.raises(UserError, match="text-to-speech runs on torch only"):
        archiver.main(["--bundle", str(bundle), "--store", str(tmp_path), "--backend", "openvino"])
    (tmp_path / "model").mkdir()
    shutil.copyfile(bundle / "model-config.yaml", tmp_path / "model" / "model-config.yaml")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="not bert"):
        Engine(tmp_path / "model")


def test_requests_are_answered_in_turn_while_there_is_time() -> None:
    def answer(sample: float, parameters: str) -> Answer:
        time.sleep(sample)
        if parameters == "bad":
            raise InvalidInput("bad")
        return Answer(parameters)

    outcomes = in_turn([([0.0], "a"), ([0.0], "bad"), ([0.06], "b"), ([0.0], "c"), ([0.0], "d")], answer, 0.1)
    assert [getattr(outcome, "prediction", type(outcome)) for outcome in outcomes] == [
        "a",
        InvalidInput,
        "b",
        Overloaded,  # another one as slow as the slowest would come too late
        Overloaded,
    ]


@pytest.fixture(scope="module")
def served(bundle: Path, shared_store: Path, serve_models: Callable[..., Served]) -> Served:
    build_here(bundle, shared_store, "speech", precision="auto")
    return serve_models("speech")


def same_sound(found: bytes, expected: bytes) -> bool:
    """Whether two wav files sound alike; other processes may add numbers in another order."""
    one, other = (base64.b64encode(content).decode() for content in (found, expected))
    return task.TextToSpeech.drift(one, other) < 1e-3


def test_the_hubs_client_gets_a_wav(inference_client: HubClient, engine: Engine) -> None:
    client = inference_client("speech")
    assert same_sound(client.text_to_speech("Hello there."), spoken(ask(engine, "Hello there.")))
    parameters = {"seed": 4, "speaking_rate": 2.0}
    found = client.text_to_speech("Hello there.", extra_body=parameters)
    assert same_sound(found, spoken(ask(engine, "Hello there.", **parameters)))
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as raised:
        client.text_to_speech("Hello there.", temperature=0.5)
    assert raised.value.response.status_code == 422
    assert "speaking_rate" in raised.value.response.json()["error"]


def test_rest_formats(served: Served, engine: Engine) -> None:
    expected = spoken(ask(engine, "Hello"))
    single = served.post("/predictions/speech", {"inputs": "Hello"})
    assert single.headers["content-type"] == "audio/wav"
    assert int(single.headers["x-usage-tokens"]) == 11
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["Hello"]}
    encoded = [
        served.post("/predictions/speech", {"inputs": ["Hello"]}).json()[0],
        served.post("/predictions/speech", {"inputs": "Hello", "parameters": {"details": True}}).json()["predictions"],
        served.post("/v1/models/speech:predict", {"instances": ["Hello"]}).json()["predictions"][0],
        served.post("/v2/models/speech/infer", {"inputs": [tensor]}).json()["outputs"][0]["data"][0],
    ]
    for content in (single.content, *map(base64.b64decode, encoded)):
        assert same_sound(content, expected)
    refused = served.post("/predictions/speech", {"inputs": "a" * 1500})
    assert (refused.status_code, refused.json()["type"]) == (413, "TooLarge")
    assert refused.headers["content-type"] == "application/json"


def test_the_marble_client_over_rest_and_grpc(served: Served, engine: Engine, shared: Path, same_workers: None) -> None:
    expected = spoken(ask(engine, "Hello", seed=2))
    with served.rest_client() as rest, served.grpc_client() as grpc:
        for client in (rest, grpc):
            answer = client.predict("speech", "Hello", {"seed": 2})
            assert same_sound(base64.b64decode(str(answer.predictions)), expected)
            assert answer.usage.tokens == 11
            with pytest.raises(marble_client.InvalidParameter):
                client.predict("speech", "Hello", {"seed": -2})
            assert client.canary("speech") < 1e-3
        texts: list[str] = json.loads((shared / "naughty_strings" / "blns.json").read_text(encoding="utf-8"))
        for text in texts[::8]:
            answer = served.post("/predictions/speech", {"inputs": text})
            assert answer.status_code in (200, 413, 422), answer.text
