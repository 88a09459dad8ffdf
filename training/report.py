"""What people read of a training run: the model card, and `report.html`, one file that opens offline."""

from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

_MARKDOWN = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
_HTML = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

_CARD = """\
---
{{ metadata }}
---

# {{ name }}

A {{ task }} model with the labels {{ labels }}, fine-tuned from `{{ base }}`.

| split | rows | accuracy | macro-F1 |
|---|---|---|---|
{% for split, m in splits.items() %}
| {{ split }} | {{ m.rows }} | {{ "%.4f"|format(m.accuracy) }} | {{ "%.4f"|format(m.macro_f1) }} |
{% endfor %}

Training rows: {{ balance }}. Texts longer than {{ max_length }} tokens: policy `{{ overflow }}` unless a request says
otherwise. Digests, versions and arguments are in `provenance.json`, all metrics in `metrics.json`.

```python
from transformers import pipeline
pipeline("{{ task }}", model=".", top_k=None)("a text")
```
"""

_REPORT = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: training report</title>
<style>
 body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }
 table { border-collapse: collapse; margin: .5rem 0 1.5rem } caption { text-align: left; color: #555 }
 th, td { border: 1px solid #ccc; padding: .3rem .7rem; text-align: right } th { background: #f4f4f4 }
 td.text, th.text { text-align: left } code { word-break: break-all }
</style>
<h1>{{ name }}</h1>
<p>{{ task }}, fine-tuned from <code>{{ base }}</code> with seed {{ seed }} in {{ "%.0f"|format(seconds) }} s
({{ "%.0f"|format(samples_per_second) }} samples/s).</p>
<h2>Data</h2>
<table><caption>Rows per label{% if skipped %}; {{ skipped }} rows without a text or label were left out{% endif %}</caption>
<tr><th class="text">label</th>{% for split in counts %}<th>{{ split }}</th>{% endfor %}</tr>
{% for label in labels %}
<tr><td class="text">{{ label }}</td>{% for split in counts.values() %}<td>{{ split[label] }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<h2>Learning curve</h2>
<table><tr><th>epoch</th><th>validation loss</th><th>accuracy</th><th>macro-F1</th></tr>
{% for e in epochs %}
<tr><td>{{ "%g"|format(e.epoch) }}</td><td>{{ "%.4f"|format(e.eval_loss) }}</td>
<td>{{ "%.4f"|format(e.eval_accuracy) }}</td><td>{{ "%.4f"|format(e.eval_macro_f1) }}</td></tr>
{% endfor %}
</table>
{% for split, m in splits.items() %}
<h2>{{ split|capitalize }}: accuracy {{ "%.4f"|format(m.accuracy) }}, macro-F1 {{ "%.4f"|format(m.macro_f1) }}</h2>
<table><tr><th class="text">label</th><th>precision</th><th>recall</th><th>F1</th><th>rows</th></tr>
{% for label, s in m.per_label.items() %}
<tr><td class="text">{{ label }}</td><td>{{ "%.3f"|format(s.precision) }}</td><td>{{ "%.3f"|format(s.recall) }}</td>
<td>{{ "%.3f"|format(s.f1) }}</td><td>{{ s.rows }}</td></tr>
{% endfor %}
</table>
<table><caption>Confusion matrix: rows are true labels, columns predicted ones</caption>
<tr><th></th>{% for label in m.labels %}<th>{{ label }}</th>{% endfor %}</tr>
{% for row in m.confusion_matrix %}
<tr><th class="text">{{ m.labels[loop.index0] }}</th>
{% set total = row|sum or 1 %}
{% for n in row %}<td style="background: rgba(46, 110, 190, {{ "%.2f"|format(n / total * 0.6) }})">{{ n }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
<h2>Golden set</h2>
<p>{{ golden }} examples with their answers are in <code>golden.jsonl</code>; every worker replays them before it is ready.</p>
<h2>Provenance</h2>
<table>
{% for key, value in provenance %}
<tr><td class="text">{{ key }}</td><td class="text"><code>{{ value }}</code></td></tr>
{% endfor %}
</table>
</html>
"""


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
    card = _MARKDOWN.from_string(_CARD).render(
        **{**facts, "labels": ", ".join(metrics["labels"])}, metadata=_metadata(name, metrics, provenance), balance=balance
    )
    (stage / "README.md").write_text(card, encoding="utf-8")
    (stage / "report.html").write_text(_HTML.from_string(_REPORT).render(**facts), encoding="utf-8")


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
