"""What people read of a training run: the model card, and `report.html`, one file that opens offline."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite, log10, nan
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup
from numpy.typing import NDArray
from transformers.pipelines import PIPELINE_REGISTRY

from handler import golden
from handler.engine import Engine
from handler.tasks.media_classification import MediaClassification
from handler.tasks.text_classification import TextClassification
from training import calibration, care, evaluation, label_errors, mistakes
from training.calibration import Bin
from training.charts import Points, Scale, chart, scale
from training.templating import render

# Labels of which a confusion matrix is shown whole, pairs that are shown of a larger one, and curves of thresholds.
_MATRIX, _PAIRS, _CURVES = 20, 15, 6
_HISTOGRAM_BARS = 24
_SUSPECTS = 20
_THRESHOLDS = np.linspace(0.02, 0.98, 49)
# Names that the Hugging Face hub has for metrics, where they differ from ours.
_HUB_METRICS = {"macro_f1": "f1"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the report shows besides metrics and provenance.

    examples, predictions: by split, those that the metrics are of. golden: examples in the golden set. lengths: tokens
    of each row by split, {} where that says nothing.
    """

    engine: Engine
    examples: Mapping[str, Sequence[Mapping[str, Any]]]
    predictions: Mapping[str, Sequence[Any]]
    golden: int
    findings: care.Findings
    lengths: Mapping[str, Sequence[int]]


def write(stage: Path, name: str, metrics: dict[str, Any], provenance: dict[str, Any], evidence: Evidence) -> None:
    """Writes `README.md` and `report.html` into the bundle."""
    base = provenance["base_model"]["name"]
    scores = list(metrics["splits"].values())
    facts = {
        "name": name,
        "task": metrics["task"],
        "labels": metrics["labels"],
        "origin": f"fine-tuned from `{base}`" if metrics.get("epochs") is not None else f"`{base}` as it is",
        "base": base,
        "splits": metrics["splits"],
        "columns": [key for key, value in (scores[0] if scores else {}).items() if isinstance(value, float)],
        "max_length": metrics["settings"].get("max_length"),
        "overflow": metrics["settings"].get("overflow"),
    }
    balance = ", ".join(f"{label} {count}" for label, count in metrics["rows_per_label"].get("train", {}).items())
    card = render(
        "README.md.j2",
        **{**facts, "labels": ", ".join(metrics["labels"])},
        metadata=_metadata(name, metrics, provenance),
        balance=balance,
        private=metrics.get("private"),
        pipeline=metrics["task"] in PIPELINE_REGISTRY.get_supported_tasks(),
    )
    page = render(
        "report.html.j2",
        **facts,
        rows=metrics["rows"],
        counts={split: counts for split, counts in metrics["rows_per_label"].items() if counts},
        skipped=metrics["rows_skipped"],
        findings=evidence.findings,
        shown=care.SHOWN,
        lengths=_lengths(evidence.lengths, metrics["settings"].get("max_length", 0)),
        epochs=metrics.get("epochs", []),
        losses=metrics.get("training_loss", []),
        choices=metrics.get("choices", []),
        learning=_learning(metrics.get("epochs", [])),
        curves=learning_curves(metrics.get("epochs", []), metrics.get("training_loss", [])),
        search=search(metrics.get("search", []), metrics.get("search_metric", "")),
        folds=metrics.get("folds"),
        seconds=metrics.get("training_seconds"),
        samples_per_second=metrics.get("training_samples_per_second"),
        matrix=_MATRIX,
        confused={split: _confused(entry.get("entity_confusion", entry)) for split, entry in metrics["splits"].items()},
        **_answers(evidence, metrics["labels"]),
        membership=metrics.get("membership"),
        private=metrics.get("private"),
        golden=_golden(stage, evidence),
        provenance=provenance,
        facts=list(_flat({key: value for key, value in provenance.items() if key not in ("versions", "machine")})),
    )
    (stage / "README.md").write_text(card, encoding="utf-8")
    (stage / "report.html").write_text(page, encoding="utf-8")


def figures(scores: dict[str, Any]) -> list[str]:
    """The single figures among metrics, as people read them: "accuracy 0.9120"."""
    return [f"{key.replace('_', '-')} {value:.4f}" for key, value in scores.items() if isinstance(value, float)]


