"""predict_many, and `marble predict --input FILE --output FILE`, against servers that fail, die and come back."""

import asyncio
import csv
import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, run, succeeded
from test_client import (
    Backend,
    QuietServer,
    Reply,
    Request,
    Servers,
    answers,
    fails,
    grpc_server,
    http_server,
    write_keys,
)

import marble_client
from benchmarks import bulk
from marble_client import AsyncRestClient, Client, ItemError, RestClient, cli, retry
from marble_client.retry import Patience
from marble_client.stubs import inference_pb2, inference_pb2_grpc, management_pb2, management_pb2_grpc

ROWS = 300
STUBS = {
    module.__name__.rpartition(".")[2]: module
    for module in (inference_pb2, inference_pb2_grpc, management_pb2, management_pb2_grpc)
}
SCRIPT = "import sys; from marble_client.cli import main; sys.exit(main())"
Marble = Callable[..., tuple[int, str]]


@dataclass
class Scorer(Backend):
    """Scores a text by its letters. `bad` fails alone, `poison` with the whole request it is in."""

    digest: str = "sha256:0f"
    predict_one: Callable[[Any], Any] = field(default=lambda value: labels(str(value)))
    before: Callable[[int], Reply | None] = field(default=lambda _: None)
    canary: Reply = field(default_factory=lambda: answers({"drift": 0.0}))
    lock: threading.Lock = field(default_factory=threading.Lock)
    under_way: int = 0
    most_under_way: int = 0

    def predict(self, request: Request) -> Reply:
        if not request.body:
            raise ConnectionAbortedError("the client was killed while it sent this")
        with self.lock:
            self.requests.append(request)
            number = len(self.requests)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if (reply := self.before(number)) is not None:
                return reply
            if self.key is not None and request.authorization != f"Bearer {self.key}":
                return fails(401, "InvalidKeyException")
            if request.json == {"canary": True}:
                return self.canary
            return self._answer(request.json["inputs"])
        finally:
            with self.lock:
                self.under_way -= 1

    def _answer(self, inputs: list[Any]) -> Reply:
        if "poison" in inputs:
            return fails(400, "UnreadableRequest")
        bad = {"error": "it is bad", "code": 422, "type": "InvalidInput"}
        predictions = [bad if value == "bad" else self.predict_one(value) for value in inputs]
        if all(entry == bad for entry in predictions):
            return Reply(422, json.dumps(bad).encode())
        usage = {"tokens": 7, "truncated": "long" in inputs, "windows": 1}
        model = {"name": "sentiment", "version": "1.0", "digest": self.digest}
        return Reply(200, json.dumps({"predictions": predictions, "usage": usage, "model": model}).encode())

    @property
    def asked(self) -> int:
        """How many inputs were sent, those that were sent again included."""
        return sum(len(request.json.get("inputs", [])) for request in self.requests)


def score(text: str) -> float:
    return zlib.crc32(text.encode(errors="surrogatepass")) % 1000 / 1000


def labels(text: str) -> list[dict[str, Any]]:
    return [{"label": f"L{len(text) % 3}", "score": score(text)}, {"label": "other", "score": 0.0}]


@pytest.fixture
def scorer() -> Scorer:
    return Scorer()


@pytest.fixture
def server(scorer: Scorer) -> Iterator[QuietServer]:
    server = http_server(scorer)
    yield server
    scorer.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(server: QuietServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def rest(url: str) -> Iterator[RestClient]:
    with RestClient(url, url) as client:
        yield client


@pytest.fixture(params=["rest", "async-rest"])
def client(url: str, request: pytest.FixtureRequest, scorer: Scorer) -> Iterator[Client]:
    with Servers(scorer, url, "").client(request.param) as client:
        yield client


@pytest.fixture
def marble(url: str, capsys: pytest.CaptureFixture[str]) -> Marble:
    """Runs `marble predict sentiment` with these arguments and --url; returns its exit code and standard error."""

    def run(*arguments: object) -> tuple[int, str]:
        code = cli.main(["predict", "sentiment", "--url", url, *map(str, arguments)])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    return run


@pytest.fixture(autouse=True)
def a_place_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No tokens but a test's own, relative paths, and no waiting."""
    monkeypatch.delenv("MARBLE_TOKEN", raising=False)
    monkeypatch.delenv("MARBLE_MANAGEMENT_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(retry, "BACKOFF_S", 0.005)


def texts(count: int = ROWS) -> list[str]:
    return [f"text {number}, “{'x' * (number % 7)}”\n" for number in range(count)]


def write(path: str, rows: list[dict[str, Any]]) -> Path:
    """A table of these rows, which have the same columns."""
    place = Path(path)
    if place.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), place)
    elif place.suffix == ".jsonl":
        place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with place.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return place


def read(path: str) -> list[dict[str, Any]]:
    """The rows of a table; those of a csv are strings."""
    place = Path(path)
    if place.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(place).to_pylist()
        return rows
    with place.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file)) if place.suffix == ".csv" else [json.loads(line) for line in file]


