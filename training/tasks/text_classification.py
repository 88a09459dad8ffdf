"""Fine-tunes a model to put a label, several labels or a number on a text or a pair of texts."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from scipy.special import softmax
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from handler.tasks.text_classification import activate
from training import calibration, data, distillation, evaluation, labelled_texts, models, trainer
from training.base_model import BaseModel
from training.batches import Padding, TokenRows
from training.care import Made, Row, Rows
from training.errors import UserError
from training.labelled_texts import MULTI, REGRESSION, SINGLE
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

_USUAL_MAX_LENGTH = 256
_GOLDEN_PER_LABEL = 4
_GOLDEN_LABELS = 16
_GOLDEN_EXAMPLES = 32  # where there are no single labels to take them by
_CHARACTERS_PER_TOKEN = 20  # more than any language has on average
_LONGEST_EXAMPLE = 500_000  # characters; a longer request is refused
# Texts unlike any in training: a model must answer them too, and the same way after every conversion.
_GOLDEN_ODD = ("", "?", "Ünïcödé, 漢字 and 🙂", "word " * 40)


class TextClassification(TrainingTask):
    """One label for a text, or as many as apply (each with a threshold of its own), or a number."""

    metrics: ClassVar[tuple[str, ...]] = ("macro_f1", "accuracy")
    primary: ClassVar[str] = "accuracy"
    purpose: ClassVar[str] = "a text classifier"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """See `labelled_texts.read`."""
        return labelled_texts.read(options, seed, base)

    def counts(self, rows: Dataset, labels: Sequence[str]) -> dict[str, int]:
        """Rows per label; nothing for a regression."""
        kind = labelled_texts.problem(rows)
        if kind == MULTI:
            return dict(zip(labels, np.sum(rows["label"][:], axis=0).astype(int).tolist(), strict=True))
        return data.balance(rows) if kind == SINGLE else {}

    def compared(self, rows: Dataset, labels: Sequence[str]) -> Rows:
        """A text or pair, and its label, its labels or its number."""
        columns, kind = labelled_texts.text_columns(rows), labelled_texts.problem(rows)

        def make(batch: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
            texts = zip(*(batch[name] for name in columns), strict=True)
            for text, target in zip(texts, labelled_texts.named(batch["label"], kind, labels), strict=True):
                yield Row(text, ", ".join(target) if isinstance(target, list) else str(target))

        return Made(rows, make)

    def load(
        self, base: BaseModel, splits: Splits, options: Options
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A sequence classifier with the labels of the data."""
        rows = splits.train
        texts = (text for name in labelled_texts.text_columns(rows) for text in rows[name]) if rows else ()
        tokenizer = models.load_tokenizer(base, self.purpose, texts)
        model = models.load(
            base,
            AutoModelForSequenceClassification,
            self.purpose,
            tokenizer,
            num_labels=len(splits.labels),
            id2label=dict(enumerate(splits.labels)),
            label2id={label: index for index, label in enumerate(splits.labels)},
            problem_type=labelled_texts.problem(rows) if rows else labelled_texts.own_problem(base),
            **models.attention(options),
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        if rows:
            _prepare_head(
                model,
                rows,
                fresh=not models.has_labels(base, splits.labels),
                # The frequencies of the labels would be told without noise.
                blank=bool(options.class_weights) or options.private_epsilon is not None,
            )
        return model, tokenizer

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Length and overflow policy."""
        return models.text_settings(model, processor, options, _USUAL_MAX_LENGTH, "truncate")

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer over the tokenized texts. A regression is learnt on values of mean 0 and deviation 1."""
        assert splits.train is not None
        columns = labelled_texts.text_columns(splits.train)
        kind = labelled_texts.problem(splits.train)
        if options.wished_precision is not None and kind != SINGLE:
            raise UserError("--wished-precision is for one label of several, which these rows do not have")
        mean, deviation = _scale(splits.train, models.head(model)) if kind == REGRESSION else (0.0, 1.0)
        if options.teacher and kind == REGRESSION:
            raise UserError("--teacher: a number is not learnt from one; leave it out")
        if options.private_epsilon is not None and kind == REGRESSION:
            raise UserError("--private-epsilon: a number is learnt on the scale of the rows, which noise does not hide")
        teacher = distillation.load_teacher(
            options, arguments, AutoModelForSequenceClassification, self.purpose, splits.labels, several=kind == MULTI
        )

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            texts = [batch[name] for name in columns]
            encoded = processor(*texts, truncation=True, max_length=settings["max_length"], return_attention_mask=False)
            if kind == REGRESSION:
                encoded["label"] = [(value - mean) / deviation for value in batch["label"]]
            return dict(encoded)

        def features(rows: Dataset | None, teacher: distillation.Teacher | None = None) -> TokenRows | None:
            if rows is None:
                return None
            tokenized = data.mapped(rows, tokenize, columns).rename_column("label", "labels")
            if teacher is None:
                return TokenRows(tokenized)
            return TokenRows(tokenized, teacher.judge_texts(rows, columns, settings["max_length"]))

        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=features(splits.train, teacher),
            validation=features(splits.validation),
            collator=Padding(processor),
            metrics=_METRICS[kind],
            **(trainer.weighted(options, splits.train["label"][:], len(splits.labels)) if kind == SINGLE else {}),
        )

    def learned(
        self, trainer: Trainer, splits: Splits, options: Options, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The thresholds of several labels; the temperature of one label, by which the head's weights are divided.

        A regression's head is brought to the scale of the data.
        """
        assert splits.train is not None
        kind, head = labelled_texts.problem(splits.train), models.head(trainer.model)
        if kind == REGRESSION:
            mean, deviation = _scale(splits.train, head)
            _rescale(head, deviation, mean)
            return {}
        found = trainer.predict(trainer.eval_dataset)  # type: ignore[arg-type]
        logits = np.asarray(found.predictions, dtype=np.float64)
        if kind == SINGLE:
            temperature = round(calibration.fit_temperature(softmax(logits, axis=1), np.asarray(found.label_ids)), 4)
            _rescale(head, 1 / temperature, 0.0)
            learned: dict[str, Any] = {"temperature": temperature}
            if options.wished_precision is not None:
                scores = softmax(logits / temperature, axis=1)
                threshold, told = _abstention(scores, np.asarray(found.label_ids), options.wished_precision)
                if trainer.is_world_process_zero():
                    print(told, flush=True)
                if threshold is not None:
                    learned["thresholds"] = dict.fromkeys(splits.labels, threshold)
            return {"options": learned}
        scores = activate(logits, "sigmoid")
        thresholds = evaluation.thresholds(scores, np.asarray(found.label_ids))
        return {"options": {"thresholds": dict(zip(splits.labels, thresholds, strict=True))}}

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """A text or pair, and the name of its label, a list of names, or a number."""
        parameters: dict[str, Any] = {"overflow": "truncate"}
        if labelled_texts.problem(rows) == MULTI:
            parameters["threshold"] = "learned"
        inputs, targets = labelled_texts.inputs(rows, _LONGEST_EXAMPLE), labelled_texts.targets(rows, labels)
        return [
            {"inputs": value, "parameters": parameters, "target": target}
            for value, target in zip(inputs, targets, strict=True)
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Texts or pairs of each label, an over-long one and odd ones."""
        shuffled = random.Random(seed).sample(list(examples), len(examples))
        names = sorted({e["target"] for e in shuffled if isinstance(e["target"], str)})[:_GOLDEN_LABELS]
        chosen = [e for name in names for e in [e for e in shuffled if e["target"] == name][:_GOLDEN_PER_LABEL]]
        inputs = [example["inputs"] for example in chosen or shuffled[:_GOLDEN_EXAMPLES]]
        longest = max((example["inputs"] for example in examples), key=_size, default="a text")
        enough = max_length * _CHARACTERS_PER_TOKEN
        odd: list[Any] = [_repeated(longest, enough), *_GOLDEN_ODD]
        if isinstance(longest, dict):
            odd = [{**longest, "text": text} for text in odd] + [
                {"text": text, "text_pair": text} for text in _GOLDEN_ODD
            ]
        return [{"inputs": value} for value in (*inputs, longest, *odd)]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Metrics of labels, lists of labels or numbers, whichever the targets are."""
        if isinstance(targets[0], list):
            found = [[entry["label"] for entry in entries] for entries in predictions]
            return evaluation.multi_label_metrics(targets, found, labels)
        if isinstance(targets[0], float):
            return evaluation.regression_metrics(targets, [entries[0]["score"] for entries in predictions])
        return evaluation.single_label_metrics(predictions, targets, labels)


def _multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """What an epoch is judged by: F1 with the thresholds that would be learnt after it."""
    scores = activate(np.asarray(prediction.predictions, dtype=np.float64), "sigmoid")
    targets = np.asarray(prediction.label_ids)
    return evaluation.mark_metrics(targets > 0, scores >= np.array(evaluation.thresholds(scores, targets)))


def _regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """What an epoch is judged by; the scale of the values makes no difference to these."""
    figures = evaluation.regression_metrics(np.ravel(prediction.label_ids), np.ravel(prediction.predictions))
    return {name: figures[name] for name in ("r2", "pearson")}


_METRICS: dict[str, Callable[[EvalPrediction], dict[str, float]]] = {
    SINGLE: evaluation.label_metrics,
    MULTI: _multi_label_metrics,
    REGRESSION: _regression_metrics,
}


def _prepare_head(model: PreTrainedModel, rows: Dataset, *, fresh: bool, blank: bool) -> None:
    """Gives the head what is known before training. blank: whether that must not be how frequent each label is."""
    kind, head = labelled_texts.problem(rows), models.head(model)
    if kind == REGRESSION:
        if not fresh:
            mean, deviation = _scale(rows, head)
            _rescale(head, 1 / deviation, -mean / deviation)
    elif not fresh or blank:
        return
    elif kind == MULTI:
        # From a head that holds every label for even odds, rare ones are not learnt at all. Half a row is added to both
        # sides, because a label may be on no row or on all.
        marks = np.array(rows["label"][:], dtype=np.float64).sum(axis=0)
        models.set_bias(head, np.log((marks + 0.5) / (len(rows) - marks + 0.5)))
    else:
        counts = np.bincount(rows["label"][:], minlength=head.out_features)
        models.set_bias(head, np.log((counts + 0.5) / len(rows)))


def _abstention(scores: NDArray[np.float64], targets: NDArray[np.int64], wished: float) -> tuple[float | None, str]:
    """The score below which there is no answer, if any will do, and what it is worth on validation."""
    found = calibration.abstention(scores, targets, wished)
    if found is None:
        return None, (
            f"--wished-precision {wished:g}: not even the surest answers to validation reach it; none is left out"
        )
    return round(found.threshold, 6), (
        f'with "threshold": "learned" {found.coverage:.1%} of validation is answered, where the score is at least '
        f"{found.threshold:.3f}, and {found.precision:.1%} of the answers are right"
    )


def _scale(rows: Dataset, head: nn.Linear) -> tuple[float, float]:
    """Mean and standard deviation of a regression's values; a head without a bias, as GPT-2's, cannot move the mean."""
    values = np.array(rows["label"][:], dtype=np.float64)
    return (float(values.mean()) if head.bias is not None else 0.0), float(values.std())


def _rescale(head: nn.Linear, factor: float, offset: float) -> None:
    """Makes a head give `factor` times what it gave, plus `offset`, which must be 0 for one without a bias."""
    head.weight.data.mul_(factor)
    if head.bias is not None:
        head.bias.data.mul_(factor).add_(offset)


def _size(value: Any) -> int:
    """Characters of a text or pair."""
    return len(value) if isinstance(value, str) else sum(map(len, value.values()))


def _repeated(value: Any, enough: int) -> str:
    """The text, or the first of a pair, over and over, to the length of `enough` characters."""
    text = value if isinstance(value, str) else value["text"]
    return (f"{text} " * (1 + enough // len(text)))[:enough]
