"""deploy/monitoring against real programs: promtool, and a Prometheus that scrapes a TorchServe with real traffic.

No Grafana and no blackbox exporter run here: every query of the dashboard is executed as Grafana would send it, and the
rules about certificates are tested on series made for promtool.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from browser import until
from conftest import ROOT, Served, build_here, free_ports

from handler.metrics import METRICS
from marble_client import MarbleError, tracing

MONITORING = ROOT / "deploy" / "monitoring"
DOCS = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
RULES = yaml.safe_load((MONITORING / "rules.yml").read_text(encoding="utf-8"))
ALERTS = [rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SAMPLED = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


# --- what is written about it


def test_every_metric_is_explained() -> None:
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in METRICS}
    assert [name for name in sorted(names) if f"| `{name}` |" not in DOCS] == []


def test_every_alert_is_explained_and_tested() -> None:
    assert len(ALERTS) == len(set(ALERTS)) > 10
    tests = yaml.safe_load((MONITORING / "rules.test.yml").read_text(encoding="utf-8"))["tests"]
    fired = {
        re.search(r'alertname="(\w+)"', sample["labels"])[1]  # type: ignore[index]
        for test in tests
        for case in test["promql_expr_test"]
        for sample in case["exp_samples"] or []
    }
    assert fired == set(ALERTS)
    assert [f"### {alert}" for alert in ALERTS] == re.findall(r"^### Marble\w+$", DOCS, re.MULTILINE)
    for group in RULES["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["annotations"]["description"] == f"docs/monitoring.md#{rule['alert'].lower()}"
                assert rule["labels"]["severity"] in ("page", "ticket")


def test_rules_and_dashboard_ask_for_metrics_that_there_are() -> None:
    declared = yaml.safe_load((ROOT / "deploy" / "metrics.yaml").read_text(encoding="utf-8"))
    names = {entry["name"] for part in ("ts_metrics", "model_metrics") for k in declared[part].values() for entry in k}
    recorded = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
    rules = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    for expression in [*rules, *QUERIES.values()]:
        assert set(re.findall(r"\b(?:marble_|ts_inf|ts_que|Requests)\w+", expression)) <= names
        assert set(re.findall(r"\bmarble:[\w:]+", expression)) <= recorded


# --- promtool


@pytest.fixture(scope="module")
def prometheus() -> None:
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            "prometheus is not installed: apt-get install prometheus"
        )


def promtool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.usefixtures("prometheus")
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    for command in (("check", "config", "prometheus.yml"), ("test", "rules", "rules.test.yml")):
        done = promtool(*command, cwd=MONITORING)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "SUCCESS" in done.stdout


CHANGES = {
    "an alert that never fires": ("marble:label_drift:rate1h > 0.2", "marble:label_drift:rate1h > 2"),
    "an alert that always fires": ("< 14 * 86400", "< 140 * 86400"),
    "a broken recording rule": ('code=~"5.."', 'code=~"4.."'),
}


@pytest.mark.usefixtures("prometheus")
@pytest.mark.parametrize(("old", "new"), CHANGES.values(), ids=CHANGES)
def test_the_tests_of_the_rules_can_fail(tmp_path: Path, old: str, new: str) -> None:
    text = (MONITORING / "rules.yml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "rules.yml").write_text(text.replace(old, new), encoding="utf-8")
    shutil.copy(MONITORING / "rules.test.yml", tmp_path)
    done = promtool("test", "rules", "rules.test.yml", cwd=tmp_path)
    assert done.returncode != 0
    assert "FAILED" in done.stdout + done.stderr


# --- a real server and a real Prometheus


@pytest.fixture(scope="module")
def served(serve_models: Callable[..., Served], shared_store: Path, tiny_bundle: Path) -> Served:
    build_here(tiny_bundle, shared_store, "watched", "torch")
    return serve_models("watched")


@pytest.fixture(scope="module")
def url(served: Served, prometheus: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus with the configuration of deploy/monitoring, which scrapes the server every second."""
    folder = tmp_path_factory.mktemp("prometheus")
    [port] = free_ports(1)
    text = (MONITORING / "prometheus.yml").read_text(encoding="utf-8")
    assert "127.0.0.1:8082" in text
    text = text.replace("127.0.0.1:8082", served.metrics.removeprefix("http://")).replace(
        "_interval: 15s", "_interval: 1s"
    )
    (folder / "prometheus.yml").write_text(text, encoding="utf-8")
    shutil.copy(MONITORING / "rules.yml", folder)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("prometheus", "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"),
                "--storage.tsdb.path=data",
            ],
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: is_ready(url), "Prometheus")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/-/ready", timeout=10).ok
    except requests.ConnectionError:
        return False


def query(url: str, expression: str) -> list[Any]:
    """The result of an instant query."""
    answer = requests.get(f"{url}/api/v1/query", params={"query": expression}, timeout=10)
    assert answer.status_code == 200, f"{expression}: {answer.text}"
    found: list[Any] = answer.json()["data"]["result"]
    return found


def traffic(served: Served, number: int) -> None:
    """A few requests over either protocol, good and bad, and a canary."""
    with served.rest_client() as rest, served.grpc_client() as grpc:
        rest.classify("watched", f"good {number}")
        rest.predict("watched", ["good", 7, "bad " * 300])
        grpc.classify("watched", ["bad", "good"])
        rest.canary("watched")
        for client in (rest, grpc):
            with pytest.raises(MarbleError):
                client.predict("watched", 7)


