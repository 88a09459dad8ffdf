"""Row 4: a streaming worker that is wedged from inside, and broken messages that come through the front door."""

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import psutil
import requests

from benchmarks.fault_injection.bench import MODEL, STREAMS, Bench, Target
from benchmarks.fault_injection.load import percentile
from benchmarks.fault_injection.site import MODEL_INFER, PREDICTIONS, Site, message
from marble_client.stubs import inference_pb2

PROMPT = {"inputs": "A warm film", "parameters": {"max_new_tokens": 24}, "stream": True}
_SERVICE = PREDICTIONS.rpartition("/")[0]
_SECONDS_TO_ANSWER = 10
# How long a model that still works may take to answer after what might have wedged it.
_SECONDS_TO_SHOW = 8
_MOST_SECONDS = 30
_SEED = 20
# Messages of so many bytes must not be made by doubling again and again.
_MOST_BYTES = 100_000


def wedge(bench: Bench) -> tuple[list[Target], Any]:
    """Row 4. Directly is on TorchServe's own port, with its key; and, as that may not wedge any more, by SIGSTOP."""
    stops = bench.times(5, 1)
    with bench.site("wedge", [MODEL, STREAMS]) as site:
        right = stream(site)
        mutated = mutate_through_door(site, bench.times(1000, 150), right)
        direct = [attack(site, name, right) for name in ATTACKS]
        stopped = [stop_worker(site, right) for _ in range(stops)]
        noticed = sum("is READY, has answered nothing" in line for line in watchdog_lines(site))
    # A way that kills the worker is over when TorchServe has started another; it counts as one to recover from.
    harmed = [entry for entry in direct if entry["outcome"] != "harmless"]
    wedged = [entry for entry in (*harmed, *stopped) if entry["outcome"] == "wedged"]
    longest = max(entry["seconds_to_recover"] for entry in (*harmed, *stopped))
    ways = ", ".join(entry["way"] for entry in harmed) or "none of the gRPC ways"
    times = len(harmed) + stops
    told = min(noticed, sum(entry["unready"] for entry in wedged))
    sent, harm, slowest = mutated["sent"], mutated["harm"], mutated["longest_s"]
    return [
        Target(
            "4a",
            f"a wedged streaming worker, {times} times (over gRPC: {ways}), longest time to the next right stream, s",
            longest,
            f"<= {_MOST_SECONDS}",
            longest <= _MOST_SECONDS,
        ),
        Target("4b", "wedges that /ready and the watchdog's log told of", told, str(len(wedged)), told == len(wedged)),
        Target("4c", f"{sent:,} mutated messages through the door, harm to others", harm or "none", "none", not harm),
        Target(
            "4d", "longest answer to one of them, s", slowest, f"<= {_SECONDS_TO_ANSWER}", slowest <= _SECONDS_TO_ANSWER
        ),
    ], {"directly": direct, "stopped": stopped, "mutated": mutated}


def stream(site: Site, seconds: float = _SECONDS_TO_SHOW) -> bytes:
    """A stream through the door, whole; b"" if there is none. It is greedy, so it is the same each time."""
    try:
        answer = site.predict(site.session(), STREAMS, json=PROMPT, timeout=seconds)
        whole = answer.ok and b"generated_text" in answer.content
        return answer.content if whole else b""
    except requests.RequestException:
        return b""


def watchdog_lines(site: Site) -> list[str]:
    """What the watchdog has seen."""
    lines = (site.folder / "logs" / "watchdog.log").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["message"] for line in lines]


# --- Directly --------------------------------------------------------------------------------------------------------


@contextmanager
def inner(site: Site) -> Iterator[tuple[grpc.Channel, tuple[tuple[str, str], ...]]]:
    """TorchServe's own gRPC port, and the metadata that it wants."""
    key = json.loads((site.folder / "key_file.json").read_text(encoding="utf-8"))["inference"]["key"]
    with grpc.insecure_channel(site.state()["addresses"]["grpc"], [("grpc.enable_http_proxy", 0)]) as channel:
        yield channel, (("authorization", f"Bearer {key}"),)


def sequence_message() -> bytes:
    """A message of StreamPredictions2."""
    data = json.dumps(PROMPT).encode()
    asked = inference_pb2.PredictionsRequest(model_name=STREAMS, input={"data": data}, sequence_id="one")
    return asked.SerializeToString()


def unary(site: Site) -> None:
    """A stream asked for in a unary call."""
    with inner(site) as (channel, metadata):
        channel.unary_unary(PREDICTIONS, None, None)(message(STREAMS, PROMPT), metadata=metadata, timeout=5)


def unary_left(site: Site) -> None:
    """The same, and the caller does not wait for the answer."""
    with inner(site) as (channel, metadata):
        method = channel.unary_unary(PREDICTIONS, None, None)
        calls = [method.future(message(STREAMS, PROMPT), metadata=metadata, timeout=5) for _ in range(8)]
        time.sleep(0.05)
        for call in calls:
            call.cancel()  # type: ignore[no-untyped-call]


