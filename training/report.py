"""What people read of a training run: the model card, and `report.html`, one file that opens offline."""

from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from transformers.pipelines import PIPELINE_REGISTRY

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=lambda name: name is not None and "html" in name,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


# Names that the Hugging Face hub has for metrics, where they differ from ours.
_HUB_METRICS = {"macro_f1": "f1"}


def write(stage: Path, name: str, metrics: dict[str, Any], provenance: dict[str, Any], golden: int) -> None:
    """Writes `README.md` and `report.html` into the bundle."""
    base = provenance["base_model"]["name"]
    scores = list(metrics["splits"].values())
    facts = {
        "name": name,
        "task": metrics["task"],
        "labels": metrics["labels"],
        "origin": f"fine-tuned from `{base}`" if metrics.get("epochs") is not None else f"`{base}` as it is",
        "base": base,
        "splits": metrics["splits"],
        "columns": [key for key, value in (scores[0] if scores else {}).items() if isinstance(value, float)],
        "rows": metrics["rows"],
        "counts": {split: counts for split, counts in metrics["rows_per_label"].items() if counts},
        "skipped": metrics["rows_skipped"],
        "epochs": metrics.get("epochs", []),
        "learning": _learning(metrics.get("epochs", [])),
        "seconds": metrics.get("training_seconds"),
        "samples_per_second": metrics.get("training_samples_per_second"),
        "seed": provenance["arguments"]["seed"],
        "max_length": metrics["settings"].get("max_length"),
        "overflow": metrics["settings"].get("overflow"),
        "golden": golden,
        "pipeline": metrics["task"] in PIPELINE_REGISTRY.get_supported_tasks(),
        "provenance": list(_flat(provenance)),
    }
    balance = ", ".join(f"{label} {count}" for label, count in metrics["rows_per_label"].get("train", {}).items())
    card = _TEMPLATES.get_template("README.md.j2").render(
        **{**facts, "labels": ", ".join(metrics["labels"])},
        metadata=_metadata(name, metrics, provenance),
        balance=balance,
    )
    (stage / "README.md").write_text(card, encoding="utf-8")
    (stage / "report.html").write_text(_TEMPLATES.get_template("report.html.j2").render(**facts), encoding="utf-8")


def _learning(epochs: list[dict[str, Any]]) -> dict[str, str]:
    """The figures of the learning curve, by their key in the Trainer's log: validation loss and the task's metrics."""
    keys = [key for key in (epochs[0] if epochs else {}) if key.startswith("eval_") and not key.endswith("_per_second")]
    return {
        key: "validation loss" if key == "eval_loss" else key.removeprefix("eval_").replace("_", "-")
        for key in keys
        if key != "eval_runtime"
    }


def figures(scores: dict[str, Any]) -> list[str]:
    """The single figures among metrics, as people read them: "accuracy 0.9120"."""
    return [f"{key.replace('_', '-')} {value:.4f}" for key, value in scores.items() if isinstance(value, float)]


def _metadata(name: str, metrics: dict[str, Any], provenance: dict[str, Any]) -> str:
    """The card's YAML: the `model-index` that the Hugging Face hub and `huggingface_hub` read."""
    results = [
        EvalResult(
            task_type=metrics["task"],
            dataset_type="local",
            dataset_name=provenance["data"].get(split, provenance["data"].get("train", {})).get("file", "local"),
            dataset_split=split,
            metric_type=_HUB_METRICS.get(key, key),
            metric_value=round(value, 6),
        )
        for split, scores in metrics["splits"].items()
        for key, value in scores.items()
        if isinstance(value, float)
    ]
    base = provenance["base_model"]
    return ModelCardData(
        base_model=base["name"],
        library_name="transformers",
        license=base["licence"],
        pipeline_tag=metrics["task"],
        model_name=name,
        eval_results=results or None,
    ).to_yaml()


def _flat(value: Any, prefix: str = "") -> Any:
    """Nested facts as (dotted name, value) pairs."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", " ".join(map(str, entry)) if isinstance(entry, list) else entry
