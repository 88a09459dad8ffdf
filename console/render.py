"""Answers as HTML. Every word of a server's or a user's is escaped; every colour comes with a word or a number."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image, ImageOps

from console.traffic import Live
from marble_client import ModelInfo, ServedModel, TextEnd, Usage

# The longer side, in pixels, of an image that is shown.
_SIDE = 480


def bars(scores: Sequence[tuple[str, float]], what: str) -> str:
    """A table of names and scores, each with a bar as long as its score, or as its share of the largest of them."""
    if not scores:
        return "<p>Nothing reached its threshold.</p>"
    largest = max(1.0, *(abs(score) for _, score in scores))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="number">{score:.4f}</td>'
        f'<td class="bar"><span style="width:{100 * max(score, 0) / largest:.1f}%"></span></td></tr>'
        for name, score in scores
    )
    return (
        f'<table class="bars"><thead><tr><th scope="col">{escape(what)}</th><th scope="col">Score</th>'
        f"<td></td></tr></thead><tbody>{rows}</tbody></table>"
    )


def entities(found: Sequence[Mapping[str, Any]], asked: str) -> str:
    """The text with its entities marked and named."""
    return f'<p class="text">{_marked(asked, found)}</p>' + ("" if found else "<p>No entity was found.</p>")


def _marked(text: str, found: Sequence[Mapping[str, Any]]) -> str:
    parts, end = [], 0
    for entity in sorted(found, key=lambda entity: int(entity["start"])):
        label = entity.get("entity_group", entity.get("entity", ""))
        words = f"{escape(str(label))} {entity['score']:.2f}"
        parts.append(escape(text[end : entity["start"]]))
        end = entity["end"]
        parts.append(f"<mark>{escape(text[entity['start'] : end])} <small>{words}</small></mark>")
    return "".join([*parts, escape(text[end:])])


def answer(found: Mapping[str, Any], context: str) -> str:
    """The answer to a question, and where it stands."""
    if not found["answer"]:
        return f"<p>The text holds no answer (score {found['score']:.2f}).</p>"
    start, end = found["start"], found["end"]
    marked = f"{escape(context[:start])}<mark>{escape(context[start:end])}</mark>{escape(context[end:])}"
    return f'<p><strong>{escape(found["answer"])}</strong> (score {found["score"]:.2f})</p><p class="text">{marked}</p>'


def text(words: str) -> str:
    """A text as it is, line breaks included."""
    return f'<p class="text">{escape(words)}</p>'


def raw(value: Any) -> str:
    """JSON. Lists of numbers are cut short: nobody reads 384 of them."""
    return f'<pre tabindex="0">{escape(json.dumps(_short(value), ensure_ascii=False, indent=2))}</pre>'


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(entry) for name, entry in value.items()}
    if not isinstance(value, list):
        return value
    if len(value) > 16 and all(isinstance(entry, float) for entry in value):
        return [*value[:8], f"… {len(value) - 8} more numbers"]
    return [_short(entry) for entry in value]


def image(content: str) -> str:
    """An image that a model painted, from base64."""
    return f'<img alt="what the model painted" src="data:image/png;base64,{escape(content)}">'


def sound(content: str) -> str:
    """What a model said, from base64."""
    return f'<audio controls aria-label="what the model said" src="data:audio/wav;base64,{escape(content)}"></audio>'


def explanation(found: Mapping[str, Any], asked: Any, picture: bytes | None) -> str:
    """For each answer, the words or squares that speak for it and against it."""
    if not found["explanations"]:
        return "<p>There was no answer to explain.</p>"
    fields = list(asked.values()) if isinstance(asked, dict) else [asked]
    shown = []
    for entry in found["explanations"]:
        named = entry.get("label", entry.get("entity_group", entry.get("entity", entry.get("answer", ""))))
        word = f" ({escape(entry['word'])})" if "word" in entry else ""
        heading = f"<h4>{escape(str(named))}{word}: score {entry['score']:.2f}, value {entry['value']:.2f}</h4>"
        if picture is None:
            shown.append(heading + _words(entry["attributions"], fields))
        else:
            shown.append(heading + heat_map(entry["heat_map"], entry["box"], picture))
    legend = '<p><span class="for">Orange</span> and above 0 speaks for the answer, <span class="against">blue</span> '
    return f"{legend}and below 0 against it. Method: {escape(str(found['method']))}.</p>{''.join(shown)}"


def _words(attributions: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str:
    strongest = max((abs(word["score"]) for word in attributions), default=0) or 1
    shown = []
    for index, field in enumerate(fields):
        parts, end = [], 0
        for word in attributions:
            if word.get("text", 0) != index:
                continue
            parts.append(escape(field[end : word["start"]]))
            end = word["end"]
            side, share = ("for" if word["score"] > 0 else "against"), abs(word["score"]) / strongest
            parts.append(
                f'<span class="{side}" style="--share:{share:.2f}">{escape(field[word["start"] : end])}'
                f"<small> {word['score']:+.2f}</small></span>"
            )
        shown.append(f'<p class="text words">{"".join(parts)}{escape(field[end:])}</p>')
    return "".join(shown)


def heat_map(rows: Sequence[Sequence[float]], box: Mapping[str, float], picture: bytes) -> str:
    """The image with its squares coloured. `box`: what they cover of it, in pixels."""
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGB")
    width, height = upright.size
    upright.thumbnail((_SIDE, _SIDE))
    png = io.BytesIO()
    upright.save(png, "PNG")
    wide = (box["xmax"] - box["xmin"]) / len(rows[0])
    high = (box["ymax"] - box["ymin"]) / len(rows)
    strongest = max(abs(score) for row in rows for score in row) or 1
    squares = "".join(
        f'<rect x="{box["xmin"] + x * wide:.2f}" y="{box["ymin"] + y * high:.2f}" width="{wide:.2f}" '
        f'height="{high:.2f}" fill="{"#d9480f" if score > 0 else "#1864ab"}" '
        f'fill-opacity="{0.75 * abs(score) / strongest:.2f}"><title>{score:+.3f}</title></rect>'
        for y, row in enumerate(rows)
        for x, score in enumerate(row)
    )
    y, x = max(((y, x) for y in range(len(rows)) for x in range(len(rows[0]))), key=lambda at: rows[at[0]][at[1]])
    words = f"heat map of {len(rows)} rows of {len(rows[0])} squares; row {y + 1}, column {x + 1} speaks most for it"
    return (
        f'<svg role="img" aria-label="{words}" viewBox="0 0 {width} {height}" class="heat">'
        f'<image width="{width}" height="{height}" href="data:image/png;base64,'
        f'{base64.b64encode(png.getvalue()).decode("ascii")}"/>{squares}</svg>'
    )


def facts(seconds: float, usage: Usage | None, model: ModelInfo | None, end: TextEnd | None = None) -> str:
    """What an answer cost and who made it. A stream tells its `end`, and nothing of the other two."""
    rows = {"Latency": f"{1000 * seconds:,.0f} ms"}
    if usage is not None:
        rows |= {"Tokens": f"{usage.tokens:,}", "Windows": f"{usage.windows:,}"}
        cut = 'yes: the end was not read; the parameter "overflow": "window" reads all of it, "error" refuses it'
        rows["Truncated"] = cut if usage.truncated else "no"
    if end is not None:
        rows |= {"Generated tokens": f"{end.generated_tokens:,}", "Ended by": end.finish_reason}
    if model is not None:
        rows |= {"Model": f"{model.name} {model.version}", "Digest": model.digest}
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in rows.items())
    return f'<dl class="facts">{listed}</dl>'


def models(
    served: Sequence[ServedModel] | None,
    known: Mapping[str, ModelInfo],
    live: Mapping[str, Live],
    without: str,
    left_out: Sequence[str],
) -> str:
    """The table of what is served and how it fares.

    served: None where the list cannot be had. known: what each model said of itself; those that are not among `served`
    were named by hand. without: why nothing is
    counted, "" if it is. left_out: models that have no tab.
    """
    listed = [(model.name, model.version, f"{model.ready_workers} of {model.workers}") for model in served or ()]
    named = known.keys() - {name for name, _, _ in listed}
    listed += [(name, known[name].version, "unknown") for name in sorted(named)]
    if not listed and served is None:
        return "<p>The list of models is not to be had from here: write the name of one below.</p>"
    if not listed:
        return "<p>No model is served: build one with build_mar.sh and start it with scripts/serve.</p>"
    rows = []
    for name, version, ready in listed:
        info = known.get(name)
        task, digest = (info.task or "not told", info.digest) if info else ("unknown", "unknown")
        numbers = _live(None if without else live.get(name, Live(0)))
        cells = [
            *(f"<td>{escape(cell)}</td>" for cell in (version, ready, task)),
            *(f'<td class="number">{number}</td>' for number in numbers),
            f"<td>{escape(digest[:16])}{'…' if len(digest) > 16 else ''}</td>",
        ]
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}')
    names = ("Model", "Version", "Ready workers", "Task", *_LIVE, "Digest")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    note = "Requests since the server started; the rest of the last minute."
    if without:
        note = f"No metrics: {escape(without)}"
    more = f"<p>Without a tab, for there are too many: {escape(', '.join(left_out))}</p>" if left_out else ""
    body = "</tr>".join(rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Models served"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tr></tbody></table></div><p>{note}</p>{more}"
    )


_LIVE = ("Requests", "A second", "Failed", "p50", "p95", "Queued")


def _live(model: Live | None) -> list[str]:
    """How a model fares, in the columns of `_LIVE`; a dash for what is not known."""
    if model is None:
        return ["–"] * len(_LIVE)

    def milliseconds(seconds: float | None) -> str:
        return "–" if seconds is None else f"{1000 * seconds:,.0f} ms"

    return [
        f"{model.requests:,}",
        "–" if model.rate is None else f"{model.rate:.{1 if model.rate >= 1 else 2}f}",
        "–" if model.failed is None else f"{100 * model.failed:.1f} %",
        *map(milliseconds, (model.median, model.tail, model.queue)),
    ]


def waiting(words: str) -> str:
    """That an answer is on its way."""
    return f"<p>{escape(words)}</p>"


def fault(words: str) -> str:
    """What went wrong; read aloud at once."""
    return f'<p class="fault" role="alert">{escape(words)}</p>'


def heading(model: str, task: str | None, *, served: bool) -> str:
    """Of the tab that asks a model."""
    gone = "" if served else " (not served now)"
    return f"<h2>Ask {escape(model)}</h2><p>{escape(task or 'its task is not known')}{gone}</p>"


def progress(done: int, rows: int) -> str:
    """How far a csv is."""
    return f'<p><progress aria-label="rows done" value="{done}" max="{rows}"></progress> {done:,} of {rows:,} rows</p>'


def outcome(rows: Sequence[Mapping[str, str]]) -> str:
    """How many rows of a csv were answered, and what was wrong with the first of the others."""
    failed = [(number, row["error"]) for number, row in enumerate(rows, start=1) if row["error"]]
    told = f'<p role="status">{len(rows):,} rows, {len(failed):,} with an error.</p>'
    listed = "".join(f"<li>row {number}: {escape(error)}</li>" for number, error in failed[:10])
    return told + (f"<ul>{listed}</ul>" if failed else "")
