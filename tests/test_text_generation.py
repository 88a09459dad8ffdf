"""Text generation, whole: answers of the Inference API, streams, training, and a real TorchServe with real clients."""

import asyncio
import dataclasses
import json
import math
import random
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import huggingface_hub
import pytest
import requests
import transformers
from conftest import NO_CHECKPOINTS, HubClient, Served, build_here, run, succeeded, train_here
from datasets import Dataset
from huggingface_hub.errors import GenerationError
from huggingface_hub.inference._generated.types import TextGenerationInputGenerateParameters
from test_client import Awaited
from ts.context import Context, RequestProcessor
from ts.protocol.otf_message_handler import create_predict_response

import marble_client
from handler import golden
from handler.engine import Engine
from handler.errors import InvalidInput, Overloaded, RequestError
from handler.messages import Piece, Request, Result
from handler.service import Service
from handler.tasks.text_generation import TextGeneration, TextGenerationParameters
from marble_client import cli
from marble_client.stubs import inference_pb2, inference_pb2_grpc
from training import bundle, evaluation, scratch
from training.corpus import read
from training.errors import UserError
from training.tasks import text_generation as training_task

CONTEXT = 96
PROMPT = "First Citizen:\nBefore we"
MODEL = "poet"
GREEDY = {"do_sample": False}
# Parameters of text-generation-inference that a small server on a CPU does not offer.
NOT_OFFERED = {"adapter_id", "best_of", "frequency_penalty", "grammar", "watermark"}


@pytest.fixture(scope="module")
def corpus(shared: Path) -> str:
    return (shared / "shakespeare" / "input.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with random weights, wide enough to have something to say."""
    place = tmp_path_factory.mktemp("poet")
    spec = scratch.parse_spec(
        f"gpt2 n_embd=32 n_layer=2 n_head=2 n_positions={CONTEXT} vocab_size=400 initializer_range=0.4"
    )
    tokenizer = scratch.train_tokenizer(spec, [corpus[:20_000]])
    transformers.set_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(scratch.build_config(spec, tokenizer))
    bundle.write_model(place, model, tokenizer)
    bundle.write_model_config(place, "text-generation", {"max_length": CONTEXT, "stride": 8, "threads": 1})
    engine = Engine(place)
    asked = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8, "details": True}}
    (place / golden.FILE_NAME).write_text(golden.record(engine, [asked]), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(folder)


def ask(engine: Engine, inputs: Any = PROMPT, **parameters: Any) -> Any:
    """The prediction for one input, or the error."""
    [outcome] = engine.predict([Request([inputs], parameters)])
    return outcome if isinstance(outcome, RequestError) else outcome.predictions[0]


# --- answers


def test_answers_equal_the_pipeline(engine: Engine, folder: Path, corpus: str) -> None:
    prompts = [line for line in corpus[20_000:40_000].splitlines() if line][:120]
    assert len(prompts) == 120
    pipeline = transformers.pipeline("text-generation", model=str(folder))
    [result] = engine.predict([Request(prompts, {**GREEDY, "max_new_tokens": 12}, many=True)])
    assert isinstance(result, Result)
    expected = [
        pipeline(prompt, max_new_tokens=12, return_full_text=False, **GREEDY)[0]["generated_text"] for prompt in prompts
    ]
    assert [prediction["generated_text"] for prediction in result.predictions] == expected
    assert len(set(expected)) > 100
    whole = ask(engine, prompts[0], max_new_tokens=12, return_full_text=True)
    assert whole == pipeline(prompts[0], max_new_tokens=12, **GREEDY)[0]


def test_details_are_those_of_the_inference_api(engine: Engine) -> None:
    found = ask(engine, max_new_tokens=5, details=True, decoder_input_details=True, top_n_tokens=2, seed=3, top_k=9)
    output = huggingface_hub.TextGenerationOutput.parse_obj_as_instance(found)
    details = output.details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 5, 3)
    assert "".join(token.text for token in details.tokens) == output.generated_text
    assert "".join(token.text for token in details.prefill) == PROMPT
    assert details.prefill[0].logprob is None
    assert details.top_tokens is not None
    assert [len(tokens) for tokens in details.top_tokens] == [2] * 5
    known = {"finish_reason", "generated_tokens", "prefill", "tokens", "best_of_sequences", "seed", "top_tokens"}
    assert set(found["details"]) <= known
    assert "details" not in ask(engine, max_new_tokens=5)
    assert "top_tokens" not in ask(engine, max_new_tokens=5, details=True)["details"]


def test_every_parameter_of_the_inference_api_is_known_or_refused_by_name(engine: Engine) -> None:
    names = {field.name for field in dataclasses.fields(TextGenerationInputGenerateParameters)}
    ours = {field.name for field in dataclasses.fields(TextGenerationParameters)}
    assert names - ours == NOT_OFFERED
    for name in NOT_OFFERED:
        error = ask(engine, **{name: 1})
        assert isinstance(error, RequestError)
        assert error.code == 422
        assert name in str(error)
        assert "temperature" in str(error)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": 0}, "'temperature' must be at least 0.01"),
        ({"temperature": 1e9}, "'temperature' must be at most 100"),
        ({"temperature": "hot"}, "'temperature' must be a number or null"),
        ({"top_p": 1.5}, "'top_p' must be at most 1"),
        ({"top_p": 0}, "'top_p' must be at least"),
        ({"typical_p": 2}, "'typical_p'"),
        ({"top_k": -1}, "'top_k' must be at least 0"),
        ({"repetition_penalty": 0}, "'repetition_penalty'"),
        ({"seed": -1}, "'seed' must be at least 0"),
        ({"seed": 2**64}, "'seed' must be at most"),
        ({"seed": 1.5}, "'seed' must be an integer"),
        ({"num_beams": 9}, "'num_beams' must be at most 8"),
        ({"max_new_tokens": 0}, "'max_new_tokens' must be at least 1"),
        ({"max_new_tokens": CONTEXT}, f"'max_new_tokens' must be at most {CONTEXT - 1}"),
        ({"truncate": 0}, "'truncate' must be at least 1"),
        ({"stop": "x"}, "'stop' must be a list of strings"),
        ({"stop": [""]}, "'stop' takes at most 16 texts of 1 to 256 characters"),
        ({"stop": ["x"] * 17}, "'stop' takes at most 16"),
        ({"stop": ["x" * 257]}, "'stop' takes at most 16"),
        ({"do_sample": "yes"}, "'do_sample' must be true or false"),
        ({"overflow": "window"}, "'overflow' must be 'error' or 'truncate'"),
        ({"top_n_tokens": 21}, "'top_n_tokens' must be at most 20"),
    ],
)
def test_parameters_out_of_range_are_refused(engine: Engine, parameters: dict[str, Any], message: str) -> None:
    error = ask(engine, **parameters)
    assert isinstance(error, RequestError)
    assert error.code == 422
    assert message in str(error)


