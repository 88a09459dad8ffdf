"""Models without pretrained weights: `--from-scratch "bert hidden_size=128 num_hidden_layers=4"`.

A specification names a model type and sizes of its configuration. Weights start at random (seed them with
`transformers.set_seed`), and a text model's tokenizer is trained on the corpus:

spec = parse_spec("gpt2 n_layer=4 n_embd=128 n_head=4 vocab_size=1024")
tokenizer = train_tokenizer(spec, texts)
model = AutoModelForCausalLM.from_config(build_config(spec, tokenizer))
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    GPT2Tokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from training.errors import UserError

# Models of about a million parameters, which train in minutes on two cores. What a specification leaves out is this.
_ENCODER = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
}
_ENCODER_DECODER = {
    "vocab_size": 4096,
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 256,
}
_TRANSFORMER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
_SMALL: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    # RoBERTa counts positions from behind its padding index.
    "roberta": _ENCODER | {"max_position_embeddings": 260},
    "distilbert": {
        "vocab_size": 4096,
        "dim": 128,
        "n_layers": 4,
        "n_heads": 4,
        "hidden_dim": 512,
        "max_position_embeddings": 256,
    },
    # Relative positions as in the published DeBERTa-v3; without these keys the class is a plain BERT.
    "deberta-v2": _ENCODER
    | {
        "relative_attention": True,
        "position_buckets": 64,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
    },
    # "gelu" is one operation of torch, their own "gelu_new", its approximation, is eight and takes a sixth of a step.
    "gpt2": {
        "vocab_size": 4096,
        "n_embd": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 256,
        "activation_function": "gelu",
    },
    # A decoder with rotary positions: what it learns of a word at one place holds at all others.
    "phi": _ENCODER | {"tie_word_embeddings": True, "hidden_act": "gelu"},
    "t5": {"vocab_size": 4096, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4},
    "bart": _ENCODER_DECODER,
    "marian": _ENCODER_DECODER,
    "vit": _TRANSFORMER | {"image_size": 32, "patch_size": 4},
    "resnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"},
    "audio-spectrogram-transformer": _TRANSFORMER | {"max_length": 128, "num_mel_bins": 64},
    "wav2vec2": _TRANSFORMER | {"conv_dim": [64] * 7, "classifier_proj_size": 64, "num_conv_pos_embeddings": 32},
    "vits": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "flow_size": 32,
        "spectrogram_bins": 33,
        "depth_separable_num_layers": 2,
        "duration_predictor_num_flows": 2,
        "duration_predictor_filter_channels": 32,
        "prior_encoder_num_flows": 2,
        "prior_encoder_num_wavenet_layers": 2,
        "posterior_encoder_num_wavenet_layers": 2,
        "upsample_initial_channel": 32,
        "upsample_rates": [4, 4],
        "upsample_kernel_sizes": [8, 8],
        "resblock_kernel_sizes": [3],
        "resblock_dilation_sizes": [[1, 3]],
    },
}
# Of a weight, times the width. The usual deviation of 0.02 suits widths of about 1,000: narrow layers with so small
# weights take long to learn anything (Nguyen & Salazar, "Transformers without Tears", 2019).
_INITIAL_VARIANCE = 2 / 5
_SIZE = re.compile(r"([A-Za-z_]\w*)=(\[[^\]]*\]|[^\s,\[\]]+)")
_DEFAULT_VOCABULARY = 4096
_DEFAULT_MAX_LENGTH = 512  # of models whose positions have no end, such as T5
_TEXTS_PER_CALL = 1000


class Spec(NamedTuple):
    """model_type: a key of `AutoConfig`, e.g. "bert"; sizes: arguments of its configuration class."""

    model_type: str
    sizes: dict[str, Any]


def parse_spec(text: str) -> Spec:
    """Reads `"TYPE KEY=VALUE …"`, separated by blanks or commas; lists are written `[16,32]`.

    Sizes that are left out are small ones for the types this module knows and the class's own for all others.
    Raises UserError for an unknown type or key (naming close ones), a value of a wrong type, and sizes that no model
    can be built from.
    """
    model_type, *_ = re.split(r"[\s,]+", text.strip(), maxsplit=1)
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"--from-scratch {text!r}: there is no model type {model_type!r}{_close(model_type, list(CONFIG_MAPPING))}"
            f"; write a type and sizes, e.g. 'bert hidden_size=128'. Small ones are known for {', '.join(_SMALL)}"
        )
    rest = text.strip()[len(model_type) :]
    if unread := _SIZE.sub("", rest).strip(" ,\t\n"):
        raise UserError(f"--from-scratch {text!r}: {unread!r} is not a size; write sizes as key=value")
    given = [(match[1], _value(match[2])) for match in _SIZE.finditer(rest)]
    small = _SMALL.get(model_type, {})
    if not given and not small:
        raise UserError(f"--from-scratch {text!r}: give the sizes, e.g. '{model_type} hidden_size=128 …'")
    kind = CONFIG_MAPPING[model_type]
    sizes: dict[str, Any] = {}
    known = _keys(kind) | small.keys()
    for key, value in given:
        if key not in known:
            raise UserError(f"--from-scratch {text!r}: {model_type} has no {key!r}{_close(key, sorted(known))}")
        # Some classes call a common size by a name of their own: hidden_size is n_embd in GPT-2.
        name = kind.attribute_map.get(key, key)
        if name in sizes:
            raise UserError(f"--from-scratch {text!r}: {name} is given twice")
        sizes[name] = value
    small = {kind.attribute_map.get(key, key): value for key, value in small.items()}
    spec = Spec(model_type, small | sizes)
    _check(spec, text, sizes)
    return spec


def build_config(spec: Spec, tokenizer: PreTrainedTokenizerBase | None = None, **changes: Any) -> PreTrainedConfig:
    """The configuration of `spec`, its vocabulary and special tokens those of `tokenizer`, and `changes` made to it."""
    defaults = CONFIG_MAPPING[spec.model_type]()
    if tokenizer is not None:
        vocabulary = _vocabulary(defaults, tokenizer)
    else:  # ids of the published vocabulary, which may be larger, mean nothing here
        ids = {name: value for name, value in vars(defaults).items() if name.endswith("_token_id")}
        vocabulary = dict.fromkeys((name for name, value in ids.items() if isinstance(value, int) and value > 0), 0)
    config = AutoConfig.for_model(spec.model_type, **(spec.sizes | vocabulary | changes))
    for name in ("initializer_range", "init_std"):
        given = name in spec.sizes or name in changes
        if hasattr(config, name) and not given and isinstance(getattr(config, "hidden_size", None), int):
            setattr(config, name, math.sqrt(_INITIAL_VARIANCE / config.hidden_size))
    return config


def train_tokenizer(spec: Spec, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A tokenizer of the model's own kind, trained on `texts`, with at most `vocab_size` tokens.

    BERT and DistilBERT get lower-cased WordPiece, RoBERTa, GPT-2 and BART byte-level BPE (GPT-2 with a padding token),
    DeBERTa-v2 and T5 Unigram. Marian's own tokenizer is a slow one of the sentencepiece library, which serving cannot
    use: it gets T5's in its place, without the sentinel tokens. So do encoder-decoders of other types that have no fast
    tokenizer; all other types get GPT-2's. The same texts in the same order give the same tokenizer.

    Raises UserError if the type is not a text model, or `vocab_size` is below the special tokens and characters.
    """
    config = build_config(spec)
    if not hasattr(config, "vocab_size") or spec.model_type == "wav2vec2":
        raise UserError(f"--from-scratch {spec.model_type}: this is not a text model, so it has no tokenizer to train")
    size = int(spec.sizes.get("vocab_size", _DEFAULT_VOCABULARY))
    kind = getattr(transformers, str(TOKENIZER_MAPPING_NAMES.get(spec.model_type)), None)
    options: dict[str, Any] = {}
    if not (own := isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerFast)):
        kind, options = (T5Tokenizer, {"extra_ids": 0}) if config.is_encoder_decoder else (GPT2Tokenizer, {})
    try:
        if kind(**options).pad_token is None:
            options["pad_token"] = "<|pad|>"
        tokenizer: PreTrainedTokenizerBase = _train(kind, options, list(texts), size)
    except Exception as error:  # what the Rust library raises has no type of its own
        raise UserError(f"--from-scratch {spec.model_type}: its tokenizer cannot be trained: {error}") from error
    if len(tokenizer) > size:
        raise UserError(
            f"--from-scratch {spec.model_type}: vocab_size={size} is too small; the special tokens and single "
            f"characters alone are {len(tokenizer)}"
        )
    if not own and config.is_encoder_decoder:
        # A class that is not T5's by name: loading goes by the type of the model, and Marian's would win.
        named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **named)
    tokenizer.model_max_length = _max_length(build_config(spec, tokenizer))
    return tokenizer


