"""Bundles a model of embeddings to compare sentences with, as it is; pairs with a score tell how well it does that."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from training import evaluation, labelled_texts
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options
from training.tasks import Splits
from training.tasks.feature_extraction import FeatureExtraction, check_untrained

_LONGEST_SENTENCE = 200_000  # characters; a longer request is refused
_GOLDEN_PAIRS = 12
_GOLDEN_SENTENCES = ("Somebody makes music.", "The invoice is due in March.", "", "Ünïcödé, 漢字 and 🙂", "word " * 40)


class SentenceSimilarity(FeatureExtraction):
    """A model of embeddings; a validation or test file holds pairs of sentences and how similar they are."""

    primary: ClassVar[str] = "spearman"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Pairs with a number. Raises UserError if the files hold anything else, or there is no model."""
        check_untrained(options, base)
        if not options.files():
            return Splits(None, None, None)
        splits = labelled_texts.read(
            replace(options, problem_type=labelled_texts.REGRESSION), seed, base, ["similarity"]
        )
        for name, rows in splits.named().items():
            if len(labelled_texts.text_columns(rows)) < 2:
                raise UserError(f"{options.files()[name]}: give pairs: the columns sentence1, sentence2 and label")
        return replace(splits, labels=[], metrics=None, primary=None)

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """The first sentence to be compared with the second, and the number."""
        return [
            {
                "inputs": {"source_sentence": one[:_LONGEST_SENTENCE], "sentences": [other[:_LONGEST_SENTENCE]]},
                "parameters": {"overflow": "truncate"},
                "target": target,
            }
            for one, other, target in zip(rows["text"], rows["text_pair"], rows["label"], strict=True)
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """The first pairs, plain sentences and odd ones."""
        own = [{"inputs": example["inputs"]} for example in examples[:_GOLDEN_PAIRS]]
        sentences = list(_GOLDEN_SENTENCES)
        plain = [{"inputs": {"source_sentence": source, "sentences": sentences}} for source in sentences[:2]]
        return [*plain, *own]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Correlations of the similarities with the numbers of the data."""
        found, expected = np.array([similar for [similar] in predictions]), np.array(targets)
        return {
            "rows": len(expected),
            "spearman": evaluation.rank_correlation(expected, found),
            "pearson": evaluation.correlation(expected, found),
        }