@pytest.mark.parametrize("parameters", [{"temperature": 0.8}, {"top_k": 5}, {"top_p": 0.9}, {"typical_p": 0.9}])
def test_naming_a_way_to_sample_samples(engine: Engine, parameters: dict[str, Any]) -> None:
    assert isinstance(ask(engine, max_new_tokens=2, details=True, **parameters)["details"]["seed"], int)
    assert ask(engine, max_new_tokens=2, details=True, do_sample=False, **parameters)["details"]["seed"] is None


def test_null_parameters_are_as_good_as_none(engine: Engine) -> None:
    names = {field.name for field in dataclasses.fields(TextGenerationParameters)} - {"details"}
    assert ask(engine, **dict.fromkeys(names)) == ask(engine)


def test_the_model_has_defaults_of_its_own(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 6, "repetition_penalty": 1.4, "eos_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    changed = Engine(tmp_path)
    found = ask(changed, details=True, seed=1)
    assert found["details"]["generated_tokens"] == 6
    plain = Engine(folder)
    given = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 6, "repetition_penalty": 1.4}
    assert found == ask(plain, details=True, seed=1, **given)
    assert ask(changed, **GREEDY, repetition_penalty=1.0) == ask(plain, max_new_tokens=6)


def test_new_tokens_are_bounded_by_the_context_and_the_settings(engine: Engine, folder: Path) -> None:
    assert ask(engine, details=True)["details"]["generated_tokens"] == CONTEXT // 2
    most = ask(engine, max_new_tokens=CONTEXT - 1, details=True)
    assert (most["details"]["generated_tokens"], most["details"]["finish_reason"]) == (CONTEXT - 1, "length")
    small = Engine(folder, max_new_tokens=4)
    assert ask(small, details=True)["details"]["generated_tokens"] == 4
    assert "at most 4" in str(ask(small, max_new_tokens=5))


def test_bf16(folder: Path) -> None:
    assert ask(Engine(folder, precision="bf16"), max_new_tokens=3, details=True)["details"]["generated_tokens"] == 3


# --- prompts


def test_long_prompts_lose_their_beginning_or_are_refused(engine: Engine, folder: Path, corpus: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    long = corpus[:3000]
    ids = tokenizer(long)["input_ids"]
    asked = {"max_new_tokens": 10, "details": True, "decoder_input_details": True}
    [result] = engine.predict([Request([long], asked)])
    assert isinstance(result, Result)
    assert (result.usage.tokens, result.usage.truncated, result.usage.windows) == (len(ids), True, 1)
    kept = [token["id"] for token in result.predictions[0]["details"]["prefill"]]
    assert kept == ids[-(CONTEXT - 10) :]
    error = ask(engine, long, overflow="error")
    assert isinstance(error, RequestError)
    assert error.code == 413
    assert f"{len(ids)} tokens" in str(error)
    [short] = engine.predict([Request([long], {**asked, "truncate": 7, "overflow": "error"})])
    assert isinstance(short, Result)
    assert [token["id"] for token in short.predictions[0]["details"]["prefill"]] == ids[-7:]
    assert short.usage.truncated
    [whole] = engine.predict([Request(["Before"], {"truncate": 50})])
    assert isinstance(whole, Result)
    assert not whole.usage.truncated


def test_a_cut_prompt_keeps_the_special_tokens_at_its_beginning(folder: Path, tmp_path: Path, corpus: str) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start = tokenizer.bos_token
    from tokenizers.processors import TemplateProcessing

    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)])
    backend.save(str(tmp_path / "tokenizer.json"))
    details = ask(
        Engine(tmp_path), corpus[:3000], max_new_tokens=1, details=True, decoder_input_details=True, truncate=5
    )["details"]
    plain = tokenizer(corpus[:3000], add_special_tokens=False)["input_ids"]
    assert [token["id"] for token in details["prefill"]] == [tokenizer.bos_token_id, *plain[-4:]]
    assert details["prefill"][0]["special"]
    assert details["prefill"][0]["text"] == ""


def test_an_empty_prompt_begins_as_generate_does(engine: Engine, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = model.generate(max_new_tokens=9, **GREEDY)[0, 1:]
    assert ask(engine, "", max_new_tokens=9)["generated_text"] == tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("value", "code"), [(3, 422), (None, 422), ({"text": "x"}, 422), ("\ud800", 400), (b"\x00", 415)]
)
def test_what_is_no_text_is_refused(engine: Engine, value: Any, code: int) -> None:
    error = ask(engine, value)
    assert isinstance(error, RequestError)
    assert error.code == code


def test_characters_are_rationed_before_time_is_spent(folder: Path) -> None:
    small = Engine(folder, max_characters=50)
    many, few, *_ = small.predict([Request(["x" * 30, "y" * 30], {}), Request(["x" * 30], {"max_new_tokens": 1})])
    assert isinstance(many, RequestError)
    assert many.code == 413
    assert isinstance(few, Result)
    outcomes = small.predict([Request(["x" * 50], {"max_new_tokens": 1})] * 5)
    assert [getattr(outcome, "code", 200) for outcome in outcomes] == [200] * 4 + [503]


