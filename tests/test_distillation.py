"""Smaller models: learning from a teacher, and keeping some layers of the base model, through train.py."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import NO_CHECKPOINTS, train_here
from safetensors.numpy import load_file, save_file
from scratch_models import write
from test_train import TINY, write_csv
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from benchmarks import compression
from handler import golden
from handler.engine import Engine
from training import distillation, layers, scratch
from training.batches import IGNORED
from training.errors import UserError
from training.options import Options

LABELS = ("negative", "positive")
# All rows in one step, after which the weights are those from before; no dropout of tokens, and none in `CALM` models.
ONE_STEP = (
    *("--per-device-train-batch-size", 100, "--max-steps", 1, "--learning-rate", 1e-12),
    *("--bf16", "false", "--token-dropout", 0),
)
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def labelled(*labels: str, **more: Any) -> dict[str, Any]:
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        **CALM,
        **more,
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with random weights and opinions: a base of four layers, and teachers."""
    folder = tmp_path_factory.mktemp("models")
    several = labelled("animal", "colour", "speed", problem_type="multi_label_classification")
    kinds: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "base": ("bert", transformers.AutoModel, {"num_hidden_layers": 4, **CALM}),
        "teacher": ("bert", AutoModelForSequenceClassification, labelled(*LABELS)),
        "stranger": ("roberta", AutoModelForSequenceClassification, labelled(*LABELS, initializer_range=1.0)),
        "several": ("bert", AutoModelForSequenceClassification, several),
        "tagger": ("bert", AutoModelForTokenClassification, labelled("O", "B-place", "I-place")),
        "strange-tagger": ("roberta", AutoModelForTokenClassification, labelled("O", "B-place", "I-place")),
    }
    return {
        name: write(folder / name, kind, auto, "text-classification", config)
        for name, (kind, auto, config) in kinds.items()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "data.csv", LABELS)


def train(data: Path, place: Path, base: Path, *options: object) -> Any:
    """A run in this process; its metrics."""
    with contextlib.redirect_stdout(io.StringIO()):
        train_here(
            *("--train-file", data, "--output-dir", place, "--base-model", base, "--max-length", 16),
            *(*NO_CHECKPOINTS, "--logging-strategy", "steps", "--logging-steps", 1, *options),
        )
    return json.loads((place / "metrics.json").read_text())


def logits(folder: Path, texts: list[str], auto: Any = AutoModelForSequenceClassification) -> torch.Tensor:
    model, tokenizer = auto.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
        found: torch.Tensor = model.eval()(**encoded).logits
    return found


def test_the_distance_from_a_teacher() -> None:
    teacher, pupil = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]]), torch.tensor([[0.0, 1.0, 3.0], [4.0, 0.0, 1.0]])
    wanted, found = (functional.softmax(values / 2, dim=-1) for values in (teacher, pupil))
    by_hand = 4 * (wanted * (wanted / found).log()).sum(dim=-1)
    labels = torch.tensor([0, 1])
    assert distillation.loss(pupil, teacher, labels).item() == pytest.approx(by_hand.mean().item(), rel=1e-5)
    assert distillation.loss(teacher, teacher, labels).item() == pytest.approx(0, abs=1e-6)
    assert distillation.loss(teacher + 5, teacher, labels).item() == pytest.approx(0, abs=1e-6)
    # Of tokens those with a label count, and each the same.
    tokens = torch.tensor([[0, IGNORED, 2], [IGNORED, IGNORED, 1]])
    rows = [torch.stack([values[0], 9 * values[1], values[1]]).expand(2, 3, 3) for values in (pupil, teacher)]
    expected = (by_hand[0] + 2 * by_hand[1]) / 3
    assert distillation.loss(rows[0], rows[1], tokens).item() == pytest.approx(expected.item(), rel=1e-5)
    several = distillation.loss(pupil, teacher, torch.zeros(2, 3)).item()
    score, own = teacher.sigmoid(), pupil.sigmoid()
    assert several == pytest.approx(-(score * own.log() + (1 - score) * (1 - own).log()).mean().item(), rel=1e-5)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("teacher", ["teacher", "stranger"])
