"""Fine-tunes a model to tell whether one text entails another, which is what zero-shot classification asks it."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datasets import Dataset

from handler.tasks.zero_shot_classification import entailment
from training import evaluation, labelled_texts
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options
from training.tasks import Splits
from training.tasks.text_classification import TextClassification

_LONGEST_TEXT = 200_000  # characters; a longer request is refused
_GOLDEN_TEXTS = 12
_GOLDEN_CHOICE = 5
_GOLDEN_TOPICS = ["sport", "politics", "cooking", "a fault in a machine", "漢字 and 🙂"]
_GOLDEN_ODD = ("?", "Ünïcödé, 漢字 and 🙂", "word " * 400)


class ZeroShotClassification(TextClassification):
    """Pairs of texts, labelled with "entailment" and, say, "not_entailment", or "neutral" and "contradiction"."""

    purpose: ClassVar[str] = "a judge of entailment"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """See `labelled_texts.read`. Raises UserError, too, for data that is not of pairs or of other labels."""
        splits = super().read(options, seed, base)
        for name, rows in splits.named().items():
            if len(labelled_texts.text_columns(rows)) < 2 or labelled_texts.problem(rows) != labelled_texts.SINGLE:
                raise UserError(
                    f"{options.files().get(name, options.train_file)}: zero-shot-classification learns from pairs of "
                    "texts with one label: give the columns premise, hypothesis and label"
                )
        try:
            entailment(splits.labels)
        except ValueError as error:
            raise UserError(str(error)) from None
        return splits

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """The first text, with the second as the one candidate; the target is whether it is entailed."""
        entailed, _ = entailment(labels)
        return [
            {
                "inputs": text[:_LONGEST_TEXT],
                "parameters": {
                    "candidate_labels": [hypothesis[:_LONGEST_TEXT]],
                    "hypothesis_template": "{}",
                    "overflow": "truncate",
                },
                "target": label == entailed,
            }
            for text, hypothesis, label in zip(rows["text"], rows["text_pair"], rows["label"], strict=True)
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Texts with several candidates, and odd ones with the usual template."""
        chosen = random.Random(seed).sample(list(examples), min(_GOLDEN_TEXTS, len(examples)))
        hypotheses = sorted({label for example in chosen for label in example["parameters"]["candidate_labels"]})
        own = {"candidate_labels": hypotheses[:_GOLDEN_CHOICE], "hypothesis_template": "{}"}
        usual = {"candidate_labels": _GOLDEN_TOPICS}
        texts = [example["inputs"] for example in chosen]
        return [
            *({"inputs": text, "parameters": own} for text in texts),
            *({"inputs": text, "parameters": usual} for text in (*texts, *_GOLDEN_ODD)),
            *({"inputs": text, "parameters": {**usual, "multi_label": True}} for text in (*texts, *_GOLDEN_ODD)),
        ]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Accuracy of telling what is entailed from what is not."""
        names = ("entailment", "not entailment")
        found = [names[entries[0]["score"] < 0.5] for entries in predictions]
        return evaluation.classification_metrics([names[not target] for target in targets], found, names)
