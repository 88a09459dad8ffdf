"""A real TorchServe, real clients: every door gives the same answers, and nothing a client sends ends a worker."""

import asyncio
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import huggingface_hub.constants
import numpy as np
import pytest
import requests
import tritonclient.http
from conftest import REVIEWS, Served, run, succeeded

import marble_client
from marble_client.stubs import (
    inference_pb2,
    inference_pb2_grpc,
    open_inference_grpc_pb2,
    open_inference_grpc_pb2_grpc,
)

TEXT = "The room was cold, the staff were warm: I would come back."
JSON = {"Content-Type": "application/json"}
GOOD = {"inputs": TEXT}


def rest(served: Served, path: str, body: Any = None, **headers: str) -> requests.Response:
    """POSTs bytes as they are, anything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Authorization": f"Bearer {served.token}", **({} if isinstance(body, bytes) else JSON), **headers}
    return requests.post(f"{served.url}{path}", data=data, headers=sent, timeout=60)


def ask(served: Served, body: Any, model: str = "reviews", **headers: str) -> requests.Response:
    return rest(served, f"/predictions/{model}", body, **headers)


def scores(labels: Any) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in labels}


@pytest.fixture(scope="module")
def expected(served: Served) -> dict[str, float]:
    """Scores of TEXT by label, as the fp32 archive gives them to a lone request."""
    return scores(ask(served, GOOD, "reviews-fp32").json()[0])


def open_inference(served: Served, model: str, tensor: dict[str, Any] | None, identifier: str = "7") -> Any:
    """Open Inference gRPC."""
    with grpc.insecure_channel(served.grpc) as channel:
        stub = open_inference_grpc_pb2_grpc.GRPCInferenceServiceStub(channel)
        message = open_inference_grpc_pb2.ModelInferRequest
        tensors = [message.InferInputTensor(**tensor)] if tensor else []
        request = message(model_name=model, id=identifier, inputs=tensors)
        return stub.ModelInfer(request, metadata=served.metadata(), timeout=60)


# --- every door


def via_hugging_face(served: Served) -> dict[str, float]:
    return scores(ask(served, GOOD, "reviews-fp32").json()[0])


def via_list(served: Served) -> dict[str, float]:
    return scores(ask(served, {"inputs": [TEXT]}, "reviews-fp32").json()[0])


def via_details(served: Served) -> dict[str, float]:
    answer = ask(served, {**GOOD, "parameters": {"details": True}}, "reviews-fp32").json()
    assert answer["usage"]["windows"] == 1
    assert answer["model"]["name"] == "reviews-fp32"
    return scores(answer["predictions"][0])


def via_plain_text(served: Served) -> dict[str, float]:
    answer = ask(served, TEXT.encode(), "reviews-fp32", **{"Content-Type": "text/plain; charset=utf-8"})
    return scores(answer.json()[0])


def via_json_without_content_type(served: Served) -> dict[str, float]:
    return scores(ask(served, json.dumps(GOOD).encode(), "reviews-fp32").json()[0])


def via_json_with_charset(served: Served) -> dict[str, float]:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    return scores(ask(served, json.dumps(GOOD).encode(), "reviews-fp32", **headers).json()[0])


def via_multipart(served: Served) -> dict[str, float]:
    answer = requests.post(
        f"{served.url}/predictions/reviews-fp32",
        files={"data": ("text.txt", TEXT.encode(), "text/plain")},
        headers={"Authorization": f"Bearer {served.token}"},
        timeout=60,
    )
    return scores(answer.json()[0])


def via_version_in_path(served: Served) -> dict[str, float]:
    return scores(rest(served, "/predictions/reviews-fp32/1.0", GOOD).json()[0])


def via_kserve_v1(served: Served) -> dict[str, float]:
    answer = rest(served, "/v1/models/reviews-fp32:predict", {"instances": [TEXT]})
    return scores(answer.json()["predictions"][0])


def via_open_inference_rest(served: Served) -> dict[str, float]:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [TEXT]}
    answer = rest(served, "/v2/models/reviews-fp32/infer", {"id": "7", "inputs": [tensor]}).json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("7", "reviews-fp32", "1.0")
    columns = {output["name"]: output["data"] for output in answer["outputs"]}
    return dict(zip(columns["label"], columns["score"], strict=True))


def via_open_inference_grpc(served: Served) -> dict[str, float]:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [TEXT.encode()]}}
    answer = open_inference(served, "reviews-fp32", tensor)
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "reviews-fp32", "1.0")
    outputs = {output.name: output for output in answer.outputs}
    assert list(outputs["score"].shape) == [1, 3]
    # TorchServe leaves each string its JSON quotes.
    labels = [json.loads(value) for value in outputs["label"].contents.bytes_contents]
    return dict(zip(labels, outputs["score"].contents.fp32_contents, strict=True))


def via_torchserve_grpc(served: Served) -> dict[str, float]:
    return scores(json.loads(served.grpc_predictions("reviews-fp32", json.dumps(GOOD).encode()))[0])


def via_torchserve_grpc_plain_text(served: Served) -> dict[str, float]:
    return scores(json.loads(served.grpc_predictions("reviews-fp32", TEXT.encode()))[0])


def via_inference_client(served: Served) -> dict[str, float]:
    client = huggingface_hub.InferenceClient(model=f"{served.url}/predictions/reviews-fp32", token=served.token)
    return {entry.label: entry.score for entry in client.text_classification(TEXT)}


def via_tritonclient(served: Served) -> dict[str, float]:
    with tritonclient.http.InferenceServerClient(served.url.removeprefix("http://")) as client:
        tensor = tritonclient.http.InferInput("text", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([TEXT], dtype=object))
        answer = client.infer("reviews-fp32", [tensor], headers={"Authorization": f"Bearer {served.token}"})
        labels = answer.as_numpy("label").ravel()
        return dict(zip(labels, answer.as_numpy("score").ravel().tolist(), strict=True))


def via_marble_rest(served: Served) -> dict[str, float]:
    with served.rest_client() as client:
        return {entry.label: entry.score for entry in client.classify("reviews-fp32", TEXT).predictions}


def via_marble_grpc(served: Served) -> dict[str, float]:
    with served.grpc_client() as client:
        return {entry.label: entry.score for entry in client.classify("reviews-fp32", TEXT).predictions}


DOORS = [value for name, value in sorted(globals().items()) if name.startswith("via_")]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__.removeprefix("via_"))
def test_every_door_gives_the_same_answer(
    door: Callable[[Served], dict[str, float]],
    served: Served,
    expected: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The hub's client refuses even local addresses in offline mode.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = door(served)
    assert list(found) == list(expected)  # highest score first
    # Open Inference over gRPC and its FP32 tensors carry 24 bits.
    assert found == pytest.approx(expected, abs=1e-6)


def test_answers_equal_the_transformers_pipeline(served: Served, bundle: Path, shared: Path) -> None:
    from transformers import pipeline

    with (REVIEWS / "test.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:150]
    lines = (shared / "naughty_strings" / "naughty.jsonl").read_text(encoding="utf-8").split("\n")
    texts += [json.loads(line)["text"] for line in lines if line][::8]
    texts += ["Отличная гостиница, вернёмся.", "料理は最高でした。", "خدمة ممتازة", "मुझे बहुत पसंद आया", "long " * 700]
    assert len(texts) >= 200
    reference = pipeline("text-classification", str(bundle), top_k=None, device="cpu")
    wanted = reference(texts, truncation=True, max_length=256)
    answer = ask(served, {"inputs": texts}, "reviews-torch").json()
    assert len(answer) == len(texts)
    for text, one, other in zip(texts, answer, wanted, strict=True):
        assert scores(one) == pytest.approx(scores(other), abs=1e-4), text[:80]


def test_parameters_and_headers(served: Served, store: Path) -> None:
    answer = ask(served, {**GOOD, "parameters": {"top_k": 1, "function_to_apply": "none"}})
    [[entry]] = answer.json()
    [[probable]] = ask(served, {**GOOD, "parameters": {"top_k": 1}}).json()
    assert entry["label"] == probable["label"]
    assert entry["score"] != pytest.approx(probable["score"], abs=1e-3), "a logit"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-model-name"] == "reviews"
    assert answer.headers["x-model-version"] == "1.0"
    assert len(answer.headers["x-model-digest"]) == 64
    assert answer.headers["x-usage-truncated"] == "false"
    assert int(answer.headers["x-usage-tokens"]) > 10


def test_an_over_long_text_is_never_cut_in_silence(served: Served, same_workers: None) -> None:
    body = {"inputs": "good " * 2000}
    cut = ask(served, body)
    assert cut.headers["x-usage-truncated"] == "true"
    assert cut.headers["x-usage-tokens"] == "2002"
    windows = ask(served, {**body, "parameters": {"overflow": "window"}})
    assert windows.headers["x-usage-truncated"] == "false"
    assert int(windows.headers["x-usage-windows"]) > 7
    refused = ask(served, {**body, "parameters": {"overflow": "error"}})
    assert refused.status_code == 413
    assert "2002 tokens" in refused.json()["error"]


def test_a_text_of_100_000_tokens(served: Served, same_workers: None) -> None:
    body = {"inputs": "word " * 100_000}
    assert ask(served, body).headers["x-usage-tokens"] == "100002"
    refused = ask(served, {**body, "parameters": {"overflow": "window"}})
    assert refused.status_code == 413
    assert "at most 64 windows" in refused.json()["error"]


def test_a_flood_of_windows_is_refused(served: Served, same_workers: None) -> None:
    answer = ask(served, {"inputs": ["a " * 14_000] * 5, "parameters": {"overflow": "window"}})
    assert answer.status_code == 413
    assert "tokens to run; at most 32768 are taken" in answer.json()["error"]


BAD_REQUESTS: list[tuple[str, bytes, str | None, int, str]] = [
    ("no body", b"", None, 400, "no body|empty"),
    ("empty json body", b"", "application/json", 400, "empty|no body"),
    ("broken json", b'{"inputs": "a"', "application/json", 400, "not valid JSON"),
    ("broken json, no type", b'{"inputs": "a"', None, 400, "not valid JSON"),
    ("deep json", b"[" * 100_000, "application/json", 400, "not valid JSON"),
    ("no inputs", b'{"text": "a"}', "application/json", 422, "unknown field"),
    ("only parameters", b'{"parameters": {}}', "application/json", 422, 'no "inputs"'),
    ("number", b'{"inputs": 7}', "application/json", 422, "must be a string"),
    ("null", b'{"inputs": null}', "application/json", 422, "must be a string"),
    ("empty list", b'{"inputs": []}', "application/json", 422, "empty"),
    ("unknown parameter", b'{"inputs": "a", "parameters": {"topk": 1}}', "application/json", 422, "top_k"),
    ("type of a parameter", b'{"inputs": "a", "parameters": {"top_k": "1"}}', "application/json", 422, "an integer"),
    ("value of a parameter", b'{"inputs": "a", "parameters": {"top_k": 0}}', "application/json", 422, "at least 1"),
    ("a stream", b'{"inputs": "a", "stream": true}', "application/json", 501, "does not stream"),
    ("parameters not an object", b'{"inputs": "a", "parameters": [1]}', "application/json", 422, "object"),
    ("lone surrogate", b'{"inputs": "a \\ud800 b"}', "application/json", 400, "surrogate"),
    ("not utf-8", b"caf\xe9", "text/plain", 400, "UTF-8"),
    ("an image", b"\x89PNG\r\n", "image/png", 415, "takes text"),
    ("a web form", b'{"inputs": "a"}', "application/x-www-form-urlencoded", 415, "Content-Type: application/json"),
    ("tensor shape", b'{"inputs": [{"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a"]}]}',
     "application/json", 422, "shape"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "media_type", "status", "message"), [case[1:] for case in BAD_REQUESTS],
                         ids=[case[0] for case in BAD_REQUESTS])  # fmt: skip
def test_bad_requests_say_what_is_wrong(
    served: Served, same_workers: None, body: bytes, media_type: str | None, status: int, message: str
) -> None:
    import re

    answer = ask(served, body, **({"Content-Type": media_type} if media_type else {}))
    assert answer.status_code == status, answer.text
    error = answer.json()
    assert set(error) == {"error", "code", "type"}
    assert error["code"] == status
    assert re.search(message, error["error"]), error


def test_a_body_of_10_megabytes_is_refused(served: Served, same_workers: None) -> None:
    # The refusal may arrive as a closed connection while the body is still being sent.
    try:
        answer = ask(served, b"a" * 10_000_000, **{"Content-Type": "text/plain"})
    except requests.exceptions.ConnectionError:
        return
    assert answer.status_code == 413


def test_one_bad_text_of_a_list_fails_alone(served: Served, expected: dict[str, float]) -> None:
    answer = ask(served, {"inputs": [TEXT, 3, "\ud800", TEXT]}, "reviews-fp32")
    assert answer.status_code == 200
    first, number, surrogate, last = answer.json()
    assert number["type"] == "InvalidInput"
    assert surrogate["type"] == "UnreadableRequest"
    assert scores(first) == pytest.approx(expected, abs=1e-5)
    assert scores(last) == pytest.approx(expected, abs=1e-5)


def hostile_bodies(shared: Path) -> list[bytes]:
    """The 515 naughty strings as inputs, and malformed requests of every kind."""
    lines = (shared / "naughty_strings" / "naughty.jsonl").read_text(encoding="utf-8").split("\n")
    strings = [json.loads(line)["text"] for line in lines if line]
    assert len(strings) == 515
    controls = ["\0", "a\0b", "\x1b[31m", "\r\nX-Injected: 1", "[METRICS]Fake.Count:1|#Level:Host", "\u2028", "\ufeff"]
    return [json.dumps({"inputs": text}).encode() for text in strings + controls]


def test_naughty_strings_each_alone(served: Served, same_workers: None, shared: Path) -> None:
    for body in hostile_bodies(shared):
        answer = ask(served, body, "reviews-fp32", **JSON)
        assert answer.status_code == 200, body
        assert len(answer.json()[0]) == 3


def test_naughty_strings_do_not_change_their_neighbours(
    served: Served, same_workers: None, shared: Path, expected: dict[str, float]
) -> None:
    """Hostile, malformed and good requests at the same time, so that they meet in the worker's batches."""
    bad = [body for _, body, media_type, _, _ in BAD_REQUESTS if media_type == "application/json" and body]
    good = json.dumps(GOOD).encode()
    bodies = list(
        itertools.chain.from_iterable(zip(hostile_bodies(shared), itertools.cycle(bad), itertools.repeat(good)))
    )
    local = threading.local()

    def send(body: bytes) -> tuple[bytes, int, Any]:
        session = local.__dict__.setdefault("session", requests.Session())
        answer = session.post(
            f"{served.url}/predictions/reviews-fp32",
            data=body,
            headers={"Authorization": f"Bearer {served.token}", **JSON},
            timeout=60,
        )
        return body, answer.status_code, answer.json()

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(send, bodies))
    good_answers = [answer for body, status, answer in answers if body == good and status == 200]
    assert len(good_answers) >= 515
    for answer in good_answers:
        assert scores(answer[0]) == pytest.approx(expected, abs=1e-5)
    assert {status for body, status, _ in answers if body in bad} <= {400, 422, 501}
    assert all(status == 200 for body, status, _ in answers if body not in bad)


