"""Whether a model's answers tell which rows it was trained on.

Yeom, Giacomelli, Fredrikson and Jha, "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", 2018.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from handler.engine import Engine
from handler.tasks.media_classification import MediaClassification
from handler.tasks.text_classification import TextClassification
from training import evaluation

Examples = Sequence[Mapping[str, Any]]


def membership(
    engine: Engine, trained_on: Examples, held_out: Mapping[str, Examples], predictions: Mapping[str, Sequence[Any]]
) -> dict[str, float] | None:
    """How well whoever knows a row and its label guesses by the loss whether training had it.

    trained_on: rows of the training split. held_out, predictions: by split; the test split counts, because validation
    has chosen the epoch, and validation where there is no other. auc: the probability that of a row of either kind the
    trained one has the lower loss, 0.5 if the loss tells nothing. advantage: the largest difference of the shares of
    trained and of held-out rows below one loss, from 0 to 1. None for tasks without one label a row.
    """
    split = "test" if "test" in held_out else "validation"
    unseen = list(held_out.get(split, ()))[: len(trained_on)]
    one_label = isinstance(engine.task, TextClassification | MediaClassification)
    if not one_label or not unseen or not isinstance(unseen[0]["target"], str):
        return None
    known = _true_scores(evaluation.predict(engine, trained_on), trained_on)
    scores = np.concatenate([known, _true_scores(predictions[split][: len(unseen)], unseen)])
    members = np.repeat([1, 0], [len(trained_on), len(unseen)])
    false, true, _ = roc_curve(members, scores)
    return {
        "auc": float(roc_auc_score(members, scores)),
        "advantage": float(np.max(true - false)),
        "rows": len(trained_on),
        f"{split}_rows": len(unseen),
    }


def _true_scores(predictions: Sequence[Any], examples: Examples) -> Any:
    """The score [rows] of each row's own label, of which the loss is the negative logarithm."""
    pairs = zip(predictions, examples, strict=True)
    return np.array([next(e["score"] for e in row if e["label"] == example["target"]) for row, example in pairs])