def test_an_answer_that_takes_too_long_is_given_up(folder: Path) -> None:
    slow = Engine(folder, max_generation_seconds=0.0)
    error = ask(slow)
    assert isinstance(error, RequestError)
    assert error.code == 503
    assert "stream" in str(error)
    [first, *_, last] = [said for step in slow.stream([Request([PROMPT], stream=True)]) for _, said in step]
    assert isinstance(first, Piece)
    assert isinstance(last, Piece)
    assert last.last


def test_drift() -> None:
    def answer(text: str, *logprobs: float) -> dict[str, Any]:
        tokens = [{"id": index, "text": "", "logprob": value} for index, value in enumerate(logprobs)]
        return {"generated_text": text, "details": {"tokens": tokens, "prefill": []}}

    assert TextGeneration.drift({"generated_text": "a"}, {"generated_text": "a"}) == 0
    assert TextGeneration.drift({"generated_text": "a"}, {"generated_text": "b"}) == math.inf
    assert TextGeneration.drift(answer("a", -1.0, -2.0), answer("a", -1.0, -2.5)) == 0.5
    assert TextGeneration.drift(answer("a", -1.0), answer("a", -1.0, -2.0)) == math.inf
    assert math.isnan(TextGeneration.drift(answer("a", -1.0), answer("a", math.nan)))


# --- the engine streams


def test_a_stream_makes_up_the_whole_answer(engine: Engine) -> None:
    parameters = {"max_new_tokens": 9, "details": True, "seed": 5, "temperature": 1.4, "top_n_tokens": 1}
    pieces = [said for step in engine.stream([Request([PROMPT], parameters, stream=True)]) for _, said in step]
    assert all(isinstance(piece, Piece) for piece in pieces)
    events = [huggingface_hub.TextGenerationStreamOutput.parse_obj_as_instance(piece.value) for piece in pieces]
    whole = ask(engine, **parameters)
    assert [event.index for event in events] == list(range(1, 10))
    assert [piece.value["token"] for piece in pieces] == whole["details"]["tokens"]
    assert [piece.value["top_tokens"] for piece in pieces] == whole["details"]["top_tokens"]
    assert [event.generated_text for event in events] == [None] * 8 + [whole["generated_text"]]
    end = events[-1].details
    assert end is not None
    assert (end.finish_reason, end.generated_tokens, end.seed) == ("length", 9, 5)
    assert end.input_length == pieces[0].usage.tokens
    assert [piece.last for piece in pieces] == [False] * 8 + [True]
    bare = [said for step in engine.stream([Request([PROMPT], {}, stream=True)]) for _, said in step]
    assert all(piece.value["details"] is None for piece in bare)


def test_streams_and_whole_answers_share_a_batch(engine: Engine) -> None:
    asked = [
        Request([PROMPT], {"max_new_tokens": 6}, stream=True),
        Request([PROMPT, "Speak"], {"max_new_tokens": 3}, many=True),
        Request([PROMPT], {"max_new_tokens": 8}),
        Request([PROMPT], {"max_new_tokens": -1}, stream=True),
        Request([PROMPT, PROMPT], stream=True),
        Request([7], stream=True),
        Request([PROMPT], {"max_new_tokens": 4, "num_beams": 2}, stream=True),
    ]
    said: dict[int, list[Any]] = {index: [] for index in range(len(asked))}
    order = []
    for step in engine.stream(asked):
        for index, outcome in step:
            said[index].append(outcome)
            order.append(index)
    assert len(said[0]) == 6
    assert said[0][-1].value["generated_text"] == ask(engine, max_new_tokens=6)["generated_text"]
    [several], [one] = said[1], said[2]
    assert several.predictions == [ask(engine, text, max_new_tokens=3) for text in (PROMPT, "Speak")]
    assert one.predictions == [ask(engine, max_new_tokens=8)]
    assert [error.code for index in (3, 4, 5) for error in said[index]] == [422] * 3
    assert len(said[6]) == 4
    assert said[6][-1].value["generated_text"] == ask(engine, max_new_tokens=4, num_beams=2)["generated_text"]
    assert order.index(1) < order.index(2)


# --- TorchServe's messages


class Frontend:
    """The socket to TorchServe's frontend: reads what a worker sends, and keeps its rules."""

    def __init__(self, asked: Sequence[tuple[dict[str, str], Any]]) -> None:
        self.messages: list[dict[int, tuple[str | None, bytes]]] = []
        self.headers: list[dict[str, str]] = [{} for _ in asked]
        self.statuses = [0] * len(asked)
        self.over: set[int] = set()
        self._rest = {index for index, (headers, _) in enumerate(asked) if "explain" in headers}

    def sendall(self, message: bytes) -> None:
        assert not self.messages or any(following == "true" for following, _ in self.messages[-1].values())
        position = 0

        def number() -> int:
            nonlocal position
            position += 4
            return int(struct.unpack_from("!i", message, position - 4)[0])

        def text() -> bytes:
            nonlocal position
            length = number()
            position += length
            return bytes(message[position - length : position])

        assert number() == 200
        text()
        found: dict[int, tuple[str | None, bytes]] = {}
        while (length := number()) != -1:
            index = int(message[position : position + length])
            position += length
            assert index not in self.over
            kind, status, _ = text().decode(), number(), text()
            headers = {text().decode(): text().decode() for _ in range(number())}
            following = headers.pop("ts_stream_next", None)
            if not self.statuses[index]:
                assert following != "false" or index not in self._rest  # else it has no head
                self.headers[index], self.statuses[index] = {**headers, "content-type": kind}, status
            if following != "true":
                self.over.add(index)
            found[index] = (following, text())
        self.messages.append(found)

    def body(self, index: int) -> bytes:
        return b"".join(message[index][1] for message in self.messages if index in message)

    def parts(self, index: int) -> list[str | None]:
        return [message[index][0] for message in self.messages if index in message]

    def places(self, index: int) -> list[int]:
        """The messages that say something of a request."""
        return [place for place, message in enumerate(self.messages) if index in message]


REST = {"explain": "False"}
SEQUENCE = {"ts_request_sequence_id": "s"}  # what StreamPredictions2 sends along


