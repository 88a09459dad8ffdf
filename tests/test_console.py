"""The console: its parts by themselves, and the page in a real Chromium.

All but one of the browser's tests ask `console_server`, which answers at once; the last asks a real TorchServe.
"""

import base64
import csv
import io
import json
import subprocess
import sys
import wave
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import browser
import pytest
import requests
from browser import Browser, until
from conftest import OFFLINE, ROOT, Served, free_ports
from console_page import NAME, TEXT, StartConsole, at, choose, click_tab, faults, holds, opened
from console_server import DIGEST, HOSTILE, TASKS, TOKEN, FakeServer, png, wav
from PIL import Image

from console import batch, render, snippets, tasks
from console.connection import Connection
from console.traffic import Live, Traffic
from marble_client import (
    BadRequest,
    ModelInfo,
    ModelMetrics,
    NotFound,
    RestClient,
    ServedModel,
    TextEnd,
    Unauthorized,
    Usage,
)

# --- its parts ------------------------------------------------------------------------------------------------------


def test_every_task_of_the_handler_is_known() -> None:
    from handler.tasks import REGISTRY

    assert tasks._TASKS.keys() == REGISTRY.keys()


@pytest.mark.parametrize(
    ("task", "first", "second", "inputs", "parameters"),
    [
        ("text-classification", "a", "", "a", {}),
        ("text-classification", "a", "b", {"text": "a", "text_pair": "b"}, {}),
        ("question-answering", "who?", "Ann", {"question": "who?", "context": "Ann"}, {}),
        ("sentence-similarity", "a", "b\n\nc\n", {"source_sentence": "a", "sentences": ["b", "c"]}, {}),
        ("zero-shot-classification", "a", "b, c,", "a", {"candidate_labels": ["b", "c"]}),
        ("fill-mask", "[MASK]", "ignored", "[MASK]", {}),
        (None, '{"any": 1}', "", {"any": 1}, {}),
        ("unheard-of", "no JSON", "", "no JSON", {}),
    ],
)
def test_what_a_form_asks(task: str | None, first: str, second: str, inputs: Any, parameters: Any) -> None:
    assert tasks.of(task).read(first, second) == (inputs, parameters)