def test_half_of_the_loss_is_the_teachers(teacher: str, bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """In parts, too, and with a teacher that has another tokenizer; a pupil of the same labels starts with its head."""
    config = labelled(*LABELS, initializer_range=0.2)
    pupil = write(tmp_path / "pupil", "bert", AutoModelForSequenceClassification, "text-classification", config)
    options = ("--validation-file", data, *ONE_STEP, "--most-tokens", 200)
    found = train(data, tmp_path / "bundle", pupil, *options, "--teacher", bases[teacher])
    texts = [row["text"] for row in read(data)]
    labels = torch.tensor([LABELS.index(row["label"]) for row in read(data)])
    own = logits(pupil, texts)
    distance = distillation.loss(own, logits(bases[teacher], texts), labels)
    expected = (functional.cross_entropy(own, labels) + distance) / 2
    assert distance > 0.05, "there is something to learn from"
    assert found["training_loss"][0]["loss"] == pytest.approx(expected.item(), abs=1e-3)
    facts = json.loads((tmp_path / "bundle" / "provenance.json").read_text())
    assert facts["teacher"]["name"] == teacher
    assert len(facts["teacher"]["sha256"]) == 64


def test_several_labels_from_a_teacher(bases: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    sets = (["animal"], ["animal", "colour"], [], ["speed"], ["colour", "speed"])
    rows = [{"text": f"a {('slow', 'warm', 'quick')[i % 3]} place {i}", "label": sets[i % 5]} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--validation-file", data, *ONE_STEP)
    # The teacher as its own pupil: its head is kept, because it has the same labels.
    found = train(data, tmp_path / "bundle", bases["several"], *options, "--teacher", bases["several"])
    own = logits(bases["several"], [str(row["text"]) for row in rows])
    marks = torch.tensor([[float(name in row["label"]) for name in ("animal", "colour", "speed")] for row in rows])
    loss = functional.binary_cross_entropy_with_logits
    expected = (loss(own, marks) + loss(own, own.sigmoid())) / 2
    assert found["training_loss"][0]["loss"] == pytest.approx(expected.item(), abs=1e-3)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sentences") / "data.jsonl"
    sentence = "we went from a warm kind hotel to a cold rude restaurant in the old town"
    words = sentence.split()
    rows = [
        {
            "tokens": words[: 4 + i % 11],
            "ner_tags": ["B-place", "I-place", "O", "O", "B-place", *["O"] * 20][: 4 + i % 11],
        }
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tokens_from_a_teacher(bases: dict[str, Path], sentences: Path, tmp_path: Path) -> None:
    """A teacher that is its own pupil is no distance away, so half of the loss is left; another one is."""
    options = ("--task", "token-classification", "--validation-file", sentences, *ONE_STEP, "--most-tokens", 100)
    tagger = bases["tagger"]
    alone = train(sentences, tmp_path / "alone", tagger, *options)["training_loss"][0]["loss"]
    same = train(sentences, tmp_path / "same", tagger, *options, "--teacher", tagger)["training_loss"][0]["loss"]
    assert same == pytest.approx(alone / 2, rel=1e-3)
    turned = permuted(tagger, tmp_path / "turned", [2, 0, 1])
    other = train(sentences, tmp_path / "other", tagger, *options, "--teacher", turned)["training_loss"][0]["loss"]
    assert other == pytest.approx(alone / 2, rel=1e-3), "labels go by their names"
    with pytest.raises(UserError, match="--teacher strange-tagger: its tokenizer is not that of the base model"):
        train(sentences, tmp_path / "no", tagger, *options, "--teacher", bases["strange-tagger"])


def permuted(folder: Path, place: Path, order: list[int]) -> Path:
    """The same model with its labels in another order."""
    shutil.copytree(folder, place)
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = np.ascontiguousarray(weights[name][order])
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    names = [config["id2label"][str(index)] for index in order]
    changes = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (place / "config.json").write_text(json.dumps(config | changes))
    return place


def test_a_teacher_with_its_labels_in_another_order(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """And class weights, adapters and fewer layers beside it."""
    turned = permuted(bases["teacher"], tmp_path / "teacher", [1, 0])
    options = (*TINY, "--learning-rate", 0.01, "--class-weights", "balanced", "--lora", 2, "--layers", 2)
    places = {
        "alone": (),
        "same": ("--teacher", bases["teacher"]),
        "turned": ("--teacher", turned),
    }
    for name, teacher in places.items():
        train(data, tmp_path / name, bases["base"], *options, *teacher)
    alone, same, other = (load_file(tmp_path / name / "model.safetensors") for name in places)
    for name, weight in same.items():
        np.testing.assert_allclose(other[name], weight, atol=1e-6, err_msg=name)
    assert abs(alone["classifier.weight"] - same["classifier.weight"]).max() > 1e-4
    assert golden.replay(Engine(tmp_path / "same"), tmp_path / "same" / golden.FILE_NAME) <= 1e-5


def test_teachers_that_are_refused(bases: dict[str, Path], data: Path, sentences: Path, tmp_path: Path) -> None:
    other = write_csv(tmp_path / "other.csv", ("negative", "neutral"))
    numbers = write_csv(tmp_path / "numbers.csv", (0.5, 1.5))
    squad = tmp_path / "squad.jsonl"
    answer = {"text": ["kind"], "answer_start": [7]}
    squad.write_text(
        "".join(
            json.dumps({"question": "How?", "context": f"a warm kind {i}", "answers": answer}) + "\n" for i in range(9)
        )
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[Path, object, tuple[object, ...], str]] = [
        (data, tmp_path / "nowhere", (), "--teacher .*nowhere: there is no such folder"),
        (data, empty, (), r"--teacher .*empty: there is no config\.json in it"),
        (data, bases["base"], (), "--teacher base: it is BertModel, not a text classifier"),
        (data, bases["tagger"], (), "it is BertForTokenClassification, not a text classifier"),
        (other, bases["teacher"], (), "only the teacher has 'positive'; only the data has 'neutral'"),
        (numbers, bases["teacher"], (), "--teacher: a number is not learnt from one"),
        (squad, bases["teacher"], ("--task", "question-answering"), "--teacher: only classifiers of texts"),
    ]
    for file, teacher, options, words in cases:
        with pytest.raises(UserError, match=words):
            train(file, tmp_path / "bundle", bases["base"], *options, "--teacher", teacher, "--max-steps", 1)
    with pytest.raises(UserError, match="--teacher needs a --train-file"):
        Options(teacher="somewhere")
    config = json.loads((bases["teacher"] / "config.json").read_text())
    several = shutil.copytree(bases["teacher"], tmp_path / "several")
    (several / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    with pytest.raises(UserError, match="its problem_type is multi_label_classification, that of the data single"):
        train(data, tmp_path / "bundle", bases["base"], "--teacher", several, "--max-steps", 1)
    assert not (tmp_path / "bundle").exists()


def test_the_table_of_the_benchmark() -> None:
    """Each model has its line, and docs/training.md has that of the committed results."""
    trained = {"weights_learnt": 480386, "training_seconds": 61.2}
    measured = {"archive_mb": 91.6, "texts_per_second": [300.0, 321.0, 310.0], "accuracy": 0.8752}
    models = {name: measured | (trained if way.bundle is None else {}) for name, way in compression.WAYS.items()}
    found = {"models": models, "rows": 2000, "machine": {"processor": "a CPU", "cpus": 2}}
    text = compression.DOCUMENT.read_text(encoding="utf-8")
    lines = compression.document(found, text).splitlines()
    assert "| 6 layers, adapters of rank 8 | 92 MB | 0.5 million | 61 s | 310 (300 to 321) | 87.5 % |" in lines
    assert "| the first row in int8 | 92 MB |  |  | 310 (300 to 321) | 87.5 % |" in lines
    if compression.RESULTS.exists():
        assert compression.document(json.loads(compression.RESULTS.read_text()), text) == text
    with pytest.raises(ValueError, match="needs the lines"):
        compression.document(found, "no marks")


# --- Fewer layers -----------------------------------------------------------------------------------------------------


def test_which_layers_are_kept() -> None:
    assert layers.spaced(3, 6) == [0, 2, 5]
    assert layers.spaced(6, 12) == [0, 2, 4, 7, 9, 11]
    assert layers.spaced(1, 6) == [0]
    for total in range(1, 40):
        assert layers.spaced(total, total) == list(range(total))
        for count in range(2, total + 1):
            kept = layers.spaced(count, total)
            assert kept == sorted(set(kept))
            assert (kept[0], kept[-1], len(kept)) == (0, total - 1, count)


def test_a_bundle_of_fewer_layers(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    train(data, place, bases["base"], *TINY, "--learning-rate", 1e-12, "--layers", 2)
    assert json.loads((place / "config.json").read_text())["num_hidden_layers"] == 2
    before, after = load_file(bases["base"] / "model.safetensors"), load_file(place / "model.safetensors")
    for old, new in ((0, 0), (3, 1)):
        name = "encoder.layer.{}.output.dense.weight"
        np.testing.assert_allclose(after[f"bert.{name.format(new)}"], before[name.format(old)], atol=1e-6)
    assert not any(".layer.2." in name or ".layer.3." in name for name in after)
    model, report = AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
    assert [keys for keys in report.values() if keys] == []
    assert len(model.bert.encoder.layer) == 2
    assert golden.replay(Engine(place), place / golden.FILE_NAME) <= 1e-5


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "deberta-v2", "gpt2", "vit", "modernbert"])
def test_every_kind_of_stack(model_type: str) -> None:
    """The smaller model answers as the larger one does whose other layers are taken out."""
    sizes = {"modernbert": " hidden_size=32 num_hidden_layers=4 num_attention_heads=2 intermediate_size=64"}
    spec = scratch.parse_spec(model_type + sizes.get(model_type, ""))
    config = scratch.build_config(spec, num_labels=3)
    head = "ImageClassification" if model_type == "vit" else "SequenceClassification"
    transformers.set_seed(0)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    model.config.pad_token_id = 0
    smaller = layers.keep(model, 2)
    assert smaller.config.num_hidden_layers == 2
    [(name, stack)] = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == 4
    ]
    model.set_submodule(name, torch.nn.ModuleList([stack[0], stack[3]]))
    if "layer_types" in vars(model.config) and model.config.layer_types:
        model.config.layer_types = [model.config.layer_types[place] for place in (0, 3)]
    inputs = (
        {"input_ids": torch.randint(5, 200, (2, 9))}
        if model_type != "vit"
        else {"pixel_values": torch.randn(2, 3, 32, 32)}
    )
    if model_type == "gpt2":
        inputs["use_cache"] = False  # in which the layers would have to know their new numbers
    with torch.inference_mode():
        torch.testing.assert_close(smaller(**inputs).logits, model(**inputs).logits)


def test_layers_that_are_refused(bases: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--layers 0: give 1 or more"):
        Options(layers=0)
    with pytest.raises(UserError, match="--layers needs a base model"):
        Options(layers=2, from_scratch="bert")
    with pytest.raises(UserError, match="--layers needs a --train-file"):
        Options(layers=2)
    with pytest.raises(UserError, match="--layers 5: this base model has 4; give 1 to 4"):
        train(data, tmp_path / "bundle", bases["base"], "--layers", 5)
    albert = {"embedding_size": 16, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    several: list[Any] = [
        transformers.AutoModelForSeq2SeqLM.from_config(scratch.build_config(scratch.parse_spec("t5"))),
        transformers.AutoModelForSeq2SeqLM.from_config(scratch.build_config(scratch.parse_spec("bart"))),
        transformers.AlbertModel(transformers.AlbertConfig(**albert, vocab_size=100)),
        transformers.ResNetModel(scratch.build_config(scratch.parse_spec("resnet"))),
    ]
    for model in several:
        with pytest.raises(
            UserError, match=f"--layers 1: a model of the type {model.config.model_type} is not one stack"
        ):
            layers.keep(model, 1)