def server_stream(site: Site) -> None:
    """StreamPredictions, read to its end."""
    with inner(site) as (channel, metadata):
        method = channel.unary_stream(f"{_SERVICE}/StreamPredictions", None, None)
        list(method(message(STREAMS, PROMPT), metadata=metadata, timeout=5))


def server_stream_left(site: Site) -> None:
    """StreamPredictions, cancelled while its answer is made."""
    with inner(site) as (channel, metadata):
        method = channel.unary_stream(f"{_SERVICE}/StreamPredictions", None, None)
        calls = [method(message(STREAMS, PROMPT), metadata=metadata, timeout=5) for _ in range(8)]
        time.sleep(0.05)
        for call in calls:
            call.cancel()  # type: ignore[no-untyped-call]


def both_stream(site: Site) -> None:
    """StreamPredictions2, closed by its caller when the answer has come or the time is over."""
    with inner(site) as (channel, metadata):
        method = channel.stream_stream(f"{_SERVICE}/StreamPredictions2", None, None)
        list(method(iter([sequence_message()]), metadata=metadata, timeout=5))


def both_stream_left(site: Site) -> None:
    """StreamPredictions2 of many, and their callers are gone at once."""
    with inner(site) as (channel, metadata):
        method = channel.stream_stream(f"{_SERVICE}/StreamPredictions2", None, None)
        calls = [method(iter([sequence_message()] * 3), metadata=metadata, timeout=5) for _ in range(4)]
        time.sleep(0.05)
        for call in calls:
            call.cancel()  # type: ignore[no-untyped-call]


def rest_left(site: Site) -> None:
    """A REST stream that its caller does not read."""
    url = f"{site.url}/predictions/{STREAMS}"
    for _ in range(8):
        with site.session().post(url, json=PROMPT, stream=True, timeout=5) as answer:
            next(answer.iter_content(8))


ATTACKS = {
    "unary Predictions of a stream": unary,
    "unary Predictions, cancelled": unary_left,
    "StreamPredictions": server_stream,
    "StreamPredictions, cancelled": server_stream_left,
    "StreamPredictions2": both_stream,
    "StreamPredictions2, cancelled": both_stream_left,
    "REST stream, left": rest_left,
}


def attack(site: Site, name: str, right: bytes) -> dict[str, Any]:
    """Does it, and says whether the worker died of it, is wedged, or neither; then waits until all is well."""
    [worker] = workers_of(site, STREAMS)
    begun = time.monotonic()
    said = "OK"
    try:
        ATTACKS[name](site)
    except grpc.RpcError as error:
        said = error.code().name
    except (requests.RequestException, StopIteration) as error:
        said = type(error).__name__
    if stream(site) == right:
        outcome = "harmless" if worker.is_running() else "killed"
    else:
        outcome = "wedged" if worker.is_running() else "killed"
    return {"way": name, "said": said, "outcome": outcome, **recover(site, right, begun)}


def stop_worker(site: Site, right: bytes) -> dict[str, Any]:
    """A worker that is READY for TorchServe, whose connection stands, and that answers nothing: as if wedged."""
    [worker] = workers_of(site, STREAMS)
    begun = time.monotonic()
    worker.send_signal(signal.SIGSTOP)
    try:
        found = recover(site, right, begun, wedged=True)
    finally:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGCONT)
    return {"way": "SIGSTOP", "outcome": "wedged", **found, "replaced": not worker.is_running()}


def recover(site: Site, right: bytes, begun: float, *, wedged: bool = False) -> dict[str, Any]:
    """Waits for the right stream and for /ready. wedged: /ready says no, before."""
    found: dict[str, Any] = {"unready": False}
    if wedged:
        site.wait_until(lambda: not site.ready())
        found = {"unready": True, "seconds_to_unready": round(time.monotonic() - begun, 2)}
    site.wait_until(lambda: stream(site, 2) == right)
    found["seconds_to_recover"] = round(time.monotonic() - begun, 2)
    site.wait_until(site.ready)
    return found | {"seconds_to_ready": round(time.monotonic() - begun, 2)}


def workers_of(site: Site, model: str) -> list[psutil.Process]:
    """The processes of one model, as TorchServe names them."""
    key = json.loads((site.folder / "key_file.json").read_text(encoding="utf-8"))["management"]["key"]
    url = f"{site.state()['addresses']['management']}/models/{model}"
    with requests.Session() as session:
        session.trust_env = False
        description = session.get(url, headers={"Authorization": f"Bearer {key}"}, timeout=10).json()
    return [psutil.Process(worker["pid"]) for version in description for worker in version["workers"]]


# --- Through the door ------------------------------------------------------------------------------------------------


