"""What `RestClient.metrics` makes of the text that a server gives Prometheus; a real server's is in test_console.py."""

from math import inf

import pytest
from console_server import FakeServer

from marble_client import BadResponse, ConnectionFailed, ModelMetrics, RestClient
from marble_client.metrics import decode_metrics

TEXT = """\
# HELP marble_requests_total Torchserve prometheus counter metric with unit: Count
# TYPE marble_requests_total counter
marble_requests_total{model="a",version="1.0",protocol="rest",code="200",Hostname="h",} 5.0
marble_requests_total{model="a",version="2.0",protocol="grpc",code="200",Hostname="h",} 2.0
marble_requests_total{model="a",version="1.0",protocol="rest",code="503",Hostname="h",} 1.0
marble_request_seconds_bucket{model="a",version="1.0",le="0.01",Hostname="h",} 4.0
marble_request_seconds_bucket{model="a",version="1.0",le="0.1",Hostname="h",} 8.0
marble_request_seconds_bucket{model="a",version="1.0",le="+Inf",Hostname="h",} 8.0
marble_predictions_total{model="a",version="1.0",label="odd \\"} 7 {\\\\",Hostname="h",} 1.2E3
ts_inference_requests_total{model_name="a",model_version="default",hostname="h",} 9.0
ts_queue_latency_microseconds{model_name="a",model_version="default",hostname="h",} 4500000.5
Requests2XX{Level="Host",Hostname="h",} 12.0
"""


def test_what_is_counted_by_model() -> None:
    [(name, counted)] = decode_metrics(TEXT.encode()).items()
    assert (name, counted.requests, counted.failed) == ("a", {200: 7, 503: 1}, 1)
    assert counted.seconds == {0.01: 4, 0.1: 8, inf: 8}
    assert (counted.arrivals, counted.queue_seconds) == (9, pytest.approx(4.5000005))
    assert decode_metrics(b"") == {}


def test_quantiles_are_those_of_prometheus() -> None:
    counted = ModelMetrics(seconds={0.01: 4, 0.1: 8, inf: 10})
    assert counted.quantile(0.2) == pytest.approx(0.005)
    assert counted.quantile(0.4) == pytest.approx(0.01)
    assert counted.quantile(0.6) == pytest.approx(0.055)
    assert counted.quantile(0.95) == 0.1, "above the last bound nothing more is known"
    assert ModelMetrics().quantile(0.5) is None
    assert (counted - counted).quantile(0.5) is None


def test_what_happened_between_two_looks() -> None:
    earlier = ModelMetrics({200: 5}, {0.1: 4, inf: 5}, 6, 1.0)
    later = ModelMetrics({200: 9, 422: 2}, {0.1: 8, inf: 11}, 12, 2.5)
    assert later - earlier == ModelMetrics({200: 4, 422: 2}, {0.1: 4, inf: 6}, 6, 1.5)
    assert later - ModelMetrics() == later


@pytest.mark.parametrize(
    "content", [b'marble_requests_total{code="200",} 1.0', b"\xff", TEXT.replace("503", "x").encode()]
)
def test_what_is_no_metrics(content: bytes) -> None:
    with pytest.raises(BadResponse, match="no metrics of a Marble server"):
        decode_metrics(content)


def test_over_http() -> None:
    server = FakeServer()
    server.counted["fill-mask", 200] = 3
    with RestClient(metrics_url=server.url) as client:
        assert client.metrics()["fill-mask"].requests == {200: 3}
    server.stop()
    with RestClient(metrics_url=server.url) as client, pytest.raises(ConnectionFailed, match="no server at"):
        client.metrics()
