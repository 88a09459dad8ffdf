"""The page: what is served and how it fares, a tab for each model that fits its task, and one for a csv at a time."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from console import batch, render, snippets, tasks
from console.connection import Connection
from console.traffic import Traffic
from marble_client import Json, MarbleError, ModelInfo, RestClient, ServedModel

# Seconds between two looks at what is served. Each asks the management and the metrics API alone; a model is asked once
# for its task.
LOOK_EVERY_S = 5
# Tabs for models, made when the console starts and shown as models come. Gradio can also make them as they come
# (gr.render), but in version 6.31 that moves what was written from one model's fields into another's.
TABS = 24
_IDENTIFY_WITHIN_S = 10
_METRICS_WITHIN_S = 2
_EMPTY = ""
# What Gradio has no way to say: what is read aloud when it changes, the name of a field with a button in its label, and
# that tabs are one stop of the keyboard, with arrows from one to the next (https://www.w3.org/WAI/ARIA/apg/patterns/tabs).
_FOR_READERS = """() => {
    const tidy = () => {
        for (const part of document.querySelectorAll("#status, #refused, [id^=facts-]"))
            part.setAttribute("aria-live", "polite");
        for (const block of document.querySelectorAll(".code"))
            block.querySelector("textarea")?.setAttribute("aria-label", block.querySelector("span").innerText);
        for (const tab of document.querySelectorAll("[role=tab]"))
            tab.tabIndex = tab.getAttribute("aria-selected") === "true" ? 0 : -1;
    };
    document.addEventListener("keydown", (event) => {
        const tabs = [...(event.target.closest("[role=tablist]")?.querySelectorAll("[role=tab]") ?? [])];
        const at = tabs.indexOf(event.target), last = tabs.length - 1;
        const to = {ArrowLeft: at ? at - 1 : last, ArrowRight: at < last ? at + 1 : 0, Home: 0, End: last}[event.key];
        if (at < 0 || to === undefined) return;
        event.preventDefault();
        tabs[to].focus();
        tabs[to].click();
    });
    new MutationObserver(tidy).observe(
        document.body, {childList: true, subtree: true, attributes: true, attributeFilter: ["aria-selected"]}
    );
    tidy();
}"""
STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
THEME = gr.themes.Default(
    primary_hue="indigo",
    secondary_hue="indigo",
    neutral_hue="slate",
    # The system's own: nothing is fetched.
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    # Gradio's own are too pale to read: https://www.w3.org/TR/WCAG22/#contrast-minimum
    body_text_color_subdued="*neutral_500",
    block_info_text_color="*neutral_500",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
)


@dataclass(frozen=True)
class Tab:
    """The tab of one model. task: None until the model told it; served: whether the list of models had it last."""

    model: str
    task: str | None = None
    served: bool = True


@dataclass(frozen=True)
class Seen:
    """What one page shows: the tabs, in their order. A tab stays until the page is loaded anew, with all in it."""

    tabs: tuple[Tab, ...] = ()

    @property
    def models(self) -> list[str]:
        """Names of the models that have a tab."""
        return [tab.model for tab in self.tabs]

    def of(self, model: str | None) -> Tab:
        """The tab of that model. Raises ValueError if it has none."""
        found = next((tab for tab in self.tabs if tab.model == model), None)
        if found is None:
            raise ValueError("choose a model first")
        return found

    def number(self, number: int) -> Tab:
        """The tab at that place, from 0. Raises ValueError if there is none."""
        if number >= len(self.tabs):
            raise ValueError("the page has been loaded anew: reload it here, too")
        return self.tabs[number]


class Console:
    """What the page's buttons do."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        """`folder`: where answers to download are written."""
        self._connection = connection
        self._folder = folder
        self._traffic = Traffic()
        # Models by name and version: a version that is served never changes.
        self._known: dict[tuple[str, str], ModelInfo] = {}

    def refresh(self, seen: Seen) -> list[Any]:
        """Looks again, and asks every model anew who it is."""
        self._known.clear()
        return self.look(seen)

    def look(self, seen: Seen) -> list[Any]:
        """What is served now and how it fares, what is wrong, and the tabs there are for it."""
        faults = []
        served: list[ServedModel] | None = None
        if self._connection.management_url:
            try:
                with self._connection.open() as client:
                    served = client.models()
            except (MarbleError, ValueError) as error:
                faults.append(f"{self._connection.words(error)} A model's name can be typed all the same.")
        versions = {entry.name: entry.version for entry in served or ()}
        known, silent = self._identify(
            seen.models if served is None else [entry.name for entry in served if entry.ready_workers], versions
        )
        # Of a server that is away, the first fault says it already.
        if served is not None or not faults:
            faults += [f"{', '.join(names)}: {words}" for words, names in silent.items()]
        without = self._measure()
        now = _tabs(seen, None if served is None else list(versions), known)
        left_out = sorted(versions.keys() - set(now.models))
        return [
            gr.skip()
            if served is None and faults and not known
            else render.models(served, known, self._traffic.live(), without, left_out),
            "".join(map(render.fault, faults)),
            # Left alone unless it changed: a tab may have been opened since this look began.
            gr.skip() if now == seen else now,
        ]

    def open(self, model: str, seen: Seen) -> list[Any]:
        """What is wrong with a name, the tabs with one for it, what the field is to hold, and which tab to show."""
        model = model.strip()
        try:
            if model not in seen.models:
                info = self._ask_name(model, _EMPTY)
                kept = seen.tabs[: TABS - 1]
                seen = Seen((*kept, Tab(model, info.task)))
        except (MarbleError, ValueError) as error:
            return [render.fault(self._connection.words(error)), *[gr.skip()] * 3]
        return [_EMPTY, seen, _EMPTY, gr.update(selected=seen.models.index(model))]

    def _identify(
        self, models: Sequence[str], versions: dict[str, str]
    ) -> tuple[dict[str, ModelInfo], dict[str, list[str]]]:
        """Models by name; and, by what is wrong, the names of those that do not answer."""
        known: dict[str, ModelInfo] = {}
        silent: dict[str, list[str]] = {}
        for name in models:
            try:
                known[name] = self._ask_name(name, versions.get(name, _EMPTY))
            except (MarbleError, ValueError) as error:
                silent.setdefault(self._connection.words(error), []).append(name)
        return known, silent

    def _ask_name(self, model: str, version: str) -> ModelInfo:
        if (model, version) not in self._known:
            with self._connection.open(_IDENTIFY_WITHIN_S) as client:
                self._known[model, version] = client.identify(model)
        return self._known[model, version]

    def _last_known(self, model: str) -> ModelInfo | None:
        """A stream does not tell who answers."""
        return next((info for (name, _), info in reversed(self._known.items()) if name == model), None)

    def _measure(self) -> str:
        """Takes what the server counts; returns why it cannot, "" if it can."""
        try:
            with self._connection.open(_METRICS_WITHIN_S) as client:
                self._traffic.add(time.monotonic(), client.metrics())
        except (MarbleError, ValueError) as error:
            self._traffic = Traffic()
            return self._connection.words(error)
        return _EMPTY

    def ask(
        self, number: int, seen: Seen, first: str, second: str, parameters: str, *files: str | None
    ) -> Iterator[list[Any]]:
        """Answer, facts, explanation and the three snippets; a text that is generated comes piece by piece."""
        calls: list[Any] = [gr.skip()] * 3
        try:
            tab = seen.number(number)
            task = tasks.of(tab.task)
            inputs, given, file = _request(task, first, second, files, parameters)
            asked = (self._connection.url.rstrip("/"), tab.model, inputs, given, file)
            calls = [snippets.curl(*asked), snippets.python(*asked), snippets.grpc(*asked)]
            yield [_EMPTY, render.waiting("Asking …"), _EMPTY, *calls]
            started = time.perf_counter()
            with self._connection.open() as client:
                if task.streamed:
                    yield from self._stream(client, tab.model, inputs, given, calls)
                    return
                answer = client.predict(tab.model, inputs, given)
            facts = render.facts(time.perf_counter() - started, answer.usage, answer.model)
            shown = _shown(answer.predictions, lambda: task.show(answer.predictions, inputs))
            yield [shown, facts, _EMPTY, *calls]
        except (MarbleError, ValueError) as error:
            yield [render.fault(self._connection.words(error)), _EMPTY, _EMPTY, *calls]

    def _stream(
        self, client: RestClient, model: str, prompt: Any, given: dict[str, Json], calls: list[Any]
    ) -> Iterator[list[Any]]:
        started = time.perf_counter()
        text, end = _EMPTY, None
        for token in client.stream(model, prompt, given):
            text, end = text + token.text, token.end
            yield [render.text(text), render.waiting("Generating …"), _EMPTY, *calls]
        facts = render.facts(time.perf_counter() - started, None, self._last_known(model), end)
        yield [render.text(text), facts, _EMPTY, *calls]

    def explain(
        self, number: int, seen: Seen, first: str, second: str, parameters: str, *files: str | None
    ) -> Iterator[list[Any]]:
        """Explanation and facts."""
        try:
            tab = seen.number(number)
            inputs, given, file = _request(tasks.of(tab.task), first, second, files, parameters)
            yield [render.waiting("Explaining …"), gr.skip()]
            started = time.perf_counter()
            with self._connection.open() as client:
                answer = client.explain(tab.model, inputs, given)
            facts = render.facts(time.perf_counter() - started, answer.usage, answer.model)
            picture = inputs if isinstance(inputs, bytes) and file else None
            found: Any = answer.predictions
            yield [_shown(found, lambda: render.explanation(found, inputs, picture)), facts]
        except (MarbleError, ValueError) as error:
            yield [render.fault(self._connection.words(error)), _EMPTY]

    def predict_csv(self, seen: Seen, model: str | None, content: bytes | None, parameters: str) -> Iterator[list[Any]]:
        """What is done so far, and at the end the csv with predictions."""
        nothing = gr.update(visible=False)
        yield [_EMPTY, nothing]
        try:
            tab = seen.of(model)
            task = tasks.of(tab.task)
            if content is None:
                raise ValueError("choose a csv first")
            rows = batch.read(content, task)
            given = _parameters(parameters)
            done: list[dict[str, str]] = []
            with self._connection.open() as client:
                for row in batch.predict(client, tab.model, task, rows, given, self._connection.words):
                    done.append(row)
                    if len(done) % max(1, len(rows) // 100) == 0:
                        yield [render.progress(len(done), len(rows)), nothing]
        except (MarbleError, ValueError) as error:
            yield [render.fault(self._connection.words(error)), nothing]
            return
        with tempfile.NamedTemporaryFile(
            "w", dir=self._folder, prefix="predictions-", suffix=".csv", delete=False, encoding="utf-8", newline=""
        ) as file:
            file.write(batch.write(done))
        yield [render.outcome(done), gr.update(visible=True, value=file.name)]


def _tabs(seen: Seen, served: Sequence[str] | None, known: dict[str, ModelInfo]) -> Seen:
    """The tabs after a look: those there were, then models that are new. served: None if the list cannot be read."""
    tabs = [
        replace(
            tab,
            task=known[tab.model].task if tab.model in known else tab.task,
            served=tab.served if served is None else tab.model in served,
        )
        for tab in seen.tabs
    ]
    new = [name for name in served or () if name not in seen.models]
    tabs += [Tab(name, known[name].task if name in known else None) for name in new]
    return Seen(tuple(tabs[:TABS]))


def _request(
    task: tasks.Task, first: str, second: str, files: Sequence[str | None], parameters: str
) -> tuple[Any, dict[str, Json], str | None]:
    """Inputs, parameters, and the name of the file that the inputs are."""
    given = _parameters(parameters)
    if task.media is None:
        inputs, own = task.read(first, second if task.second else "")
        return inputs, {**own, **given}, None
    path = next(filter(None, files), None)
    if path is None:
        raise ValueError("choose a file first")
    return Path(path).read_bytes(), given, Path(path).name


def _parameters(written: str) -> dict[str, Json]:
    try:
        value = json.loads(written or "{}")
    except ValueError as error:
        raise ValueError(f'the parameters are no JSON: {error}; write e.g. {{"top_k": 3}}') from None
    if not isinstance(value, dict):
        raise ValueError('the parameters are no JSON object; write e.g. {"top_k": 3}')
    return value


def _shown(predictions: Json, show: Callable[[], str]) -> str:
    try:
        return show()
    except (AttributeError, IndexError, KeyError, OSError, TypeError, ValueError):
        # Parameters can give an answer another shape.
        return render.raw(predictions)


def page(connection: Connection, folder: Path) -> gr.Blocks:
    """The page, not yet served."""
    console = Console(connection, folder)
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="Marble console", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        seen = gr.State(Seen())
        gr.HTML("<h1>Marble console</h1>")
        gr.HTML("<h2>Models</h2>")
        table = gr.HTML(_EMPTY, elem_id="models")
        status = gr.HTML(_EMPTY, elem_id="status")
        with gr.Row(elem_classes="choose"):
            model = gr.Textbox(label="Another model", info="one that the table does not list", elem_id="model")
            opening = gr.Button("Open a tab for it", elem_id="open")
            refresh = gr.Button("Refresh", elem_id="refresh")
        refused = gr.HTML(_EMPTY, elem_id="refused")
        dressed: list[Any] = []
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as tabs:
            for number in range(TABS):
                with gr.Tab(str(number), id=number, visible=False, elem_id=f"tab-{number}") as tab:
                    dressed += [tab, *_form(console, number, seen, quiet)]
            with gr.Tab("Batch", id=TABS, elem_id="batch"):
                gr.HTML("<h2>Batch</h2><p>A csv in, the same csv with predictions out.</p>")
                which = gr.Dropdown([], label="Model", elem_id="which")
                csv = gr.File(label="csv", file_types=[".csv"], type="binary", elem_id="csv")
                parameters = gr.Textbox(label="Parameters", info='JSON, e.g. {"top_k": 1}', elem_id="batch-given")
                start = gr.Button("Predict", variant="primary", elem_id="predict")
                outcome = gr.HTML(_EMPTY, elem_id="outcome")
                download = gr.DownloadButton("Download the csv", visible=False, elem_id="download")

        looked = [table, status, seen]
        arranged = [*dressed, which, csv]
        blocks.load(console.look, seen, looked, **quiet)
        blocks.load(None, js=_FOR_READERS)
        gr.Timer(LOOK_EVERY_S).tick(console.look, seen, looked, **quiet)
        refresh.click(console.refresh, seen, looked, **quiet)
        seen.change(_arrange, [seen, which], arranged, **quiet)
        gr.on([opening.click, model.submit], console.open, [model, seen], [refused, seen, model, tabs], **quiet)
        which.input(_batch_form, [seen, which], [which, csv], **quiet)
        tabs.select(_follow, seen, [which, csv], **quiet)
        start.click(console.predict_csv, [seen, which, csv, parameters], [outcome, download], **quiet)
    return blocks


def _form(console: Console, number: int, seen: gr.State, quiet: dict[str, Any]) -> list[Any]:
    """Fills the tab of a model; returns what `_dress` updates."""
    heading = gr.HTML(_EMPTY, elem_id=f"heading-{number}")
    first = gr.Textbox(label="Text", lines=3, elem_id=f"first-{number}")
    second = gr.Textbox(label="Second text", lines=3, visible=False, elem_id=f"second-{number}")
    with gr.Row():
        # No gr.Image, which reads what is chosen and fails: what is no image is the server's to say.
        image = gr.File(
            type="filepath", file_types=["image"], label="Image", visible=False, elem_id=f"image-{number}", height=240
        )
        camera = gr.Image(
            type="filepath",
            image_mode=None,
            sources=["webcam"],
            # As large as classifiers need: a picture of a whole sensor would be more than the server takes.
            webcam_options=gr.WebcamOptions(mirror=False, constraints={"video": {"width": 640, "height": 480}}),
            buttons=[],
            label="or a picture from the camera",
            visible=False,
            elem_id=f"camera-{number}",
            height=240,
        )
    audio = gr.Audio(
        type="filepath",
        sources=["upload", "microphone"],
        buttons=["download"],
        label="Sound",
        visible=False,
        elem_id=f"audio-{number}",
    )
    parameters = gr.Textbox(
        label="Parameters",
        info='JSON, e.g. {"top_k": 3}; docs/tasks.md has each task\'s',
        elem_id=f"given-{number}",
    )
    with gr.Row():
        ask = gr.Button("Ask", variant="primary", elem_id=f"ask-{number}")
        explain = gr.Button("Explain", visible=False, elem_id=f"explain-{number}")
    with gr.Row():
        with gr.Column(min_width=320):
            gr.HTML("<h3>Answer</h3>")
            answer = gr.HTML(_EMPTY, elem_id=f"answer-{number}")
            facts = gr.HTML(_EMPTY, elem_id=f"facts-{number}")
        with gr.Column(min_width=320, visible=False) as beside:
            gr.HTML("<h3>Explanation</h3>")
            explanation = gr.HTML(_EMPTY, elem_id=f"explanation-{number}")
    gr.HTML("<h3>The same call from elsewhere</h3>")
    calls = [
        gr.Textbox(
            label=label,
            interactive=False,
            max_lines=20,
            buttons=["copy"],
            elem_id=f"{name}-{number}",
            elem_classes="code",
        )
        for label, name in (("curl", "curl"), ("Python", "python"), ("gRPC, from Python", "grpc"))
    ]
    # The image that was chosen last counts.
    image.upload(None, None, camera, js="() => null", **quiet)
    camera.input(None, None, image, js="() => null", **quiet)
    asked = [seen, first, second, parameters, image, camera, audio]
    ask.click(partial(console.ask, number), asked, [answer, facts, explanation, *calls], **quiet)
    explain.click(partial(console.explain, number), asked, [explanation, facts], **quiet)
    return [heading, first, second, image, camera, audio, explain, beside]


def _dress(tab: Tab) -> list[Any]:
    """Updates of a tab and its parts, so that they fit the model's task. What was written stays."""
    task = tasks.of(tab.task)
    return [
        gr.update(label=tab.model, visible=True),
        render.heading(tab.model, tab.task, served=tab.served),
        gr.update(label=task.first, visible=task.media is None),
        gr.update(label=task.second or _EMPTY, visible=task.second is not None),
        gr.update(visible=task.media == "image"),
        gr.update(visible=task.media == "image"),
        gr.update(visible=task.media == "audio"),
        gr.update(visible=task.explained),
        gr.update(visible=task.explained),
    ]


def _arrange(seen: Seen, which: str | None) -> list[Any]:
    """Updates of all tabs."""
    rest = [gr.skip()] * (len(_dress(Tab(_EMPTY))) * (TABS - len(seen.tabs)))
    return [*(part for tab in seen.tabs for part in _dress(tab)), *rest, *_batch_form(seen, which)]


def _batch_form(seen: Seen, which: str | None) -> list[Any]:
    """Updates of the choice of a model for a csv, and of what the csv needs."""
    model = which or next(iter(seen.models), None)
    task = tasks.of(seen.of(model).task if model else None)
    label = f"csv with {' and '.join(task.needed)}" if task.columns else "csv"
    return [gr.update(choices=seen.models, value=model), gr.update(label=label)]


def _follow(seen: Seen, event: gr.SelectData) -> list[Any]:
    """Has the tab for a csv begin with the model whose own tab is shown."""
    return _batch_form(seen, event.value) if event.value in seen.models else [gr.skip()] * 2
