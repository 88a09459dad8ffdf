"""Fine-tunes an encoder to find entities, from sentences in IOB2: `tokens` and `ner_tags`, a list of each per row.

The model is trained on what it will be asked: the tokens joined by a space, its own tokenizer's words, and windows with
overlap where a sentence is too long. The first sub-word of each of these words has a label, the others have none.
"""

import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset
from seqeval.metrics import classification_report, f1_score, precision_score, recall_score
from tokenizers import Encoding
from transformers import (
    AutoModelForTokenClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from training import data, distillation, evaluation, models, trainer
from training.base_model import BaseModel
from training.batches import IGNORED, Padding, TokenRows
from training.care import Made, Row, Rows
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

_USUAL_MAX_LENGTH = 256
_TAG = re.compile(r"O|[BI]-.+")
_NO_ENTITY = "O"
_OFFSETS = np.arange(-3, 3.1, 0.25).tolist()  # of its logit
_GOLDEN_EXAMPLES = 12
_GOLDEN_ODD = ("", "?", "Ünïcödé, 漢字 and 🙂")


class TokenClassification(TrainingTask):
    """Entities in a text."""

    metrics: ClassVar[tuple[str, ...]] = ("f1", "precision", "recall")
    primary: ClassVar[str] = "f1"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Columns `tokens` and `tags`, lists of strings."""
        skip = options.skip_bad_rows
        splits: dict[str, Dataset] = {}
        skipped = 0
        for name, path in options.files().items():
            splits[name], bad = data.good_rows(_read(path, options), path, _problem, skip_bad_rows=skip)
            skipped += bad
        if "train" in splits:
            types = sorted({tag[2:] for tags in splits["train"]["tags"] for tag in tags if tag != "O"})
            if not types:
                raise UserError(f"{options.train_file}: every tag is O; there is no entity to learn from")
            labels = ["O", *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]
        else:
            labels = base.labels()
        for name in splits:
            splits[name], bad = data.good_rows(
                splits[name], options.files()[name], lambda row: _unknown(row["tags"], labels), skip_bad_rows=skip
            )
            skipped += bad
        train, validation = splits.get("train"), splits.get("validation")
        if train is not None and validation is None:
            if len(train) < 2:
                raise UserError(f"{options.train_file}: one row cannot be split; give a --validation-file")
            halves = train.train_test_split(test_size=max(1, round(len(train) * options.validation_share)), seed=seed)
            train, validation = halves["train"], halves["test"]
        return Splits(train, validation, splits.get("test"), labels, skipped)

    def counts(self, rows: Dataset, labels: Sequence[str]) -> dict[str, int]:
        """Entities of each type."""
        found = Counter(tag[2:] for tags in rows["tags"] for tag in tags if tag.startswith("B-"))
        return {kind: found[kind] for kind in _types(labels)}

    def compared(self, rows: Dataset, labels: Sequence[str]) -> Rows:
        """Tokens joined by a space, and their tags."""

        def make(batch: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
            for tokens, tags in zip(batch["tokens"], batch["tags"], strict=True):
                yield Row((" ".join(tokens),), " ".join(tags))

        return Made(rows, make)

    def load(
        self, base: BaseModel, splits: Splits, options: Options
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A token classifier with the labels of the data."""
        purpose = "a token classifier"
        tokenizer = models.load_tokenizer(base, purpose, map(" ".join, splits.train["tokens"]) if splits.train else ())
        model = models.load(
            base,
            AutoModelForTokenClassification,
            purpose,
            tokenizer,
            num_labels=len(splits.labels),
            id2label=dict(enumerate(splits.labels)),
            label2id={label: index for index, label in enumerate(splits.labels)},
            **models.attention(options),
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        if splits.train and not models.has_labels(base, splits.labels):
            tags = Counter(tag for tags in splits.train["tags"] for tag in tags)
            counts = np.array([tags[label] for label in splits.labels])
            models.set_bias(model.classifier, np.log((counts + 0.5) / counts.sum()))
        return model, tokenizer

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Length, overlap of windows, and windows as the overflow policy."""
        return models.text_settings(model, processor, options, _USUAL_MAX_LENGTH, "window")

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer over the windows of the sentences."""
        assert splits.train is not None
        ids = {label: index for index, label in enumerate(splits.labels)}
        teacher = distillation.load_teacher(
            options, arguments, AutoModelForTokenClassification, "a token classifier", splits.labels
        )
        if teacher:
            teacher.check_tokenizer(processor, list(map(" ".join, splits.train["tokens"])))

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            encoded = processor(
                [" ".join(tokens) for tokens in batch["tokens"]],
                truncation=True,
                max_length=settings["max_length"],
                stride=settings["stride"],
                return_overflowing_tokens=True,
                return_attention_mask=False,
            )
            samples = encoded.pop("overflow_to_sample_mapping")
            labels = []
            for row, sample in enumerate(samples):
                tags = align(encoded.encodings[row], batch["tokens"][sample], batch["tags"][sample])
                if row and samples[row - 1] == sample:
                    _forget_first(tags, encoded.encodings[row])
                labels.append([IGNORED if tag is None else ids[tag] for tag in tags])
            return {**encoded, "labels": labels}

        def features(rows: Dataset | None, teacher: distillation.Teacher | None = None) -> TokenRows | None:
            if rows is None:
                return None
            windows = data.mapped(rows, tokenize, rows.column_names)
            # A window that is all one long word's, whose label is in another, teaches nothing; its loss is no number.
            windows = windows.filter(_has_label, input_columns="labels", keep_in_memory=True)
            if teacher is None:
                return TokenRows(windows)
            return TokenRows(windows, teacher.judge_tokens(windows.remove_columns("labels"), settings["max_length"]))

        def metrics(prediction: EvalPrediction) -> dict[str, float]:
            expected, found = _sequences(prediction, splits.labels)
            return {
                "f1": float(f1_score(expected, found, zero_division=0)),
                "precision": float(precision_score(expected, found, zero_division=0)),
                "recall": float(recall_score(expected, found, zero_division=0)),
            }

        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=features(splits.train, teacher),
            validation=features(splits.validation),
            collator=Padding(processor, labelled_tokens=True),
            metrics=metrics,
        )

    def learned(
        self, trainer: Trainer, splits: Splits, options: Options, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Nothing beside the model: how ready it is to see an entity, in the bias of "O" in its head.

        A loss of tokens, of which few are of entities, makes it too shy; of some offsets that with the best F1 of the
        entities of validation is taken, the smallest of equals.
        """
        bias = models.head(trainer.model).bias
        if _NO_ENTITY in splits.labels and bias is not None:
            found: Any = trainer.predict(trainer.eval_dataset)  # type: ignore[arg-type]
            place = splits.labels.index(_NO_ENTITY)

            def f1(offset: float) -> float:
                logits = np.array(found.predictions, dtype=np.float32)
                logits[..., place] += offset
                return float(f1_score(*_sequences(EvalPrediction(logits, found.label_ids), splits.labels)))

            bias.data[place] += max(sorted(_OFFSETS, key=abs), key=f1)
        return {}

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Tokens joined by a space, and the entities' types and places in that text."""
        return [
            {
                "inputs": " ".join(tokens),
                "parameters": {"aggregation_strategy": "first", "overflow": "window"},
                "target": entities(tokens, tags),
            }
            for tokens, tags in zip(rows["tokens"], rows["tags"], strict=True)
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Texts with and without entities, one of several windows, and odd ones.

        Every token's label is asked for: where the model hesitates, grouped entities would fall apart at a breath.
        """
        shuffled = random.Random(seed).sample(list(examples), len(examples))
        shuffled.sort(key=lambda example: not example["target"])
        texts = [example["inputs"] for example in (*shuffled[:_GOLDEN_EXAMPLES], *shuffled[-2:])]
        words = " ".join(texts or ["Ada Lovelace wrote to Charles Babbage in London."]).split()
        too_long = " ".join(words * (1 + 2 * max_length // len(words)))
        return [
            {"inputs": text, "parameters": {"aggregation_strategy": "none", "ignore_labels": []}}
            for text in dict.fromkeys([*texts, too_long, *_GOLDEN_ODD])
        ]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Precision, recall and F1 of entities, which are right if type, start and end are; in all and by type."""
        pairs = [_tagged(target, found) for target, found in zip(targets, predictions, strict=True)]
        expected, found = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        # seqeval has no means of nothing.
        report = classification_report(expected, found, output_dict=True, zero_division=0) if any(expected) else {}
        total = report.pop("micro avg", {})
        by_type = {kind: _figures(entry) for kind, entry in report.items() if not kind.endswith(" avg")}
        return {
            "rows": len(targets),
            **{name: value for name, value in _figures(total).items() if name != "rows"},
            "macro_f1": float(np.mean([entry["f1"] for entry in by_type.values()])) if by_type else 0.0,
            "per_label": by_type,
            "entity_confusion": evaluation.entity_confusion(targets, predictions, _types(labels)),
        }


def _types(labels: Sequence[str]) -> list[str]:
    """The types of entities among IOB labels."""
    return list(dict.fromkeys(label[2:] if label[:2] in ("B-", "I-") else label for label in labels if label != "O"))


def _figures(entry: Mapping[str, Any]) -> dict[str, float | int]:
    """One line of seqeval's report."""
    return {
        "f1": float(entry.get("f1-score", 0.0)),
        "precision": float(entry.get("precision", 0.0)),
        "recall": float(entry.get("recall", 0.0)),
        "rows": int(entry.get("support", 0)),
    }


def align(encoding: Encoding, tokens: Sequence[str], tags: Sequence[str]) -> list[str | None]:
    """The tag of each position of an encoding of `" ".join(tokens)`; None for special tokens and later sub-words.

    Where the model's tokenizer finds several words in a token ("#", "hashtag"), the later ones continue its entity.
    """
    starts = [0, *accumulate(len(token) + 1 for token in tokens)]
    aligned: list[str | None] = []
    before: tuple[int | None, int] | None = None  # word and token of the position before
    for special, word, (start, end) in zip(
        encoding.special_tokens_mask, encoding.word_ids, encoding.offsets, strict=True
    ):
        if special or start == end:
            aligned.append(None)
            continue
        # By its last character, because some tokenizers count the space before a word to it.
        token = bisect_right(starts, end - 1) - 1
        if before == (word, token):
            aligned.append(None)
        elif (before and before[1] == token) or start > starts[token]:
            aligned.append(tags[token].replace("B-", "I-", 1) if tags[token].startswith("B-") else tags[token])
        else:
            aligned.append(tags[token])
        before = word, token
    return aligned


def entities(tokens: Sequence[str], tags: Sequence[str]) -> list[dict[str, Any]]:
    """Entities of an IOB2 sentence as types and character places in `" ".join(tokens)`."""
    starts = [0, *accumulate(len(token) + 1 for token in tokens)]
    found: list[dict[str, Any]] = []
    for start, token, tag in zip(starts, tokens, tags, strict=False):
        if tag.startswith("B-"):
            found.append({"entity_group": tag[2:], "start": start, "end": start + len(token)})
        elif tag != "O":
            found[-1]["end"] = start + len(token)
    return found


def _read(path: Path, options: Options) -> Dataset:
    """Columns `tokens` and `tags`; integers become the names that a parquet file holds for them."""
    # The options' defaults are those of the other tasks.
    names = {
        "text": "tokens" if options.text_column == "text" else options.text_column,
        "label": "ner_tags" if options.label_column == "label" else options.label_column,
    }
    rows = data.columns(data.read(path), path, names).rename_columns({"text": "tokens", "label": "tags"})
    feature = getattr(rows.features["tags"], "feature", None)
    if isinstance(feature, ClassLabel):
        tags = [[feature.names[tag] for tag in row] for row in rows["tags"]]
        return Dataset.from_dict({"tokens": rows["tokens"], "tags": tags})
    if getattr(feature, "dtype", "").startswith("int"):
        raise UserError(
            f"{path}: {names['label']!r} holds integers without names; write tags such as B-person, or a parquet file "
            "of the datasets library, which holds the names of its ClassLabel"
        )
    return rows


def _problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row."""
    tokens, tags = row["tokens"], row["tags"]
    for values in (tokens, tags):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            return "no list of strings for tokens or for tags"
    if len(tokens) != len(tags):
        return "more tokens than tags, or fewer"
    if not tokens or not all(token.strip() for token in tokens):
        return "no tokens, or an empty one"
    if not all(_TAG.fullmatch(tag) for tag in tags):
        return "a tag that is not O, B-TYPE or I-TYPE"
    if any(tag.startswith("I-") and before[1:] != tag[1:] for before, tag in pairwise(("O", *tags))):
        return "an I- tag that continues no entity of its type (in IOB2 every entity begins with B-)"
    return None


def _unknown(tags: Sequence[str], labels: Sequence[str]) -> str | None:
    """A problem, if the model has no label for a tag."""
    return "a tag that the model is not trained for" if set(tags) - set(labels) else None


def _has_label(labels: Sequence[int]) -> bool:
    """Whether any token has one."""
    return any(label != IGNORED for label in labels)


def _forget_first(tags: list[str | None], encoding: Encoding) -> None:
    """Takes the label from a later window's first token: the window before has it, and it may be the rest of a word."""
    tags[encoding.special_tokens_mask.index(0)] = None


def _sequences(prediction: EvalPrediction, labels: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Expected and predicted tags of the labelled positions."""
    best = np.argmax(prediction.predictions, axis=-1)
    expected, found = [], []
    for row, target in zip(best, np.asarray(prediction.label_ids), strict=True):
        kept = target != IGNORED
        expected.append([labels[index] for index in target[kept]])
        found.append([labels[index] for index in row[kept]])
    return expected, found


def _tagged(expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Two sets of entities as IOB2 tags over the same stretches of a text: those between any two of their borders."""
    borders = sorted({entity[side] for entity in (*expected, *found) for side in ("start", "end")})
    both = []
    for some in (expected, found):
        tags = ["O"] * (len(borders) - 1)
        for entity in some:
            inside = range(bisect_right(borders, entity["start"]) - 1, bisect_right(borders, entity["end"]) - 1)
            for number, index in enumerate(inside):
                tags[index] = f"{'I' if number else 'B'}-{entity['entity_group']}"
        both.append(tags)
    return both[0], both[1]