def plain_run(count: int = ROWS) -> list[dict[str, Any]]:
    """What a run over `texts` gives, with the columns id and text."""
    return [
        {"id": str(at), "text": text, "label": f"L{len(text) % 3}", "score": score(text), "error": None}
        for at, text in enumerate(texts(count))
    ]


@pytest.fixture
def inputs() -> Path:
    return write("in.csv", [{"id": str(at), "text": text} for at, text in enumerate(texts())])


# predict_many


def test_many_inputs_are_answered_in_order_by_a_few_requests_at_a_time(client: Client, scorer: Scorer) -> None:
    assert list(client.predict_many("sentiment", texts(), {"top_k": 2}, batch_size=7, concurrency=3)) == [
        labels(text) for text in texts()
    ]
    assert {len(request.json["inputs"]) for request in scorer.requests} == {7, ROWS % 7}
    assert scorer.requests[0].json["parameters"] == {"top_k": 2, "details": True}
    assert scorer.most_under_way <= 3


def test_several_requests_are_under_way(client: Client, scorer: Scorer) -> None:
    together = threading.Barrier(3)

    def meet(_: int) -> None:
        together.wait(10)  # breaks, and the test fails, if fewer come

    scorer.before = meet
    assert len(list(client.predict_many("sentiment", texts(6), batch_size=2, concurrency=3))) == 6


def test_inputs_are_taken_as_they_are_needed(rest: RestClient) -> None:
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "a"

    results = rest.predict_many("sentiment", endless(), batch_size=2, concurrency=3)
    assert taken == 0
    assert next(results) == labels("a")
    assert taken == 2 * 2 * 3
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", [0, 5, 31, 32])
@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("bad", ItemError("it is bad", 422, "InvalidInput")),
        ("poison", ItemError("why 400", 400, "UnreadableRequest")),
        (float("nan"), ItemError("Out of range float values are not JSON compliant", 422, "InvalidInput")),
    ],
)
def test_an_input_that_fails_hurts_no_other(client: Client, place: int, word: Any, error: ItemError) -> None:
    given: list[Any] = texts(33)
    given[place] = word
    expected: list[Any] = [labels(text) for text in texts(33)]
    expected[place] = error
    assert list(client.predict_many("sentiment", given)) == expected


def test_inputs_that_all_fail_have_errors_of_their_own(client: Client) -> None:
    given = ["bad", "poison", "bad"]
    assert [result.error for result in client.predict_many("sentiment", given)] == ["it is bad", "why 400", "it is bad"]


def test_too_large_a_request_is_halved(client: Client, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = scorer._answer
    monkeypatch.setattr(scorer, "_answer", lambda inputs: Reply(413, b"") if len(inputs) > 4 else answer(inputs))
    assert list(client.predict_many("sentiment", texts(40))) == [labels(text) for text in texts(40)]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (fails(422, "InvalidParameter"), marble_client.InvalidParameter),
        (fails(404, "ModelNotFoundException"), marble_client.NotFound),
        (fails(401, "InvalidKeyException"), marble_client.Unauthorized),
        (Reply(200, b"hello"), marble_client.BadResponse),
        (fails(501, "NotSupported"), marble_client.ServerError),
    ],
)
def test_what_no_input_is_to_blame_for_is_raised_in_its_place(
    rest: RestClient, scorer: Scorer, reply: Reply, error: type[Exception]
) -> None:
    scorer.before = lambda number: reply if number > 2 else None
    results = rest.predict_many("sentiment", texts(8), batch_size=2, concurrency=1)
    assert [next(results) for _ in range(4)] == [labels(text) for text in texts(4)]
    with pytest.raises(error):
        next(results)
    assert len(scorer.requests) <= 4


@pytest.mark.parametrize(
    "trouble",
    [
        fails(503),
        fails(429),
        Reply(502, b"<html>nginx</html>"),
        Reply(504, b""),
        Reply(500, json.dumps({"code": 500, "type": "InternalServerException", "message": "Worker died."}).encode()),
    ],
)
def test_trouble_is_waited_through(client: Client, scorer: Scorer, trouble: Reply) -> None:
    scorer.before = lambda number: trouble if number < 8 else None
    assert list(client.predict_many("sentiment", texts(4), batch_size=2)) == [labels(text) for text in texts(4)]


def hang_up() -> Reply:
    raise ConnectionAbortedError("too large, or a worker that died")


DEADLY = {
    "worker": lambda: Reply(500, b'{"code": 500, "type": "InternalServerException", "message": "Worker died."}'),
    "connection": hang_up,
    "deadline": lambda: Reply(504, b""),
}