def over_the_wire(service: Service, folder: Path, *asked: tuple[dict[str, str], Any]) -> Frontend:
    """Puts a batch of (headers, body) through a service as TorchServe's worker does."""
    frontend = Frontend(asked)
    context = Context("poet", str(folder), {"model": {"modelVersion": "1.0"}}, 64, None, "0.12.0")
    context.request_ids = ids = {index: str(index) for index in range(len(asked))}
    context.cl_socket = frontend
    context.request_processor = [RequestProcessor(dict(headers)) for headers, _ in asked]
    bodies = service.handle([{"body": body} for _, body in asked], context)
    assert len(bodies) == len(asked)
    frontend.sendall(bytes(create_predict_response(bodies, ids, "Prediction success", 200, context)))
    return frontend


@pytest.fixture(scope="module")
def service(folder: Path) -> Service:
    return Service(Context("poet", str(folder), {"model": {"modelVersion": "1.0"}}, 64, None, "0.12.0"))


def body(stream: bool = False, inputs: Any = PROMPT, **parameters: Any) -> dict[str, Any]:
    return {"inputs": inputs, "parameters": parameters, **({"stream": True} if stream else {})}


def events(stream: bytes) -> list[Any]:
    """The values of server-sent events."""
    *lines, rest = stream.decode("ascii").split("\n\n")
    assert rest == ""
    assert all(line.startswith("data:") and "\n" not in line for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


def test_a_stream_goes_out_token_by_token(service: Service, folder: Path) -> None:
    frontend = over_the_wire(service, folder, (REST, body(True, max_new_tokens=4)))
    assert frontend.parts(0) == ["true"] * 4 + ["false"]
    assert [len(events(message[0][1])) for message in frontend.messages] == [1, 1, 1, 1, 0]
    assert frontend.headers[0]["content-type"] == "text/event-stream"
    assert frontend.headers[0]["x-model-name"] == "poet"
    assert int(frontend.headers[0]["x-usage-tokens"]) > 3
    assert frontend.headers[0]["x-usage-truncated"] == "false"


def test_a_batch_of_streams_and_whole_answers(service: Service, folder: Path) -> None:
    frontend = over_the_wire(
        service,
        folder,
        (REST, body(True, max_new_tokens=3)),
        (REST, body(True, max_new_tokens=6)),
        (REST, body(max_new_tokens=2)),
        (REST, body(max_new_tokens=9)),
        ({}, body(True, max_new_tokens=2)),  # gRPC: whole, though it asks for a stream
        (REST, body(True, max_new_tokens=0)),
        (REST, body(True, inputs=[PROMPT, PROMPT])),
        (REST, {"inputs": PROMPT, "stream": "yes"}),
    )
    assert frontend.statuses == [200] * 5 + [422] * 3
    assert frontend.parts(0) == ["true", "true", "false"]  # ends before the others
    assert frontend.parts(1) == ["true"] * 6 + ["false"]  # the last stream waits for the last whole answer
    assert frontend.places(2) == [1]
    assert frontend.places(3) == [len(frontend.messages) - 1]
    assert frontend.parts(4) == ["false"]
    assert [frontend.parts(index) for index in (5, 6, 7)] == [[None]] * 3
    assert [event["token"]["text"] for event in events(frontend.body(0))] == [
        event["token"]["text"] for event in events(frontend.body(1))[:3]
    ]
    texts = [json.loads(frontend.body(index))["generated_text"] for index in (2, 3, 4)]
    assert texts[0] == texts[2]
    assert texts[1].startswith(events(frontend.body(1))[-1]["generated_text"])
    assert json.loads(frontend.body(7))["error"] == "\"stream\" must be true or false, not 'yes'"


def test_any_batch_is_answered_whole(service: Service, folder: Path) -> None:
    choose = random.Random(1)
    for _ in range(25):
        asked = []
        for _ in range(choose.randrange(1, 12)):
            limit = choose.choice([0, 1, 1, 2, 3, 8, 12])
            one = body(choose.random() < 0.6, max_new_tokens=limit, num_beams=choose.choice([1, 1, 1, 1, 2]))
            asked.append(({} if choose.random() < 0.3 else REST, one))
        frontend = over_the_wire(service, folder, *asked)
        assert frontend.over == set(range(len(asked)))
        for index, (headers, value) in enumerate(asked):
            limit = value["parameters"]["max_new_tokens"]
            assert frontend.statuses[index] == (200 if limit else 422)
            if limit and headers and value.get("stream"):
                assert [event["index"] for event in events(frontend.body(index))] == list(range(1, limit + 1))
            else:
                assert ("generated_text" in json.loads(frontend.body(index))) == (limit > 0)


def test_only_streams_that_all_fail_are_plain_errors(service: Service, folder: Path) -> None:
    frontend = over_the_wire(service, folder, (REST, body(True, top_k=-1)), (REST, body(True, inputs=4)))
    assert len(frontend.messages) == 1
    assert frontend.statuses == [422, 422]
    assert frontend.headers[0]["content-type"] == "application/json"


def test_stream_predictions_2_is_never_answered(service: Service, folder: Path) -> None:
    frontend = over_the_wire(service, folder, (SEQUENCE, body()), (REST, body(max_new_tokens=2)), ({}, body()))
    [message] = frontend.messages
    assert set(message) == {1, 2}
    [alone] = over_the_wire(service, folder, (SEQUENCE, body())).messages
    assert alone == {}
    # The header of a REST request that happens to have that name is none of it.
    [rest] = over_the_wire(service, folder, (REST | SEQUENCE, body(max_new_tokens=1))).messages
    assert set(rest) == {0}


def test_an_error_in_the_middle_ends_that_stream(
    service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = service._engine.stream

    def stream(requests: Sequence[Request]) -> Iterator[list[Any]]:
        for step in real(requests):
            said = {index: piece.value["index"] for index, piece in step}
            yield [(index, piece) for index, piece in step if index != 0 or said[0] <= 2]
            if said.get(0) == 2:
                yield [(0, InvalidInput("so far and no further"))]

    monkeypatch.setattr(service._engine, "stream", stream)
    frontend = over_the_wire(
        service, folder, (REST, body(True, max_new_tokens=9)), (REST, body(True, max_new_tokens=7))
    )
    *good, bad = events(frontend.body(0))
    assert [event["index"] for event in good] == [1, 2]
    assert (bad["error"], bad["error_type"]) == ("so far and no further", "generation")
    assert len(events(frontend.body(1))) == 7
    assert frontend.statuses == [200, 200]


def test_a_model_that_breaks_off_ends_streams_with_an_error(
    service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = service._engine.stream

    def stream(requests: Sequence[Request]) -> Iterator[list[Any]]:
        for step in real(requests):
            yield step
            if any(isinstance(said, Piece) and said.value["index"] == 3 for _, said in step):
                raise RuntimeError(f"no: {PROMPT}")

    monkeypatch.setattr(service._engine, "stream", stream)
    asked = [(REST, body(True, max_new_tokens=9)), (REST, body(max_new_tokens=5)), (REST, body(True, max_new_tokens=2))]
    frontend = over_the_wire(service, folder, *asked)
    *_, last = events(frontend.body(0))
    assert last["error"] == "the model failed; the server's log has the cause"
    assert last["error_type"] == "generation"
    assert json.loads(frontend.body(1)) == ask(service._engine, max_new_tokens=5)  # tried again by itself
    assert len(events(frontend.body(2))) == 2
    log = capsys.readouterr().err
    assert "RuntimeError in a request" in log
    assert "First Citizen" not in log


# --- training


@pytest.fixture(scope="module")
def trained(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of its own, trained from scratch for some steps."""
    place = tmp_path_factory.mktemp("trained")
    (place / "part.txt").write_text(corpus[:40_000], encoding="utf-8")
    train_here(
        *("--task", "text-generation", "--train-file", place / "part.txt"),
        *("--from-scratch", "gpt2 n_layer=2 n_embd=64 n_head=2 vocab_size=384 n_positions=64"),
        *("--output-dir", place / "poet", "--max-steps", 25, "--learning-rate", 5e-3, *NO_CHECKPOINTS),
        *("--per-device-train-batch-size", 8),
    )
    return place / "poet"


def test_training_beats_chance_and_says_by_how_much(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    found = metrics["splits"]["validation"]
    assert found["perplexity"] < 200  # of 384 tokens
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["character_likelihood"] == pytest.approx(math.exp(-found["nats_per_character"]))
    assert 3700 < found["characters"] < 4000  # a tenth, less the first token of each piece
    assert metrics["primary"] == "character_likelihood"
    assert metrics["settings"]["max_length"] == 64


def test_the_figures_are_those_of_a_plain_reference(trained: Path) -> None:
    import torch

    [example, *_] = [json.loads(line) for line in (trained / "validation.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    model = transformers.AutoModelForCausalLM.from_pretrained(trained)
    ids = tokenizer(example["inputs"])["input_ids"][-63:]
    with torch.inference_mode():
        loss = float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    prediction = ask(Engine(trained), example["inputs"], **example["parameters"])
    scores = training_task.TextGeneration().score([prediction], [example["target"]], [])
    assert scores["loss"] == pytest.approx(loss, abs=1e-4)
    assert scores["characters"] == len(tokenizer.decode(ids[1:]))


def test_the_golden_set_is_greedy_continuations(trained: Path) -> None:
    examples = golden.read(trained / golden.FILE_NAME)
    assert len(examples) == 12  # eight pieces of the text, a long one and three odd ones
    assert all(example["parameters"]["do_sample"] is False for example in examples)
    assert {len(example["predictions"]["details"]["tokens"]) for example in examples} == {16}
    assert golden.replay(Engine(trained), trained / golden.FILE_NAME) < 1e-3


def test_a_model_is_bundled_as_it_is_and_fine_tuned(trained: Path, tmp_path: Path) -> None:
    common = ("--task", "text-generation", "--base-model", trained)
    train_here(*common, "--output-dir", tmp_path / "same")
    before = (trained / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == before
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"The {n} kings."}) + "\n" for n in range(200)))
    files = ("--train-file", tmp_path / "rows.jsonl", "--output-dir", tmp_path / "tuned")
    train_here(*common, *files, "--max-steps", 3, *NO_CHECKPOINTS, "--max-length", 32)
    assert (tmp_path / "tuned" / "model.safetensors").read_bytes() != before
    assert Engine(tmp_path / "tuned").settings.max_length == 32


def test_windows_are_refused_in_training(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    with pytest.raises(UserError, match="--overflow window"):
        train_here(
            *("--task", "text-generation", "--train-file", tmp_path / "a.txt"),
            *("--from-scratch", "gpt2", "--output-dir", tmp_path / "out", "--overflow", "window"),
        )
    assert not (tmp_path / "out").exists()


class Busy:
    """An engine that answers `most` requests in the time that a request may take, or one at a time never."""

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine, self._most = engine, most

    def predict(self, requests: Sequence[Request]) -> list[Result | RequestError]:
        late = Overloaded("the answer takes too long")
        return [late] * len(requests) if len(requests) > self._most else self._engine.predict(requests)


def test_what_is_too_slow_together_is_measured_in_smaller_batches(engine: Engine, corpus: str) -> None:
    parameters = {"max_new_tokens": 2, "do_sample": False}
    asked = [{"inputs": corpus[start : start + 40], "parameters": parameters} for start in range(9)]
    expected = evaluation.predict(engine, asked)
    found = evaluation.predict(Busy(engine, 3), asked)  # type: ignore[arg-type]
    assert found == expected
    with pytest.raises(Overloaded, match="takes too long"):
        evaluation.predict(Busy(engine, 0), asked)  # type: ignore[arg-type]


# --- a real TorchServe


@pytest.fixture(scope="module")
def served(trained: Path, shared_store: Path, serve_models: Callable[..., Served]) -> Served:
    """A server of the trained model; --backend auto must choose torch."""
    assert "torch fp32" in build_here(trained, shared_store, MODEL, precision="auto")
    return serve_models(MODEL)


def rest(served: Served, value: Any, path: str = f"/predictions/{MODEL}", **options: Any) -> requests.Response:
    return served.post(path, value, **options)


def test_inference_client_whole_and_streamed(inference_client: HubClient, trained: Path) -> None:
    client = inference_client(MODEL)
    expected = ask(Engine(trained), max_new_tokens=12)["generated_text"]
    assert client.text_generation(PROMPT, max_new_tokens=12) == expected
    assert client.text_generation(PROMPT, max_new_tokens=12, return_full_text=True) == PROMPT + expected
    told = client.text_generation(PROMPT, max_new_tokens=12, details=True)
    assert (told.generated_text, told.details.finish_reason) == (expected, "length")
    pieces = list(client.text_generation(PROMPT, max_new_tokens=12, stream=True))
    assert len(pieces) == 12
    assert "".join(pieces) == expected
    tokens = list(client.text_generation(PROMPT, max_new_tokens=12, stream=True, details=True))
    assert [token.token.id for token in tokens] == [token.id for token in told.details.tokens]
    assert tokens[-1].generated_text == expected
    assert tokens[-1].details.generated_tokens == 12


def test_inference_client_with_every_parameter(
    inference_client: HubClient,
) -> None:
    client = inference_client(MODEL)
    given: dict[str, Any] = {
        "do_sample": True, "temperature": 1.2, "top_k": 40, "top_p": 0.95, "typical_p": 0.95, "seed": 11,
        "repetition_penalty": 1.1, "max_new_tokens": 20, "stop": ["\n\n", "zz"], "return_full_text": False,
        "truncate": 12, "decoder_input_details": True, "top_n_tokens": 2, "details": True,
    }  # fmt: skip
    first, second = (client.text_generation(PROMPT, **given) for _ in range(2))
    assert first == second
    assert first.details.seed == 11
    assert len(first.details.prefill) <= 12
    assert len(first.details.top_tokens) == first.details.generated_tokens


def test_a_stream_arrives_while_it_is_generated(served: Served) -> None:
    with rest(served, body(True, max_new_tokens=40), stream=True) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["transfer-encoding"] == "chunked"
        assert response.headers["x-model-name"] == MODEL
        chunks = [chunk for chunk in response.raw.stream(decode_content=True) if chunk]
    assert len(chunks) > 10
    assert len(events(b"".join(chunks))) == 40


def test_marble_client_streams(served: Served, trained: Path) -> None:
    whole = ask(Engine(trained), max_new_tokens=10, details=True)
    with served.rest_client() as client:
        tokens = list(client.stream(MODEL, PROMPT, {"max_new_tokens": 10}))
        assert [token.id for token in tokens] == [token["id"] for token in whole["details"]["tokens"]]
        assert [token.end for token in tokens[:-1]] == [None] * 9
        assert tokens[-1].end == marble_client.TextEnd(whole["generated_text"], "length", 10, None)
        answer = client.predict(MODEL, PROMPT, {"max_new_tokens": 10})
        assert answer.predictions["generated_text"] == whole["generated_text"]  # type: ignore[index, call-overload]
        assert answer.model.name == MODEL
        assert answer.usage.windows == 1
        with pytest.raises(marble_client.InvalidParameter, match="'top_k' must be at least 0"):
            client.stream(MODEL, PROMPT, {"top_k": -3})
        with pytest.raises(marble_client.NotFound):
            client.stream("prose", PROMPT)
        several = client.predict(MODEL, [PROMPT, 5], {"max_new_tokens": 10}).predictions
        assert isinstance(several, list)
        assert several[0]["generated_text"] == whole["generated_text"]  # type: ignore[index, call-overload]
        assert several[1]["code"] == 422  # type: ignore[index, call-overload]


def test_marble_client_streams_to_those_who_await(served: Served) -> None:
    """The same tokens, several streams at a time; one that is left early leaves the others alone."""
    parameters = {"max_new_tokens": 10}
    with served.rest_client() as client:
        expected = list(client.stream(MODEL, PROMPT, parameters))

    async def whole(client: marble_client.AsyncRestClient) -> list[marble_client.Token]:
        return [token async for token in client.stream(MODEL, PROMPT, parameters)]

    async def left_early(client: marble_client.AsyncRestClient) -> list[marble_client.Token]:
        async with aclosing(client.stream(MODEL, PROMPT, parameters)) as tokens:
            return [await anext(tokens)]

    async def ask() -> list[list[marble_client.Token]]:
        async with marble_client.AsyncRestClient(served.url, token=served.token) as client:
            with pytest.raises(marble_client.InvalidParameter, match="'top_k' must be at least 0"):
                await anext(client.stream(MODEL, PROMPT, {"top_k": -3}))
            with pytest.raises(ValueError, match="no model name"):
                client.stream("a/b", PROMPT)
            with pytest.raises(marble_client.ServerError, match="not explained"):
                await client.explain(MODEL, PROMPT)
            return await asyncio.gather(whole(client), left_early(client), whole(client))

    first, [head], second = asyncio.run(ask())
    for tokens in (first, second, [head]):
        known = expected[: len(tokens)]
        # In a batch, sums of a forward pass may differ in the last bit.
        assert [dataclasses.replace(token, logprob=0.0) for token in tokens] == [
            dataclasses.replace(token, logprob=0.0) for token in known
        ]
        assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in known], abs=1e-5)


def test_marble_client_over_grpc(served: Served, trained: Path) -> None:
    with served.grpc_client() as client:
        found = client.predict(MODEL, PROMPT, {"max_new_tokens": 10}).predictions
    assert isinstance(found, dict)
    assert found == ask(Engine(trained), max_new_tokens=10, details=True)


def test_the_command_streams(served: Served, trained: Path) -> None:
    expected = ask(Engine(trained), max_new_tokens=10)["generated_text"]
    command = (Path(sys.executable).parent / "marble", "predict", MODEL, PROMPT, "-p", "max_new_tokens=10")
    address = ("--url", served.url, "--token", served.token)
    assert succeeded(run(*command, *address, "--stream")) == expected + "\n"
    lines = succeeded(run(*command, *address, "--stream", "--details")).splitlines()
    assert json.loads(lines[-1])["end"]["generated_text"] == expected
    assert json.loads(succeeded(run(*command, *address))) == {"generated_text": expected}
    refused = run(*command, *address, "--stream", "--grpc")
    assert (refused.returncode, "--stream goes over REST" in refused.stderr) == (2, True)


def test_other_formats(served: Served) -> None:
    expected = rest(served, body(max_new_tokens=6)).json()["generated_text"]
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [PROMPT]}
    asked = {"max_new_tokens": 6}
    found = rest(served, {"inputs": [tensor], "parameters": asked}, f"/v2/models/{MODEL}/infer").json()
    assert found["outputs"] == [{"name": "generated_text", "datatype": "BYTES", "shape": [1, 1], "data": [expected]}]
    told = rest(served, {"inputs": [tensor], "parameters": {**asked, "details": True}}, f"/v2/models/{MODEL}/infer")
    assert json.loads(told.json()["outputs"][0]["data"][0])["generated_text"] == expected
    kserve = rest(served, {"instances": [PROMPT, PROMPT], "parameters": asked}, f"/v1/models/{MODEL}:predict").json()
    assert kserve == {"predictions": [{"generated_text": expected}] * 2}


def grpc_call(served: Served, method: str, value: Any, timeout: float = 30, **options: Any) -> list[Any]:
    """The answers to a gRPC call, each as JSON."""
    with grpc.insecure_channel(served.grpc) as channel:
        stub = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
        request = inference_pb2.PredictionsRequest(
            model_name=MODEL, input={"data": json.dumps(value).encode()}, **options
        )
        metadata = served.metadata()
        if method == "StreamPredictions2":
            return list(stub.StreamPredictions2(iter([request]), metadata=metadata, timeout=10))
        found = getattr(stub, method)(request, metadata=metadata, timeout=timeout)
        return [json.loads(answer.prediction) for answer in ([found] if method == "Predictions" else found)]


@pytest.mark.usefixtures("same_workers")
@pytest.mark.parametrize("method", ["Predictions", "StreamPredictions"])
@pytest.mark.parametrize("stream", [False, True])
def test_grpc_calls_get_one_whole_answer(served: Served, method: str, stream: bool) -> None:
    expected = rest(served, body(max_new_tokens=6)).json()
    assert grpc_call(served, method, body(stream, max_new_tokens=6)) == [expected]
    [error] = grpc_call(served, method, body(stream, max_new_tokens=0))
    assert error["code"] == 422


@pytest.mark.usefixtures("same_workers")
def test_stream_predictions_2_does_not_wedge_the_worker(served: Served) -> None:
    # It closes its side at once, as `iter([request])` does: whatever is answered then ends TorchServe's worker thread.
    for _ in range(2):
        with pytest.raises(grpc.RpcError):
            grpc_call(served, "StreamPredictions2", body(max_new_tokens=2), sequence_id="one")


@pytest.mark.usefixtures("same_workers")
def test_all_kinds_of_calls_at_once(served: Served, trained: Path) -> None:
    """Streams of all lengths, whole answers and gRPC calls: each as it would be alone."""
    alone = Engine(trained)
    lengths = [3, 17, 1, 30, 8, 12]

    def whole(length: int) -> str:
        text: str = rest(served, body(max_new_tokens=length, seed=length, top_k=20)).json()["generated_text"]
        return text

    def streamed(length: int) -> str:
        response = rest(served, body(True, max_new_tokens=length, seed=length, top_k=20))
        text: str = events(response.content)[-1]["generated_text"]
        return text

    def over_grpc(length: int, method: str = "Predictions") -> str:
        [found] = grpc_call(served, method, body(True, max_new_tokens=length, seed=length, top_k=20))
        return str(found["generated_text"])

    ways = [whole, streamed, over_grpc, lambda length: over_grpc(length, "StreamPredictions"), streamed]
    with ThreadPoolExecutor(30) as pool:
        found = [(length, pool.submit(way, length)) for length in lengths for way in ways]
    expected = {n: ask(alone, max_new_tokens=n, seed=n, top_k=20)["generated_text"] for n in lengths}
    assert [future.result() for _, future in found] == [expected[length] for length, _ in found]


@pytest.mark.usefixtures("same_workers")
def test_clients_that_hang_up(served: Served) -> None:
    parts = urlsplit(served.url)
    content = json.dumps(body(True, max_new_tokens=50)).encode()
    head = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {served.token}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    for wait in (0, 1, 300):
        with socket.create_connection((str(parts.hostname), int(parts.port or 80)), timeout=30) as connection:
            connection.sendall(head.encode() + content)
            if wait:
                connection.recv(wait)
            # A reset, which is what a process that is killed leaves behind.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with served.rest_client() as client:
        tokens = client.stream(MODEL, PROMPT, {"max_new_tokens": 50})
        next(tokens)
        tokens.close()  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError):
        grpc_call(served, "StreamPredictions", body(max_new_tokens=50), timeout=0.02)


def test_a_client_of_the_hub_sees_what_is_wrong(
    inference_client: HubClient,
) -> None:
    client = inference_client(MODEL)
    for stream in (False, True):
        with pytest.raises(Exception, match="'top_p' must be at most 1"):
            client.text_generation(PROMPT, top_p=3.0, stream=stream)
        with pytest.raises(Exception, match="unknown parameter 'best_of'"):
            client.text_generation(PROMPT, best_of=3, stream=stream)


def test_a_client_of_the_hub_understands_an_error_in_a_stream() -> None:
    from huggingface_hub.inference._common import _stream_text_generation_response

    from handler.errors import InternalError
    from handler.formats.hugging_face import stream_error

    line = f"data:{json.dumps(stream_error(InternalError('it broke')))}"
    with pytest.raises(GenerationError, match="it broke"):
        list(_stream_text_generation_response([line], details=False))


@pytest.mark.usefixtures("same_workers")
def test_naughty_strings(served: Served, shared: Path) -> None:
    strings = json.loads((shared / "naughty_strings" / "blns.json").read_text(encoding="utf-8"))
    assert len(strings) > 500
    lock = threading.Lock()
    codes: dict[int, int] = {}

    def call(number: int) -> None:
        response = rest(served, body(number % 2 == 0, inputs=strings[number], max_new_tokens=2, stop=["\n"]))
        if response.status_code == 200 and number % 2 == 0:
            assert events(response.content)[-1]["generated_text"] is not None
        with lock:
            codes[response.status_code] = codes.get(response.status_code, 0) + 1

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(call, range(len(strings))))
    assert codes == {200: len(strings)}


def test_corpora_are_read_as_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    [document] = read(tmp_path / "a.txt")
    task = training_task.TextGeneration()
    task._piece = 800
    rows = Dataset.from_dict({"text": [document, "x" * 1700]})
    assert [len(piece["inputs"]) for piece in task.examples(rows, [])] == [8, 800, 800, 100]
    long = Dataset.from_dict({"text": ["x" * 800 * 1000]})
    assert len(task.examples(long, [])) == 256


# --- the client, when a stream goes wrong


@pytest.fixture(params=["called", "awaited"])
def faulty(request: pytest.FixtureRequest) -> Iterator[Callable[..., marble_client.RestClient]]:
    """A client of a server that answers its requests with the given pieces of HTTP, one list for each."""
    listener = socket.create_server(("127.0.0.1", 0))
    clients: list[Any] = []

    def answer(replies: Sequence[Sequence[bytes | float]]) -> None:
        for reply in replies:
            connection, _ = listener.accept()
            with connection:
                read_request(connection)
                for piece in reply:
                    if isinstance(piece, bytes):
                        connection.sendall(piece)
                    else:
                        time.sleep(piece)

    def start(*replies: Sequence[bytes | float], timeout: float = 20) -> marble_client.RestClient:
        threading.Thread(target=answer, args=(replies,), daemon=True).start()
        host, port = listener.getsockname()
        kind = marble_client.RestClient if request.param == "called" else marble_client.AsyncRestClient

        def make() -> Any:
            return kind(f"http://{host}:{port}", timeout=timeout)

        clients.append(make() if request.param == "called" else Awaited(make))
        return clients[-1]  # type: ignore[no-any-return]

    yield start
    for client in clients:
        client.__exit__(None, None, None)
    listener.close()


def read_request(connection: socket.socket) -> None:
    """Reads a whole request: closed with a part of it unread, a connection is reset, and the reply is lost."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    [length] = re.findall(rb"content-length: (\d+)", head.lower())
    while len(body) < int(length):
        body += connection.recv(65536)


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def sent(index: int, text: str | None = None, **changes: Any) -> bytes:
    """An event as a chunk."""
    token = {"id": index, "text": f"t{index}", "logprob": -1, "special": False}
    details = {"finish_reason": "length", "generated_tokens": index, "input_length": 1, "seed": 4}
    event = {"index": index, "token": token, "generated_text": text, "details": text and details, **changes}
    return chunk(f"data:{json.dumps(event)}\n\n".encode())


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def test_a_stream_is_tried_again_until_it_begins(faulty: Callable[..., marble_client.RestClient]) -> None:
    client = faulty([BUSY], [HEAD, sent(1), sent(2, "t1t2")])
    # The connection is left open, as TorchServe leaves it while the rest of a batch is not done.
    tokens = list(client.stream(MODEL, PROMPT))
    assert [token.text for token in tokens] == ["t1", "t2"]
    assert tokens[-1].end == marble_client.TextEnd("t1t2", "length", 2, 4)


def test_an_event_in_pieces_is_read_whole(faulty: Callable[..., marble_client.RestClient]) -> None:
    whole = sent(1, "t1")
    client = faulty([HEAD, whole[:20], 0.05, whole[20:30], 0.05, whole[30:]])
    assert [token.id for token in client.stream(MODEL, PROMPT)] == [1]


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        ([HEAD, sent(1), b"0\r\n\r\n"], marble_client.BadResponse, "broke off"),
        ([HEAD, b"0\r\n\r\n"], marble_client.BadResponse, "broke off"),
        ([HEAD, sent(1)], marble_client.ConnectionFailed, "failed"),
        # Had it come with the first event, aiohttp would drop that, and the client try again.
        ([HEAD, sent(1), 1.0, b"HTTP/1.1 500 Worker died\r\n\r\n"], marble_client.ConnectionFailed, "failed"),
        ([HEAD, sent(1), chunk(b"data:{oops\n\n")], marble_client.BadResponse, "not valid JSON"),
        ([HEAD, sent(1), chunk(b"data:{}\n\n")], marble_client.BadResponse, "no dict named 'token'"),
        ([HEAD, sent(1), sent(2, error="it broke", code=500, type="E")], marble_client.ServerError, "it broke"),
        ([HEAD, sent(1), 5.0], marble_client.Timeout, "no answer within"),
    ],
)
def test_a_stream_that_goes_wrong_raises(
    faulty: Callable[..., marble_client.RestClient],
    reply: Sequence[bytes | float],
    error: type[marble_client.MarbleError],
    message: str,
) -> None:
    client = faulty(reply, timeout=1 if error is marble_client.Timeout else 20)
    tokens: list[marble_client.Token] = []
    with pytest.raises(error, match=message):
        tokens.extend(client.stream(MODEL, PROMPT))


def test_a_stream_of_what_cannot_be_sent_fails_at_once() -> None:
    with marble_client.RestClient("http://127.0.0.1:9") as client:
        with pytest.raises(ValueError, match="no model name"):
            client.stream("a/b", PROMPT)
        with pytest.raises(ValueError, match="JSON"):
            client.stream(MODEL, PROMPT, {"temperature": math.nan})


def test_control_characters_stay_out_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end = marble_client.TextEnd("x", "length", 1, None)
    tokens = [marble_client.Token(1, "a\x1b[2J\n", -1.0, False), marble_client.Token(2, "é", -1.0, False, end)]
    monkeypatch.setattr(marble_client.RestClient, "stream", lambda *_, **__: iter(tokens))
    cli.main(["predict", MODEL, PROMPT, "--stream"])
    assert capsys.readouterr().out == "a\x1b[2J\né\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.main(["predict", MODEL, PROMPT, "--stream"])
    assert capsys.readouterr().out == "a?[2J\né\n"
