"""Fine-tunes an encoder to find the answer to a question in a context, from SQuAD's flat fields.

Columns `question`, `context` and `answers` ({"text": […], "answer_start": […]}, empty lists where the context has no
answer); in a csv file `answer_text` and `answer_start` instead, empty where there is none.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.model_selection import GroupShuffleSplit
from tokenizers import Encoding
from transformers import (
    AutoModelForQuestionAnswering,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from training import data, models, trainer
from training.base_model import BaseModel
from training.batches import Padding, TokenRows
from training.care import Made, Row, Rows
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

_USUAL_MAX_LENGTH = 384
_MOST_STRIDE = 128
_NO_ANSWER = 0  # position of the first token, which stands for "not in this window"
_GOLDEN_EXAMPLES = 12
_GOLDEN_ANSWERS = 5


class QuestionAnswering(TrainingTask):
    """Answers that stand in a context."""

    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match")
    primary: ClassVar[str] = "f1"

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Columns `question`, `context`, `texts` and `starts`: of all answers, none where there is no answer."""
        splits: dict[str, Dataset] = {}
        skipped = 0
        for name, path in options.files().items():
            rows, bad = data.good_rows(_read(path), path, _problem, skip_bad_rows=options.skip_bad_rows)
            answers = [_answers(row) for row in rows]
            splits[name] = Dataset.from_dict(
                {
                    "question": rows["question"],
                    "context": rows["context"],
                    "texts": [texts for texts, _ in answers],
                    "starts": [starts for _, starts in answers],
                }
            )
            skipped += bad
        train, validation = splits.get("train"), splits.get("validation")
        if train is not None and not any(train["texts"]):
            raise UserError(f"{options.train_file}: no question has an answer; there is nothing to learn from")
        if train is not None and validation is None:
            train, validation = _split(train, options.validation_share, seed, Path(str(options.train_file)))
        return Splits(train, validation, splits.get("test"), [], skipped)

    def compared(self, rows: Dataset, labels: Sequence[str]) -> Rows:
        """A question and its context. Several answers may be right."""
        return Made(rows, lambda batch: map(Row, zip(batch["question"], batch["context"], strict=True)))

    def load(
        self, base: BaseModel, splits: Splits, options: Options
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model with a start and an end logit for each token."""
        purpose = "a question-answering model"
        texts = [*splits.train["context"], *splits.train["question"]] if splits.train else ()
        tokenizer = models.load_tokenizer(base, purpose, texts)
        changes = models.attention(options)
        model = models.load(base, AutoModelForQuestionAnswering, purpose, tokenizer, **changes)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Length, overlap of windows, and windows as the overflow policy."""
        length = models.longest_input(model, processor, options.max_length, _USUAL_MAX_LENGTH)
        stride = min(length // 3, _MOST_STRIDE)
        return {"max_length": length, "stride": stride, "overflow": options.overflow or "window"}

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer over the windows of the contexts."""
        length, stride = settings["max_length"], settings["stride"]
        for name, rows in splits.named().items():
            _check_questions(rows["question"], options.files().get(name), processor, length, stride)

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            encoded = processor(
                batch["question"],
                batch["context"],
                truncation="only_second",
                max_length=length,
                stride=stride,
                return_overflowing_tokens=True,
                return_attention_mask=False,
            )
            samples = encoded.pop("overflow_to_sample_mapping")
            spans = []
            for encoding, sample in zip(encoded.encodings, samples, strict=True):
                texts, starts = batch["texts"][sample], batch["starts"][sample]
                spans.append(answer_span(encoding, starts[0], starts[0] + len(texts[0])) if texts else (0, 0))
            return {
                **encoded,
                "start_positions": [start for start, _ in spans],
                "end_positions": [end for _, end in spans],
            }

        def features(rows: Dataset | None) -> TokenRows | None:
            if rows is None:
                return None
            return TokenRows(data.mapped(rows, tokenize, rows.column_names))

        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=features(splits.train),
            validation=features(splits.validation),
            collator=Padding(processor),
            metrics=_metrics,
        )

    def learned(
        self, trainer: Trainer, splits: Splits, options: Options, settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Whether "no answer" may be the answer: if some questions of the training data have none."""
        assert splits.train is not None
        return {"options": {"handle_impossible_answer": not all(splits.train["texts"])}}

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """A question with its context, and the texts of all right answers."""
        return [
            {
                "inputs": {"question": row["question"], "context": row["context"]},
                "parameters": {"overflow": "window"},
                "target": row["texts"],
            }
            for row in rows
        ]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Questions with and without an answer, and one whose context takes several windows.

        Several answers are asked for: where two are close, only the list tells how close.
        """
        inputs = [example["inputs"] for example in random.Random(seed).sample(list(examples), len(examples))]
        inputs = inputs[:_GOLDEN_EXAMPLES] or [{"question": "Who wrote?", "context": "Ada wrote to Charles."}]
        words = inputs[0]["context"].split()
        too_long = " ".join(words * (1 + 2 * max_length // len(words)))
        inputs += [{"question": inputs[0]["question"], "context": text} for text in (too_long, "Ünïcödé, 漢字 and 🙂")]
        return [
            {"inputs": value, "parameters": {"top_k": _GOLDEN_ANSWERS, "handle_impossible_answer": bool(number % 2)}}
            for number, value in enumerate(inputs)
        ]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """Exact match and F1 as SQuAD has them: the best over a question's right answers, the mean over questions."""
        answers = [prediction["answer"] for prediction in predictions]
        exact = [
            max(float(normalized(answer) == normalized(text)) for text in texts or [""])
            for answer, texts in zip(answers, targets, strict=True)
        ]
        overlaps = [
            max(overlap(answer, text) for text in texts or [""]) for answer, texts in zip(answers, targets, strict=True)
        ]
        unanswerable = [value for value, texts in zip(exact, targets, strict=True) if not texts]
        return {
            "rows": len(targets),
            "f1": float(np.mean(overlaps)),
            "exact_match": float(np.mean(exact)),
            "without_answer": {
                "rows": len(unanswerable),
                "exact_match": float(np.mean(unanswerable)) if unanswerable else None,
            },
        }


def answer_span(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """First and last position of the answer at characters `start` to `end` of the context.

    Both are the first token's, if the answer is not wholly in this window.
    """
    context = np.flatnonzero([sequence == 1 for sequence in encoding.sequence_ids])
    if not len(context):
        return _NO_ANSWER, _NO_ANSWER
    starts, ends = np.array(encoding.offsets)[context].T
    if start < starts[0] or end > ends[-1]:
        return _NO_ANSWER, _NO_ANSWER
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(starts, end, side="left") - 1
    return (int(context[first]), int(context[last])) if first <= last else (_NO_ANSWER, _NO_ANSWER)


def normalized(text: str) -> str:
    """An answer as SQuAD compares it: without case, punctuation, articles and extra blanks."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def overlap(found: str, expected: str) -> float:
    """F1 of the words that two answers share, after `normalized`."""
    first, second = normalized(found).split(), normalized(expected).split()
    if not first or not second:
        return float(first == second)
    shared = (Counter(first) & Counter(second)).total()
    return 2 * shared / (len(first) + len(second))


def _read(path: Path) -> Dataset:
    """The file. Raises UserError if a column is missing."""
    rows = data.read(path)
    answers = ("answers",) if "answers" in rows.column_names else ("answer_text", "answer_start")
    if missing := [name for name in ("question", "context", *answers) if name not in rows.column_names]:
        raise UserError(
            f"{path}: there is no column {missing[0]!r}; the file has {', '.join(map(repr, rows.column_names))}; "
            'question-answering needs question, context and answers ({"text": […], "answer_start": […]}), '
            "or in a csv file question, context, answer_text and answer_start"
        )
    return rows


def _answers(row: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Texts and places of a row's answers. Raises TypeError or ValueError if they are not what they should be."""
    if "answers" not in row:
        text, start = row["answer_text"], row["answer_start"]
        return ([str(text)], [int(start)]) if text else ([], [])
    texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
    if len(texts) != len(starts) or not all(isinstance(text, str) for text in texts):
        raise ValueError
    return list(texts), [int(start) for start in starts]


def _problem(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row."""
    for name in ("question", "context"):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"an empty {name}, or one that is not a string"
    try:
        texts, starts = _answers(row)
    except (TypeError, ValueError, KeyError):
        return 'answers that are not texts with a place each: {"text": ["…"], "answer_start": [0]}'
    if any(
        start < 0 or not text.strip() or row["context"][start : start + len(text)] != text
        for text, start in zip(texts, starts, strict=True)
    ):
        return "an answer that the context does not have at its answer_start"
    return None


def _split(rows: Dataset, share: float, seed: int, path: Path) -> tuple[Dataset, Dataset]:
    """Takes the questions to some of the contexts for validation: (training, validation)."""
    contexts = rows["context"]
    if len(set(contexts)) < 2:
        raise UserError(f"{path}: all questions are about one context; give a --validation-file")
    splitter = GroupShuffleSplit(n_splits=1, test_size=share, random_state=seed)
    [(train, validation)] = splitter.split(contexts, groups=contexts)
    return rows.select(train), rows.select(validation)


def _check_questions(questions: Sequence[str], path: Path | None, processor: Any, length: int, stride: int) -> None:
    """Raises UserError, naming the rows, if questions leave less than a stride of a window for their context."""
    most = length - processor.num_special_tokens_to_add(pair=True) - stride - 1
    encoded = processor(list(questions), add_special_tokens=False)["input_ids"]
    if long := [str(number) for number, ids in enumerate(encoded, start=1) if len(ids) > most]:
        raise UserError(
            f"{path or 'the validation rows'}: {len(long)} question(s) with more than {most} tokens, which leave too "
            f"little of --max-length {length} for the context: row {', '.join(long[:5])}; shorten them or raise it"
        )


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Of windows: share with the right span, and mean F1 of the tokens of the most probable start and end."""
    first, last = (np.argmax(logits, axis=-1) for logits in prediction.predictions)
    expected_first, expected_last = (np.asarray(positions) for positions in prediction.label_ids)
    shared = _tokens(np.maximum(first, expected_first), np.minimum(last, expected_last))
    both = _tokens(first, last) + _tokens(expected_first, expected_last)
    return {
        "f1": float(np.mean(2 * shared / both)),
        "exact_match": float(np.mean((first == expected_first) & (last == expected_last))),
    }


def _tokens(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of spans."""
    return np.asarray(np.maximum(last - first + 1, 0))
