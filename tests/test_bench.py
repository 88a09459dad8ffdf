"""The speed benchmark: texts, requests, parsing, ratios and targets; and real load on a real server."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Served

from benchmarks import grpc_load
from benchmarks.speed import load, models, peers, report, servers, startup, texts
from benchmarks.speed.__main__ import DOCUMENT, RESULTS, disagreement
from benchmarks.speed.limit import Limit
from benchmarks.speed.load import LoadError, Sample
from benchmarks.speed.report import Round
from handler import digests
from marble_client.stubs import inference_pb2
from server import archive

GOOD = Sample(requests=500, seconds=5.0, p50_ms=10.0, p99_ms=20.0, errors=0)


def sample(rate: float, p50: float = 10.0, p99: float = 20.0, errors: int = 0) -> Sample:
    return Sample(round(rate * 5), 5.0, p50, p99, errors)


def a_round(ours: float, best: float, limit: float = 1000.0, errors: int = 0) -> Round:
    samples = {
        "marble": {"sst2-64": sample(ours, p99=30.0, errors=errors), "grpc-64": sample(ours * 0.95)},
        "mosec": {"sst2-64": sample(best, p99=200.0)},
        "litserve": {"sst2-64": sample(best / 2, p99=100.0)},
        "mosec-openvino": {"sst2-64": sample(ours / 1.2, p99=1.0)},
    }
    return Round({"sst2": limit, "torch": 200.0}, samples, ["mosec", "litserve"])


# --- load


def test_the_output_of_wrk_is_read() -> None:
    output = (
        "Running 1s test @ http://127.0.0.1:8080/predictions/reviews\n  1 threads and 64 connections\n"
        "Requests/sec:    144.26\nTransfer/sec:     54.07KB\n"
        'RESULT {"requests": 584, "seconds": 4.048263, "p50_ms": 436.994, "p99_ms": 629.090, "errors": 0}\n'
    )
    assert load.parse(output) == Sample(584, 4.048263, 436.994, 629.09, 0)
    assert load.parse(output).rate == pytest.approx(144.26, abs=0.01)


def test_output_without_a_result_names_what_was_printed() -> None:
    with pytest.raises(LoadError, match="unable to connect to 127"):
        load.parse("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_a_measurement_with_errors_or_without_answers_is_no_result() -> None:
    assert GOOD.valid
    assert not sample(100, errors=1).valid
    assert not Sample(0, 5.0, 0.0, 0.0, 0).valid


def test_a_missing_generator_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(LoadError, match="apt-get install wrk"):
        load.check_wrk()


@pytest.fixture
def bodies(tmp_path: Path) -> Path:
    return texts.write_bodies(tmp_path / "bodies.jsonl", [{"inputs": "Fine boots."}, {"inputs": "Two lines,\nno end."}])


@pytest.fixture
def wrk() -> None:
    if shutil.which("wrk") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("wrk is not installed: apt-get install wrk")


@pytest.mark.usefixtures("wrk")
def test_rest_load_counts_answers_and_refusals(served: Served, bodies: Path) -> None:
    url = f"{served.url}/predictions/reviews"
    answered = load.rest(url, bodies, 4, 1, served.token)
    assert answered.valid
    assert 0 < answered.p50_ms <= answered.p99_ms
    refused = load.rest(url, bodies, 4, 1, "no such key")
    assert refused.errors > 0
    assert not refused.valid


def test_grpc_load_counts_answers_and_errors(served: Served, bodies: Path, tmp_path: Path) -> None:
    answered = load.grpc(served.grpc, "reviews", bodies, 4, 1, served.token)
    assert answered.valid
    assert 0 < answered.p50_ms <= answered.p99_ms
    broken = texts.write_bodies(tmp_path / "broken.jsonl", [{"inputs": 1}])
    assert not load.grpc(served.grpc, "reviews", broken, 4, 1, served.token).valid
    assert not load.grpc(served.grpc, "reviews", bodies, 4, 1, "no such key").valid


def test_grpc_messages_carry_the_bodies() -> None:
    [message] = grpc_load.messages("reviews", [b'{"inputs": "a"}'])
    request = inference_pb2.PredictionsRequest.FromString(message)
    assert (request.model_name, dict(request.input)) == ("reviews", {"data": b'{"inputs": "a"}'})


@pytest.mark.parametrize(("body", "good"), [(b'[[{"label": "a", "score": 1}]]', True), (b'{"error": "no"}', False)])
def test_an_error_inside_an_ok_reply_is_seen(body: bytes, good: bool) -> None:
    assert grpc_load.is_answer(inference_pb2.PredictionResponse(prediction=body).SerializeToString()) is good


# --- texts and requests


def test_any_stretch_of_a_mix_has_the_lengths_of_the_whole() -> None:
    mix = texts.spread(("x" * n for n in range(1000)), len)
    assert sorted(map(len, mix)) == list(range(1000))
    for start in range(0, 900, 100):
        assert sum(map(len, mix[start : start + 100])) / 100 == pytest.approx(499.5, rel=0.03)


def test_the_long_tail_is_long_and_has_all_sources(shared: Path, bundle: Path) -> None:
    found = texts.Texts(shared, bundle, 512)
    mix = found.long_tail()
    described = found.describe(mix)
    assert described["texts"] == len(set(mix)) == 300
    assert 5 <= described["least_tokens"] < 8
    assert 400 < described["most_tokens"] <= 500
    assert described["median_tokens"] < described["mean_tokens"] / 1.5


@pytest.mark.parametrize("tokens", [8, 64, 512])
def test_texts_of_a_length_have_it(tokens: int, shared: Path, bundle: Path) -> None:
    found = texts.Texts(shared, bundle, 512)
    assert {found.tokens(text) for text in found.of_length(tokens)} == {tokens}


def test_bodies_are_one_line_each_whatever_is_in_a_text(tmp_path: Path) -> None:
    odd = ["two\nlines", "a\u2028b", "\x85", '"', "é"]
    path = texts.write_bodies(tmp_path / "deep" / "bodies.jsonl", [{"inputs": text} for text in odd])
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line)["inputs"] for line in lines[:-1]] == odd
    assert lines[-1] == b""


def test_groups_leave_out_what_is_left_over() -> None:
    assert texts.chunks(["a", "b", "c", "d", "e"], 2) == [["a", "b"], ["c", "d"]]


def test_each_peer_is_asked_in_its_own_form() -> None:
    asked = {peer.name: peer.body("Fine.") for peer in peers.PEERS}
    assert asked.pop("infinity") == {"model": "model", "input": ["Fine."]}
    assert asked.pop("bentoml") == {"inputs": ["Fine."]}
    assert {name: body for name, body in asked.items() if body != {"inputs": "Fine."}} == {}


def test_peers_have_a_file_of_their_own_and_pinned_packages() -> None:
    for peer in peers.PEERS:
        for part in peer.command:
            if part.startswith("{servers}/"):
                assert (peers.SERVERS / part.removeprefix("{servers}/")).is_file()
        packages = [peers.pinned(package) for package in peer.packages]
        assert not packages or packages[0] == "torch==2.13.0"
    assert peers.pinned("transformers").startswith("transformers==5.")


@pytest.mark.parametrize(
    "answer",
    [
        [[{"label": "a", "score": 0.75}, {"label": "b", "score": 0.25}]],
        [{"label": "b", "score": 0.25}, {"label": "a", "score": 0.75}],
        {"object": "classify", "data": [[{"label": "a", "score": 0.75}, {"label": "b", "score": 0.25}]]},
    ],
)
def test_scores_are_found_in_every_form_of_answer(answer: object) -> None:
    assert servers.scores(answer) == {"a": 0.75, "b": 0.25}


@pytest.mark.parametrize("answer", [{"error": "no"}, [], [[]], [{"label": "a"}], "a"])
def test_an_answer_without_scores_is_refused(answer: object) -> None:
    with pytest.raises(peers.Unavailable, match="no scores"):
        servers.scores(answer)


def test_servers_that_answer_otherwise_are_left_out() -> None:
    sure, close = {"a": 0.9, "b": 0.1}, {"a": 0.52, "b": 0.48}
    assert disagreement(sure, {"a": 0.9005, "b": 0.0995}, exact=True) == pytest.approx(0.0005)
    assert disagreement(sure, {"a": 0.6, "b": 0.4}, exact=False) == pytest.approx(0.3)
    assert disagreement(close, {"a": 0.48, "b": 0.52}, exact=False) == pytest.approx(0.04)
    with pytest.raises(peers.Unavailable, match="scores differ"):
        disagreement(sure, {"a": 0.88, "b": 0.12}, exact=True)
    with pytest.raises(peers.Unavailable, match="another label"):
        disagreement(sure, {"a": 0.49, "b": 0.51}, exact=False)
    with pytest.raises(peers.Unavailable, match="labels"):
        disagreement(sure, {"LABEL_0": 0.9, "LABEL_1": 0.1}, exact=True)


# --- ratios and targets


def test_targets_are_medians_of_the_ratios_of_each_round() -> None:
    # The machine halves its speed in the second round: no ratio changes.
    rounds = [a_round(900, 100), a_round(450, 50, limit=500), a_round(950, 100)]
    found = {entry["id"]: entry for entry in report.targets(rounds)}
    assert found["1"]["ratios"] == [0.9, 0.9, 0.95]
    assert (found["1"]["value"], found["1"]["min"], found["1"]["max"], found["1"]["met"]) == (0.9, 0.9, 0.95, False)
    assert (found["3"]["value"], found["3"]["met"]) == (9.0, True)
    assert (found["4"]["value"], found["4"]["met"]) == (1.2, True)
    # The lowest p99 of a peer in its usual form; the leanest peer is none.
    assert (found["7"]["value"], found["7"]["bound"], found["7"]["met"]) == (0.3, "at most", True)
    assert (found["8"]["value"], found["8"]["met"]) == (0.95, True)
    # What was not measured is not a target of this run.
    assert found.keys() == {"1", "3", "4", "7", "8", "10"}


def test_a_round_with_errors_does_not_count() -> None:
    rounds = [a_round(900, 100), a_round(5000, 100, errors=3)]
    [first, *_] = report.targets(rounds)
    assert first["ratios"] == [0.9, None]
    assert first["value"] == 0.9
    assert report.targets([a_round(900, 100, errors=3)])[0]["id"] != "1"


def test_every_target_of_the_table_is_measured() -> None:
    assert [target.id for target in report.TARGETS] == [str(number) for number in range(1, 11)]
    assert {target.id for target in report.TARGETS if target.at_most} == {"6", "7", "9"}


def test_the_tables_go_between_the_marks() -> None:
    results = {
        "machine": {"processor": "P", "cpus": 2, "memory_gb": 8.0},
        "archive": "openvino int8, 23.0 MB",
        "servers": {
            "marble": {"title": "Marble", "usual": False, "memory_mb": 500.0, "drift": 0.01},
            "mosec": {"title": "mosec", "usual": True, "memory_mb": 900.0, "drift": 1e-6},
            "ray": {"title": "Ray Serve", "usual": True, "unavailable": "no network"},
        },
        "rounds": [
            {
                "limit": {"sst2": 1000.0},
                "servers": {
                    "marble": {"sst2-64": {"requests": 4500, "seconds": 5, "p50_ms": 70, "p99_ms": 90, "errors": 0}},
                    "mosec": {"sst2-64": {"requests": 500, "seconds": 5, "p50_ms": 600, "p99_ms": 900, "errors": 0}},
                },
            }
        ],
    }
    results["targets"] = report.targets(report.rounds_of(results))
    page = report.document(results, f"# Speed\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert page.startswith(f"# Speed\n{report.BEGIN}\n\n1 round(s) on P, 2 cores, 8.0 GB")
    assert page.endswith(f"\n\n{report.END}\nafter\n")
    assert "old" not in page
    assert "| mosec | 100 | 9.0 × (9.0 – 9.0) | 600 / 900 | – | – |  | 900 |" in page
    assert "| Ray Serve | not measured: no network |" in page
    with pytest.raises(ValueError, match="needs the lines"):
        report.document(results, "# Speed\n")


def test_the_committed_page_says_what_the_committed_results_say() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["targets"] == report.targets(report.rounds_of(results))
    assert report.document(results, DOCUMENT.read_text(encoding="utf-8")) == DOCUMENT.read_text(encoding="utf-8")
    assert len(results["rounds"]) >= 5
    assert str(ROOT) not in RESULTS.read_text(encoding="utf-8")


# --- models, the limit and servers


def test_an_archive_with_other_settings_is_whole(store: Path, tmp_path: Path) -> None:
    import zipfile

    copied = Path(shutil.copy(store / "reviews-fp32.mar", tmp_path))
    with zipfile.ZipFile(copied) as file:
        file.extractall(tmp_path / "unpacked" / "reviews-fp32")
    model = models.Model("reviews-fp32", tmp_path, copied, tmp_path / "unpacked" / "reviews-fp32")
    made = models.variant(model, "two", minWorkers=2, handler={"threads": 1})
    archive.verify("two", made)
    folder = made.parent / "unpacked" / "two"
    digests.verify(folder)
    changed = models.Settings.load(folder)
    assert (changed.threads, changed.task) == (1, "text-classification")
    assert "minWorkers: 2" in (folder / "model-config.yaml").read_text()


def test_a_model_that_was_not_trained_here_is_not_trained_again(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "sst2")
    model = models.prepare("sst2", tmp_path / "no data", tmp_path, quick=True)
    assert model.archive.is_file()
    assert (model.unpacked / "config.json").read_bytes() == (tiny_bundle / "config.json").read_bytes()


def test_the_limit_is_the_engine_itself(bundle: Path) -> None:
    with Limit(bundle) as limit:
        [first, second] = limit.scores(["Fine boots.", "Two hours on hold."])
        assert first.keys() == second.keys() == {"negative", "neutral", "positive"}
        assert sum(first.values()) == pytest.approx(1)
        assert limit.throughput(["Fine boots."] * 8, 0.1, {"token_budget": 64, "streams": 1}, 4) > 0
        assert limit.latency([["Fine boots."]], 0.1) > 0


@pytest.fixture
def server(store: Path, tmp_path: Path) -> Iterator[servers.Server]:
    made = servers.marble("marble", "Marble", store / "reviews.mar", tmp_path)
    yield made
    made.stop()


def test_a_server_is_started_asked_and_stopped(server: servers.Server) -> None:
    server.start()
    assert servers.scores(server.ask("Fine boots.")).keys() == {"negative", "neutral", "positive"}
    assert server.memory() > 200  # the JVM and its worker
    restart = startup.restart(server)
    assert 0 < restart.ready_s < restart.back_s
    assert restart.memory_mb > 50
    assert servers.scores(server.ask("Fine boots.")).keys() == {"negative", "neutral", "positive"}
    server.stop()
    assert not server.running


def test_a_server_that_ends_says_its_last_line(server: servers.Server) -> None:
    server.command = ["sh", "-c", "echo no such model >&2; exit 3"]
    with pytest.raises(peers.Unavailable, match="Marble did not start: no such model"):
        server.start()