# --- the hazards of TorchServe's gRPC


def test_grpc_errors_are_bodies_and_marble_raises_them(served: Served, same_workers: None) -> None:
    body = json.loads(served.grpc_predictions("reviews", b'{"inputs": 7}'))
    assert body["code"] == 422
    with (
        served.grpc_client() as client,
        pytest.raises(marble_client.InvalidParameter, match="must be a string"),
    ):
        client.predict("reviews", 7)


def test_streamed_grpc_to_a_model_that_does_not_stream(served: Served, same_workers: None) -> None:
    with grpc.insecure_channel(served.grpc) as channel:
        stub = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
        for body in (GOOD, {**GOOD, "stream": True}):
            request = inference_pb2.PredictionsRequest(model_name="reviews", input={"data": json.dumps(body).encode()})
            [answer] = stub.StreamPredictions(request, metadata=served.metadata(), timeout=30)
            assert len(json.loads(answer.prediction)[0]) == 3
        request.sequence_id = "one"
        with pytest.raises(grpc.RpcError):  # whatever is answered to this one ends TorchServe's worker thread
            list(stub.StreamPredictions2(iter([request]), metadata=served.metadata(), timeout=5))


@pytest.mark.parametrize(
    "tensor",
    [
        {"name": "t", "datatype": "FP32", "shape": [1], "contents": {"fp32_contents": [1.0]}},
        {"name": "t", "datatype": "BYTES", "shape": [3], "contents": {"bytes_contents": [b"a"]}},
        {"name": "t", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"\xff\xfe"]}},
        {"name": "t", "datatype": "BYTES", "shape": [1]},
        {"name": "t", "datatype": "nonsense", "shape": [1]},
        None,
    ],
    ids=["datatype", "shape", "not a text", "no contents", "unknown datatype", "no tensor"],
)
def test_bad_open_inference_over_grpc(served: Served, same_workers: None, tensor: dict[str, Any] | None) -> None:
    answer = open_inference(served, "reviews", tensor)
    [output] = answer.outputs
    assert output.name == "error"
    error = json.loads(json.loads(output.contents.bytes_contents[0]))
    assert error["code"] in (400, 415, 422)


