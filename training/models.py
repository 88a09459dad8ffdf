"""Loads what training starts from, with errors that name the option to change."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from training import layers, scratch
from training.base_model import BaseModel
from training.errors import UserError
from training.options import Options


def load(
    base: BaseModel, auto_model: Any, purpose: str, processor: Any = None, /, **config_changes: Any
) -> PreTrainedModel:
    """A pretrained model with a fresh head where its own does not fit, or a model from scratch.

    auto_model: e.g. `AutoModelForSequenceClassification`. purpose: what it shall be, for messages, e.g. "a text
    classifier". processor: its tokenizer, where it has one; a model from scratch takes its vocabulary from there.
    config_changes: entries of the model's config. Raises UserError if it cannot be loaded. `fresh_head` of a pretrained
    model tells whether some of its weights begin at random.
    """
    with loading(base, purpose):
        if base.spec is not None:
            tokenizer = processor if isinstance(processor, PreTrainedTokenizerBase) else None
            built: PreTrainedModel = auto_model.from_config(
                scratch.build_config(base.spec, tokenizer, **config_changes)
            )
            return built
        config = AutoConfig.from_pretrained(base.location, trust_remote_code=False, **config_changes)
        model, report = auto_model.from_pretrained(
            base.location,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the head of a model with other labels is replaced
            output_loading_info=True,
        )
        body = f"{model.base_model_prefix}."
        if misfits := [str(name) for name, *_ in report["mismatched_keys"] if str(name).startswith(body)]:
            raise ValueError(f"its weights do not fit its config.json: {misfits[0]}")
    found: PreTrainedModel = model if base.layers is None else layers.keep(model, base.layers)
    found.fresh_head = bool(report["missing_keys"] or report["mismatched_keys"])  # type: ignore[assignment]
    return found


def load_tokenizer(base: BaseModel, purpose: str, texts: Iterable[str] = ()) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; for a model from scratch one trained on `texts`.

    Raises UserError if it cannot be loaded, or cannot be served.
    """
    if base.spec is not None:
        return scratch.train_tokenizer(base.spec, texts)
    with loading(base, purpose):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base.location, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(f"{base.option} {base.name}: its tokenizer has no tokenizer.json, which serving needs")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token  # as is usual with GPT-2, which has no padding token
    if tokenizer.pad_token_id is None:
        raise UserError(f"{base.option} {base.name}: its tokenizer has no padding token; set one and save it first")
    return tokenizer


@contextmanager
def loading(base: BaseModel, purpose: str) -> Iterator[None]:
    """Turns whatever goes wrong in loading into a UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{base.option} {base.name}: cannot be loaded as {purpose}: {reason}") from error


def attention(options: Options) -> dict[str, Any]:
    """Changes of the config for training: kernel and dropout of attention, where they are not the model's own."""
    kernel, dropout = options.attention, options.attention_dropout
    changes = {} if dropout is None else {"attention_probs_dropout_prob": dropout, "attention_dropout": dropout}
    return changes | ({} if kernel is None else {"attn_implementation": kernel})


def has_labels(base: BaseModel, labels: Sequence[str]) -> bool:
    """Whether a base model has a head for these very labels, which training goes on with."""
    try:
        return base.spec is None and base.labels() == list(labels)
    except UserError:
        return False


def head(model: Any) -> nn.Linear:
    """The layer that gives the logits."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return next(layer for layer in reversed(layers) if layer.out_features == model.config.num_labels)


def set_bias(head: Any, bias: NDArray[np.float64]) -> None:
    """Has a fresh head begin with what is known of each label, if it has a bias."""
    if head.bias is not None:
        head.bias.data.copy_(torch.from_numpy(bias))


def text_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options, usual: int, overflow: str
) -> dict[str, Any]:
    """The entries of model-config.yaml that every task on texts has: length, overlap of windows, overflow policy.

    usual: see `longest_input`. overflow: the policy where none is asked for. Raises UserError as `longest_input` does.
    """
    length = longest_input(model, tokenizer, options.max_length, usual)
    return {"max_length": length, "stride": length // 8, "overflow": options.overflow or overflow}


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int | None, usual: int) -> int:
    """Tokens of one sequence: as `wanted`, or what the model can take, at most `usual`.

    Raises UserError for a length that the model cannot take.
    """
    # RoBERTa counts positions from behind its padding index.
    reserved = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    limit = min(positions - reserved, tokenizer.model_max_length)
    if wanted is None:
        return int(min(limit, usual))
    if not 8 <= wanted <= limit:
        raise UserError(f"--max-length {wanted}: this model takes 8 to {limit} tokens")
    return wanted
