"""Small models with random weights for the tests of text tasks, as bundles, converted, and in a model store."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
import yaml
from conftest import build_here

from archiver import source
from archiver.convert import Converter
from handler.engine import Engine
from handler.errors import RequestError
from handler.messages import Request
from training import bundle, scratch

FAMILIES = {
    "bert": "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64",
    "roberta": "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64",
    "distilbert": "dim=32 n_layers=2 n_heads=2 hidden_dim=64",
    "deberta-v2": "hidden_size=32 num_hidden_layers=2 num_attention_heads=2 intermediate_size=64",
    "gpt2": "n_embd=32 n_layer=2 n_head=2",
}
MAX_LENGTH, STRIDE = 64, 8
EMOTIONS = ["anger", "joy", "love", "surprise"]
VERDICTS = ["contradiction", "entailment", "neutral"]


def real_texts(data: Path, count: int) -> list[str]:
    """So many texts each of SST-2, banking77 and GoEmotions: 1 to some 60 words."""
    tables = [data / "sst2" / "test.csv", data / "banking77" / "test.csv"]
    texts = []
    for path in tables:
        with path.open(encoding="utf-8", newline="") as file:
            texts += [row["text"] for row in csv.DictReader(file)][:count]
    lines = (data / "goemotions" / "test.jsonl").read_text(encoding="utf-8").split("\n")
    return texts + [json.loads(line)["text"] for line in lines[:count]]


def naughty_strings(data: Path) -> list[str]:
    """All of them, the empty one included."""
    strings: list[str] = json.loads((data / "naughty_strings" / "blns.json").read_text(encoding="utf-8"))
    return strings


def write(
    folder: Path,
    family: str,
    auto_model: Any,
    task: str,
    golden: Sequence[Any],
    *,
    parameters: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    overflow: str = "truncate",
    **config: Any,
) -> Path:
    """A bundle of a model with wide random weights, whose answers differ from text to text.

    golden: inputs of its golden set, which are the tokenizer's training data too.
    """
    spec = scratch.parse_spec(f"{family} {FAMILIES[family]} vocab_size=600 initializer_range=0.3")
    tokenizer = scratch.train_tokenizer(spec, [text for value in golden for text in _texts(value)])
    if family == "gpt2":
        tokenizer.pad_token = tokenizer.eos_token  # as with the published ones
    transformers.set_seed(5)
    model = auto_model.from_config(scratch.build_config(spec, tokenizer, **config))
    model.config.pad_token_id = tokenizer.pad_token_id
    folder.mkdir(parents=True)
    bundle.write_model(folder, model, tokenizer)
    settings = {"max_length": MAX_LENGTH, "stride": STRIDE, "overflow": overflow, "threads": 1}
    bundle.write_model_config(folder, task, settings | ({"options": options} if options else {}))
    bundle.write_lines(folder, "validation.jsonl", [])
    labels = list(config.get("id2label", {}).values())
    bundle.write_json(folder, "metrics.json", {"labels": labels, "primary": "accuracy", "splits": {}})
    examples = [{"inputs": value, **({"parameters": parameters} if parameters else {})} for value in golden]
    bundle.write_golden(folder, Engine(folder), examples)
    return folder


def labelled(*labels: str) -> dict[str, Any]:
    """The entries of a model's config for these labels."""
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels))} | {
        "label2id": {label: index for index, label in enumerate(labels)}
    }


def converted(folder: Path) -> Path:
    """The same model for OpenVINO in fp32, in a folder beside it."""
    stage = folder.with_name(f"{folder.name}-openvino")
    stage.mkdir()
    Converter(source.check(folder)).write("openvino", "fp32", stage)
    config = yaml.safe_load((folder / "model-config.yaml").read_text(encoding="utf-8"))
    config["handler"]["backend"] = "openvino"
    (stage / "model-config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return stage


def answers(engine: Engine, inputs: Sequence[Any], **parameters: Any) -> list[Any]:
    """One request for all inputs; raises if it fails."""
    [result] = engine.predict([Request(list(inputs), parameters, many=True)])
    if isinstance(result, RequestError):
        raise result
    return list(result.predictions)


def refusal(engine: Engine, value: Any, **parameters: Any) -> tuple[int, str]:
    """Status and message of a request that must fail."""
    [result] = engine.predict([Request([value], parameters)])
    assert isinstance(result, RequestError), result
    return result.code, str(result)


def drift(engine: Engine, inputs: Sequence[Any], expected: Sequence[Any], **parameters: Any) -> float:
    """How far the answers are from the expected ones."""
    found = answers(engine, inputs, **parameters)
    return max(engine.task.drift(old, new) for old, new in zip(expected, found, strict=True))


def archive(folder: Path, store: Path) -> None:
    """Builds `folder` into a store, as OpenVINO in fp32."""
    build_here(folder, store, folder.name, "openvino")


def _texts(value: Any) -> list[str]:
    """All texts in an input."""
    if isinstance(value, str):
        return [value]
    return [text for entry in (value.values() if isinstance(value, dict) else value) for text in _texts(entry)]