def test_an_endless_id_over_grpc(served: Served, same_workers: None) -> None:
    tensor = {"name": "t", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"a"]}}
    answer = open_inference(served, "reviews", tensor, "é" * 1_000_000)
    assert [output.name for output in answer.outputs] == ["error"]


@pytest.mark.parametrize("fields", [{}, {"other": b"a"}, {"data": b""}, {"data": b"a", "body": b"b"}])
def test_odd_grpc_fields(served: Served, same_workers: None, fields: dict[str, bytes]) -> None:
    with grpc.insecure_channel(served.grpc) as channel:
        stub = inference_pb2_grpc.InferenceAPIsServiceStub(channel)
        request = inference_pb2.PredictionsRequest(model_name="reviews", input=fields)
        stub.Predictions(request, metadata=served.metadata(), timeout=30)


def test_headers_a_client_may_forge(served: Served, same_workers: None) -> None:
    for name, value in {"describe": "True", "explain": "True", "ts_stream_next": "true", "url_path": "../x"}.items():
        assert ask(served, GOOD, **{name: value}).status_code in (200, 400, 501), name


def test_explanations(served: Served, same_workers: None) -> None:
    """Over REST, by `marble_client` and by `marble explain`; predictions and explanations at a time."""
    answer = rest(served, "/explanations/reviews", {"inputs": GOOD["inputs"], "parameters": {"details": True}})
    assert answer.status_code == 200, answer.text
    found = answer.json()["predictions"]
    assert close(found["prediction"], rest(served, "/predictions/reviews", GOOD).json()[0])
    assert [entry["label"] for entry in found["explanations"]] == [entry["label"] for entry in found["prediction"]]
    words = found["explanations"][0]["attributions"]
    assert [GOOD["inputs"][word["start"] : word["end"]] for word in words] == [word["word"] for word in words]
    with served.rest_client() as client:
        assert close(client.explain("reviews", TEXT).predictions, found)
    assert close(asyncio.run(awaited_explanation(served)), found)
    told = succeeded(marble(served, "explain", "reviews", TEXT))
    assert close(json.loads(told), found)
    best = json.loads(succeeded(marble(served, "explain", "reviews", TEXT, "--top-k", "1", "--details")))
    assert close(best["predictions"]["explanations"], found["explanations"][:1])
    assert best["model"]["name"] == "reviews"
    refused = marble(served, "explain", "reviews", TEXT, "--grpc")
    assert refused.returncode == 2
    assert "over REST" in refused.stderr


