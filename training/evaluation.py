"""Predictions made by the very engine that will serve the model, and metrics that several tasks share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support
from transformers import EvalPrediction

from handler.engine import Engine
from handler.errors import Overloaded, RequestError
from handler.messages import Request

_REQUESTS_PER_BATCH = 256


def predict(engine: Engine, examples: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The prediction for each example, one request each.

    examples: `inputs` and perhaps `parameters`. Raises RequestError if the engine refuses one.
    """
    predictions: list[Any] = [None] * len(examples)
    waiting = list(range(len(examples)))
    while waiting:
        batch, waiting = waiting[:_REQUESTS_PER_BATCH], waiting[_REQUESTS_PER_BATCH:]
        requests = [Request([examples[index]["inputs"]], examples[index].get("parameters", {})) for index in batch]
        for index, outcome in zip(batch, engine.predict(requests), strict=True):
            if isinstance(outcome, Overloaded):
                waiting.append(index)
            elif isinstance(outcome, RequestError):
                raise outcome
            else:
                predictions[index] = outcome.predictions[0]
    return predictions


def classification_metrics(expected: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro-F1, the confusion matrix (rows: true label) and precision, recall, F1 and rows per label."""
    precision, recall, f1, support = precision_recall_fscore_support(
        expected, predicted, labels=labels, zero_division=0
    )
    return {
        "rows": len(expected),
        "accuracy": float(accuracy_score(expected, predicted)),
        "macro_f1": float(f1_score(expected, predicted, labels=labels, average="macro", zero_division=0)),
        "labels": list(labels),
        "confusion_matrix": confusion_matrix(expected, predicted, labels=labels).tolist(),
        "per_label": {
            label: {
                "precision": float(precision[index]),
                "recall": float(recall[index]),
                "f1": float(f1[index]),
                "rows": int(support[index]),
            }
            for index, label in enumerate(labels)
        },
    }


def label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """What an epoch of a single-label classifier is judged by: macro-F1 and accuracy of the most probable labels."""
    predicted, expected = np.argmax(prediction.predictions, axis=-1), prediction.label_ids
    return {
        "macro_f1": float(f1_score(expected, predicted, average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(expected, predicted)),
    }