@pytest.mark.parametrize("how", DEADLY)
def test_an_input_that_is_deadly_hurts_no_other(
    client: Client, scorer: Scorer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    answer = scorer._answer
    monkeypatch.setattr(scorer, "_answer", lambda inputs: DEADLY[how]() if "deadly" in inputs else answer(inputs))
    given = texts(9)
    given[4] = "deadly"
    results = list(client.predict_many("sentiment", given))
    assert isinstance(results[4], ItemError)
    assert results[:4] + results[5:] == [labels(text) for text in given[:4] + given[5:]]


@pytest.mark.parametrize("most", [1, 3])
def test_what_was_too_much_at_once_is_asked_again(
    client: Client, scorer: Scorer, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """As a model that generates: of what it cannot do in time some is late, or all of it."""
    answer = scorer._answer
    late = {"error": "it takes too long", "code": 503, "type": "Overloaded"}

    def slow(inputs: list[Any]) -> Reply:
        if len(inputs) > 4 * most or "endless" in inputs:
            return Reply(503, json.dumps(late).encode())
        reply = json.loads(answer(inputs).body)
        reply["predictions"][most:] = [late] * (len(inputs) - most)
        return Reply(200, json.dumps(reply).encode())

    monkeypatch.setattr(scorer, "_answer", slow)
    given = texts(20)
    given[7] = "endless"
    results: list[Any] = list(client.predict_many("sentiment", given, patience=0.1))
    assert results.pop(7) == ItemError("it takes too long", 503, "Overloaded")
    assert results == [labels(text) for text in given if text != "endless"]


@pytest.mark.parametrize("how", DEADLY)
def test_no_input_is_blamed_where_the_canary_fails_too(client: Client, scorer: Scorer, how: str) -> None:
    scorer.before = lambda _: DEADLY[how]()
    with pytest.raises(marble_client.MarbleError):
        list(client.predict_many("sentiment", texts(9), patience=0.3))


def test_patience_has_an_end(client: Client, scorer: Scorer) -> None:
    scorer.before = lambda _: fails(503)
    with pytest.raises(marble_client.Unavailable):
        list(client.predict_many("sentiment", texts(4), patience=0.1))


def test_the_callers_trace_goes_along(rest: RestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    ask = rest.predict
    monkeypatch.setattr(rest, "predict", lambda *given, **how: seen.append(traceparent()) or ask(*given, **how))
    from marble_client.trace import traceparent

    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    with marble_client.tracing(trace):
        list(rest.predict_many("sentiment", texts(4), batch_size=2))
    assert seen == [trace, trace]


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"concurrency": 0}, {"patience": 0}, {"version": "a/b"}, {"parameters": {"x": 1e999}}],
)
def test_what_cannot_be_is_refused_at_once(client: Client, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least one|positive|model version|JSON"):
        client.predict_many("sentiment", ["a"], **options)


def test_awaited_results_come_as_they_are_there(url: str, scorer: Scorer) -> None:
    scorer.before = lambda number: fails(404, "ModelNotFoundException") if number > 2 else None
    found, taken = [], []

    async def ask() -> None:
        inputs = (taken.append(text) or text for text in itertools.cycle(texts(8)))
        async with AsyncRestClient(url, url) as client:
            async for result in client.predict_many("sentiment", inputs, batch_size=2, concurrency=1):
                found.append(result)

    with pytest.raises(marble_client.NotFound):
        asyncio.run(ask())
    assert found == [labels(text) for text in texts(4)]
    assert len(taken) <= 8


def test_awaited_requests_end_with_whoever_awaits_them(url: str, scorer: Scorer) -> None:
    scorer.before = lambda _: fails(503)

    async def ask() -> None:
        async with AsyncRestClient(url, url) as client:
            async with asyncio.timeout(0.5):
                async for _ in client.predict_many("sentiment", texts()):
                    pytest.fail("nothing was answered")
            assert asyncio.all_tasks() == {asyncio.current_task()}

    with pytest.raises(TimeoutError):
        asyncio.run(ask())
    assert scorer.requests


# Files


@pytest.mark.parametrize("target", ["out.csv", "out.jsonl", "out.parquet"])
@pytest.mark.parametrize("source", ["in.csv", "in.jsonl", "in.parquet"])
def test_every_row_is_kept_with_its_label(marble: Marble, scorer: Scorer, source: str, target: str) -> None:
    write(source, [{"id": str(at), "text": text} for at, text in enumerate(texts())])
    assert marble("--input", source, "--output", target, "--top-k", 1, "--version", "1.0") == (0, "")
    expected = plain_run()
    if target == "out.csv":
        expected = [{**row, "score": str(row["score"]), "error": ""} for row in expected]
    assert read(target) == expected
    assert scorer.asked == ROWS
    assert {request.version for request in scorer.requests} == {"1.0"}
    assert scorer.requests[0].json["parameters"] == {"top_k": 1, "details": True}
    assert sorted(path.name for path in Path().iterdir()) == [source, target]


def test_files_go_over_grpc_too(scorer: Scorer, inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server, port = grpc_server(scorer, STUBS)
    options = ["--input", str(inputs), "--output", "out.jsonl", "--grpc", "--grpc-target", f"127.0.0.1:{port}"]
    try:
        assert (cli.main(["predict", "sentiment", *options]), *capsys.readouterr()) == (0, "", "")
    finally:
        server.stop(0).wait(10)
    assert read("out.jsonl") == plain_run()


def test_a_row_that_fails_has_its_error(marble: Marble, scorer: Scorer) -> None:
    given = texts()
    given[0], given[40], given[41] = "bad", "poison", "bad"
    write("in.jsonl", [{"id": str(at), "text": text} for at, text in enumerate(given)])
    code, err = marble("--input", "in.jsonl", "--output", "out.jsonl")
    assert (code, err) == (1, "marble: 3 of 300 rows failed: the column of errors says why\n")
    expected = plain_run()
    for at in (0, 40, 41):
        error = "why 400 (UnreadableRequest)" if at == 40 else "it is bad (InvalidInput)"
        expected[at] |= {"text": given[at], "label": None, "score": None, "error": error}
    assert read("out.jsonl") == expected


def test_when_all_rows_fail_there_are_errors(marble: Marble) -> None:
    write("in.csv", [{"text": "bad"}, {"text": "poison"}])
    assert marble("--input", "in.csv", "--output", "out.csv")[0] == 1
    assert read("out.csv") == [
        {"text": "bad", "prediction": "", "error": "it is bad (InvalidInput)"},
        {"text": "poison", "prediction": "", "error": "why 400 (UnreadableRequest)"},
    ]


@pytest.mark.parametrize("target", ["out.csv", "out.jsonl", "out.parquet"])
def test_anything_else_than_a_label_is_json(marble: Marble, scorer: Scorer, target: str) -> None:
    scorer.predict_one = lambda text: [0.5, len(text)]
    write("in.csv", [{"text": "a"}, {"text": "bad"}, {"text": "é"}])
    assert marble("--input", "in.csv", "--output", target)[0] == 1
    found = [row["prediction"] for row in read(target)]
    assert found == ([[0.5, 1], None, [0.5, 1]] if target == "out.jsonl" else ["[0.5, 1]", found[1], "[0.5, 1]"])


def test_what_is_told_of_tokens_is_left_out(marble: Marble, scorer: Scorer) -> None:
    scorer.predict_one = lambda text: {"generated_text": f"{text}!", "details": {"tokens": [1, 2]}}
    write("in.csv", [{"text": "a"}])
    assert marble("--input", "in.csv", "--output", "out.jsonl") == (0, "")
    assert read("out.jsonl") == [{"text": "a", "prediction": {"generated_text": "a!"}, "error": None}]


@pytest.mark.parametrize("option", [("--top-k", 2), ("-p", "threshold=learned")])
def test_several_labels_are_json(marble: Marble, option: tuple[object, ...]) -> None:
    write("in.csv", [{"text": "a"}])
    assert marble("--input", "in.csv", "--output", "out.jsonl", *option) == (0, "")
    assert read("out.jsonl") == [{"text": "a", "prediction": labels("a"), "error": None}]


def test_a_text_without_a_label_has_none(marble: Marble, scorer: Scorer) -> None:
    scorer.predict_one = lambda text: [] if text == "none" else labels(text)
    write("in.csv", [{"text": "none"}, {"text": "a"}])
    assert marble("--input", "in.csv", "--output", "out.jsonl") == (0, "")
    assert [(row["label"], row["score"]) for row in read("out.jsonl")] == [(None, None), ("L1", score("a"))]


def test_text_that_was_cut_is_told(marble: Marble) -> None:
    write("in.csv", [{"text": "long"}])
    code, err = marble("--input", "in.csv", "--output", "out.csv")
    assert (code, "text was cut" in err) == (0, True)


def test_columns_of_the_input_keep_their_names(marble: Marble) -> None:
    write("in.csv", [{"text": "a", "label": "gold", "error": "none"}])
    assert marble("--input", "in.csv", "--output", "out.csv") == (0, "")
    [row] = read("out.csv")
    assert list(row) == ["text", "label", "error", "predicted_label", "score", "predicted_error"]
    assert (row["label"], row["predicted_label"], row["error"], row["predicted_error"]) == ("gold", "L1", "none", "")


@pytest.mark.parametrize(
    ("row", "options", "sent"),
    [
        ({"text": "a", "b": "x"}, (), "a"),
        ({"text": "a", "b": "x"}, ("--column", "b"), "x"),
        ({"text": "a", "text_pair": "b"}, (), {"text": "a", "text_pair": "b"}),
        ({"text_a": "a", "text_b": "b"}, (), {"text": "a", "text_pair": "b"}),
        ({"sentence1": "a", "sentence2": "b"}, (), {"text": "a", "text_pair": "b"}),
        ({"premise": "a", "hypothesis": "b"}, (), {"text": "a", "text_pair": "b"}),
        ({"context": "b", "question": "a"}, (), {"question": "a", "context": "b"}),
        ({"text": "a", "question": "b", "context": "c"}, (), "a"),
        ({"body": {"any": ["json", 1, None]}}, ("--column", "body"), {"any": ["json", 1, None]}),
    ],
)
def test_the_input_is_found_by_the_names_of_columns(
    marble: Marble, scorer: Scorer, row: dict[str, Any], options: tuple[str, ...], sent: Any
) -> None:
    write("in.jsonl", [row])
    assert marble("--input", "in.jsonl", "--output", "out.jsonl", *options) == (0, "")
    assert scorer.requests[0].json["inputs"] == [sent]


def test_values_of_jsonl_travel_to_every_format(marble: Marble) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a\ud800", "n": 1, "x": 1, "flag": True, "any": 1, "big": 2**70, "deep": {"é": [1]}, "null": None},
        {"text": "b", "n": None, "x": 0.5, "flag": False, "any": "s", "late": "z"},
    ]
    write("in.jsonl", rows)
    for target in ("out.jsonl", "out.csv", "out.parquet"):
        assert marble("--input", "in.jsonl", "--output", target) == (0, "")
    assert [{name: row[name] for name in given} for row, given in zip(read("out.jsonl"), rows, strict=True)] == rows
    first_score = score("a\ud800")
    assert Path("out.csv").read_text(encoding="utf-8") == (
        "text,n,x,flag,any,big,deep,null,late,label,score,error\n"
        f'a\\ud800,1,1,true,1,{2**70},"{{""é"": [1]}}",,,L2,{first_score},\n'
        f"b,,0.5,false,s,,,,z,L1,{score('b')},\n"
    )
    first, second = read("out.parquet")
    expected = {"text": "a\\ud800", "n": 1, "x": 1.0, "flag": True, "any": "1", "big": str(2**70), "deep": '{"é": [1]}'}
    expected |= {"null": None, "late": None, "label": "L2", "score": first_score, "error": None}
    assert first == expected
    assert (second["any"], second["late"]) == ('"s"', "z")


def test_types_of_parquet_are_kept(marble: Marble, scorer: Scorer) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", None, "c"], pa.large_string()),
            "day": pa.array([1, 2, None], pa.date32()),
            "vector": pa.array([[1.5], [], None], pa.list_(pa.float32())),
            "x": pa.array([float("nan"), 1, 2], pa.float32()),
            "data": pa.array([b"\xff", None, b""]),
        }
    )
    pq.write_table(table, "in.parquet")
    assert marble("--input", "in.parquet", "--output", "out.parquet") == (0, "")
    found = pq.read_table("out.parquet")
    assert found.schema.names == [*table.schema.names, "label", "score", "error"]
    assert found.select(table.schema.names).cast(table.schema).slice(1).equals(table.slice(1))
    assert scorer.requests[0].json["inputs"] == ["a", None, "c"]

    assert marble("--input", "in.parquet", "--output", "out.jsonl") == (0, "")
    first = read("out.jsonl")[0]
    assert (first["day"], first["vector"], first["x"], first["data"]) == ("1970-01-02", [1.5], None, "/w==")


