"""Causal language modelling: trains a decoder to go on with a text, on plain text.

The model is of use by itself (text-generation), and as the --base-model of further training: pretrain on a corpus, then
fine-tune from the resulting folder.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from training import corpus, models, trainer
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options, TrainerOptions
from training.tasks import Splits, TrainingTask

_USUAL_TRAINING_LENGTH = 256
_PIECES = 256  # validation examples at most
_SAMPLE = 20_000  # characters by which the length of tokens is judged
_FILLED = 0.9  # of the context, by a validation example of average tokens
_GOLDEN_PROMPTS, _PROMPT, _GOLDEN_TOKENS = 8, 60, 16
_LONGEST_TOKEN = 20  # characters: more than tokens have on average
# Prompts unlike any in training: a model must go on from them too, and the same way on every machine.
_GOLDEN_ODD = ("", "?", "Ünïcödé, 漢字 and 🙂")
# The scores of a training batch are the largest array of all: 512 MB in fp32.
_MOST_LOGITS = 2**27


class TextGeneration(TrainingTask):
    """The next token, and the next."""

    primary: ClassVar[str] = "character_likelihood"
    # Characters of a token on average, and of a validation example that fits the model.
    _token: float
    _piece: int

    def read(self, options: Options, seed: int, base: BaseModel) -> Splits:
        """Documents in the column `text`; without a validation file the last part of the text is for validation."""
        if options.overflow == "window":
            raise UserError("--overflow window: a text to go on with has no windows; choose truncate or error")
        return corpus.read_splits(options)

    def counts(self, rows: Dataset, labels: Sequence[str]) -> dict[str, int]:
        """Characters of the corpus."""
        return {"characters": sum(map(len, rows["text"]))}

    def load(
        self, base: BaseModel, splits: Splits, options: Options
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A causal language model and its tokenizer."""
        purpose = "a causal language model"
        tokenizer = models.load_tokenizer(base, purpose, splits.train["text"] if splits.train else ())
        sample = next((text[:_SAMPLE] for rows in splits.named().values() for text in rows["text"]), "a text")
        self._token = len(sample) / len(tokenizer(sample, verbose=False)["input_ids"])
        return models.load(base, AutoModelForCausalLM, purpose, tokenizer, **models.attention(options)), tokenizer

    def settings(self, model: Any, processor: Any, options: Options) -> dict[str, Any]:
        """Length and overflow policy: the served model takes all positions that it has."""
        settings = models.text_settings(model, processor, options, processor.model_max_length, "truncate")
        self._piece = max(1, int(_FILLED * settings["max_length"] * self._token))
        return settings

    def trainer(
        self,
        model: Any,
        processor: Any,
        splits: Splits,
        options: Options,
        arguments: TrainerOptions,
        settings: Mapping[str, Any],
    ) -> Trainer:
        """A Trainer over sequences of one length, packed with the documents one after the other.

        A pretrained model learns on sequences of 256 tokens, unless --max-length is given; one from scratch on such as
        it has positions for, because it knows nothing of a position that it has not seen.
        """
        make = corpus.by_line if options.line_by_line else corpus.pack
        length = settings["max_length"]
        if options.max_length is None and options.from_scratch is None:
            length = min(length, _USUAL_TRAINING_LENGTH)

        def features(rows: Dataset | None) -> Dataset | None:
            if rows is None:
                return None
            blocks = make(rows["text"], processor, length)
            return blocks.add_column("labels", blocks["input_ids"])

        # Of how many sequences the scores fit into memory makes no difference to the result.
        fitting = max(1, _MOST_LOGITS // (length * model.config.vocab_size))
        arguments.per_device_eval_batch_size = min(arguments.per_device_eval_batch_size, fitting)
        return trainer.build(
            model,
            processor,
            arguments,
            options,
            train=features(splits.train),
            validation=features(splits.validation),
            # Unlike the collator for language modelling it leaves end tokens to be learned where they pad as well.
            collator=DataCollatorForSeq2Seq(processor, pad_to_multiple_of=8),
        )

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Pieces of the text, asked for with the log probabilities of their tokens."""
        asked = {"max_new_tokens": 1, "do_sample": False, "details": True, "decoder_input_details": True}
        size = self._piece
        pieces = [text[start : start + size] for text in rows["text"] for start in range(0, len(text), size)]
        step = max(1, len(pieces) // _PIECES)
        return [{"inputs": piece, "parameters": asked, "target": piece} for piece in pieces[::step][:_PIECES]]

    def golden(self, examples: Sequence[Mapping[str, Any]], max_length: int, seed: int) -> list[dict[str, Any]]:
        """Greedy continuations of beginnings of the examples, and of over-long and odd texts."""
        chosen = random.Random(seed).sample(list(examples), min(_GOLDEN_PROMPTS, len(examples)))
        prompts = [example["inputs"][:_PROMPT] for example in chosen]
        tokens = min(_GOLDEN_TOKENS, max_length // 2)
        asked = {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1, "details": True}
        too_long = "word " * (max_length * _LONGEST_TOKEN // 5)
        return [{"inputs": text, "parameters": asked} for text in (*prompts, too_long, *_GOLDEN_ODD)]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any], labels: Sequence[str]) -> dict[str, Any]:
        """How well the model foresees the texts, after the first token of each.

        loss: nats of a token; perplexity: e to that. nats_per_character compares models of different tokens;
        character_likelihood, e to minus that, is the probability of a character (geometric mean).
        """
        tokens = [token for found in predictions for token in found["details"]["prefill"][1:]]
        nats = -math.fsum(token["logprob"] for token in tokens)
        characters = max(1, sum(len(token["text"]) for token in tokens))
        loss = nats / max(1, len(tokens))
        return {
            "rows": len(targets),
            "characters": characters,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "nats_per_character": nats / characters,
            "character_likelihood": math.exp(-nats / characters),
        }
