"""Bundles of small models with random weights, for tests that need a model but not a good one."""

import csv
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers
from conftest import REVIEWS

from training import bundle, scratch

SIZES = {
    "bert": "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64 initializer_range=0.3",
    "roberta": "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64 initializer_range=0.3",
    "distilbert": "dim=32 n_layers=2 n_heads=2 hidden_dim=64 initializer_range=0.3",
    "deberta-v2": "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64 initializer_range=0.3",
    "gpt2": "n_embd=32 n_layer=2 n_head=2 initializer_range=0.3",
    "t5": "d_model=32 d_ff=64 num_heads=2 d_kv=16 initializer_factor=3.0",
    "bart": "d_model=32 encoder_attention_heads=2 decoder_attention_heads=2 init_std=0.3",
    "marian": "d_model=32 encoder_attention_heads=2 decoder_attention_heads=2 init_std=0.3",
    "mbart": "d_model=32 encoder_layers=2 decoder_layers=2 encoder_attention_heads=2 decoder_attention_heads=2 "
    "encoder_ffn_dim=64 decoder_ffn_dim=64 max_position_embeddings=256 init_std=0.3",
}


def reviews(split: str) -> list[str]:
    """Texts of the shipped reviews."""
    with (REVIEWS / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def write(
    folder: Path,
    model_type: str,
    auto_model: Any,
    task: str,
    config: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Path:
    """Writes a model with wide random weights, which has preferences, unlike one whose weights are all near zero.

    config: further entries of the model's configuration; settings: of model-config.yaml.
    """
    spec = scratch.parse_spec(f"{model_type} {SIZES[model_type]} vocab_size=600")
    tokenizer = scratch.train_tokenizer(spec, reviews("validation"))
    transformers.set_seed(5)
    model = auto_model.from_config(scratch.build_config(spec, tokenizer, **config))
    folder.mkdir(exist_ok=True)
    bundle.write_model(folder, model, tokenizer)
    bundle.write_model_config(folder, task, {"max_length": 64, "stride": 8, "threads": 1, **settings})
    return folder