def test_bytes_of_parquet_are_sent_as_base64(marble: Marble, scorer: Scorer) -> None:
    pq.write_table(pa.table({"image": [b"\x89PNG\xff"]}), "in.parquet")
    assert marble("--input", "in.parquet", "--output", "out.csv", "--column", "image") == (0, "")
    assert scorer.requests[0].json["inputs"] == ["iVBOR/8="]


def test_a_csv_of_a_spreadsheet_is_read(marble: Marble, scorer: Scorer) -> None:
    Path("in.csv").write_bytes(
        b'\xef\xbb\xbftext,note\r\n"two\r\nlines, ""quoted""",1\r\n\r\n' + b"x" * 200_000 + b",2\r\n"
    )
    assert marble("--input", "in.csv", "--output", "out.csv") == (0, "")
    assert scorer.requests[0].json["inputs"] == ['two\r\nlines, "quoted"', "x" * 200_000]
    assert [row["note"] for row in read("out.csv")] == ["1", "2"]


def test_a_file_without_rows_gives_one_without_rows(marble: Marble, scorer: Scorer) -> None:
    Path("in.csv").write_text("text\n")
    assert marble("--input", "in.csv", "--output", "out.csv") == (0, "")
    assert Path("out.csv").read_text() == "text,prediction,error\n"
    assert scorer.requests == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"", "in.csv: the file is empty; its first line must name the columns"),
        (
            "in.csv",
            b"body,topic\na,b\n",
            "in.csv: there is no column 'text'; the file has 'body', 'topic': name",
        ),
        ("in.csv", b"text,x\na,b\na,b,c\n", "in.csv: line 3 has 3 fields, the header 2: mend the line"),
        ("in.csv", b"text\na\n\xe9\n", "in.csv: line 3 is not UTF-8 (byte 0xe9): convert it first, e.g. iconv"),
        ("in.csv", b'text\na\n"b" c\n', "in.csv: line 3: ',' expected after '\"': mend its quotes"),
        ("in.csv", b'text\na\n"b\nc\n', "in.csv: line 3: unexpected end of data: mend its quotes"),
        ("in.csv", b"text,text\na,b\n", "in.csv: the column 'text' is there twice: rename one"),
        ("in.csv", b"text,label,predicted_label\na,b,c\n", "the columns 'predicted_label' and 'label' are both taken"),
        ("in.jsonl", b"", "in.jsonl: there is no column 'text'; the file has none"),
        ("in.jsonl", b'{"text": "a"}\n{"text": \n', "in.jsonl: line 2 is not JSON: "),
        ("in.jsonl", b'{"text": "a"}\n\n["a"]\n', "in.jsonl: line 3 is no object: write {"),
        ("in.jsonl", b'{"text": NaN}\n', "in.jsonl: line 1 is not JSON: NaN is not JSON: write null"),
        ("in.jsonl", b"[" * 100_000, "in.jsonl: line 1 is not JSON: "),
        ("in.parquet", b"PAR1 but not really", "in.parquet: this is no sound parquet file"),
        ("in.txt", b"a\n", "in.txt: the name must end in .csv, .jsonl, .parquet"),
        ("in.csv", None, "in.csv: No such file or directory"),
        ("in.parquet", None, "in.parquet: No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_before_anything_is_sent(
    marble: Marble, scorer: Scorer, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    code, err = marble("--input", name, "--output", "out.csv")
    assert (code, scorer.requests) == (2, [])
    assert f"marble: {message}" in err or f": {message}" in err
    assert [path.name for path in Path().iterdir()] == ([] if content is None else [name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "in.csv", "--overwrite"], "in.csv is the input: choose another output"),
        (["--output", "link.csv", "--overwrite"], "link.csv is the input: choose another output"),
        (["--output", "there.csv"], "there.csv is there already: choose another output, or --overwrite"),
        (["--output", "folder.csv", "--overwrite"], "folder.csv is there already"),
        (["--output", "nowhere/out.csv"], "nowhere/out.csv.part: No such file or directory"),
        (["--output", "out.txt"], "out.txt: the name must end in"),
        ([], "--input goes with --output FILE"),
        (["--output", "out.csv", "--json"], "--input takes the place of TEXT"),
        (["--output", "out.csv", "--batch-size", "0"], "a request needs at least one input"),
        (["--output", "out.csv", "--patience", "0"], "positive number of seconds"),
        (["--output", "out.csv", "--column", "body"], "no column 'body'"),
    ],
)
def test_wrong_usage(marble: Marble, scorer: Scorer, inputs: Path, arguments: list[str], message: str) -> None:
    Path("link.csv").symlink_to(inputs)
    Path("there.csv").write_text("precious")
    Path("folder.csv").mkdir()
    before = inputs.read_bytes()
    code, err = marble("--input", inputs, *arguments)
    assert (code, scorer.requests) == (2, [])
    assert message in err
    assert (inputs.read_bytes(), Path("there.csv").read_text()) == (before, "precious")