def _value(text: str) -> Any:
    """A number, true, false, null or a list as JSON has them; anything else is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _keys(kind: type[PreTrainedConfig]) -> set[str]:
    """What a specification may set: what the class itself declares, and the common names it has for some of that."""
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(kind)} - inherited
    return own | (kind.__annotations__.keys() & inherited) | kind.attribute_map.keys()


def _close(word: str, words: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, words, n=3)
    return f" (close: {', '.join(found)})" if found else ""


def _check(spec: Spec, text: str, given: dict[str, Any]) -> None:
    """Raises UserError if no model can be built; it is tried without memory for weights."""
    defaults = CONFIG_MAPPING[spec.model_type]()
    for key, value in given.items():
        default = getattr(defaults, key, None)
        counts = isinstance(default, int) and not isinstance(default, bool) and default > 0 and not key.endswith("_id")
        if counts and isinstance(value, int) and value < 1:
            raise UserError(f"--from-scratch {text!r}: {key} must be at least 1")
    try:
        config = build_config(spec)
        width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
        # Not all types look at this themselves; a few, such as T5, have heads of any size.
        if isinstance(width, int) and isinstance(heads, int) and width % heads and not hasattr(config, "head_dim"):
            raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
        with torch.device("meta"):
            AutoModel.from_config(config)
    except KeyError as error:
        raise UserError(f"--from-scratch {text!r}: {error} is not a value that {spec.model_type} knows") from error
    except Exception as error:  # each model type objects in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(f"--from-scratch {text!r}: {re.sub('^(Type|Value)Error: ', '', reason)}") from error


def _vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a configuration says of its tokenizer: the size of the vocabulary and the ids of special tokens."""
    changes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if config.is_encoder_decoder:
        # BART's decoder starts with the end token of the sequence before it, those of T5 and Marian with padding.
        start = getattr(config, "decoder_start_token_id", None)
        starts_with_end = start is not None and start == config.eos_token_id
        changes["decoder_start_token_id"] = tokenizer.eos_token_id if starts_with_end else tokenizer.pad_token_id
        if getattr(config, "forced_eos_token_id", None) is not None:
            changes["forced_eos_token_id"] = tokenizer.eos_token_id
    return changes


