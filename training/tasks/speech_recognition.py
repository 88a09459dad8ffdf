"""Trains a model with connectionist temporal classification (CTC) to write down what is said."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jiwer
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCTC,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2Processor,
)

from training import data, media, models, sounds, trainer
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

_PURPOSE = "a speech recogniser"
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "|")
_GOLDEN_EXAMPLES = 24
_IGNORED = -100  # as torch's losses and the Trainer's padding have it


class SpeechRecognition(TrainingTask):
    """The text of a sound."""

    metrics: ClassVar[tuple[str, ...]] = ("character_accuracy", "word_accuracy")
    primary: ClassVar[str] = "word_accuracy"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Files in the column `path`, what is said in `text`."""
        sounds.check_base("automatic-speech-recognition", options, base, "wav2vec2 feat_extract_norm=layer")
        splits: dict[str, Dataset] = {}
        digests: dict[str, str] = {}
        skipped = 0
        columns = {"path": options.path_column, "text": options.text_column}
        for name, source in options.files().items():
            listing = media.read(source, columns, sounds.check, skip_bad_rows=options.skip_bad_rows)
            rows, silent = data.good_rows(listing.rows, source, _problem, skip_bad_rows=options.skip_bad_rows)
            splits[name], digests[name] = rows.map(_tidy), listing.sha256
            skipped += listing.skipped + silent
        train, validation = splits.get("train"), splits.get("validation")
        if train is not None and validation is None:
            if len(train) < 2:
                raise UserError(f"{options.train_file}: one row is too few to take a validation split; add some")
            parts = train.train_test_split(test_size=options.validation_share, seed=seed)
            train, validation = parts["train"], parts["test"]
        return Splits(train, validation, splits.get("test"), [], skipped, digests)

    def load(self, base: BaseModel, splits: Splits, options: Options) -> tuple[PreTrainedModel, Wav2Vec2Processor]:
        """A CTC model, and its feature extractor and tokenizer.

        The tokenizer is the base model's own; if it has none, one of the characters in the training texts.
        """
        tokenizer = _load_tokenizer(base, splits)
        model = models.load(
            base,
            AutoModelForCTC,
            _PURPOSE,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            ctc_loss_reduction="mean",
            ctc_zero_infinity=True,  # a text longer than its sound is no reason to stop
        )
        return model, Wav2Vec2Processor(sounds.load_extractor(base, model, _PURPOSE, splits), tokenizer)

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Length and overlap of windows, and windows as the overflow policy."""
        length = options.max_length or sounds.USUAL_MAX_LENGTH
        # A sixth at either end of a window is left to its neighbour, as with the pipeline of transformers.
        return {"max_length": length, "stride": length // 6 * 2, "overflow": options.overflow or "window"}

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer over sounds that are decoded when they are needed."""
        features = sounds.served(processor.feature_extractor, model)
        assert splits.train is not None
        sounds.prepare(model, features, arguments, splits.train)
        tokenizer = processor.tokenizer

        def items(rows: Dataset | None, *, augment: bool) -> sounds.Sounds:
            assert rows is not None
            return sounds.Sounds(rows["path"], tokenizer(list(rows["text"]))["input_ids"], features, augment=augment)

        def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
            labels = [torch.tensor(item["labels"]) for item in items]
            padded = pad_sequence(labels, batch_first=True, padding_value=_IGNORED)
            return {**sounds.collate(features, items), "labels": padded}

        def texts(ids: Any, *, collapse: bool) -> list[str]:
            return [tokenizer.decode(row[row >= 0], group_tokens=collapse) for row in ids]

        def metrics(prediction: EvalPrediction) -> dict[str, float]:
            expected = texts(prediction.label_ids, collapse=False)
            return _accuracies(expected, texts(prediction.predictions, collapse=True))

        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=items(splits.train, augment=options.augment),
            validation=items(splits.validation, augment=False),
            collator=collate,
            metrics=metrics,
            kind=_CtcTrainer,
        )

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """A sound and what is said in it."""
        return [
            {"inputs": media.as_input(path), "target": text}
            for path, text in zip(rows["path"], rows["text"], strict=True)
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Sounds from the data and odd ones."""
        chosen = [example["inputs"] for example in examples[:_GOLDEN_EXAMPLES]]
        return [{"inputs": value} for value in (*chosen, *sounds.odd_sounds())]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Word and character error rates, and what they leave of 1."""
        found = [prediction["text"] for prediction in predictions]
        return {
            "rows": len(targets),
            "word_error_rate": float(jiwer.wer(list(targets), found)),
            "character_error_rate": float(jiwer.cer(list(targets), found)),
            **_accuracies(targets, found),
        }


class _CtcTrainer(trainer.SafeTrainer):
    """Keeps of an evaluation batch the most probable classes, without those of the padding."""

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, *arguments, **options)
        if logits is None:
            return loss, None, labels
        classes = logits.argmax(dim=-1)
        if "attention_mask" in inputs:
            lengths = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(dim=-1))
            classes[torch.arange(classes.shape[1]) >= lengths[:, None]] = _IGNORED
        return loss, classes, labels


def _accuracies(expected: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """1 less the error rates, which insertions may take above 1."""
    return {
        "word_accuracy": max(0.0, 1.0 - jiwer.wer(list(expected), list(found))),
        "character_accuracy": max(0.0, 1.0 - jiwer.cer(list(expected), list(found))),
    }


def _problem(row: Mapping[str, Any]) -> str | None:
    if not isinstance(row["text"], str) or not row["text"].strip():
        return "an empty text, or one that is not a string"
    return None


def _tidy(row: Mapping[str, Any]) -> dict[str, Any]:
    """Single blanks between words."""
    return {"text": " ".join(row["text"].split())}


def _load_tokenizer(base: BaseModel, splits: Splits) -> Wav2Vec2CTCTokenizer:
    """Raises UserError if the base model's tokenizer is of another kind, or cannot write the training texts."""
    texts = splits.train["text"] if splits.train else []
    if base.spec is not None or (splits.train and not Path(base.location, "vocab.json").is_file()):
        return _new_tokenizer(texts)
    with models.loading(base, _PURPOSE):
        tokenizer = AutoTokenizer.from_pretrained(base.location, trust_remote_code=False)
        if not isinstance(tokenizer, Wav2Vec2CTCTokenizer):
            raise ValueError(f"its tokenizer is a {type(tokenizer).__name__}, not a Wav2Vec2CTCTokenizer")
    characters = {character for text in texts for character in (text.upper() if tokenizer.do_lower_case else text)}
    if unknown := sorted(characters - tokenizer.get_vocab().keys() - {" "}):
        raise UserError(
            f"--base-model {base.name}: its vocabulary lacks {''.join(unknown)!r}; write the training texts with the "
            "characters that it has, or remove its vocab.json to start with those of the texts"
        )
    return tokenizer


def _new_tokenizer(texts: Sequence[str]) -> Wav2Vec2CTCTokenizer:
    """A tokenizer of the characters in `texts`."""
    characters = sorted({character for text in texts for character in text} - {" ", "|"})
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *characters))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocabulary), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(str(path))
