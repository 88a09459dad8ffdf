"""The table of docs/tasks.md, cell by cell: each family of models on each backend, bundled, archived, served, asked."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import scratch_models
import transformers
from conftest import ROOT, Served, build_here, train_here
from test_audio_tasks import classifier, recogniser
from test_images import FAMILIES as IMAGES
from test_images import model_folder
from test_text_to_image import class_pipeline

from archiver.gate import GOLDEN_TOLERANCE
from handler import golden, tasks
from handler.models.label_to_image import Gan, GanConfig, Vae, VaeConfig

TEXT = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
TRANSPORTS = "REST, gRPC"
BACKENDS = ("torch", "openvino")
# Task and family → which of the backends.
ROWS = {
    (task, family): tuple(backend for backend, cell in zip(BACKENDS, cells, strict=True) if cell == TRANSPORTS)
    for task, family, *cells in re.findall(
        rf"^\| (.+) \| (.+) \| ({TRANSPORTS}|–) \| ({TRANSPORTS}|–) \|$", TEXT, re.MULTILINE
    )
}
TASKS = list(dict.fromkeys(task for task, _ in ROWS))

HEADS: dict[str, Any] = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "fill-mask": transformers.AutoModelForMaskedLM,
    "text-generation": transformers.AutoModelForCausalLM,
    "summarization": transformers.AutoModelForSeq2SeqLM,
    "translation": transformers.AutoModelForSeq2SeqLM,
    "feature-extraction": transformers.AutoModel,
    "sentence-similarity": transformers.AutoModel,
    "zero-shot-classification": transformers.AutoModelForSequenceClassification,
}
LABELS = {
    "text-classification": ["no", "so", "yes"],
    "token-classification": ["O", "B-person", "I-person"],
    "zero-shot-classification": ["contradiction", "neutral", "entailment"],
}


# What the tests and transformers call families whose names are written otherwise.
NAMES = {"AST": "spectrogram", "GPT-2": "gpt2"}


def bundled(task: str, family: str, folder: Path) -> Path:
    """A small model with random weights, made a bundle by train.py."""
    place, source = folder / "bundle", folder / "model"
    folder.mkdir()
    kind = NAMES.get(family, family.lower())
    given: tuple[object, ...] = ("--base-model", source)
    if task in HEADS:
        names = dict(enumerate(LABELS.get(task, ())))
        config = {"id2label": names, "label2id": {name: index for index, name in names.items()}} if names else {}
        scratch_models.write(source, kind, HEADS[task], task, config)
        given += ("--max-length", 64)
    elif task == "image-classification":
        model_folder(source, *IMAGES[kind])
    elif task == "audio-classification":
        classifier(source, kind)
    elif task == "automatic-speech-recognition":
        recogniser(source, kind)
    elif family == "VITS":
        given = ("--from-scratch", "vits")
    elif family == "diffusers":
        class_pipeline(source)
    else:
        model, config_of = {"VAE": (Vae, VaeConfig), "GAN": (Gan, GanConfig)}[family]
        model(config_of(image_size=8, hidden_size=4, id2label={0: "column", 1: "row"})).save_pretrained(source)
    train_here("--task", task, "--output-dir", place, *given)
    return place


def drifts(served: Served, name: str, task: str, examples: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far answers over each transport are from the golden ones."""
    found = {}
    for transport, client in (("REST", served.rest_client()), ("gRPC", served.grpc_client())):
        with client:
            answers = [client.predict(name, [e["inputs"]], e.get("parameters")).predictions for e in examples]
        pairs = zip(examples, answers, strict=True)
        found[transport] = max(tasks.load(task).drift(example["predictions"], *answer) for example, answer in pairs)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_every_cell_of_the_table(
    task: str, shared_store: Path, serving: Callable[..., AbstractContextManager[Served]], tmp_path: Path
) -> None:
    """Golden answers are the bundle's own in this process, which the tests of each task compare with the pipeline."""
    cells = {}
    for family, backends in ((family, backends) for (name, family), backends in ROWS.items() if name == task):
        bundle = bundled(task, family, tmp_path / family)
        for backend in backends:
            name = f"cell-{task}-{family}-{backend}"
            build_here(bundle, shared_store, name, backend)
            cells[name] = golden.read(bundle / golden.FILE_NAME)[:5]
    with serving(*cells) as served:
        found = {name: drifts(served, name, task, examples) for name, examples in cells.items()}
    assert [name for name, drift in found.items() if not max(drift.values()) <= GOLDEN_TOLERANCE["fp32"]] == [], found


def test_the_table_is_whole() -> None:
    assert set(TASKS) == tasks.REGISTRY.keys()
    for (task, family), backends in ROWS.items():
        wanted = BACKENDS if issubclass(tasks.load(task), tasks.EncoderTask) else BACKENDS[:1]
        assert backends == wanted, (task, family)
