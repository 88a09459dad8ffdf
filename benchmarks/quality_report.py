"""What benchmarks/quality found: its results file, and the targets, the table and the chart that follow from it."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.page import rewritten
from benchmarks.quality_data import ROOT, SEED
from benchmarks.quality_experiments import EXPERIMENTS, Experiment, Figure

RESULTS = ROOT / "benchmarks" / "quality-results.json"
DOCS = ROOT / "docs" / "quality.md"
CHART = ROOT / "docs" / "quality.svg"
BEGIN, END = "<!-- figures: written by benchmarks/quality -->", "<!-- end of figures -->"
# That int8 may lose, in shares: half a point.
LARGEST_DROP = 0.005
OURS, TRAINER, INT8 = "train.py", "Trainer", "int8"


@dataclass(frozen=True)
class Round:
    """One model. way: OURS, TRAINER, or INT8, which is of the model of OURS."""

    name: str
    seed: int
    way: str


def ways(experiment: Experiment, seed: int) -> list[str]:
    """What is made of an experiment with this seed, in this order."""
    more = {TRAINER: experiment.against_trainer, INT8: experiment.int8 and seed == SEED}
    return [OURS, *(way for way, wanted in more.items() if wanted)]


def rounds() -> list[dict[str, Any]]:
    """The results that there are."""
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rounds"] if RESULTS.exists() else []
    return found


def key(entry: Mapping[str, Any]) -> Round:
    """What an entry is about."""
    return Round(entry["name"], entry["seed"], entry["way"])


def record(found: Mapping[str, Any]) -> None:
    """Writes quality-results.json, the table and the chart in the docs: these figures in place of older ones."""
    order = {
        Round(entry.name, seed, way): None for entry in EXPERIMENTS for seed in entry.seeds for way in ways(entry, seed)
    }
    kept = {key(entry): entry for entry in [*rounds(), found]}
    entries = [kept[wanted] for wanted in order if wanted in kept]
    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "openvino", "nncf")
    results = {
        "command": "benchmarks/quality",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rounds": entries,
        "targets": targets(entries),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(rewritten(DOCS, text, (BEGIN, END), table(entries)), encoding="utf-8")
    plot(entries, CHART)


def values(entries: Sequence[Mapping[str, Any]], name: str, figure: Figure, way: str) -> list[float]:
    """A figure of each seed."""
    return [entry["figures"][figure.name] for entry in entries if (entry["name"], entry["way"]) == (name, way)]


def baseline_of(entries: Sequence[Mapping[str, Any]], experiment: Experiment) -> float | None:
    """What the first figure of an experiment is compared with."""
    return next(
        (entry["baseline"] for entry in entries if entry["name"] == experiment.name and "baseline" in entry), None
    )


def targets(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is to be reached: by the mean over the seeds, and by what int8 loses."""
    found = []
    for experiment, figure in ((e, f) for e in EXPERIMENTS for f in e.figures):
        first = figure is experiment.figures[0]
        reached = values(entries, experiment.name, figure, OURS)
        target = experiment.target(figure, baseline_of(entries, experiment) if first else None)
        if reached and target is not None:
            value = round(mean(reached), 4)
            met = value <= target if figure.lower_is_better else value >= target
            limit = "at most" if figure.lower_is_better else "at least"
            what = f"{figure.name}: {experiment.data}, mean of {len(reached)} ({limit})"
            found.append(
                {
                    "id": f"{experiment.name}: {figure.name}",
                    "what": what,
                    "value": value,
                    "target": round(target, 4),
                    "met": met,
                }
            )
        int8 = values(entries, experiment.name, figure, INT8)
        if reached and int8 and not figure.lower_is_better:
            drop = round(reached[0] - int8[0], 4)
            what = f"{figure.name}: {experiment.data}, what an int8 archive loses (at most)"
            found.append(
                {
                    "id": f"{experiment.name}: {figure.name}, int8",
                    "what": what,
                    "value": drop,
                    "target": LARGEST_DROP,
                    "met": drop <= LARGEST_DROP,
                }
            )
    return found


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model and data | figure | train.py | at least | Trainer as it is | int8 archive | baseline | its value "
        "| times as fast as the Trainer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    goals = {target["id"]: target for target in targets(entries)}
    for experiment in EXPERIMENTS:
        for figure in experiment.figures:
            reached = values(entries, experiment.name, figure, OURS)
            if not reached:
                continue
            first = figure is experiment.figures[0]
            goal = goals.get(f"{experiment.name}: {figure.name}")
            limit = f"{'at most ' if figure.lower_is_better else ''}{goal['target']:.3f}" if goal else ""
            limit += " (missed)" if goal and not goal["met"] else ""
            baseline = baseline_of(entries, experiment) if first else None
            cells = [
                experiment.data if first else "",
                figure.name,
                f"**{shown(reached)}**",
                limit,
                shown(values(entries, experiment.name, figure, TRAINER)),
                shown(values(entries, experiment.name, figure, INT8)),
                experiment.baseline if first else "",
                "" if baseline is None else f"{baseline:.3f}",
                faster(entries, experiment) if first else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(found: Sequence[float]) -> str:
    """The mean of the seeds, and the lowest and the highest."""
    if len(found) < 2:
        return "".join(f"{value:.3f}" for value in found)
    return f"{mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"


def faster(entries: Sequence[Mapping[str, Any]], experiment: Experiment) -> str:
    """How many times as long the Trainer trained as train.py did, seed by seed; only of one kind of machine.

    Without seconds are int8 archives, and what was trained at low priority while other programs ran.
    """
    rounds = {key(entry): entry for entry in entries}
    pairs = [[rounds.get(Round(experiment.name, seed, way)) for way in (TRAINER, OURS)] for seed in experiment.seeds]
    return ", ".join(
        f"{stock['training_seconds'] / ours['training_seconds']:.1f}"
        for stock, ours in pairs
        if stock and ours and stock["training_seconds"] and computer(stock) == computer(ours)
    )


def computer(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The machine of a round, without its programs."""
    return {name: entry["machine"].get(name) for name in ("processor", "cpus", "flags")}


def plot(entries: Sequence[Mapping[str, Any]], place: Path) -> None:
    """An SVG file: each seed of train.py and of the Trainer, and the baseline, of figures from 0 to 1."""
    import matplotlib

    matplotlib.use("svg")
    # The same results give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "marble", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    from matplotlib import pyplot

    drawn = [e for e in EXPERIMENTS if not e.figures[0].lower_is_better and values(entries, e.name, e.figures[0], OURS)]
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.28 * len(drawn)), layout="constrained")
    styles = {OURS: ("o", "#4338ca"), TRAINER: ("D", "#d97706"), INT8: ("x", "#0f766e")}
    for way, (marker, colour) in styles.items():
        points = [(value, row) for row, e in enumerate(drawn) for value in values(entries, e.name, e.figures[0], way)]
        places, heights = [value for value, _ in points], [row for _, row in points]
        axes.scatter(places, heights, marker=marker, s=18, color=colour, label=way)
    baselines = [baseline_of(entries, experiment) or 0.0 for experiment in drawn]
    axes.scatter(baselines, [*range(len(drawn))], marker="|", s=60, color="#64748b", label="baseline")
    axes.set_yticks(range(len(drawn)), [f"{e.name}: {e.figures[0].name}" for e in drawn])
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.legend(fontsize=7, loc="upper left")
    figure.savefig(place, metadata={"Date": None})
    pyplot.close(figure)