def test_a_text_and_a_file_exclude_each_other(marble: Marble, inputs: Path) -> None:
    code, err = marble("a text", "--input", inputs, "--output", "out.csv")
    assert (code, "takes the place of TEXT" in err) == (2, True)


def test_an_output_is_replaced_when_asked_for(marble: Marble, inputs: Path) -> None:
    Path("out.jsonl").write_text("old")
    assert marble("--input", inputs, "--output", "out.jsonl", "--overwrite") == (0, "")
    assert read("out.jsonl") == plain_run()


def test_parquet_without_pyarrow_says_what_to_install(
    marble: Marble, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, err = marble("--input", inputs, "--output", "out.parquet")
    assert (code, "pip install 'marble-client[parquet]'" in err) == (2, True)
    assert marble("--input", inputs, "--output", "out.csv") == (0, "")


# Interruptions


def go_on(marble: Marble, scorer: Scorer, *arguments: object) -> None:
    """The same command again gives what an undisturbed run gives, and asks for what was missing alone."""
    before, done = scorer.asked, rows_done()
    assert 0 < done < ROWS
    assert marble("--input", "in.csv", "--output", "out.jsonl", *arguments) == (0, "")
    assert read("out.jsonl") == plain_run()
    assert scorer.asked - before == ROWS - done
    assert not Path("out.jsonl.part").exists()


def rows_done() -> int:
    """The rows whose results are kept, by their whole lines."""
    _, *lines = Path("out.jsonl.part").read_bytes().split(b"\n")[:-1]
    return sum(len(json.loads(line)["results"]) for line in lines)


@pytest.fixture
def broken_off(marble: Marble, scorer: Scorer, inputs: Path) -> str:
    """A run that ended in the midst, because the model was taken away; what it said."""
    scorer.before = lambda number: fails(404, "ModelNotFoundException") if number > 20 else None
    code, err = marble("--input", inputs, "--output", "out.jsonl", "--batch-size", 5, "--concurrency", 2)
    assert code == 1
    assert not Path("out.jsonl").exists()
    scorer.before = lambda _: None
    return err


def test_a_run_goes_on_where_it_ended(marble: Marble, scorer: Scorer, broken_off: str) -> None:
    said = f"marble: {rows_done()} of 300 rows are done: the same command goes on from there\nmarble: why 404"
    assert broken_off.startswith(said)
    go_on(marble, scorer)


@pytest.mark.parametrize("rest", [b'{"digest": "sha256:0f", "trunc', b"\0" * 4096, b'{"digest": 1}\n'])
def test_half_a_line_is_forgotten(marble: Marble, scorer: Scorer, broken_off: str, rest: bytes) -> None:
    before, done = scorer.asked, rows_done()
    with Path("out.jsonl.part").open("ab") as file:
        file.write(rest)
    assert marble("--input", "in.csv", "--output", "out.jsonl") == (0, "")
    assert read("out.jsonl") == plain_run()
    assert scorer.asked - before == ROWS - done


@pytest.mark.parametrize(
    ("change", "arguments", "what"),
    [
        (lambda: write("in.csv", [{"text": "other"}]), (), "input"),
        (None, ("--top-k", 1), "parameters"),
        (None, ("--column", "text"), "column"),
        (None, ("--version", "1.0"), "version"),
    ],
)
def test_another_run_does_not_go_on_with_it(
    marble: Marble, scorer: Scorer, broken_off: str, change: Any, arguments: tuple[object, ...], what: str
) -> None:
    kept, before = Path("out.jsonl.part").read_bytes(), scorer.asked
    if change is not None:
        change()
    code, err = marble("--input", "in.csv", "--output", "out.jsonl", *arguments)
    advice = "give what it was begun with, or delete it to start anew"
    assert (code, err) == (2, f"marble: out.jsonl.part was begun with another {what}: {advice}\n")
    assert (Path("out.jsonl.part").read_bytes(), scorer.asked) == (kept, before)


def test_a_run_that_got_nothing_binds_nobody(marble: Marble, scorer: Scorer, inputs: Path) -> None:
    scorer.before = lambda _: fails(422, "InvalidParameter")
    code, err = marble("--input", inputs, "--output", "out.jsonl", "-p", "topk=1")
    assert (code, err) == (1, "marble: why 422 (InvalidParameter)\n")
    scorer.before = lambda _: None
    assert marble("--input", inputs, "--output", "out.jsonl") == (0, "")
    assert read("out.jsonl") == plain_run()


def test_rows_of_two_models_are_not_mixed(marble: Marble, scorer: Scorer, broken_off: str) -> None:
    scorer.digest = "sha256:1a"
    code, err = marble("--input", "in.csv", "--output", "out.jsonl")
    assert code == 2
    was = f"its digest was sha256:0f for the rows before row {rows_done() + 1} and is now sha256:1a"
    assert f"{was}. Serve the former again" in err
    scorer.digest = "sha256:0f"
    go_on(marble, scorer)


def test_a_file_of_somebody_else_is_left_alone(marble: Marble, inputs: Path) -> None:
    Path("out.csv.part").write_text("half of a download")
    code, err = marble("--input", inputs, "--output", "out.csv")
    assert (code, err) == (2, "marble: out.csv.part was not written by marble: move it away\n")
    assert Path("out.csv.part").read_text() == "half of a download"


def test_an_input_that_changes_meanwhile_is_noticed(marble: Marble, scorer: Scorer, inputs: Path) -> None:
    def touch(number: int) -> None:
        if number == 3:
            with inputs.open("a") as file:
                file.write("300,one more\n")

    scorer.before = touch
    code, err = marble("--input", inputs, "--output", "out.csv")
    assert (code, "in.csv changed while it was read" in err) == (2, True)
    assert not Path("out.csv").exists()


def test_two_runs_do_not_write_one_file(marble: Marble, scorer: Scorer, inputs: Path, url: str) -> None:
    seen = []

    def run_another(number: int) -> None:
        if number == 1:
            arguments = ["--input", "in.csv", "--output", "out.jsonl", "--url", url]
            seen.append(subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False))

    scorer.before = run_another
    assert marble("--input", inputs, "--output", "out.jsonl") == (0, "")
    assert [(done.returncode, "another run is writing out.jsonl.part" in done.stderr) for done in seen] == [(2, True)]
    assert read("out.jsonl") == plain_run()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", SCRIPT, "predict", "sentiment", *map(str, arguments)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_was_killed_goes_on(
    marble: Marble, scorer: Scorer, inputs: Path, url: str, number: signal.Signals
) -> None:
    reached = threading.Event()

    def hold(request: int) -> None:
        if request >= 30:
            reached.set()
            scorer.release.wait(60)

    scorer.before = hold
    options = ["--input", inputs, "--output", "out.jsonl", "--batch-size", 4]
    process = subprocess.Popen(command(*options, "--url", url), stderr=subprocess.PIPE, text=True)
    try:
        assert reached.wait(60)
        process.send_signal(number)
        if number == signal.SIGINT:
            scorer.release.set()  # it waits for what is under way
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        scorer.release.set()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert ("the same command goes on from there" in err) == (number == signal.SIGINT)
    assert not Path("out.jsonl").exists()
    second = Scorer()  # the first may yet be reading what the process has sent
    server = http_server(second)
    go_on(marble, second, "--batch-size", 7, "--url", f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()


def test_a_full_disk_ends_the_run_and_loses_nothing(marble: Marble, scorer: Scorer, inputs: Path, url: str) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    given = [sys.executable, "-c", full + SCRIPT, "predict", "sentiment", "--url", url, "--input", inputs]
    done = subprocess.run([*given, "--output", "out.jsonl"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "marble: out.jsonl: File too large\n")
    go_on(marble, scorer)


@dataclass
class Mortal(Scorer):
    """Dies of its 20th request; whoever is served then hears no answer."""

    server: QuietServer | None = None
    dead: bool = False
    closed: threading.Event = field(default_factory=threading.Event)

    def predict(self, request: Request) -> Reply:
        with self.lock:
            last = len(self.requests) == 19 and not self.dead
            self.dead = self.dead or last
            if self.dead:
                self.requests.append(request)
        if last:
            assert self.server is not None
            self.server.shutdown()
            self.server.server_close()
            self.closed.set()
        if self.dead:
            raise ConnectionAbortedError("dead")
        return super().predict(request)


def test_a_restart_is_waited_through(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Mortal()
    first.server = http_server(first)
    port = first.server.server_port
    second, later = Scorer(key="new"), []
    pause = Patience.pause
    lock = threading.Lock()
    write_keys(Path("key_file.json"), inference="old", management="m", API="a")

    def restart_then_pause(patience: Patience, error: marble_client.MarbleError) -> float:
        with lock:
            if not later:
                assert first.closed.wait(10)
                write_keys(Path("key_file.json"), inference="new", management="m", API="a")
                later.append(http_server(second, port))
        return pause(patience, error)

    monkeypatch.setattr(Patience, "pause", restart_then_pause)
    options = [
        "--input",
        str(inputs),
        "--output",
        "out.jsonl",
        "--batch-size",
        "5",
        "--url",
        f"http://127.0.0.1:{port}",
    ]
    try:
        assert cli.main(["predict", "sentiment", *options]) == 0
    finally:
        for server in (first.server, *later):
            server.shutdown()
            server.server_close()
    assert capsys.readouterr() == ("", "")
    assert len(later) == 1
    assert read("out.jsonl") == plain_run()
    assert {request.authorization for request in second.requests} == {"Bearer old", "Bearer new"}


def test_a_server_that_stays_away_ends_the_run(
    marble: Marble, scorer: Scorer, server: QuietServer, inputs: Path
) -> None:
    def leave(number: int) -> None:
        if number == 20:
            server.shutdown()
            server.server_close()
        if number >= 20:
            raise ConnectionAbortedError("gone")

    scorer.before = leave
    options = ["--input", inputs, "--output", "out.jsonl", "--batch-size", 5, "--patience", 0.2]
    code, err = marble(*options)
    assert code == 3
    assert f"marble: {rows_done()} of 300 rows are done: the same command goes on from there\nmarble: " in err


def test_without_aiohttp_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "marble_client.aio_rest")
    with pytest.raises(ImportError, match=r"pip install 'marble-client\[async\]'"):
        _ = marble_client.AsyncRestClient


def test_neither_the_library_nor_a_single_prediction_needs_what_files_need(url: str, scorer: Scorer) -> None:
    hidden = (
        "import sys; sys.modules.update(dict.fromkeys(['tqdm', 'pyarrow', 'fcntl', 'grpc', 'aiohttp', 'asyncio']))\n"
    )
    given = [sys.executable, "-c", hidden + SCRIPT, "predict", "sentiment", "x", "y", "--url", url]
    done = subprocess.run(given, capture_output=True, timeout=60, check=False)
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, [labels("x"), labels("y")], b"")


# A real server


def test_a_server_that_is_killed_midway_changes_nothing(store: Path) -> None:
    """A quick run of benchmarks/bulk, on the archive that all tests share. What is counted must be met, memory too."""
    Path("store").mkdir()
    for path in store.glob("reviews.*"):
        shutil.copy(path, "store")
    command = (sys.executable, "-m", "benchmarks.bulk", "--quick", "--work", Path.cwd(), "--output", "found.json")
    output = succeeded(run(*command, cwd=Path.cwd(), PYTHONPATH=f"{ROOT}"))
    found = json.loads(Path("found.json").read_text())
    assert [target["met"] for target in found["targets"]] == [True] * 7
    assert [victim for _, victim in found["runs"]["killed"]["kills"]] == ["server"]
    assert output.count(": met") == 7


def test_the_page_has_the_results_that_are_committed() -> None:
    text, results = bulk.DOCUMENT.read_text(encoding="utf-8"), json.loads(bulk.RESULTS.read_text(encoding="utf-8"))
    assert bulk.document(results, text) == text
    assert [asdict(target) for target in bulk.targets(results)] == results["targets"]
    assert results["runs"]["killed"]["rows"] == 100_000
    worse = {**results, "output": {**results["output"], "lost": 1, "same_bytes": False}}
    assert [target.id for target in bulk.targets(worse) if not target.met] == ["lost", "bytes"]
