"""What of a row of a table is the input, and what becomes of its result in the output."""

from collections.abc import Callable, Mapping
from pathlib import Path

from marble_client.answer import Input, Json
from marble_client.tables import Kinds, Row, plain

# The columns that are added, and what they hold.
ADDED: Kinds = {"label": "string", "score": "number", "prediction": "json", "error": "string"}
# Columns that are one input together: the names it is sent under, each with its column. Pairs as train.py takes them.
_TOGETHER = (
    {"text": "text", "text_pair": "text_pair"},
    {"text": "text_a", "text_pair": "text_b"},
    {"text": "sentence1", "text_pair": "sentence2"},
    {"text": "premise", "text_pair": "hypothesis"},
    {"text": "question1", "text_pair": "question2"},
    {"text": "question", "text_pair": "sentence"},
    {"question": "question", "context": "context"},
)


def reader(path: Path, kinds: Kinds, column: str | None) -> Callable[[Row], Input]:
    """What makes an input of a row. column: the input's; None goes by the names. Raises ValueError if there is none."""
    if column is None and "text" in kinds and "text_pair" not in kinds:
        column = "text"
    if column in kinds:
        return lambda row: plain(row.get(column))
    together = next((names for names in _TOGETHER if set(names.values()) <= kinds.keys()), None)
    if column is None and together is not None:
        return lambda row: {name: plain(row.get(of)) for name, of in together.items()}
    there = ", ".join(map(repr, kinds)) or "none"
    raise ValueError(f"{path}: there is no column {column or 'text'!r}; the file has {there}: name it with --column")


def free_names(path: Path, kinds: Kinds) -> dict[str, str]:
    """The names of the columns that are added; the input's own keep theirs. Raises ValueError if both are taken."""
    names = {name: f"predicted_{name}" if name in kinds else name for name in ADDED}
    if taken := [name for name in names.values() if name in kinds]:
        raise ValueError(f"{path}: the columns {taken[0]!r} and {taken[0].removeprefix('predicted_')!r} are both taken")
    return names


def are_labels(prediction: Json) -> bool:
    """Whether a prediction is that of a classification."""
    return isinstance(prediction, list) and all(
        isinstance(entry, dict) and entry.keys() == {"label", "score"} for entry in prediction
    )


def added(labels: bool | None, parameters: Mapping[str, Json]) -> Callable[[Json], dict[str, Json]]:
    """What becomes of a result, an object with a prediction or an error; of None, for the names.

    labels: whether the predictions are those of a classification. parameters: what they were asked with.
    """
    several = parameters.get("top_k", 1) != 1 or "threshold" in parameters
    if not labels or several:
        return lambda result: {"prediction": _of(result, "prediction"), "error": _of(result, "error")}

    def best(result: Json) -> dict[str, Json]:
        found = _of(result, "prediction")
        label = found[0] if isinstance(found, list) and found else None
        return {"label": _of(label, "label"), "score": _of(label, "score"), "error": _of(result, "error")}

    return best


def _of(value: Json, name: str) -> Json:
    return value.get(name) if isinstance(value, dict) else None
