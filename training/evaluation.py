"""Metrics of a classifier, and predictions made by the very engine that will serve it."""

from collections.abc import Sequence
from typing import Any

from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from handler.engine import Engine
from handler.errors import RequestError
from handler.messages import Request

_TEXTS_PER_BATCH = 256


def predicted_labels(engine: Engine, texts: Sequence[str]) -> list[str]:
    """The most probable label of each text, over-long ones truncated.

    Raises RequestError if the engine refuses a text.
    """
    labels: list[str] = []
    limit = engine.settings.max_characters
    for start in range(0, len(texts), _TEXTS_PER_BATCH):
        batch = texts[start : start + _TEXTS_PER_BATCH]
        requests = [Request([text[:limit]], {"top_k": 1, "overflow": "truncate"}) for text in batch]
        for outcome in engine.predict(requests):
            if isinstance(outcome, RequestError):
                raise outcome
            [prediction] = outcome.predictions
            assert not isinstance(prediction, RequestError)
            labels.append(prediction[0]["label"])
    return labels


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
