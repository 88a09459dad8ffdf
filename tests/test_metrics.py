"""What a worker counts and logs: the figures are those of the requests it served, and no client forges one."""

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ROOT
from test_formats import JSON, grpc, received, rest
from test_service import answers, context
from ts.protocol.otf_message_handler import create_predict_response

from handler import service as service_module
from handler.errors import InvalidInput, Overloaded, WrongAnswer
from handler.events import Events, Trace
from handler.messages import Model, Result, Usage, Work
from handler.metrics import METRICS, MOST_LABELS, OTHER, Metrics, Served, labels_of
from handler.service import Service
from handler.tasks.token_classification import TokenClassification

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-00"
# The pattern by which TorchServe 0.12 reads a metric's line.
LINE = re.compile(
    r"\[METRICS]\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),(.+)"
)


class Counted(dict[tuple[str, ...], float]):
    """All totals that were handed on."""

    def take(self, totals: Mapping[tuple[str, ...], float]) -> None:
        for series, value in totals.items():
            self[series] = self.get(series, 0.0) + value


def labelled(*labels: str) -> Any:
    """As much of a classifier as the metrics need."""
    return SimpleNamespace(labels=labels, found=lambda prediction: [(prediction[0]["label"], prediction[0]["score"])])


def result(*predictions: Any, truncated: bool = False) -> Result:
    return Result(predictions, Usage(tokens=7, truncated=truncated, windows=len(predictions)))


def counted(task: Any, *served: Served, seconds: float = 0.02, work: Work | None = None) -> Counted:
    found = Counted()
    metrics = Metrics(task, found.take)
    metrics.batch(served, seconds, work or Work())
    metrics.flush()
    return found


def test_a_batch_is_counted_once_and_whole() -> None:
    good = result([{"label": "a", "score": 0.75}], InvalidInput("no"), [{"label": "b", "score": 0.5}], truncated=True)
    found = counted(
        labelled("a", "b"),
        *(Served(good, "rest"), Served(good, "grpc"), Served(Overloaded("later"), "rest")),
        work=Work(0.25, 0.5, [8, 8, 3]),
    )
    expected = {
        ("marble_requests_total", "rest", "200"): 1,
        ("marble_requests_total", "grpc", "200"): 1,
        ("marble_requests_total", "rest", "503"): 1,
        ("marble_errors_total", "Overloaded"): 1,
        ("marble_item_errors_total", "InvalidInput"): 2,
        ("marble_items_total",): 6,
        ("marble_tokens_total",): 14,
        ("marble_truncations_total",): 2,
        ("marble_windows_total",): 6,
        ("marble_batches_total",): 1,
        ("marble_predictions_total", "a"): 2,
        ("marble_predictions_total", "b"): 2,
        ("marble_confidence_total",): 2.5,
        ("marble_encoding_seconds_total",): 0.25,
        ("marble_inference_seconds_total",): 0.5,
        ("marble_request_seconds_count",): 3,
        ("marble_request_seconds_bucket", "0.01"): None,
        ("marble_request_seconds_bucket", "0.025"): 3,
        ("marble_request_seconds_bucket", "+Inf"): 3,
        ("marble_micro_batch_rows_bucket", "2"): None,
        ("marble_micro_batch_rows_bucket", "4"): 1,
        ("marble_micro_batch_rows_bucket", "8"): 3,
        ("marble_micro_batch_rows_sum",): 19,
        ("marble_micro_batch_rows_count",): 3,
    }
    assert {series: found.get(series) for series in expected} == expected
    assert found["marble_request_seconds_sum",] == pytest.approx(0.06)
    assert {series[0] for series in found} <= METRICS.keys()


def test_a_canary_is_no_users_request() -> None:
    right, wrong = Served(result([{"label": "a", "score": 1.0}]), "rest", True), Served(WrongAnswer("no"), "rest", True)
    found = counted(labelled("a"), right, wrong, Served(Overloaded("later"), "grpc", True))
    assert {series[1]: value for series, value in found.items() if series[0] == "marble_canaries_total"} == {
        "right": 1,
        "wrong": 1,
        "failed": 1,
    }
    assert found["marble_request_seconds_count",] == 0
    counts = ("marble_requests_total", "marble_items_total", "marble_predictions_total", "marble_errors_total")
    assert not [series for series in found if series[0] in counts]