def mutate_through_door(site: Site, count: int, right: bytes) -> dict[str, Any]:
    """Sends broken messages and paths, 8 at a time, and looks whether anything but they came to harm."""
    source = random.Random(_SEED)
    before = {model: [worker.pid for worker in workers_of(site, model)] for model in site.models}
    lines = len(watchdog_lines(site))
    metadata = (("authorization", f"Bearer {site.tokens['predict']}"),)
    codes: Counter[str] = Counter()
    seconds = []
    with site.channel() as channel:
        for _ in range(0, count, 8):
            begun = time.monotonic()
            calls = []
            for _ in range(8):
                path, content = mutation(source)
                method = channel.unary_unary(path, None, None)
                packed = source.choice([None, None, None, grpc.Compression.Gzip])
                calls.append(
                    method.future(content, metadata=metadata, timeout=_SECONDS_TO_ANSWER + 5, compression=packed)
                )
            for call in calls:
                codes[call.code().name] += 1  # waits for it
                seconds.append(time.monotonic() - begun)
    harm = []
    if stream(site) != right:
        harm.append("another stream than before")
    if {model: [worker.pid for worker in workers_of(site, model)] for model in site.models} != before:
        harm.append("a worker died")
    harm += watchdog_lines(site)[lines:]
    return {
        "sent": codes.total(),
        "codes": dict(codes),
        "longest_s": round(max(seconds), 2),
        "p99_s": percentile(seconds, 99),
        "harm": "; ".join(harm),
    }


def mutation(source: random.Random) -> tuple[str, bytes]:
    """A method's path and a message for it, broken in one to three ways."""
    path = source.choices(
        [PREDICTIONS, MODEL_INFER, f"{_SERVICE}/StreamPredictions", f"{_SERVICE}/StreamPredictions2"], [12, 3, 1, 1]
    )[0]
    model = source.choices([STREAMS, MODEL], [3, 1])[0]
    content = source.choice([message(model, PROMPT), sequence_message()])
    for _ in range(source.randint(1, 3)):
        content = source.choice(_BREAK)(source, content)[:_MOST_BYTES]
    return path, content


def field(number: int, wire_type: int, content: bytes) -> bytes:
    """A field of a message: its key and what follows it."""
    return bytes([number << 3 | wire_type]) + content


def some_bytes(source: random.Random) -> bytes:
    return source.randbytes(source.randint(1, 40))


def changed(source: random.Random, content: bytes) -> bytes:
    """Some bytes become others."""
    broken = bytearray(content or b"x")
    for _ in range(source.randint(1, 8)):
        broken[source.randrange(len(broken))] = source.randrange(256)
    return bytes(broken)


def cut(source: random.Random, content: bytes) -> bytes:
    return content[: source.randrange(len(content) + 1)]


def inserted(source: random.Random, content: bytes) -> bytes:
    place = source.randrange(len(content) + 1)
    return content[:place] + some_bytes(source) + content[place:]


def doubled(source: random.Random, content: bytes) -> bytes:
    """All fields again, or the model once more, with another name: the last one counts."""
    name = source.choice([MODEL, STREAMS, "", "nobody", "../x", "a\r\nb", "x" * 500]).encode()
    named = inference_pb2.PredictionsRequest(model_name=name.decode()).SerializeToString()
    return source.choice([content + content, content + named, named + content])


def of_another_type(source: random.Random, content: bytes) -> bytes:
    """A field with a wire type that is not its own, groups and those that do not exist among them."""
    return content + field(source.randint(1, 5), source.choice([0, 1, 3, 4, 5, 6, 7]), some_bytes(source))


def of_a_wrong_length(source: random.Random, content: bytes) -> bytes:
    """A field that is longer than the message, or has a length that overflows."""
    length = source.choice([b"\x7f", b"\xff\xff\xff\xff\x07", b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01"])
    return content + field(source.randint(1, 4), 2, length + b"x")


def of_another_body(source: random.Random, content: bytes) -> bytes:
    """Well-formed, with inputs that no client of ours sends."""
    body = json.dumps(PROMPT).encode()
    bodies = [b"", b"{", b"\xff\xfe", b"[" * 2000, b'"stream"', changed(source, body), cut(source, body), body * 2]
    names = ["data", "body", "", "stream", "explain", "describe", "traceparent", "ts_stream_next"]
    inputs = {source.choice(names): source.choice(bodies) for _ in range(source.randint(1, 4))}
    sequence = source.choice(["", "one", "x" * 300])
    asked = inference_pb2.PredictionsRequest(model_name=STREAMS, input=inputs, sequence_id=sequence)
    asked.model_version = source.choice(["", "1.0", "7", "x"])
    return asked.SerializeToString()


_BREAK = (changed, cut, inserted, doubled, of_another_type, of_a_wrong_length, of_another_body)
