"""What people read of a training run: the model card, and `report.html`, one file that opens offline."""

from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=lambda name: name is not None and "html" in name,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def write(stage: Path, name: str, metrics: dict[str, Any], provenance: dict[str, Any], golden: int) -> None:
    """Writes `README.md` and `report.html` into the bundle."""
    facts = {
        "name": name,
        "task": metrics["task"],
        "labels": metrics["labels"],
        "base": provenance["base_model"]["name"],
        "splits": metrics["splits"],
        "counts": metrics["rows_per_label"],
        "skipped": metrics["rows_skipped"],
        "epochs": metrics["epochs"],
        "seconds": metrics["training_seconds"],
        "samples_per_second": metrics["training_samples_per_second"],
        "seed": provenance["arguments"]["seed"],
        "max_length": metrics["max_length"],
        "overflow": metrics["overflow"],
        "golden": golden,
        "provenance": list(_flat(provenance)),
    }
    balance = ", ".join(f"{label} {count}" for label, count in metrics["rows_per_label"]["train"].items())
    card = _TEMPLATES.get_template("README.md.j2").render(
        **{**facts, "labels": ", ".join(metrics["labels"])},
        metadata=_metadata(name, metrics, provenance),
        balance=balance,
    )
    (stage / "README.md").write_text(card, encoding="utf-8")
    (stage / "report.html").write_text(_TEMPLATES.get_template("report.html.j2").render(**facts), encoding="utf-8")


def _metadata(name: str, metrics: dict[str, Any], provenance: dict[str, Any]) -> str:
    """The card's YAML: the `model-index` that the Hugging Face hub and `huggingface_hub` read."""
    results = [
        EvalResult(
            task_type=metrics["task"],
            dataset_type="local",
            dataset_name=provenance["data"].get(split, provenance["data"]["train"])["file"],
            dataset_split=split,
            metric_type=metric,
            metric_value=round(values[key], 6),
        )
        for split, values in metrics["splits"].items()
        for metric, key in (("accuracy", "accuracy"), ("f1", "macro_f1"))
    ]
    base = provenance["base_model"]
    return ModelCardData(
        base_model=base["name"],
        library_name="transformers",
        license=base["licence"],
        pipeline_tag=metrics["task"],
        model_name=name,
        eval_results=results,
    ).to_yaml()


def _flat(value: Any, prefix: str = "") -> Any:
    """Nested facts as (dotted name, value) pairs."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", " ".join(map(str, entry)) if isinstance(entry, list) else entry
