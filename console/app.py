"""The page: what is served, a form that fits the model's task, its answer, and a csv at a time."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from console import batch, render, snippets, tasks
from console.connection import Connection
from marble_client import Json, MarbleError, ModelInfo, ServedModel

# Seconds between two looks at what is served. Each asks the management API alone; a model is asked once for its task.
LOOK_EVERY_S = 5
_IDENTIFY_WITHIN_S = 10
_EMPTY = ""
# What Gradio has no way to say: what is read aloud when it changes, and the name of a field with a button in its label.
_FOR_READERS = """() => {
    for (const id of ["status", "facts"]) document.getElementById(id).setAttribute("aria-live", "polite");
    for (const block of document.querySelectorAll(".code"))
        block.querySelector("textarea").setAttribute("aria-label", block.querySelector("span").innerText);
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
class Seen:
    """What one page shows: the models to choose from, the one that is chosen, and its task."""

    names: tuple[str, ...] = ()
    model: str | None = None
    task: str | None = None


class Console:
    """What the page's buttons do."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        """`folder`: where answers to download are written."""
        self._connection = connection
        self._folder = folder
        # Models by name and version: a version that is served never changes.
        self._known: dict[tuple[str, str], ModelInfo] = {}

    def refresh(self, model: str | None, seen: Seen) -> list[Any]:
        """Looks again, and asks every model anew who it is."""
        self._known.clear()
        return self.look(model, seen)

    def look(self, model: str | None, seen: Seen) -> list[Any]:
        """What is served now; updates the form if it no longer fits the model that is chosen."""
        faults = []
        served: list[ServedModel] = []
        try:
            with self._connection.open() as client:
                served = client.models()
        except (MarbleError, ValueError) as error:
            faults.append(f"{self._connection.words(error)} A model's name can be typed all the same.")
        versions = {entry.name: entry.version for entry in served}
        model = model or next(iter(versions), None)
        known = {}
        silent: dict[str, list[str]] = {}
        for name in sorted({*(entry.name for entry in served if entry.ready_workers), *([model] if model else [])}):
            try:
                known[name] = self._identify(name, versions.get(name, ""))
            except (MarbleError, ValueError) as error:
                if served or name != seen.model:  # else the first fault says it already
                    silent.setdefault(self._connection.words(error), []).append(name)
        faults += [f"{', '.join(names)}: {words}" for words, names in silent.items()]
        info = known.get(model or "")
        # A model that is away for a moment keeps its form, with what was written into it.
        task = info.task if info else seen.task if model == seen.model else None
        now = Seen(tuple(versions) or seen.names, model, task)
        return [
            gr.skip() if faults and not served else render.models(served, known),
            "".join(map(render.fault, faults)),
            gr.skip() if now.names == seen.names and now.model == seen.model else _choice(now),
            # Left alone unless it changed: another model may have been chosen since this look began.
            gr.skip() if now == seen else now,
            *([gr.skip()] * 13 if (now.model, now.task) == (seen.model, seen.task) else _form(now)),
        ]

    def _identify(self, model: str, version: str) -> ModelInfo:
        if (model, version) not in self._known:
            with self._connection.open(_IDENTIFY_WITHIN_S) as client:
                self._known[model, version] = client.identify(model)
        return self._known[model, version]

    def _last_known(self, model: str) -> ModelInfo | None:
        """A stream does not tell who answers."""
        return next((info for (name, _), info in reversed(self._known.items()) if name == model), None)

    def ask(
        self, seen: Seen, first: str, second: str, image: str | None, audio: str | None, parameters: str
    ) -> Iterator[list[Any]]:
        """Answer, facts, explanation and the three snippets; a text that is generated comes piece by piece."""
        task = tasks.of(seen.task)
        calls: list[Any] = [gr.skip()] * 3
        try:
            inputs, given, file = _request(task, first, second, image or audio, parameters)
            name = _chosen(seen)
            asked = (self._connection.url.rstrip("/"), name, inputs, given, file)
            calls = [snippets.curl(*asked), snippets.python(*asked), snippets.grpc(*asked)]
            yield [_EMPTY, render.waiting("Asking …"), _EMPTY, *calls]
            started = time.perf_counter()
            with self._connection.open() as client:
                if task.streamed:
                    text, end = "", None
                    for token in client.stream(name, inputs, given):
                        text, end = text + token.text, token.end
                        yield [render.text(text), render.waiting("Generating …"), _EMPTY, *calls]
                    facts = render.facts(time.perf_counter() - started, None, self._last_known(name), end)
                    yield [render.text(text), facts, _EMPTY, *calls]
                    return
                answer = client.predict(name, inputs, given)
            facts = render.facts(time.perf_counter() - started, answer.usage, answer.model)
            shown = _shown(answer.predictions, lambda: task.show(answer.predictions, inputs))
            yield [shown, facts, _EMPTY, *calls]
        except (MarbleError, ValueError) as error:
            yield [render.fault(self._connection.words(error)), _EMPTY, _EMPTY, *calls]

    def explain(
        self, seen: Seen, first: str, second: str, image: str | None, audio: str | None, parameters: str
    ) -> Iterator[list[Any]]:
        """Explanation and facts."""
        task = tasks.of(seen.task)
        try:
            inputs, given, file = _request(task, first, second, image or audio, parameters)
            yield [_EMPTY, render.waiting("Explaining …")]
            started = time.perf_counter()
            with self._connection.open() as client:
                answer = client.explain(_chosen(seen), inputs, given)
            facts = render.facts(time.perf_counter() - started, answer.usage, answer.model)
            picture = inputs if isinstance(inputs, bytes) and file else None
            found: Any = answer.predictions
            yield [_shown(found, lambda: render.explanation(found, inputs, picture)), facts]
        except (MarbleError, ValueError) as error:
            yield [render.fault(self._connection.words(error)), _EMPTY]

    def predict_csv(self, seen: Seen, content: bytes | None, parameters: str) -> Iterator[list[Any]]:
        """What is done so far, and at the end the csv with predictions."""
        nothing = gr.update(visible=False)
        yield [_EMPTY, nothing]
        try:
            name, task = _chosen(seen), tasks.of(seen.task)
            if content is None:
                raise ValueError("choose a csv first")
            rows = batch.read(content, task)
            given = _parameters(parameters)
            done: list[dict[str, str]] = []
            with self._connection.open() as client:
                for row in batch.predict(client, name, task, rows, given, self._connection.words):
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


def _choice(seen: Seen) -> Any:
    return gr.update(choices=list(seen.names), value=seen.model)


def _form(seen: Seen) -> list[Any]:
    """Updates of the fields and of the button that explains. What another model answered goes."""
    task = tasks.of(seen.task)
    return [
        gr.update(label=task.first, visible=task.media is None),
        gr.update(label=task.second or "", visible=task.second is not None),
        gr.update(visible=task.media == "image", value=None),
        gr.update(visible=task.media == "audio", value=None),
        gr.update(visible=task.explained),
        gr.update(label=_csv_label(task)),
        render.heading(seen.model, seen.task),
        *[_EMPTY] * 6,
    ]


def _csv_label(task: tasks.Task) -> str:
    return f"csv with {' and '.join(task.needed)}" if task.columns else "csv"


def _chosen(seen: Seen) -> str:
    if seen.model is None:
        raise ValueError("choose a model first")
    return seen.model


def _request(
    task: tasks.Task, first: str, second: str, path: str | None, parameters: str
) -> tuple[Any, dict[str, Json], str | None]:
    """Inputs, parameters, and the name of the file that the inputs are."""
    given = _parameters(parameters)
    if task.media is None:
        inputs, own = task.read(first, second if task.second else "")
        return inputs, {**own, **given}, None
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
            model = gr.Dropdown([], label="Model", allow_custom_value=True, elem_id="model")
            refresh = gr.Button("Refresh", elem_id="refresh")
        with gr.Tabs():
            with gr.Tab("Ask"):
                heading = gr.HTML("<h2>Ask</h2>", elem_id="chosen")
                first = gr.Textbox(label="Text", lines=3, elem_id="first")
                second = gr.Textbox(label="Second text", lines=3, visible=False, elem_id="second")
                # No gr.Image, which reads what is chosen and fails: what is no image is the server's to say.
                image = gr.File(
                    type="filepath", file_types=["image"], label="Image", visible=False, elem_id="image", height=140
                )
                audio = gr.Audio(
                    type="filepath", sources=["upload", "microphone"], label="Sound", visible=False, elem_id="audio"
                )
                parameters = gr.Textbox(
                    label="Parameters", info='JSON, e.g. {"top_k": 3}; docs/tasks.md has each task\'s', elem_id="given"
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    explain = gr.Button("Explain", visible=False, elem_id="explain")
                gr.HTML("<h3>Answer</h3>")
                answer = gr.HTML(_EMPTY, elem_id="answer")
                facts = gr.HTML(_EMPTY, elem_id="facts")
                explanation = gr.HTML(_EMPTY, elem_id="explanation")
                gr.HTML("<h3>The same call from elsewhere</h3>")
                calls = [
                    gr.Textbox(
                        label=label,
                        interactive=False,
                        max_lines=20,
                        buttons=["copy"],
                        elem_id=name,
                        elem_classes="code",
                    )
                    for label, name in (("curl", "curl"), ("Python", "python"), ("gRPC, from Python", "grpc"))
                ]
            with gr.Tab("Batch"):
                gr.HTML("<h2>Batch</h2><p>A csv in, the same csv with predictions out.</p>")
                csv = gr.File(label="csv", file_types=[".csv"], type="binary", elem_id="csv")
                batch_parameters = gr.Textbox(label="Parameters", info='JSON, e.g. {"top_k": 1}', elem_id="batch-given")
                start = gr.Button("Predict", variant="primary", elem_id="predict")
                outcome = gr.HTML(_EMPTY, elem_id="outcome")
                download = gr.DownloadButton("Download the csv", visible=False, elem_id="download")

        answered = [answer, facts, explanation, *calls]
        looked = [table, status, model, seen, first, second, image, audio, explain, csv, heading, *answered]
        blocks.load(console.look, [model, seen], looked, **quiet)
        blocks.load(None, js=_FOR_READERS)
        gr.Timer(LOOK_EVERY_S).tick(console.look, [model, seen], looked, **quiet)
        model.input(console.look, [model, seen], looked, **quiet)
        refresh.click(console.refresh, [model, seen], looked, **quiet)
        asked = [seen, first, second, image, audio, parameters]
        ask.click(console.ask, asked, answered, **quiet)
        explain.click(console.explain, asked, [explanation, facts], **quiet)
        start.click(console.predict_csv, [seen, csv, batch_parameters], [outcome, download], **quiet)
    return blocks