def test_every_query_of_the_dashboard_has_data_after_real_traffic(served: Served, url: str) -> None:
    asked = {
        name: expression.replace("$model", "watched").replace("$__rate_interval", "1m")
        for name, expression in QUERIES.items()
    }
    assert not any("$" in expression for expression in asked.values())
    deadline = time.monotonic() + 90
    waiting = dict(asked)
    for number in itertools.count():
        traffic(served, number)
        waiting = {
            name: expression
            for name, expression in waiting.items()
            if not any(entry["value"][1] not in ("NaN", "+Inf") for entry in query(url, expression))
        }
        if not waiting:
            break
        assert time.monotonic() < deadline, waiting
        time.sleep(0.5)
    # The dashboard's list of models.
    answer = requests.get(
        f"{url}/api/v1/label/model/values", params={"match[]": "marble_model_info"}, timeout=10
    ).json()
    assert "watched" in answer["data"]


def test_the_rules_are_loaded_and_healthy(url: str, served: Served) -> None:

    def evaluated() -> list[dict[str, Any]]:
        """All rules, once each was looked at."""
        groups = requests.get(f"{url}/api/v1/rules", timeout=10).json()["data"]["groups"]
        found = [rule for group in groups for rule in group["rules"]]
        return found if all(rule["health"] != "unknown" for rule in found) else []

    rules = until(evaluated, "the rules")
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == set(ALERTS)
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


def test_what_prometheus_counts_is_what_was_asked(served: Served) -> None:
    """Read at the metrics port itself: what is there before and after."""

    def read() -> dict[str, float]:
        lines = requests.get(f"{served.metrics}/metrics", timeout=10).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if 'model="watched"' in line)
        return {re.sub(r",?Hostname=\"[^\"]*\",?", "", series): float(value) for series, value in values.items()}

    def settled() -> dict[str, float]:
        """Workers hand their totals on every second."""
        found = read()
        while True:
            time.sleep(2)
            if (again := read()) == found:
                return found
            found = again

    before = settled()
    traffic(served, 0)
    after = settled()
    labels = 'model="watched",version="1.0"'
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    expected = {
        f'marble_requests_total{{{labels},protocol="rest",code="200"}}': 2,
        f'marble_requests_total{{{labels},protocol="grpc",code="200"}}': 1,
        f'marble_requests_total{{{labels},protocol="rest",code="422"}}': 1,
        f'marble_requests_total{{{labels},protocol="grpc",code="422"}}': 1,
        f'marble_errors_total{{{labels},type="InvalidInput"}}': 2,
        f'marble_item_errors_total{{{labels},type="InvalidInput"}}': 1,
        f'marble_canaries_total{{{labels},outcome="right"}}': 1,
        f"marble_items_total{{{labels}}}": 6,
        f"marble_truncations_total{{{labels}}}": 1,
        f"marble_request_seconds_count{{{labels}}}": 5,
    }
    assert {name: grown.get(name) for name in expected} == expected
    shares = {name: value for name, value in after.items() if name.startswith("marble_validation_share")}
    assert sum(shares.values()) == pytest.approx(1)
    assert len(shares) == 2


def test_the_log_has_the_clients_trace_and_the_id_of_the_answer(served: Served) -> None:
    with served.rest_client() as rest, served.grpc_client() as grpc, tracing(SAMPLED):
        rest.classify("watched", "good")
        grpc.classify("watched", "good")
    headers = {"Authorization": f"Bearer {served.token}", "traceparent": SAMPLED.replace("-01", "-00")}
    address = f"{served.url}/predictions/watched"
    refused = requests.post(address, json={"inputs": 7}, headers=headers, timeout=60)
    assert refused.status_code == 422
    deadline = time.monotonic() + 30
    found: list[Any] = []
    while len(found) < 3 and time.monotonic() < deadline:
        lines = (served.folder / "logs" / "request_log.log").read_text(encoding="utf-8").splitlines()
        found = [event for event in map(json.loads, lines) if event.get("trace_id") == TRACE_ID]
        time.sleep(0.1)
    assert [(event["event"], event["protocol"], event["status"], event["model"]) for event in found] == [
        ("request", "rest", 200, "watched"),
        ("request", "grpc", 200, "watched"),
        ("error", "rest", 422, "watched"),
    ]
    assert found[2]["request_id"] == refused.headers["x-request-id"]


def test_every_line_of_the_logs_is_json(served: Served) -> None:
    for name in ("ts_log.log", "model_log.log", "request_log.log"):
        for line in (served.folder / "logs" / name).read_text(encoding="utf-8").splitlines():
            assert "time" in json.loads(line)


def test_the_logs_rotate_by_size() -> None:
    text = (ROOT / "deploy" / "log4j2.xml").read_text(encoding="utf-8")
    files = text.count("<RollingFile ")
    assert files == text.count("<SizeBasedTriggeringPolicy") == text.count("<DefaultRolloverStrategy") == 3
    assert "<File " not in text


def test_consoles_of_earlier_starts_are_kept_up_to_a_number(tmp_path: Path) -> None:
    from server.torchserve import rotate

    path = tmp_path / "console.log"
    for number in range(5):
        path.write_text(str(number), encoding="utf-8")
        rotate(path, 3)
    assert {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()} == {
        "console.log.1": "4",
        "console.log.2": "3",
        "console.log.3": "2",
    }
    rotate(path, 3)
    assert (tmp_path / "console.log.1").read_text(encoding="utf-8") == "4"