def _lengths(lengths: Mapping[str, Sequence[int]], limit: int) -> dict[str, dict[str, Any]]:
    """Of each split: a histogram, quantiles, and how many rows are longer than the model's limit."""
    shown = {}
    for split, tokens in lengths.items():
        # A few giants would leave one bar for all others.
        most = int(np.percentile(tokens, 99))
        width = most // _HISTOGRAM_BARS + 1
        heights = np.bincount(np.minimum(tokens, most) // width).tolist()
        x = Scale("tokens, the longest hundredth in the last bar", 0, len(heights) * width)
        y = scale("rows", heights)
        bars = [(number * width, (number + 1) * width, height) for number, height in enumerate(heights)]
        rule = (limit, y.low, limit, y.high) if limit <= x.high else None
        shortest, median, tail, longest = np.percentile(tokens, [0, 50, 95, 100]).astype(int).tolist()
        shown[split] = {
            "chart": chart(f"{split}: rows by tokens", x, y, bars=bars, rule=rule),
            "quantiles": {"shortest": shortest, "median": median, "95 of 100 have at most": tail, "longest": longest},
            "over": sum(count > limit for count in tokens),
            "share": sum(count > limit for count in tokens) / len(tokens),
        }
    return shown


def _learning(epochs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures of the learning curve, by their key in the Trainer's log: validation loss and the task's metrics."""
    keys = [key for key in (epochs[0] if epochs else {}) if key.startswith("eval_") and not key.endswith("_per_second")]
    return {
        key: "validation loss" if key == "eval_loss" else key.removeprefix("eval_").replace("_", "-")
        for key in keys
        if key != "eval_runtime"
    }


def learning_curves(epochs: Sequence[Mapping[str, Any]], losses: Sequence[Mapping[str, float]]) -> list[Markup]:
    """The losses in one chart, metrics from 0 to 1 in another, and one for each metric of another scale."""
    logs = {"training loss": ("loss", losses)} | {name: (key, epochs) for key, name in _learning(epochs).items()}
    series = {
        name: [(entry["epoch"], entry[key]) for entry in log if isfinite(entry.get(key, nan))]
        for name, (key, log) in logs.items()
    }
    groups: dict[str, dict[str, Points]] = defaultdict(dict)
    for name, points in series.items():
        if points:
            shares = all(0 <= value <= 1 for _, value in points)
            group = "Loss" if name.endswith(" loss") else "Validation metrics" if shares else name.capitalize()
            groups[group][name] = points
    charts = []
    for title, lines in groups.items():
        x = scale("epoch", [epoch for points in lines.values() for epoch, _ in points])
        y = scale(title.lower(), [value for points in lines.values() for _, value in points])
        charts.append(chart(title, x, y, lines=lines))
    return charts


def search(trials: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    """Charts and rows of the trials that metrics.json has; `best` is the number of the best one. None without trials.

    metric: what they are judged by; of a loss the lowest is the best.
    """
    if not trials:
        return None
    sign = -1 if metric == "loss" else 1
    values = {number: trial["value"] for number, trial in enumerate(trials, start=1) if trial["value"] is not None}
    complete = [number for number in values if trials[number - 1]["state"] == "complete"]
    best = max(complete, key=lambda number: sign * values[number])
    so_far = accumulate((sign * value for value in values.values()), max)
    name = metric.replace("_", "-")
    lines = {name: list(values.items()), "best so far": [(n, sign * v) for n, v in zip(values, so_far, strict=True)]}
    y = _close(name, list(values.values()))
    charts = [chart(f"{name} by trial", scale("trial", list(values)), y, lines=lines)]
    rates = [(log10(trials[n - 1]["parameters"].get("learning_rate", 1)), value) for n, value in values.items()]
    if "learning_rate" in trials[0]["parameters"]:
        x = _close("learning rate, as a power of ten", [rate for rate, _ in rates])
        charts.append(chart(f"{name} by learning rate", x, y, lines={name: rates}, joined=False))
    return {"charts": charts, "trials": trials, "best": best, "names": list(trials[0]["parameters"]), "metric": name}


def _close(title: str, values: Sequence[float]) -> Scale:
    """An axis around values that may be far from zero."""
    margin = (max(values) - min(values)) / 20 or 0.05
    return Scale(title, min(values) - margin, max(values) + margin)


def _confused(scores: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """The pairs of labels (true, predicted, rows) that are confused most; [] without a confusion matrix."""
    labels, matrix = scores.get("labels", []), scores.get("confusion_matrix", [])
    pairs = [
        (labels[true], labels[found], count)
        for true, row in enumerate(matrix)
        for found, count in enumerate(row)
        if true != found and count
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:_PAIRS]


def _answers(evidence: Evidence, labels: Sequence[str]) -> dict[str, Any]:
    """What the answers show: calibration of one label, curves of thresholds of several, and the hardest mistakes."""
    engine, known = evidence.engine, evidence.examples.get("validation", [])
    predictions = evidence.predictions.get("validation", [])
    answers: dict[str, Any] = {}
    if isinstance(engine.task, TextClassification) and known and isinstance(known[0]["target"], list):
        # Those that the metrics are of have only the labels above their thresholds.
        asked = [{"inputs": row["inputs"], "parameters": {"overflow": "truncate"}} for row in known]
        predictions = evaluation.predict(engine, asked)
        answers["thresholds"] = _thresholds(engine, known, evaluation.score_table(predictions, labels), labels)
    elif isinstance(engine.task, TextClassification | MediaClassification):
        # A regression has numbers.
        splits = {split: rows for split, rows in evidence.examples.items() if isinstance(rows[0]["target"], str)}
        applied = engine.settings.options.get("temperature")
        tables = _tables(splits, evidence.predictions, labels)
        answers["calibration"] = _calibration(tables, applied)
        answers["coverage"] = _coverage(tables, engine.settings.options.get("thresholds"))
        answers["suspects"] = _suspects(splits if isinstance(engine.task, TextClassification) else {}, tables, labels)
    if known:
        answers["mistakes"] = mistakes.hardest(engine, known, predictions)
    return answers


Table = tuple[NDArray[np.float64], NDArray[np.int64]]


def _tables(
    examples: Mapping[str, Sequence[Mapping[str, Any]]], predictions: Mapping[str, Sequence[Any]], labels: Sequence[str]
) -> dict[str, Table]:
    """Of each split the scores [rows, labels] and the indices of the true labels [rows]."""
    places = {label: index for index, label in enumerate(labels)}
    return {
        split: (evaluation.score_table(predictions[split], labels), np.array([places[row["target"]] for row in rows]))
        for split, rows in examples.items()
    }


def _calibration(tables: Mapping[str, Table], applied: float | None) -> dict[str, Any]:
    """Of each split a reliability diagram and its error; the error, too, without the model's temperature, or with one.

    temperature: the one that training has applied; of a model that has none, what validation gives.
    """
    temperature = applied
    if temperature is None and "validation" in tables:
        temperature = calibration.fit_temperature(*tables["validation"])
    found = {}
    for split, (scores, targets) in tables.items():
        bins = calibration.reliability(scores, targets)
        found[split] = {
            "accuracy": float((scores.argmax(axis=1) == targets).mean()),
            "confidence": float(scores.max(axis=1).mean()),
            "error": calibration.expected_error(bins),
            "chart": _reliability(split, bins),
        }
        if temperature is not None:
            other = calibration.tempered(scores, temperature if applied is None else 1 / applied)
            found[split]["other"] = calibration.expected_error(calibration.reliability(other, targets))
    return {"temperature": temperature, "applied": applied is not None, "splits": found}


def _coverage(tables: Mapping[str, Table], thresholds: Mapping[str, float] | None) -> dict[str, Any]:
    """Precision against the share of rows that are answered, and what the model's threshold is worth if it has one."""
    curves = {split: calibration.precision_by_coverage(*table) for split, table in tables.items()}
    lines = {split: [(entry.coverage, entry.precision) for entry in curve] for split, curve in curves.items()}
    lowest = min((precision for points in lines.values() for _, precision in points), default=0.0)
    axes = (Scale("share of rows that are answered", 0, 1), scale("share of right answers", [lowest, 1.0]))
    shown: dict[str, Any] = {"chart": chart("right answers by the share of rows answered", *axes, lines=lines)}
    if thresholds:
        shown["threshold"] = threshold = max(thresholds.values())
        shown["splits"] = {
            split: {
                "coverage": float((sure := scores.max(axis=1) >= threshold).mean()),
                "precision": float((scores.argmax(axis=1) == targets)[sure].mean()) if sure.any() else nan,
            }
            for split, (scores, targets) in tables.items()
        }
    return shown


def _suspects(
    examples: Mapping[str, Sequence[Mapping[str, Any]]], tables: Mapping[str, Table], labels: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Of each split rows that are probably mislabelled: how many, and the first with their texts, if they are such.

    examples: {} for files.
    """
    found = {split: label_errors.suspects(*table, labels) for split, table in tables.items()}
    return {
        split: {
            "count": len(rows),
            "first": [
                (row, _words(examples[split][row.row]["inputs"]) if examples else ()) for row in rows[:_SUSPECTS]
            ],
        }
        for split, rows in found.items()
    }


def _words(value: Any) -> list[str]:
    """A text, or both of a pair."""
    return [value] if isinstance(value, str) else list(value.values())


def _reliability(split: str, bins: Sequence[Bin]) -> Markup:
    return chart(
        f"{split}: share of right answers by score; on the line, the score is that share",
        Scale("score of the answer", 0, 1),
        Scale("right", 0, 1),
        bars=[(entry.low, entry.high, entry.accuracy) for entry in bins],
        rule=(0, 0, 1, 1),
    )


def _thresholds(
    engine: Engine, examples: Sequence[Mapping[str, Any]], scores: NDArray[np.float64], labels: Sequence[str]
) -> list[Markup]:
    """Precision, recall and F1 against the threshold, of the labels with most rows. scores: [rows, labels]."""
    targets = np.array([[label in row["target"] for label in labels] for row in examples])
    chosen = engine.settings.options.get("thresholds", {})
    charts = []
    for label in np.argsort(-targets.sum(axis=0), kind="stable")[:_CURVES]:
        found, rows = scores[:, label, None] >= _THRESHOLDS, targets[:, label, None]
        hits, claims, marks = (found & rows).sum(axis=0), found.sum(axis=0), rows.sum()
        name = labels[label]
        lines = {
            # Of no claim at all none is wrong, but it says nothing either.
            "precision": [(t, h / c) for t, h, c in zip(_THRESHOLDS, hits, claims, strict=True) if c],
            "recall": [(t, h / marks) for t, h in zip(_THRESHOLDS, hits, strict=True) if marks],
            "F1": [(t, 2 * h / (c + marks)) for t, h, c in zip(_THRESHOLDS, hits, claims, strict=True) if c + marks],
        }
        limit = chosen.get(name, 0.5)
        title = f"{name}: {marks} rows, threshold {limit:.2f}"
        axes = (Scale("threshold", 0, 1), Scale("precision, recall and F1", 0, 1))
        charts.append(chart(title, *axes, lines=lines, rule=(limit, 0, limit, 1)))
    return charts


def _golden(stage: Path, evidence: Evidence) -> dict[str, Any]:
    """How many golden examples there are, what they answer, and how far an answer may drift."""
    examples = golden.read(stage / golden.FILE_NAME) if evidence.golden else []
    found = [label for example in examples for label, _ in evidence.engine.task.found(example["predictions"])]
    return {
        "rows": len(examples),
        "answers": Counter(found).most_common(_PAIRS),
        "tolerance": evidence.engine.settings.golden_tolerance,
    }


def _metadata(name: str, metrics: dict[str, Any], provenance: dict[str, Any]) -> str:
    """The card's YAML: the `model-index` that the Hugging Face hub and `huggingface_hub` read."""
    results = [
        EvalResult(
            task_type=metrics["task"],
            dataset_type="local",
            dataset_name=provenance["data"].get(split, provenance["data"].get("train", {})).get("file", "local"),
            dataset_split=split,
            metric_type=_HUB_METRICS.get(key, key),
            metric_value=round(value, 6),
        )
        for split, scores in metrics["splits"].items()
        for key, value in scores.items()
        if isinstance(value, float)
    ]
    base = provenance["base_model"]
    return ModelCardData(
        base_model=base["name"],
        library_name="transformers",
        license=base["licence"],
        pipeline_tag=metrics["task"],
        model_name=name,
        eval_results=results or None,
    ).to_yaml()


def _flat(value: Any, prefix: str = "") -> Any:
    """Nested facts as (dotted name, value) pairs."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", " ".join(map(str, entry)) if isinstance(entry, list) else entry
