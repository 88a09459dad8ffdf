"""Predictions made by the very engine that will serve the model, and metrics that several tasks share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_curve,
    precision_recall_fscore_support,
    r2_score,
)
from tqdm import tqdm
from transformers import EvalPrediction

from handler.engine import Engine
from handler.errors import Overloaded, RequestError
from handler.messages import Request
from training import calibration

if TYPE_CHECKING:
    from training.tasks import TrainingTask

_REQUESTS_PER_BATCH = 256
# What all labels together count for in the threshold of one.
_ROWS_OF_ALL_LABELS = 5


def predict(engine: Engine, examples: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The prediction for each example, one request each.

    examples: `inputs` and perhaps `parameters`. Raises RequestError if the engine refuses one, or has not the time
    for it even alone.
    """
    predictions: list[Any] = [None] * len(examples)
    waiting, size = list(range(len(examples))), _REQUESTS_PER_BATCH
    with tqdm(total=len(examples), desc="scoring", unit=" rows", delay=2, leave=False, disable=None) as bar:
        while waiting:
            batch, waiting = waiting[:size], waiting[size:]
            requests = [Request([examples[index]["inputs"]], examples[index].get("parameters", {})) for index in batch]
            late = []
            for index, outcome in zip(batch, engine.predict(requests), strict=True):
                if isinstance(outcome, Overloaded) and len(batch) > 1:
                    late.append(index)
                elif isinstance(outcome, RequestError):
                    raise outcome
                else:
                    predictions[index] = outcome.predictions[0]
                    bar.update()
            waiting += late
            if late == batch:  # together they take longer than a request may
                size = -(-len(batch) // 2)
    return predictions


def measure(
    engine: Engine, task: "TrainingTask", examples: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> dict[str, Any]:
    """The task's metrics of the engine's predictions. examples: as for `predict`, each with its `target`.

    Raises RequestError if the engine refuses one.
    """
    return task.score(predict(engine, examples), [example["target"] for example in examples], labels)


def score_table(predictions: Sequence[Sequence[Mapping[str, Any]]], labels: Sequence[str]) -> NDArray[np.float64]:
    """The scores [rows, labels] in predictions that name labels, 0 for a label that is not named."""
    found = [{entry["label"]: entry["score"] for entry in entries} for entries in predictions]
    return np.array([[row.get(label, 0.0) for label in labels] for row in found]).reshape(-1, len(labels))


def classification_metrics(expected: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro-F1, the confusion matrix (rows: true label) and precision, recall, F1 and rows per label."""
    return {
        "rows": len(expected),
        "accuracy": float(accuracy_score(expected, predicted)),
        "macro_f1": float(f1_score(expected, predicted, labels=labels, average="macro", zero_division=0)),
        "labels": list(labels),
        "confusion_matrix": confusion_matrix(expected, predicted, labels=labels).tolist(),
        "per_label": _per_label(
            labels, precision_recall_fscore_support(expected, predicted, labels=labels, zero_division=0)
        ),
    }


def single_label_metrics(
    predictions: Sequence[Sequence[Mapping[str, Any]]], targets: Sequence[str], labels: Sequence[str]
) -> dict[str, Any]:
    """`classification_metrics` of the most probable labels, and the expected calibration error of all scores."""
    metrics = classification_metrics(targets, [entries[0]["label"] for entries in predictions], labels)
    places = {label: index for index, label in enumerate(labels)}
    true = np.array([places[target] for target in targets])
    return metrics | {
        "ece": calibration.expected_error(calibration.reliability(score_table(predictions, labels), true))
    }


def entity_confusion(
    expected: Sequence[Sequence[Mapping[str, Any]]], found: Sequence[Sequence[Mapping[str, Any]]], types: Sequence[str]
) -> dict[str, Any]:
    """Which types of entities are taken for which, wherever their places overlap.

    expected, found: of each row, entities with `entity_group`, `start` and `end`. In the result, rows of the
    `confusion_matrix` are true types; "O", the last of `labels`, is no entity: one was missed, or found where there is
    none. `other_borders`: pairs of one type whose places are not the same.
    """
    labels = [*types, "O"]
    places = {label: index for index, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels)), dtype=int)
    other_borders = 0
    for targets, entities in zip(expected, found, strict=True):
        for target in targets:
            best = max(entities, key=lambda entity: shared_characters(target, entity), default=target)
            there = best is not target and shared_characters(target, best) > 0
            matrix[places[target["entity_group"]], places[best["entity_group"]] if there else -1] += 1
            if there and best["entity_group"] == target["entity_group"]:
                other_borders += (best["start"], best["end"]) != (target["start"], target["end"])
        for entity in entities:
            if not any(shared_characters(entity, target) for target in targets):
                matrix[-1, places[entity["entity_group"]]] += 1
    return {"labels": labels, "confusion_matrix": matrix.tolist(), "other_borders": int(other_borders)}


def shared_characters(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Characters that two entities have in common."""
    return int(max(0, min(one["end"], other["end"]) - max(one["start"], other["start"])))


def multi_label_metrics(
    expected: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str]
) -> dict[str, Any]:
    """Macro- and micro-F1, the share of rows with exactly the right labels, and the figures of each label."""
    true = np.array([[label in row for label in labels] for row in expected], dtype=bool).reshape(-1, len(labels))
    found = np.array([[label in row for label in labels] for row in predicted], dtype=bool).reshape(-1, len(labels))
    hits, claims, rows = (true & found).sum(axis=0), found.sum(axis=0), true.sum(axis=0)
    f1 = 2 * hits / np.maximum(claims + rows, 1)
    return {
        "rows": len(expected),
        **mark_metrics(true, found),
        "labels": list(labels),
        "per_label": _per_label(labels, (hits / np.maximum(claims, 1), hits / np.maximum(rows, 1), f1, rows)),
    }


def mark_metrics(true: NDArray[np.bool_], found: NDArray[np.bool_]) -> dict[str, float]:
    """Macro- and micro-F1 and the share of exactly right rows; both arrays: [rows, labels], whether a label applies."""
    hits, marks = (true & found).sum(axis=0), true.sum(axis=0) + found.sum(axis=0)
    return {
        "macro_f1": float((2 * hits / np.maximum(marks, 1)).mean()),
        "micro_f1": float(2 * hits.sum() / max(1, marks.sum())),
        "exact_match": float((true == found).all(axis=1).mean()),
    }


def regression_metrics(expected: ArrayLike, predicted: ArrayLike) -> dict[str, Any]:
    """R² (0 where it is no better than the mean), correlations (0 where there is none), and mean errors."""
    true, found = np.asarray(expected, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    return {
        "rows": len(true),
        "r2": max(0.0, float(r2_score(true, found))) if len(true) > 1 else 0.0,
        "pearson": correlation(true, found),
        "spearman": rank_correlation(true, found),
        "mean_squared_error": float(np.mean((true - found) ** 2)),
        "mean_absolute_error": float(np.mean(np.abs(true - found))),
    }


def correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Pearson's correlation, 0 where one of the two does not vary."""
    return float(np.corrcoef(one, other)[0, 1]) if np.ptp(one) > 0 and np.ptp(other) > 0 else 0.0


def rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Spearman's correlation, 0 where one of the two does not vary."""
    ranks = pd.DataFrame({"one": one, "other": other}).rank().to_numpy(dtype=np.float64)
    return correlation(ranks[:, 0], ranks[:, 1])


def thresholds(scores: NDArray[np.float64], targets: NDArray[np.float64]) -> list[float]:
    """A threshold for each label: by which its F1 is highest, drawn towards the one that is best for all of them.

    The fewer rows a label has, the more of its own best threshold is chance, so the other one counts as
    `_ROWS_OF_ALL_LABELS` of its rows. 0.5 where no row has any label.

    scores and targets: [rows, labels], from 0 to 1; a target is 1 where the label applies.
    """
    common = _best_threshold(scores.ravel(), targets.ravel())
    found = []
    for label, rows in enumerate(targets.sum(axis=0)):
        own = _best_threshold(scores[:, label], targets[:, label])
        found.append(float((rows * own + _ROWS_OF_ALL_LABELS * common) / (rows + _ROWS_OF_ALL_LABELS)))
    return found


def _best_threshold(scores: NDArray[np.float64], targets: NDArray[np.float64]) -> float:
    if not targets.any():
        return 0.5
    precision, recall, found = precision_recall_curve(targets, scores)
    # The last point of the curve, where nothing is found, has no threshold.
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-12))[:-1]
    best = int(np.argmax(f1))
    below = scores[scores < found[best]]
    # Halfway to the next score, so that a score may change a little without changing sides.
    return float(found[best] + below.max()) / 2 if len(below) else float(found[best]) / 2


def _per_label(labels: Sequence[str], figures: Any) -> dict[str, dict[str, Any]]:
    """Precision, recall, F1 and rows by label; figures: one array of each."""
    return {
        label: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(rows)}
        for label, precision, recall, f1, rows in zip(labels, *figures, strict=True)
    }


def label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """What an epoch of a single-label classifier is judged by: macro-F1 and accuracy of the most probable labels."""
    predicted, expected = np.argmax(prediction.predictions, axis=-1), prediction.label_ids
    return {
        "macro_f1": float(f1_score(expected, predicted, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(expected, predicted)),
    }