def test_a_model_of_many_labels_has_a_bounded_number_of_series() -> None:
    names = [f"label {number}" for number in range(MOST_LABELS + 50)]
    found = Counted()
    metrics = Metrics(labelled(*names), found.take)
    metrics.loaded({"task": "t", "backend": "b", "precision": "p", "digest": "d"}, dict.fromkeys(names, 1 / len(names)))
    metrics.batch([Served(result(*([{"label": name, "score": 1.0}] for name in names)), "rest")], 0.1, Work())
    metrics.flush()
    for name in ("marble_predictions_total", "marble_validation_share"):
        labels = {series[1]: value for series, value in found.items() if series[0] == name}
        assert len(labels) == MOST_LABELS + 1
        assert labels[OTHER] == pytest.approx(50 if name == "marble_predictions_total" else 50 / len(names))


def test_series_begin_at_zero_so_that_the_first_event_is_an_increase() -> None:
    found = Counted()
    metrics = Metrics(labelled("a"), found.take)
    metrics.loaded({"task": "t", "backend": "b", "precision": "p", "digest": "d"}, {"a": 1.0})
    metrics.flush()
    assert found["marble_model_info", "t", "b", "p", "d"] == found["marble_worker_loads_total",] == 1
    begun = {series: value for series, value in found.items() if value == 0}
    assert ("marble_request_seconds_bucket", "0.5") in begun
    assert ("marble_predictions_total", "a") in begun
    assert {(name,) for name, labels in METRICS.items() if not labels} - {
        ("marble_worker_loads_total",)
    } <= begun.keys()


def test_totals_are_handed_on_within_seconds_without_another_request() -> None:
    found = Counted()
    Metrics(labelled(), found.take).batch([Served(result("x"), "rest")], 0.1, Work())
    deadline = time.monotonic() + 30
    while not found and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found["marble_items_total",] == 1


def test_tasks_without_labels_count_none() -> None:
    task = SimpleNamespace(labels=(), found=lambda prediction: pytest.fail("asked"))
    assert not [s for s in counted(task, Served(result("a text"), "rest")) if "predictions" in s[0]]


def test_entities_are_counted_by_their_type() -> None:
    task = TokenClassification.__new__(TokenClassification)
    found = task.found([{"entity": "B-PER", "score": 0.5}, {"entity_group": "LOC", "score": 1.0}])
    assert list(found) == [("PER", 0.5), ("LOC", 1.0)]


def test_torchserve_is_told_of_every_metric_and_of_no_other() -> None:
    """It goes by the order of the labels."""
    declared = yaml.safe_load((ROOT / "deploy" / "metrics.yaml").read_text(encoding="utf-8"))["model_metrics"]
    entries = [entry for kind in declared.values() for entry in kind]
    assert {entry["name"]: tuple(entry["dimensions"]) for entry in entries} == {
        name: ("model", "version", *labels) for name, labels in METRICS.items()
    }
    assert {entry["name"] for entry in declared["gauge"]} == {"marble_validation_share", "marble_model_info"}


# --- in a worker


@pytest.fixture(scope="module")
def loaded(tiny_bundle: Path) -> Service:
    return Service(context(tiny_bundle))