async def awaited_explanation(served: Served) -> Any:
    async with marble_client.AsyncRestClient(served.url, token=served.token) as client:
        return (await client.explain("reviews", TEXT)).predictions


def close(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same but for the last digits of numbers, which differ from batch to batch."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == pytest.approx(other, abs=1e-3)) if isinstance(one, float) else bool(one == other)


def test_predictions_and_explanations_at_a_time(served: Served, same_workers: None) -> None:
    """In the same batches, each as if it were alone."""
    paths = ["/predictions/reviews", "/explanations/reviews"] * 16
    with ThreadPoolExecutor(len(paths)) as pool:
        answers = list(pool.map(lambda path: rest(served, path, GOOD).json(), paths))
    alone = [rest(served, path, GOOD).json() for path in paths[:2]]
    assert all(close(answer, alone[index % 2]) for index, answer in enumerate(answers))


# --- tokens, privacy, the server itself


def test_no_token_no_answer(served: Served) -> None:
    answer = requests.post(f"{served.url}/predictions/reviews", json=GOOD, timeout=30)
    assert answer.status_code == 400
    assert answer.json()["type"] == "InvalidKeyException"
    with (
        marble_client.GrpcClient(served.grpc, served.grpc_management, "wrong") as client,
        pytest.raises(marble_client.Unauthorized),
    ):
        client.predict("reviews", TEXT)


@pytest.mark.parametrize(
    ("token", "url"),
    [
        ("management", "http://127.0.0.1:1/evil.mar"),
        ("management", "file:///tmp/evil.mar"),
        ("inference", "reviews.mar"),
        ("", "reviews.mar"),
    ],
)
def test_nobody_can_register_a_model(served: Served, token: str, url: str) -> None:
    """Not from elsewhere, and not without the management key."""
    tokens = {"management": served.management_token, "inference": served.token, "": ""}
    answer = requests.post(
        f"{served.management}/models",
        params={"url": url, "model_name": "evil"},
        headers={"Authorization": f"Bearer {tokens[token]}"},
        timeout=30,
    )
    assert answer.status_code >= 400
    with served.rest_client() as client:
        assert {model.name for model in client.models()} == {"reviews", "reviews-fp32", "reviews-torch"}


def test_every_port_is_on_loopback_only(served: Served) -> None:
    import psutil

    pid = json.loads((served.folder / "run" / "server.json").read_text())["pid"]
    listening = [c.laddr for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(listening) == 5
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_metrics_are_scraped_without_a_token(served: Served) -> None:
    ask(served, GOOD)
    text = requests.get(f"{served.metrics}/metrics", timeout=30).text
    assert "ts_inference_requests_total" in text


def test_request_text_reaches_no_log(served: Served) -> None:
    secret = "zebra-umbrella-4711"
    for body in ({"inputs": secret}, {"inputs": [secret, 3]}, {"inputs": secret, "parameters": {secret: 1}}):
        ask(served, body)
    ask(served, f'{{"inputs": "{secret}'.encode(), **JSON)
    ask(served, f"{secret} \xff".encode("latin-1"), **{"Content-Type": "text/plain"})
    served.grpc_predictions("reviews", secret.encode())
    logs = [path for path in served.folder.rglob("*") if path.is_file()]
    assert any(path.name == "model_log.log" for path in logs)
    for path in logs:
        assert secret.encode() not in path.read_bytes(), path


def mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def test_an_openvino_worker_loads_no_torch(served: Served) -> None:
    maps = {pid: mapped(pid) for pid in served.workers()}
    with_torch = [pid for pid, text in maps.items() if "libtorch" in text]
    with_openvino = [pid for pid, text in maps.items() if "libopenvino" in text]
    assert len(with_torch) == 1  # reviews-torch
    assert len(with_openvino) == 2
    assert not set(with_torch) & set(with_openvino)


# --- the command


def marble(served: Served, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`marble`, in the server's folder, where it finds key_file.json by itself."""
    places = ["--url", served.url, "--management-url", served.management]
    places += ["--grpc-target", served.grpc, "--grpc-management-target", served.grpc_management]
    return run(Path(sys.executable).parent / "marble", *arguments, *places, cwd=served.folder, **environment)


def test_the_marble_command(served: Served) -> None:
    over_rest = succeeded(marble(served, "predict", "reviews", TEXT))
    over_grpc = succeeded(marble(served, "predict", "reviews", TEXT, "--grpc"))
    assert over_rest == over_grpc
    assert len(json.loads(over_rest)) == 3
    details = json.loads(succeeded(marble(served, "predict", "reviews", TEXT, "--details")))
    assert details["model"]["name"] == "reviews"
    assert "reviews" in succeeded(marble(served, "models"))
    succeeded(marble(served, "ready"))
    unknown = marble(served, "ready", "nobody")
    assert unknown.returncode == 1
    assert "nobody" in unknown.stdout + unknown.stderr


def test_a_killed_worker_comes_back(served: Served) -> None:
    """The last test of this file: it changes the workers' process ids."""
    import psutil

    victim = next(pid for pid in served.workers() if "libopenvino" in mapped(pid))
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not psutil.pid_exists(victim) and marble(served, "ready").returncode == 0:
            break
        time.sleep(0.2)
    else:
        pytest.fail("the worker did not come back within 30 s")
    assert ask(served, GOOD).status_code == 200
