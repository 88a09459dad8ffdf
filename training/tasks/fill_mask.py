"""Masked language modelling: trains an encoder to guess tokens that are hidden from it, on plain text.

The model is of use by itself (fill-mask), and as the --base-model of any other task: pretrain on a corpus, then
fine-tune from the resulting folder.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from training import corpus, models, trainer
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

_USUAL_MAX_LENGTH = 128
_EXAMPLES = 400
_HIDING_SEED = 42  # of the tokens hidden in validation; one for all runs, which can be compared then
_LONGEST_EXAMPLE = 2000  # characters
# A model answers with a score for each token of the vocabulary at each position: 128 MB in fp32.
_MOST_LOGITS = 2**25
_USUAL_TOKEN_BUDGET = 4096


class FillMask(TrainingTask):
    """Tokens in the place of masks."""

    primary: ClassVar[str] = "accuracy"
    _tokenizer: PreTrainedTokenizerBase

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Documents in the column `text`; without a validation file the last part of the text is for validation."""
        return corpus.read_splits(options)

    def counts(self, rows: Dataset, labels: Sequence[str]) -> dict[str, int]:
        """Characters of the corpus."""
        return {"characters": sum(map(len, rows["text"]))}

    def load(
        self, base: BaseModel, splits: Splits, options: Options
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A masked language model and its tokenizer."""
        purpose = "a masked language model"
        tokenizer = models.load_tokenizer(base, purpose, corpus.lines(splits.train["text"]) if splits.train else ())
        if tokenizer.mask_token is None:
            raise UserError(
                f"{base.name}: its tokenizer has no mask token, so it cannot be {purpose}; choose another, such as "
                "BERT, RoBERTa, DistilBERT or DeBERTa-v2"
            )
        self._tokenizer = tokenizer
        return models.load(base, AutoModelForMaskedLM, purpose, tokenizer, **models.attention(options)), tokenizer

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Length, overflow policy, and a token budget that keeps the scores of a batch small."""
        budget = min(_USUAL_TOKEN_BUDGET, _MOST_LOGITS // model.config.vocab_size)
        return {
            **models.text_settings(model, processor, options, _USUAL_MAX_LENGTH, "truncate"),
            "token_budget": budget,
        }

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer that hides other tokens in each epoch, and in validation always the same ones."""
        make = corpus.by_line if options.line_by_line else corpus.pack
        masking = DataCollatorForLanguageModeling(
            processor, mlm_probability=options.mlm_probability, pad_to_multiple_of=8
        )
        padding = DataCollatorForTokenClassification(processor, pad_to_multiple_of=8)

        def features(rows: Dataset | None) -> Dataset | None:
            return rows and make(rows["text"], processor, settings["max_length"])

        def collate(batch: list[Any]) -> dict[str, Any]:
            collated: dict[str, Any] = (padding if "labels" in batch[0] else masking)(batch)
            return collated

        validation = features(splits.validation)
        # Of how many sequences the scores fit into memory makes no difference to the result.
        fitting = max(1, _MOST_LOGITS // (settings["max_length"] * model.config.vocab_size))
        arguments.per_device_eval_batch_size = min(arguments.per_device_eval_batch_size, fitting)
        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=features(splits.train),
            validation=validation and _hidden(validation, replace(masking, seed=_HIDING_SEED)),
            collator=collate,
            metrics=_metrics,
            preprocess_logits_for_metrics=_tokens_and_losses,
        )

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Lines with one word hidden, and the word. The words are such as are one token."""
        lines = [line[:_LONGEST_EXAMPLE] for line in corpus.lines(rows["text"])]
        step = max(1, len(lines) // _EXAMPLES)
        chance = random.Random(0)
        examples = [self._hide_word(line, chance) for line in lines[::step]]
        return [example for example in examples if example is not None][:_EXAMPLES]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Lines of the corpus; several masks, masks alone, and texts that are too long or odd."""
        mask = self._tokenizer.mask_token
        odd = (
            mask,
            f"{mask} {mask}",
            f"The {mask} is {mask}.",
            f"Ünïcödé 漢字 {mask} 🙂",
            f"a {mask}" + " word" * max_length,
        )
        return super().golden(examples, max_length, seed) + [{"inputs": text} for text in odd]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """How often the hidden word is the most probable one (`accuracy`), and one of the first five."""
        guesses = [[fill["token_str"].strip() for fill in fills] for fills in predictions]
        pairs = list(zip(guesses, targets, strict=True))
        return {
            "rows": len(targets),
            "accuracy": float(np.mean([words[0] == target for words, target in pairs])),
            "top_5_accuracy": float(np.mean([target in words[:5] for words, target in pairs])),
        }

    def _hide_word(self, text: str, chance: random.Random) -> dict[str, Any] | None:
        """`text` with one of its words replaced by the mask; None if no word of it is a single token."""
        encoding = self._tokenizer(text, truncation=True, max_length=64)
        words = encoding.word_ids()
        single = [
            place
            for place, word in enumerate(words)
            if word is not None
            and words.count(word) == 1
            and text[slice(*encoding.token_to_chars(place))].strip().isalpha()
        ]
        if not single:
            return None
        place = chance.choice(single)
        start, end = encoding.token_to_chars(place)
        start += len(text[start:end]) - len(text[start:end].lstrip())
        target = str(self._tokenizer.decode([encoding["input_ids"][place]])).strip()
        return {"inputs": f"{text[:start]}{self._tokenizer.mask_token}{text[end:]}", "target": target}


def _hidden(rows: Dataset, masking: DataCollatorForLanguageModeling) -> Dataset:
    """Rows with tokens hidden once and for all, and `labels`: the hidden tokens, -100 elsewhere."""
    masked = [masking([{"input_ids": ids}]) for ids in rows["input_ids"]]
    columns = {
        name: [batch[name][0, :length].tolist() for batch, length in zip(masked, rows["length"], strict=True)]
        for name in ("input_ids", "labels")
    }
    return Dataset.from_dict({**columns, "length": rows["length"]})


def _tokens_and_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable token and the loss at each position, [batch, length] each, in place of all scores."""
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    return logits.argmax(dim=-1), losses


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Share of hidden tokens that the model guesses, and perplexity: e to the mean loss of a hidden token."""
    tokens, losses = cast(Any, prediction.predictions)  # what `_tokens_and_losses` gave; it is annotated as one array
    hidden = np.asarray(prediction.label_ids) != -100
    if not hidden.any():
        return {}
    return {
        "accuracy": float((tokens == prediction.label_ids)[hidden].mean()),
        "perplexity": float(np.exp(losses[hidden].mean())),
    }