@pytest.fixture
def counts(loaded: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """What the service counts from here on."""
    loaded._metrics.flush()
    found = Counted()
    monkeypatch.setattr(loaded._metrics, "_emit", found.take)
    yield found
    loaded._metrics.flush()


def ask(service: Service, bundle: Path, *requests: Any) -> list[Any]:
    """Serves one batch, with ids as TorchServe gives them."""
    frame = context(bundle)
    processors, rows = received(*requests)
    ids = {index: f"request-{index}" for index in range(len(requests))}
    frame.request_processor, frame.request_ids = processors, ids
    bodies = service.handle(rows, frame)
    return list(answers(create_predict_response(bodies, ids, "Prediction success", 200, frame), len(requests)))


def events(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The events logged since."""
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def test_the_engine_says_what_it_spent(loaded: Service, tiny_bundle: Path, counts: Counted) -> None:
    long = "good " * 200
    texts = rest({"inputs": ["good", "bad", long], "parameters": {"overflow": "window"}}, JSON)
    found = ask(loaded, tiny_bundle, texts, rest({"inputs": long}, JSON), rest({"canary": True}, JSON), grpc(data=b"x"))
    assert [answer.status for answer in found] == [200] * 4
    loaded._metrics.flush()
    windows = sum(int(found[index].headers["x-usage-windows"]) for index in (0, 1, 3))
    tokens = sum(int(found[index].headers["x-usage-tokens"]) for index in (0, 1, 3))
    assert (counts["marble_windows_total",], counts["marble_tokens_total",]) == (windows, tokens)
    assert counts["marble_truncations_total",] == 1
    assert counts["marble_micro_batch_rows_sum",] == windows + 1  # the canary's
    assert counts["marble_encoding_seconds_total",] > 0
    assert counts["marble_inference_seconds_total",] > 0
    seconds = counts["marble_encoding_seconds_total",] + counts["marble_inference_seconds_total",]
    assert counts["marble_request_seconds_sum",] >= 3 * seconds
    assert sum(value for series, value in counts.items() if series[0] == "marble_predictions_total") == 5


def test_errors_are_logged_with_id_status_type_and_trace(
    loaded: Service, tiny_bundle: Path, counts: Counted, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = rest({"inputs": 7}, JSON, traceparent=UNSAMPLED)
    ask(loaded, tiny_bundle, rest({"inputs": "good"}, JSON), bad, grpc(data=b"", traceparent=SAMPLED.encode()))
    found = events(capfd)
    assert [re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("time")) is None for event in found] == [
        False,
        False,
    ]
    common = {"event": "error", "model": "reviews", "version": "1.0", "trace_id": TRACE_ID, "span_id": SPAN_ID}
    first = {**common, "request_id": "request-1", "protocol": "rest", "status": 422, "type": "InvalidInput"}
    second = {**common, "request_id": "request-2", "protocol": "grpc", "status": 400, "type": "UnreadableRequest"}
    assert found == [first, second]


@pytest.mark.parametrize("header", ["traceparent", "Traceparent"])
def test_a_good_request_is_logged_when_its_trace_is_sampled(
    loaded: Service, tiny_bundle: Path, counts: Counted, capfd: pytest.CaptureFixture[str], header: str
) -> None:
    body = {"inputs": "good"}
    by_grpc = grpc(data=b"good", traceparent=SAMPLED.encode())
    ask(loaded, tiny_bundle, rest(body, JSON, **{header: UNSAMPLED}), rest(body, JSON, **{header: SAMPLED}), by_grpc)
    found = events(capfd)
    assert [(event["event"], event["request_id"], event["protocol"]) for event in found] == [
        ("request", "request-1", "rest"),
        ("request", "request-2", "grpc"),
    ]
    for event in found:
        assert (event["trace_id"], event["span_id"], event["status"], event["batch"]) == (TRACE_ID, SPAN_ID, 200, 3)
        assert event["windows"] == 1
        assert "good" not in json.dumps(event)


def test_sampled_requests_cannot_flood_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    log, trace = Events(model="m"), Trace(TRACE_ID, SPAN_ID, True)
    begun = time.monotonic()
    for number in range(2000):
        log.request(trace, request_id=str(number))
    seconds = int(time.monotonic() - begun) + 2
    assert 20 <= len(events(capfd)) <= 20 * seconds


BAD_TRACES = {
    "empty": "",
    "words": "hello",
    "version ff": f"ff-{TRACE_ID}-{SPAN_ID}-01",
    "no trace": f"00-{'0' * 32}-{SPAN_ID}-01",
    "no span": f"00-{TRACE_ID}-{'0' * 16}-01",
    "upper case": SAMPLED.upper(),
    "short": f"00-{TRACE_ID[1:]}-{SPAN_ID}-01",
    "line break": f"00-{TRACE_ID}-{SPAN_ID}-01\n[METRICS]",
}


@pytest.mark.parametrize("value", BAD_TRACES.values(), ids=BAD_TRACES)
def test_a_malformed_trace_is_ignored(value: str) -> None:
    assert Trace.read({}, {"traceparent": value}) is None
    assert Trace.read({"traceparent": bytearray(value.encode())}, {}) is None


def test_a_later_version_of_the_trace_is_read() -> None:
    assert Trace.read({}, {"traceparent": f"01-{TRACE_ID}-{SPAN_ID}-03-more"}) == Trace(TRACE_ID, SPAN_ID, True)


FORGED = "[METRICS]marble_items_total.unit:1000|#model:reviews,version:1.0|#hostname:h,1"


def test_no_client_can_forge_a_metric(
    loaded: Service, tiny_bundle: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TorchServe takes every line of stdout and of stderr that begins with [METRICS] for one."""
    loaded._metrics.flush()
    capfd.readouterr()
    text = f"good\n{FORGED}\n"
    hostile = [
        rest({"inputs": text}, JSON, traceparent=SAMPLED),
        rest({"inputs": "good", "parameters": {text: 1}}, JSON, traceparent=text),
        rest(text.encode(), "image/png"),
        rest({"inputs": [text, 7], text: text}, JSON, traceparent=f"{SAMPLED}\n{FORGED}"),
        grpc(data=text.encode(), traceparent=f"{SAMPLED}\n{FORGED}".encode()),
    ]
    ask(loaded, tiny_bundle, *hostile)

    class Failing:
        settings = loaded._engine.settings

        def predict(self, requests: Sequence[Any]) -> Any:
            raise ValueError(text)

    monkeypatch.setattr(loaded, "_engine", Failing())
    assert ask(loaded, tiny_bundle, hostile[0])[0].status == 500
    loaded._metrics.flush()
    out, err = capfd.readouterr()
    assert FORGED not in out + err
    lines = out.splitlines()
    assert lines
    for line in lines:
        match = LINE.fullmatch(line)
        assert match
        assert match[1] in METRICS
        names = [part.split(":") for part in match[4].split(",")]
        assert [name for name, _ in names] == ["model", "version", *METRICS[match[1]]]
    assert any("defect" in json.loads(line)["event"] for line in err.splitlines())
    assert all(line.startswith('{"time"') for line in err.splitlines())


@pytest.mark.parametrize(
    "label", ["a,b", "a:b", "a|b", "a\nb", "\n[METRICS]", "", "ä €", "\ud800", "x" * 300, '"\\', "a\u2028b", "\x85"]
)
def test_whatever_a_label_is_called_its_line_is_one_that_torchserve_reads(
    label: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Model("m", "1.0", "d", "t", True)
    service_module._write_metrics(model, {("marble_predictions_total", label): 12_345_678.0})
    [line] = capfd.readouterr().out.split("\n")[:-1]
    assert len(line.splitlines()) == 1
    match = LINE.fullmatch(line)
    assert match
    assert float(match[3]) == 12_345_678
    parts = [part.split(":") for part in match[4].split(",")]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert parts[2][1]


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-7, 0.1234567891, 123456789.0, 987_654_321_012.0])
def test_values_are_written_as_torchserve_reads_them(value: float, capfd: pytest.CaptureFixture[str]) -> None:
    service_module._write_metrics(Model("m", "1.0", "d", "t", True), {("marble_tokens_total",): value})
    match = LINE.fullmatch(capfd.readouterr().out.rstrip("\n"))
    assert match
    assert float(match[3]) == pytest.approx(value, rel=1e-8)


def test_labels_are_named_in_their_order() -> None:
    assert labels_of(("marble_requests_total", "rest", "200"), Model("m", "2", "d", "t", True)) == {
        "model": "m",
        "version": "2",
        "protocol": "rest",
        "code": "200",
    }


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """A worker sets the level of the root logger, which here is pytest's."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
