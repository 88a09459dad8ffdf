"""Trains an encoder-decoder model to answer a text with another one: what summarization and translation share."""

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from sacrebleu import corpus_chrf
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from training import data, models, trainer
from training.base_model import BaseModel
from training.care import Made, Row, Rows
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

_USUAL_MAX_LENGTH = 512
_MOST_NEW_TOKENS = 512  # as the handler's max_new_tokens
_LONGEST_EXAMPLE = 1_000_000  # characters; a longer request is refused
_MOST_LOGITS = 2**25  # scores of an evaluation step: 128 MB in fp32


class SequenceToSequence(TrainingTask):
    """One text for another.

    answer: the name of the answer's field. columns: those that hold text and target in data sets of the Hugging Face
    hub, the first that a file has are taken.
    """

    # With little data the loss rises long before the answers stop getting better.
    metrics: ClassVar[tuple[str, ...]] = ("token_accuracy",)
    answer: ClassVar[str]
    columns: ClassVar[tuple[tuple[str, str], ...]]

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Columns `text` and `target`."""
        splits: dict[str, Dataset] = {}
        skipped = 0
        for name, path in options.files().items():
            rows = self.pairs(data.read(path), path, options)
            splits[name], bad = data.good_rows(rows, path, _problem, skip_bad_rows=options.skip_bad_rows)
            skipped += bad
        train, validation = splits.get("train"), splits.get("validation")
        if train is not None and validation is None:
            if len(train) < 2:
                raise UserError(f"{options.train_file}: too few rows to take a validation split; add some")
            size = max(1, round(len(train) * options.validation_share))
            parts = train.train_test_split(test_size=size, seed=seed)
            train, validation = parts["train"], parts["test"]
        return Splits(train, validation, splits.get("test"), [], skipped)

    def pairs(self, rows: Dataset, path: Path, options: Options) -> Dataset:
        """The columns `text` and `target` of a file. Raises UserError if it has none that are known."""
        if options.target_column is not None:
            return data.columns(rows, path, {"text": options.text_column, "target": options.target_column})
        for text, target in ((options.text_column, self.columns[0][1]), *self.columns):
            if {text, target} <= set(rows.column_names):
                return data.columns(rows, path, {"text": text, "target": target})
        known = ", ".join(f"{text} and {target}" for text, target in self.columns)
        raise UserError(
            f"{path}: the columns {', '.join(map(repr, rows.column_names))} are not the usual ones ({known}); "
            "name yours with --text-column and --target-column"
        )

    def compared(self, rows: Dataset, labels: Sequence[str]) -> Rows:
        """The text alone, without a prefix. Several answers may be right."""
        return Made(rows, lambda batch: [Row((text,)) for text in batch["text"]])

    def load(
        self, base: BaseModel, splits: Splits, options: Options
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """An encoder-decoder model and its tokenizer, which is one for both texts."""
        purpose = "an encoder-decoder model"
        texts = [*splits.train["text"], *splits.train["target"]] if splits.train else ()
        tokenizer = models.load_tokenizer(base, purpose, [*texts, options.source_prefix or ""])
        return models.load(base, AutoModelForSeq2SeqLM, purpose, tokenizer, **models.attention(options)), tokenizer

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Length, overflow policy, and what is put before each text."""
        if options.overflow == "window":
            raise UserError("--overflow window: a text is answered as a whole; choose error or truncate")
        length = models.longest_input(model, processor, options.max_length, _USUAL_MAX_LENGTH)
        settings = {"max_length": length, "stride": 0, "overflow": options.overflow or "truncate"}
        return settings | ({"options": {"prefix": options.source_prefix}} if options.source_prefix else {})

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer over texts and targets. Long texts are cut as in serving, long targets are refused.

        The model's generation_config.json gets a limit for the length of answers: half as much again as the longest
        target.
        """
        limit = min(getattr(model.config, "max_position_embeddings", None) or _MOST_NEW_TOKENS, _MOST_NEW_TOKENS)
        prefix = options.source_prefix or ""

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            texts = [prefix + text for text in batch["text"]]
            encoded = processor(texts, truncation=True, max_length=settings["max_length"])
            labels = processor(text_target=batch["target"])["input_ids"]
            return {**encoded, "labels": labels, "length": list(map(len, encoded["input_ids"]))}

        features = {
            name: rows.map(tokenize, batched=True, remove_columns=rows.column_names, keep_in_memory=True)
            for name, rows in splits.named().items()
            if name != "test"
        }
        for name, rows in features.items():
            if long := sum(len(labels) >= limit for labels in rows["labels"]):
                raise UserError(
                    f"{name}: {long} target(s) have more than the {limit - 1} tokens that the model can answer with; "
                    "shorten them, or take them out"
                )
        longest = max(map(len, features["train"]["labels"]))
        model.generation_config.max_new_tokens = min(limit - 1, longest * 3 // 2)
        # Of how many rows the scores fit into memory makes no difference to the result.
        fitting = max(1, _MOST_LOGITS // (longest * model.config.vocab_size))
        arguments.per_device_eval_batch_size = min(arguments.per_device_eval_batch_size, fitting)
        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=features["train"],
            validation=features["validation"],
            collator=DataCollatorForSeq2Seq(processor, model=model, pad_to_multiple_of=8),
            metrics=_metrics,
            preprocess_logits_for_metrics=_tokens,
        )

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """A text and the answer to it."""
        return [
            {"inputs": text[:_LONGEST_EXAMPLE], "parameters": {"overflow": "truncate"}, "target": target}
            for text, target in zip(rows["text"], rows["target"], strict=True)
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Texts of the validation set, odd ones and one that is too long; one is searched for with beams."""
        odd = ("?", "Ünïcödé, 漢字 and 🙂", "word " * max_length)
        plain = [{"inputs": text, "parameters": {"overflow": "truncate"}} for text in odd]
        beams = {"inputs": "A text.", "parameters": {"generate_parameters": {"num_beams": 2}}}
        return [*super().golden(examples, max_length, seed), *plain, beams]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Likeness of the answers to the targets, from 0 to 1: chrF (n-grams of characters) and that of the task."""
        texts = [prediction[self.answer] for prediction in predictions]
        chrf = corpus_chrf(texts, [list(targets)]).score / 100
        return {"rows": len(targets), "chrf": chrf, **self.likeness(texts, targets)}

    @abstractmethod
    def likeness(self, texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
        """What is usually measured for the task, besides chrF."""


def _problem(row: Mapping[str, Any]) -> str | None:
    for name in ("text", "target"):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"an empty {name}, or one that is not a string"
    return None


def _tokens(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The most probable token at each position, [batch, length], in place of all scores."""
    scores: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(dim=-1)


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Share of tokens that the model guesses when it has been told all tokens before."""
    labels = np.asarray(prediction.label_ids)
    known = labels != -100
    return {"token_accuracy": float((np.asarray(prediction.predictions) == labels)[known].mean())}


def rouge_l(texts: Sequence[str], targets: Sequence[str]) -> float:
    """ROUGE-L: mean F1 of the longest common subsequences of words, from 0 to 1."""
    scores = []
    for text, target in zip(texts, targets, strict=True):
        found, wanted = (re.findall(r"\w+", words.lower()) for words in (text, target))
        common = _longest_common_subsequence(found, wanted)
        scores.append(2 * common / (len(found) + len(wanted)) if common else 0.0)
    return float(np.mean(scores))


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    lengths = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for place, candidate in enumerate(other, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == candidate else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