def test_what_is_shown_is_escaped() -> None:
    entity = {"entity": HOSTILE, "score": 0.5, "start": 0, "end": 4}
    explained = {
        "method": HOSTILE,
        "explanations": [{"label": HOSTILE, "score": 1, "value": 1, "attributions": [{**entity, "word": HOSTILE}]}],
    }
    info = ModelInfo(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    for shown in (
        render.bars([(HOSTILE, 0.5)], HOSTILE),
        render.entities([entity], HOSTILE),
        render.answer({"answer": HOSTILE, "score": 1, "start": 0, "end": 4}, HOSTILE),
        render.text(HOSTILE),
        render.raw({HOSTILE: [HOSTILE]}),
        render.image(f'"{HOSTILE}'),
        render.sound(f'"{HOSTILE}'),
        render.explanation(explained, HOSTILE, None),
        render.facts(1, None, info, TextEnd("", HOSTILE, 1, None)),
        render.models([ServedModel(HOSTILE, HOSTILE, 1, 1)], {HOSTILE: info}, {}, HOSTILE, [HOSTILE]),
        render.models(None, {HOSTILE: info}, {HOSTILE: Live(1)}, "", []),
        render.heading(HOSTILE, HOSTILE, served=True),
        render.fault(HOSTILE),
        render.outcome([{"error": HOSTILE}]),
    ):
        assert "<img src=x" not in shown
        assert "&lt;img src=x" in shown or "&quot;&lt;" in shown


def test_bars_of_scores_that_are_no_probabilities() -> None:
    shown = render.bars([("a", 4.0), ("b", 1.0), ("c", -2.0)], "Label")
    assert [part.partition('"')[0] for part in shown.split("width:")[1:]] == ["100.0%", "25.0%", "0.0%"]
    assert "-2.0000" in shown
    assert "threshold" in render.bars([], "Label")


def test_entities_stand_in_the_text_once_and_in_order() -> None:
    found = [
        {"entity_group": "LOC", "score": 0.9, "start": 17, "end": 23},
        {"entity_group": "PER", "score": 0.97, "start": 0, "end": 3},
    ]
    assert render.entities(found, "Ada Lovelace, in London.") == (
        '<p class="text"><mark>Ada <small>PER 0.97</small></mark> Lovelace, '
        "in <mark>London <small>LOC 0.90</small></mark>.</p>"
    )
    assert "No entity" in render.entities([], "nobody")


def test_no_answer() -> None:
    assert "no answer" in render.answer({"answer": "", "score": 0.8, "start": 0, "end": 0}, "text")


def test_long_vectors_are_cut_short() -> None:
    assert "32 more numbers" in render.raw([[0.5] * 40])
    assert "more numbers" not in render.raw([0.5] * 16)


def test_an_explanation_of_a_pair_has_each_word_in_its_own_text() -> None:
    words = [
        {"text": 0, "word": "who", "start": 0, "end": 3, "score": 0.5},
        {"text": 1, "word": "Ann", "start": 0, "end": 3, "score": -1.0},
    ]
    found = {
        "method": "occlusion",
        "explanations": [{"answer": "Ann", "score": 0.9, "value": 3.0, "attributions": words}],
    }
    shown = render.explanation(found, {"question": "who?", "context": "Ann came"}, None)
    assert '<span class="for" style="--share:0.50">who<small> +0.50</small></span>?' in shown
    assert '<span class="against" style="--share:1.00">Ann<small> -1.00</small></span> came' in shown
    assert "no answer to explain" in render.explanation({"explanations": []}, "a", None)


def test_a_heat_map_covers_its_box() -> None:
    shown = render.heat_map([[0.5, -1.0]], {"xmin": 4, "ymin": 0, "xmax": 24, "ymax": 24}, png(24))
    assert '<rect x="14.00" y="0.00" width="10.00" height="24.00" fill="#1864ab" fill-opacity="0.75">' in shown
    assert "row 1, column 1 speaks most for it" in shown


def test_the_facts() -> None:
    info = ModelInfo("reviews", "1.0", "ab12")
    assert "overflow" in render.facts(0.0124, Usage(12, True, 1), info)
    assert "12 ms" in render.facts(0.0124, Usage(12, False, 1), info)
    assert "overflow" not in render.facts(0.0124, Usage(12, False, 1), info)


def test_faults_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MARBLE_TOKEN", raising=False)
    there = Connection.to("http://127.0.0.1:1", None, None, "secret")
    assert there.words(Unauthorized("bad token")).startswith("bad token (inference token from --token; ")
    assert "secret" not in there.words(Unauthorized("bad token"))
    assert "table above" in there.words(NotFound("no such model"))
    assert there.words(BadRequest("no", kind="Odd")) == "no (Odd)"
    assert there.words(ValueError("not so")) == "not so"


def test_where_the_server_is() -> None:
    own = Connection.to("http://127.0.0.1:8080", None, None, None)
    assert (own.management_url, own.metrics_url) == ("http://127.0.0.1:8081", "http://127.0.0.1:8082")
    front = Connection.to("https://models.example.org:8443", None, None, None)
    assert (front.management_url, front.metrics_url) == (None, front.url)


def metrics(count: int, below: int = 0, failed: int = 0) -> dict[str, ModelMetrics]:
    """Of a model with so many requests, of which so many took at most 10 ms, the others up to 20."""
    return {
        "m": ModelMetrics({200: count - failed, 503: failed}, {0.01: below, 0.02: count, inf: count}, count, count / 4)
    }


def test_traffic_is_that_of_the_last_minute() -> None:
    traffic = Traffic()
    assert traffic.live() == {}
    traffic.add(100, metrics(10))
    assert traffic.live() == {"m": Live(10)}
    traffic.add(110, metrics(30, below=10, failed=5))
    [live] = traffic.live().values()
    assert (live.requests, live.rate, live.failed, live.queue) == (30, 2.0, 0.25, 0.25)
    assert (live.median, live.tail) == (pytest.approx(0.01), pytest.approx(0.019))
    for moment in (120, 150, 175, 180):
        traffic.add(moment, metrics(30, below=10, failed=5))
    assert traffic.live() == {"m": Live(30, 0.0)}
    traffic.add(190, metrics(4))
    assert traffic.live() == {"m": Live(4)}, "a server that was started anew counts from 0"


# --- the same call from elsewhere


@pytest.fixture
def server() -> Iterator[FakeServer]:
    running = FakeServer()
    yield running
    running.stop()


@pytest.mark.parametrize("parameters", [{}, {"top_k": 1}])
@pytest.mark.parametrize("file", [None, "it's a file.png"])
def test_what_is_copied_asks_the_same(
    server: FakeServer, tmp_path: Path, parameters: dict[str, Any], file: str | None
) -> None:
    inputs: Any = "it's “$HOME”\n\\n" if file is None else png()
    if file is not None:
        (tmp_path / file).write_bytes(png())
    given = (server.url, "text-classification", inputs, parameters, file)
    environment = {**OFFLINE, "MARBLE_TOKEN": TOKEN, "PYTHONPATH": str(ROOT / "client")}
    for command in (["sh", "-c", snippets.curl(*given)], [sys.executable, "-c", snippets.python(*given)]):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert "positive" in done.stdout, done.stderr
        asked = server.asked[-1]
        if isinstance(asked, bytes):
            assert asked == inputs
            continue
        with RestClient(server.url, token=TOKEN) as client:
            client.predict("text-classification", inputs, parameters)
        expected = server.asked[-1]
        assert asked["inputs"] == expected["inputs"]
        assert {**asked.get("parameters", {}), "details": True} == expected["parameters"]


def test_grpc_is_asked_at_its_own_port() -> None:
    assert "GrpcClient('127.0.0.1:7070'" in snippets.grpc("http://127.0.0.1:8080", "m", "a", {})
    front = snippets.grpc("https://models.example.org:8443", "m", "a", {"top_k": 1})
    assert "GrpcClient('https://models.example.org:8444'" in front
    assert "client.predict('m', inputs, {'top_k': 1})" in front
    compile(front, "snippet", "exec")


# --- a csv


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_csv_is_answered_row_by_row(server: FakeServer) -> None:
    task = tasks.of("text-classification")
    rows = batch.read('\ufeffid,text\n1,warm\n2,refuse me\n3,"a, b"\n'.encode(), task)
    with RestClient(server.url, token=TOKEN) as client:
        done = list(batch.predict(client, "text-classification", task, rows, {}, str))
    assert rows_of(batch.write(done)) == [
        {"id": "1", "text": "warm", "prediction": "positive", "score": "0.75", "error": ""},
        {"id": "2", "text": "refuse me", "prediction": "", "score": "", "error": "this text is refused"},
        {"id": "3", "text": "a, b", "prediction": "positive", "score": "0.75", "error": ""},
    ]


def test_all_entities_of_a_row_count(server: FakeServer) -> None:
    task = tasks.of("token-classification")
    with RestClient(server.url, token=TOKEN) as client:
        [row] = batch.predict(client, "token-classification", task, [{"text": "Ada"}], {}, str)
    assert json.loads(row["prediction"])[0]["entity_group"] == "PER"


def test_a_server_that_is_away_is_not_asked_for_every_row(server: FakeServer) -> None:
    task = tasks.of("text-classification")
    server.stop()
    with RestClient(server.url, token=TOKEN) as client:
        done = list(batch.predict(client, "m", task, [{"text": "a"}] * 40, {}, str))
    server.start()
    assert len(done) == 40
    assert all("no server at" in row["error"] for row in done)
    assert sum(row["error"].startswith("not asked") for row in done) >= 24


@pytest.mark.parametrize(
    ("content", "task", "words"),
    [
        (b"a,b\n1,2\n", "text-classification", "no column 'text'; this model wants text; found: a, b"),
        (b"question\nwho?\n", "question-answering", "no column 'context'"),
        (b"", "fill-mask", "found: none"),
        (b"text\n", "fill-mask", "no rows"),
        (b"text\n\xe9\n", "fill-mask", "not UTF-8"),
        (b"text,score\na,1\n", "fill-mask", "'score' already"),
        (b"text\na\n", "image-classification", "files"),
    ],
)
def test_a_csv_that_does_not_fit(content: bytes, task: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batch.read(content, tasks.of(task))


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend() -> Iterator[FakeServer]:
    running = FakeServer()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def console(start_console: StartConsole, backend: FakeServer) -> Iterator[str]:
    options = (*at(backend.url), "--token", TOKEN)
    # A proxy of the environment has no say in what is on this machine.
    with start_console(*options, http_proxy="http://127.0.0.1:1") as url:
        yield url


@pytest.fixture
def page(chromium: Browser, console: str) -> Browser:
    """The page, just opened."""
    return opened(chromium, console)


@pytest.fixture(scope="module")
def once(chromium: Browser, console: str) -> Browser:
    """The page, opened once for tests that each use another model's tab."""
    return opened(chromium, console)


SHOWN = {
    "text-classification": ("positive", "0.7500", HOSTILE),
    "token-classification": ("PER 0.97",),
    "question-answering": ("Ann", "score 0.90", "Ann came late."),
    "fill-mask": ("warm", "0.6000"),
    "summarization": ("short",),
    "sentence-similarity": ("Ann came late.", "0.8000", "Bob"),
    "zero-shot-classification": ("weather", "sport"),
    "image-classification": ("seven", "one"),
    "audio-classification": ("bark", "meow"),
    "automatic-speech-recognition": ("good morning",),
    "translation": ("kurz",),
    "feature-extraction": ("32 more numbers",),
    "of-another-kind": ('"anything"',),
    "text-generation": ("once upon a time",),
}
SECOND = {
    "question-answering": "Ann came late.",
    "sentence-similarity": "Ann came late.\nBob",
    "zero-shot-classification": "weather, sport",
}


def heard(n: int) -> str:
    """What there is of a sound when it was chosen."""
    return f"#audio-{n} :is([aria-label*=emove], [aria-label*=lear])"


def test_every_task_is_shown() -> None:
    assert {*SHOWN, "text-to-image", "text-to-speech"} == set(TASKS) == {*tasks._TASKS, "of-another-kind"}


@pytest.mark.parametrize("task", TASKS)
def test_a_task(once: Browser, axe: str, tmp_path: Path, task: str) -> None:
    page = once
    n = choose(page, task)
    media = tasks.of(task).media
    if media is None:
        page.type(f"#first-{n} textarea", TEXT)
    elif media == "image":
        (tmp_path / "seven.png").write_bytes(png())
        page.upload(f"#image-{n} input[type=file]", tmp_path / "seven.png")
        page.reads(f"#image-{n}", "seven")
    else:
        (tmp_path / "bark.wav").write_bytes(wav())
        page.upload(f"#audio-{n} input[type=file]", tmp_path / "bark.wav")
        until(lambda: page.elements(heard(n)), "the sound")
    if task in SECOND:
        page.type(f"#second-{n} textarea", SECOND[task])
    page.click(f"#ask-{n}")
    facts = page.reads(
        f"#facts-{n}", "Latency", DIGEST, *(["Ended by"] if task == "text-generation" else ["Truncated"])
    )
    assert ("overflow" in facts) == (task != "text-generation")
    if task == "text-to-image":
        until(lambda: page.run(f"return document.querySelector('#answer-{n} img')?.naturalWidth") == 24, "the image")
    elif task == "text-to-speech":
        until(lambda: page.run(f"return document.querySelector('#answer-{n} audio')?.duration") == 0.1, "the sound")
    else:
        page.reads(f"#answer-{n}", *SHOWN[task])
    assert not page.elements(f"#answer-{n} img[src=x]")
    for call in ("curl", "python", "grpc"):
        copied = holds(page, f"#{call}-{n} textarea")
        assert task in copied
        assert "MARBLE_TOKEN" in copied
        assert TOKEN not in copied
    if tasks.of(task).explained:
        page.click(f"#explain-{n}")
        page.reads(f"#explanation-{n}", "Method: occlusion")
        if media == "image":
            assert len(page.elements(f"#explanation-{n} svg rect")) == 4
        else:
            page.reads(f"#explanation-{n}", "+0.94", "-0.20")
    else:
        assert not page.elements(f"#explain-{n}")
    assert faults(page, axe) == []


def test_models_that_come_and_go(page: Browser, backend: FakeServer) -> None:
    """What was written and answered stays, and so does the tab that is shown."""
    n = choose(page, "fill-mask")
    page.type(f"#first-{n} textarea", TEXT)
    page.click(f"#ask-{n}")
    page.reads(f"#answer-{n}", "warm")
    backend.models = [name for name in TASKS if name not in ("audio-classification", "fill-mask")] + ["fill-mask_new"]
    try:
        page.reads(f"#heading-{n}", "Ask fill-mask", "not served now")
        new = choose(page, "fill-mask_new")
        assert new != n
        assert holds(page, f"#first-{new} textarea") == ""
        assert choose(page, "fill-mask") == n
        assert holds(page, f"#first-{n} textarea") == TEXT
        assert "warm" in page.text(f"#answer-{n}")
    finally:
        backend.models = list(TASKS)
    until(lambda: "not served" not in page.text(f"#heading-{n}"), "that it is back")
    assert (page.text("[role=tab][aria-selected=true]"), holds(page, f"#first-{n} textarea")) == ("fill-mask", TEXT)


def test_more_models_than_tabs(chromium: Browser, console: str, backend: FakeServer) -> None:
    backend.models = [f"fill-mask_{number:02}" for number in range(26)]
    try:
        page = opened(chromium, console)
        page.reads("#models", "Without a tab, for there are too many: fill-mask_24, fill-mask_25")
        page.type(NAME, "fill-mask_25" + browser.ENTER)
        n = choose(page, "fill-mask_25")
        page.type(f"#first-{n} textarea", TEXT)
        page.click(f"#ask-{n}")
        page.reads(f"#answer-{n}", "warm")
    finally:
        backend.models = list(TASKS)


def fares(page: Browser, model: str) -> list[str]:
    """The cells of a model's row in the table."""
    row = (
        "return [...document.querySelectorAll('#models tr')].find(e => e.innerText.startsWith(arguments[0])).innerText"
    )
    return str(page.run(row, model)).split("\t")


def test_how_models_fare(page: Browser, backend: FakeServer) -> None:
    """The counters of the server, and what became of them since the page was opened."""
    n = choose(page, "translation")
    page.type(f"#first-{n} textarea", "refuse this")
    page.click(f"#ask-{n}")
    page.reads(f"#answer-{n} [role=alert]", "refused")
    page.type(f"#first-{n} textarea", TEXT)
    page.click(f"#ask-{n}")
    page.reads(f"#answer-{n}", "kurz")
    total = sum(count for (model, _), count in backend.counted.items() if model == "translation")
    # Some of this minute failed; each took from 10 to 25 ms, after 2 ms in the queue.
    cells = until(lambda: (c := fares(page, "translation"))[4] == str(total) and "%" in c[6] and c, "the figures")
    assert float(cells[5]) > 0
    assert 0 < float(cells[6].removesuffix(" %")) < 100
    assert (cells[7], cells[8], cells[9]) == ("18 ms", "24 ms", "2 ms")


def test_the_dark_page_can_be_read_too(page: Browser, axe: str) -> None:
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.devtools("Emulation.setEmulatedMedia", dark)
    try:
        page.run("location.reload()")
        n = choose(page, "text-classification")
        page.type(f"#first-{n} textarea", TEXT)
        page.click(f"#ask-{n}")
        page.reads(f"#facts-{n}", "Latency")
        page.click(f"#explain-{n}")
        page.reads(f"#explanation-{n}", "+0.94")
        assert page.run("return document.body.classList.contains('dark')")
        assert faults(page, axe) == []
    finally:
        page.devtools("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone(page: Browser, axe: str) -> None:
    page.resize(360, 740)
    for tab in ("image-classification", "question-answering", "Batch"):
        click_tab(page, tab)
        page.reads("h2", f"Ask {tab}" if tab != "Batch" else tab)
        assert page.run("return document.documentElement.scrollWidth") <= 360
        assert faults(page, axe) == []


def test_the_keyboard_is_enough(page: Browser) -> None:
    """Arrows from tab to tab, which are one stop of the Tab key, then the fields and the button."""
    n = choose(page, "token-classification")
    choose(page, "text-to-speech")
    page.run("document.querySelector('[role=tab][aria-selected=true]').focus()")
    page.press(browser.LEFT, browser.RIGHT, browser.RIGHT)
    until(lambda: page.text("[role=tab][aria-selected=true]") == "token-classification", "the next tab")
    tabbed(page, f"#first-{n}")
    page.press(*"Ada")
    tabbed(page, f"#ask-{n}")
    page.press(browser.ENTER)
    page.reads(f"#answer-{n}", "Ada", "PER 0.97")


def tabbed(page: Browser, css: str) -> None:
    """Presses Tab until the focus is in there."""
    for _ in range(6):
        page.press(browser.TAB)
        if page.run("return document.activeElement.closest(arguments[0]) != null", css):
            return
    pytest.fail(f"{css} is not reached")


def test_a_screen_reader_finds_its_way(page: Browser) -> None:
    n = choose(page, "question-answering")
    assert page.run("return document.documentElement.lang") == "en"
    headings = (
        "return [...document.querySelectorAll('h1, h2, h3')].filter(e => e.checkVisibility()).map(e => e.tagName)"
    )
    assert page.run(headings) == ["H1", "H2", "H2", "H3", "H3", "H3"]
    names = {"first": "Question", "second": "Context", "given": "Parameters", "curl": "curl", "python": "Python"}
    for field, name in names.items():
        assert page.name(f"#{field}-{n} textarea").startswith(name)
    assert page.name(NAME).startswith("Another model")
    assert page.name(f"#ask-{n}") == "Ask"
    assert page.run("return [...document.querySelectorAll('[role=tab]')].filter(e => e.tabIndex == 0).length") == 1
    for part in ("#status", f"#facts-{n}"):
        assert page.run(f"return document.querySelector('{part}').getAttribute('aria-live')") == "polite"


def test_nothing_is_fetched_from_elsewhere(page: Browser, console: str) -> None:
    page.log("performance")  # of pages before
    page.open(console)
    choose(page, "image-classification")
    click_tab(page, "Batch")
    until(lambda: page.elements("#csv"), "the tab")
    messages = [json.loads(entry["message"])["message"] for entry in page.log("performance")]
    asked = [entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith(console) for url in asked)
    assert [url for url in asked if not url.startswith((console, "data:", "blob:", "chrome:"))] == []
    refused = [entry["message"] for entry in page.log("browser") if "Content Security Policy" in entry["message"]]
    assert refused == []
    assert "default-src 'self'" in requests.get(console, timeout=10).headers["Content-Security-Policy"]


# --- what goes wrong


def test_a_refused_input_and_wrong_parameters(page: Browser, axe: str) -> None:
    n = choose(page, "text-classification")
    page.type(f"#first-{n} textarea", "refuse this")
    page.click(f"#ask-{n}")
    page.reads(f"#answer-{n} [role=alert]", "this text is refused (InvalidInput)")
    assert faults(page, axe) == []
    page.click(f"#explain-{n}")
    page.reads(f"#explanation-{n} [role=alert]", "this text is refused")
    page.type(f"#given-{n} textarea", "top_k=3")
    page.click(f"#ask-{n}")
    page.reads(f"#answer-{n} [role=alert]", "the parameters are no JSON", 'write e.g. {"top_k": 3}')
    page.type(f"#given-{n} textarea", "{}")
    page.type(f"#first-{n} textarea", TEXT)
    page.click(f"#ask-{n}")
    page.reads(f"#answer-{n}", "positive")


@pytest.mark.parametrize(("media", "name"), [("image", "seven.png"), ("audio", "bark.wav")])
def test_a_file_is_sent_as_it_is(page: Browser, backend: FakeServer, tmp_path: Path, media: str, name: str) -> None:
    n = choose(page, f"{media}-classification")
    (tmp_path / name).write_bytes(b"neither an image nor a sound, which is the server's to say")
    page.upload(f"#{media}-{n} input[type=file]", tmp_path / name)
    until(lambda: page.elements(heard(n) if media == "audio" else f"#image-{n} .file-preview"), "the file")
    page.click(f"#ask-{n}")
    page.reads(f"#facts-{n}", "Latency")
    assert sent(backend) == (tmp_path / name).read_bytes()
    assert name in holds(page, f"#curl-{n} textarea")


def test_the_camera_and_the_microphone(page: Browser, backend: FakeServer, axe: str, tmp_path: Path) -> None:
    """Of the image that was chosen and the one that was taken, the later one is sent."""
    n = choose(page, "image-classification")
    page.click(f"#camera-{n} button:not([aria-label])")
    until(lambda: page.run(f"return document.querySelector('#camera-{n} video')?.videoWidth"), "what the camera sees")
    page.click(f"#camera-{n} [aria-label='capture photo']")
    until(lambda: page.elements(f"#camera-{n} [aria-label='Remove Image']"), "a picture")
    page.click(f"#ask-{n}")
    page.reads(f"#facts-{n}", "Latency")
    with Image.open(io.BytesIO(sent(backend))) as taken:
        assert taken.size == (640, 480)
        assert len(taken.convert("RGB").getcolors(640 * 480) or []) > 2
    assert faults(page, axe) == []
    (tmp_path / "seven.png").write_bytes(png())
    page.upload(f"#image-{n} input[type=file]", tmp_path / "seven.png")
    until(lambda: not page.elements(f"#camera-{n} [aria-label='Remove Image']"), "that the picture goes")
    page.click(f"#ask-{n}")
    until(lambda: sent(backend) == png(), "the file")

    n = choose(page, "audio-classification")
    page.click(f"#audio-{n} [aria-label='Record audio']")
    page.click(f"#audio-{n} .record-button")
    until(lambda: "0:01" in page.text(f"#audio-{n} .duration"), "a second of sound")
    page.click(f"#audio-{n} .stop-button")
    until(lambda: page.elements(heard(n)), "the sound")
    page.click(f"#ask-{n}")
    page.reads(f"#facts-{n}", "Latency")
    with wave.open(io.BytesIO(sent(backend))) as recorded:
        assert recorded.getnframes() / recorded.getframerate() > 0.5
        assert len(set(recorded.readframes(recorded.getnframes()))) > 2
    assert [entry["message"] for entry in page.log("browser") if "Content Security Policy" in entry["message"]] == []


def sent(backend: FakeServer) -> bytes:
    """The file that a model was asked about last."""
    return base64.b64decode([asked["inputs"] for asked in backend.asked if "inputs" in asked][-1])


def test_no_file_chosen(page: Browser) -> None:
    n = choose(page, "image-classification")
    page.click(f"#ask-{n}")
    page.reads(f"#answer-{n} [role=alert]", "choose a file first")


def test_a_bad_token(start_console: StartConsole, backend: FakeServer, chromium: Browser) -> None:
    with start_console(*at(backend.url), "--token", "no-good") as url:
        page = opened(chromium, url)
        page.reads("#status [role=alert]", "Token Authorization failed", "from --token")
        page.reads("#models", "text-classification", "unknown")
        n = choose(page, "text-classification")
        page.type(f"#first-{n} textarea", TEXT)
        page.click(f"#ask-{n}")
        page.reads(f"#answer-{n} [role=alert]", "Token Authorization failed", "from --token")
        assert "no-good" not in page.text("body")


def test_a_list_of_models_that_cannot_be_reached(
    start_console: StartConsole, backend: FakeServer, chromium: Browser
) -> None:
    """As behind the front door: a model's name is typed."""
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    with start_console("--url", backend.url, "--management-url", nowhere, "--token", TOKEN) as url:
        page = opened(chromium, url)
        page.reads("#status [role=alert]", f"no server at {nowhere}", "can be typed")
        page.type(NAME, "question-answering" + browser.ENTER)
        n = choose(page, "question-answering")
        page.type(f"#first-{n} textarea", "who?")
        page.type(f"#second-{n} textarea", "Ann came late.")
        page.click(f"#ask-{n}")
        page.reads(f"#answer-{n}", "Ann", "score 0.90")
        page.type(NAME, "no such" + browser.ENTER)
        page.reads("#refused [role=alert]", "'no such' is no model name")
        page.reads("#models", "question-answering", "unknown", DIGEST[:16], "No metrics: no server at")


def test_a_server_that_goes_away_and_comes_back(page: Browser, backend: FakeServer, axe: str, tmp_path: Path) -> None:
    n = choose(page, "text-classification")
    page.type(f"#first-{n} textarea", TEXT)
    backend.stop()
    try:
        page.click(f"#ask-{n}")
        page.reads(f"#answer-{n} [role=alert]", f"no server at {backend.url}", "needs no reload")
        page.reads("#status [role=alert]", f"no server at {backend.url}")
        click_tab(page, "Batch")
        page.upload("#csv input[type=file]", csv_file(tmp_path, "text\na\n"))
        page.reads("#csv", "texts")
        page.click("#predict")
        page.reads("#outcome", "1 rows, 1 with an error", "no server at")
        choose(page, "text-classification")
        assert faults(page, axe) == []
    finally:
        backend.start()
    until(lambda: not page.elements("#status [role=alert]"), "the status clears by itself")
    assert holds(page, f"#first-{n} textarea") == TEXT
    page.click(f"#ask-{n}")
    page.reads(f"#answer-{n}", "positive")


def test_a_page_opened_while_the_server_is_away(chromium: Browser, console: str, backend: FakeServer) -> None:
    backend.stop()
    try:
        page = opened(chromium, console)
        page.reads("#status [role=alert]", f"no server at {backend.url}", "can be typed")
        click_tab(page, "Batch")
        page.click("#predict")
        page.reads("#outcome [role=alert]", "choose a model first")
    finally:
        backend.start()
    n = choose(page, "question-answering")
    page.type(f"#second-{n} textarea", "Ann came late.")
    page.click(f"#ask-{n}")
    page.reads(f"#answer-{n}", "Ann", "score 0.90")


def test_a_token_that_is_none(browser_environment: None) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "console", "--token", "två ord"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith("scripts/console: a token holds")


def test_a_port_that_is_taken(browser_environment: None, backend: FakeServer) -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "console", "--port", str(backend.port)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr == f"scripts/console: port {backend.port} on 127.0.0.1 is not free: choose another with --port\n"


# --- a csv on the page


def csv_file(folder: Path, content: str) -> Path:
    path = folder / "texts.csv"
    path.write_text(content, encoding="utf-8")
    return path


def test_batch(page: Browser, axe: str, tmp_path: Path) -> None:
    # The tab begins with the model whose own was shown last; here with another.
    choose(page, "question-answering")
    click_tab(page, "Batch")
    page.type("#which input", "text-classification" + browser.ENTER)
    page.reads("#csv", "csv with text")
    page.click("#predict")
    page.reads("#outcome [role=alert]", "choose a csv first")
    rows = "".join(f"text {number}\n" for number in range(300))
    page.upload("#csv input[type=file]", csv_file(tmp_path, f"text\nrefuse this\n{rows}"))
    page.reads("#csv", "texts")
    # Every state of the outcome is kept: how far it was can be gone before it is looked for.
    page.run(
        "window.seen = []; new MutationObserver(() => seen.push(document.querySelector('#outcome progress')?.value))"
        ".observe(document.querySelector('#outcome'), {childList: true, subtree: true, attributes: true})"
    )
    page.click("#predict")
    page.reads("#outcome", "301 rows, 1 with an error", "row 1: this text is refused")
    values = [value for value in page.run("return seen") if value is not None]
    assert values
    assert values == sorted(values)
    assert faults(page, axe) == []
    downloads = tmp_path / "downloads"
    page.devtools("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    page.click("#download")
    [path] = until(lambda: list(downloads.glob("*.csv")), "the download")  # has another name until it is whole
    table = rows_of(path.read_text(encoding="utf-8"))
    assert len(table) == 301
    assert table[0] == {
        "text": "refuse this",
        "prediction": "",
        "score": "",
        "error": "this text is refused (InvalidInput)",
    }
    assert table[300] == {"text": "text 299", "prediction": "positive", "score": "0.75", "error": ""}


def test_a_csv_that_does_not_fit_the_model(page: Browser, tmp_path: Path) -> None:
    choose(page, "question-answering")
    click_tab(page, "Batch")
    page.reads("#csv", "csv with question and context")
    page.upload("#csv input[type=file]", csv_file(tmp_path, "text\na\n"))
    page.reads("#csv", "texts")
    page.click("#predict")
    page.reads("#outcome [role=alert]", "no column 'question'")
    assert not page.elements("#download")


# --- a real server


def test_a_real_server(served: Served, start_console: StartConsole, chromium: Browser, axe: str) -> None:
    places = ("--url", served.url, "--management-url", served.management, "--metrics-url", served.metrics)
    options = (*places, "--token", served.token)
    with start_console(*options, MARBLE_MANAGEMENT_TOKEN=served.management_token) as url:
        page = opened(chromium, url)
        with served.rest_client() as client:
            info = client.identify("reviews-torch")
            answer = client.classify("reviews-torch", TEXT).predictions
        assert info.task == "text-classification"
        page.reads("#models", "reviews-fp32", "reviews-torch", "1 of 1", info.digest[:16])
        n = choose(page, "reviews-torch")
        page.type(f"#first-{n} textarea", TEXT)
        page.click(f"#ask-{n}")
        page.reads(f"#facts-{n}", info.digest, "reviews-torch 1.0")
        page.reads(f"#answer-{n}", *(f"{label.label}\t{label.score:.4f}" for label in answer))
        page.click(f"#explain-{n}")
        page.reads(f"#explanation-{n}", answer[0].label, *TEXT.replace(",", "").split())
        assert faults(page, axe) == []
        environment = {**OFFLINE, "MARBLE_TOKEN": served.token}
        done = subprocess.run(
            ["sh", "-c", holds(page, f"#curl-{n} textarea")],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout)[0] == [
            {"label": label.label, "score": pytest.approx(label.score, abs=1e-4)} for label in answer
        ]
        # Workers hand on their counts once a second; the page looks every five.
        until(lambda: float(fares(page, "reviews-torch")[5].replace("–", "0")) > 0, "a rate")
        until(lambda: int(fares(page, "reviews-torch")[4]) >= 3, "all three requests")
        cells = fares(page, "reviews-torch")
        assert all(cell.endswith(" ms") for cell in cells[7:10])
