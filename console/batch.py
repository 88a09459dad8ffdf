"""A csv with predictions added, row by row: one that fails has its error beside it and hurts no other."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from console.tasks import Task
from marble_client import Answer, ConnectionFailed, Json, MarbleError, NotFound, RestClient, Unauthorized

ADDED = ("prediction", "score", "error")
# Rows asked at a time: enough for the server to batch them, few enough to leave room for others.
_AT_A_TIME = 8


def read(content: bytes, task: Task) -> list[dict[str, str]]:
    """The rows of a csv. Raises ValueError, which names the columns that are wanted, if they are not all there."""
    if not task.columns:
        raise ValueError("this model reads or writes files, which a csv cannot hold: ask it one by one")
    try:
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), restkey="", restval="")
        header = rows.fieldnames or []
        if missing := [name for name in task.needed if name not in header]:
            found = ", ".join(header) or "none"
            raise ValueError(
                f"the csv has no column {missing[0]!r}; this model wants {', '.join(task.needed)}; found: {found}"
            )
        if taken := [name for name in ADDED if name in header]:
            raise ValueError(f"the csv has a column {taken[0]!r} already, which would be overwritten: rename it")
        found_rows = [{name: row[name] for name in header} for row in rows]
    except UnicodeDecodeError:
        raise ValueError("the csv is not UTF-8: convert it first, e.g. iconv -f latin1 -t utf-8") from None
    except csv.Error as error:
        raise ValueError(f"this is no csv: {error}") from None
    if not found_rows:
        raise ValueError("the csv has no rows below its header")
    return found_rows


def predict(
    client: RestClient,
    model: str,
    task: Task,
    rows: list[dict[str, str]],
    parameters: Mapping[str, Json],
    words: Callable[[Exception], str],
) -> Iterator[dict[str, str]]:
    """Each row with its prediction, in order. What would fail for all ends the asking, and stands in every row left."""
    ended: list[str] = []

    def ask(row: dict[str, str]) -> dict[str, str]:
        if ended:
            return {**row, "prediction": "", "score": "", "error": f"not asked: {ended[0]}"}
        first, second, *_ = itertools.chain((row.get(name, "") for name in task.columns), [""])
        try:
            inputs, own = task.read(first, second)
            return {**row, **_cells(client.predict(model, inputs, {**own, **parameters})), "error": ""}
        except (MarbleError, ValueError) as error:
            if isinstance(error, ConnectionFailed | NotFound | Unauthorized):
                ended.append(words(error))
            return {**row, "prediction": "", "score": "", "error": words(error)}

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        yield from pool.map(ask, rows)


def _cells(answer: Answer[Json]) -> dict[str, str]:
    """The best answer and its score where there is one; else all of it as JSON."""
    best: Any = answer.predictions
    while isinstance(best, list) and best and isinstance(best[0], dict | list) and not _is_entity(best[0]):
        best = best[0]
    if isinstance(best, dict):
        for name in ("label", "answer", "token_str", "generated_text", "summary_text", "translation_text"):
            if name in best:
                return {"prediction": str(best[name]), "score": str(best.get("score", ""))}
    return {"prediction": json.dumps(answer.predictions, ensure_ascii=False), "score": ""}


def _is_entity(entry: Any) -> bool:
    """Whether it is one of a text's entities, which all count."""
    return "entity" in entry or "entity_group" in entry


def write(rows: list[dict[str, str]]) -> str:
    """The rows as csv."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
