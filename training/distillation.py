"""Distillation: a model learns from the logits of a larger, fine-tuned one, the teacher, besides the labels.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015. The teacher answers once, before the
training, so it may have another tokenizer, and an epoch costs what it costs without one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerBase

from training import base_model, data, models
from training.batches import IGNORED, LongestFirst, Padding, TokenRows, parts
from training.errors import UserError
from training.options import Options, TrainerOptions

# What both models' logits are divided by, so that the less probable labels count, too.
TEMPERATURE = 2.0
_ROWS = 64  # of a batch, before it is taken in parts
_SHOWN = 5
_COMPARED = 100

Logits = list[NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Teacher:
    """A fine-tuned model. order: its class index of each label of the data. most_tokens, bf16, device: how it runs."""

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    order: list[int]
    most_tokens: int
    bf16: bool
    device: torch.device

    def judge_texts(self, rows: Dataset, columns: Sequence[str], length: int) -> Logits:
        """Logits of texts or pairs, each [labels], through its own tokenizer.

        length: tokens at most, if the teacher takes so many.
        """
        length = models.longest_input(self.model, self.tokenizer, None, length)

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            texts = [batch[name] for name in columns]
            return dict(self.tokenizer(*texts, truncation=True, max_length=length, return_attention_mask=False))

        return self._judge(data.mapped(rows, tokenize, rows.column_names))

    def judge_tokens(self, rows: Dataset, length: int) -> Logits:
        """Logits of token sequences (`input_ids` and what else a model takes), each [tokens, labels].

        length: tokens of the longest one that there may be. Raises UserError if the teacher takes fewer.
        """
        if (most := models.longest_input(self.model, self.tokenizer, None, length)) < length:
            raise UserError(f"--max-length {length}: the teacher {self.name} takes {most}; add --max-length {most}")
        return self._judge(rows)

    def check_tokenizer(self, tokenizer: Any, texts: Sequence[str]) -> None:
        """Raises UserError if this tokenizer gives other tokens than the teacher's own."""
        some = list(texts[:_COMPARED])
        same = self.tokenizer.get_vocab() == tokenizer.get_vocab()
        if not same or self.tokenizer(some)["input_ids"] != tokenizer(some)["input_ids"]:
            raise UserError(
                f"--teacher {self.name}: its tokenizer is not that of the base model, and a label for each token "
                "needs the same tokens; take a teacher that was fine-tuned from the same family of models"
            )

    def _judge(self, rows: Dataset) -> Logits:
        tokens, padding = TokenRows(rows), Padding(self.tokenizer)
        order = list(LongestFirst(tokens.lengths))
        batches = [order[start : start + _ROWS] for start in range(0, len(order), _ROWS)]
        found: dict[int, NDArray[np.float32]] = {}
        self.model.to(self.device).eval()
        bar = tqdm(batches, desc="the teacher answers", unit=" batches", delay=2, leave=False, disable=None)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            for numbers in bar:
                places = iter(numbers)
                for piece in parts(padding([tokens[number] for number in numbers]), self.most_tokens):
                    piece = {name: tensor.to(self.device) for name, tensor in piece.items()}
                    logits = self.model(**piece).logits.float()[..., self.order].cpu().numpy()
                    masks = piece["attention_mask"].bool().cpu().numpy()
                    for values, mask in zip(logits, masks, strict=True):
                        found[next(places)] = values[mask] if values.ndim > 1 else values
        return [found[number] for number in range(len(order))]


def load_teacher(
    options: Options,
    arguments: TrainerOptions,
    auto_model: Any,
    purpose: str,
    labels: Sequence[str],
    *,
    several: bool = False,
) -> Teacher | None:
    """The teacher that --teacher names, if it does.

    auto_model, purpose: as `models.load` takes them. labels: of the data, in class order. several: whether a row may
    have more than one. Raises UserError for a folder that is no model, one for another task, and other labels.
    """
    if options.teacher is None:
        return None
    base = base_model.local(Path(options.teacher), "--teacher")
    with models.loading(base, purpose):
        config = AutoConfig.from_pretrained(base.location, trust_remote_code=False)
    made = next(iter(config.architectures or ()), "a model without a head")
    if not made.endswith(auto_model.__name__.removeprefix("AutoModel")):
        raise UserError(
            f"--teacher {base.name}: it is {made}, not {purpose}; give one that was trained with --task {options.task}"
        )
    names = {str(name): int(index) for index, name in config.id2label.items()}
    if names.keys() != set(labels):
        raise UserError(
            f"--teacher {base.name}: its labels are not those of the data: {_differences(names, labels)}; train it on "
            "the same labels"
        )
    kind = "multi_label_classification" if several else "single_label_classification"
    if (config.problem_type or "single_label_classification") != kind:
        raise UserError(
            f"--teacher {base.name}: its problem_type is {config.problem_type or 'not set'}, that of the data {kind}; "
            "give one that was trained on data of this kind"
        )
    tokenizer = models.load_tokenizer(base, purpose)
    model = models.load(base, auto_model, purpose)
    order = [names[label] for label in labels]
    return Teacher(
        base.name, model, tokenizer, order, options.most_tokens, bool(arguments.bf16), torch.device(arguments.device)
    )


def loss(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How far logits are from the teacher's: [rows, labels], or [rows, tokens, labels], of which labelled tokens count.

    The divergence of the softened probabilities, times the squared temperature, by which their gradients are smaller;
    for several labels (float labels [rows, labels]) the cross-entropy with the teacher's scores. Means over rows, or
    over labelled tokens, as the loss of the labels is one.
    """
    logits = logits.float()
    if labels.is_floating_point():
        return functional.binary_cross_entropy_with_logits(logits, teacher.sigmoid())
    if labels.dim() > 1:
        known = labels.ne(IGNORED)
        logits, teacher = logits[known], teacher[known]
    found, wanted = (functional.log_softmax(values / TEMPERATURE, dim=-1) for values in (logits, teacher))
    return TEMPERATURE**2 * functional.kl_div(found, wanted, reduction="batchmean", log_target=True)


def _differences(teacher: Mapping[str, int], data: Sequence[str]) -> str:
    """What labels only one of the two has."""
    only = {"the teacher": sorted(teacher.keys() - set(data)), "the data": sorted(set(data) - teacher.keys())}
    return "; ".join(
        f"only {who} has {', '.join(map(repr, names[:_SHOWN]))}{' …' if len(names) > _SHOWN else ''}"
        for who, names in only.items()
        if names
    )