def _max_length(config: PreTrainedConfig) -> int:
    positions = int(getattr(config, "max_position_embeddings", None) or -1)
    reserved = int(config.pad_token_id) + 1 if "roberta" in config.model_type else 0
    return positions - reserved if positions > 0 else _DEFAULT_MAX_LENGTH


def _train(kind: Any, options: dict[str, Any], texts: Sequence[str], size: int) -> Any:
    """Trains a tokenizer of class `kind` and makes it reproducible.

    The library takes words from hash tables, in another order in each run. BPE does not depend on it.
    """
    blank = kind(**options)
    model = json.loads(blank.backend_tokenizer.to_str())["model"]["type"]
    extra = _word_pieces(blank, texts) if model == "WordPiece" else []
    trained = blank.train_new_from_iterator(
        _batches(texts), size, length=len(texts), new_special_tokens=extra, show_progress=False
    )
    if model == "WordPiece":
        return kind(vocab=trained.get_vocab(), **options)
    if model == "Unigram":
        vocabulary = json.loads(trained.backend_tokenizer.to_str())["model"]["vocab"]
        return kind(vocab=_ordered([(piece, score) for piece, score in vocabulary]), **options)
    return trained


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while batch := list(islice(rest, _TEXTS_PER_CALL)):
        yield batch


def _word_pieces(blank: Any, texts: Sequence[str]) -> list[str]:
    """Every character that continues a word, as `##c`, in alphabetical order.

    Given beforehand, their ids no longer depend on the order of words, nor do the ties that ids break.
    """
    backend = blank.backend_tokenizer
    characters: set[str] = set()
    for text in texts:
        words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        characters.update(*(word[1:] for word, _ in words))
    return [f"##{character}" for character in sorted(characters)]


def _ordered(vocabulary: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Unigram pieces by score, after the special tokens (which come first, with a score of 0).

    Single characters that training has dropped come back with the lowest score plus 0.0001, 0.0002 … in the order of a
    hash table: all of them get the lowest score. Rounding hides the order in which numbers were summed.
    """
    special = [(piece, score) for piece, score in vocabulary if score == 0]
    pieces = [(piece, score) for piece, score in vocabulary if score != 0]
    lowest = min((score for _, score in pieces), default=0.0)
    margin = lowest + 1e-4 * len(pieces)
    level = [(piece, round(lowest if len(piece) == 1 and score < margin else score, 6)) for piece, score in pieces]
    return special + sorted(level, key=lambda entry: (-entry[1], entry[0]))
