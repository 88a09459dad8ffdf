"""Whether explanations are true, and how fast the server gives them: SST-2.

Faithfulness (Petsiuk, Das and Saenko 2018; for texts DeYoung et al. 2020): the words of a text are hidden one after the
other, those first that are said to speak most for the model's answer, and the answer's probability should fall fast
(deletion); or they come back into a text that is hidden as a whole, and it should rise fast (insertion). The area under
the curve is compared with that of an order drawn at random. The judge is the fp32 model in all cases, whichever
backend made the explanation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.page import rewritten
from benchmarks.speed import load, models, servers
from benchmarks.speed.__main__ import machine
from benchmarks.speed.peers import ROOT, Unavailable
from benchmarks.speed.texts import Texts, write_bodies
from handler.engine import Engine
from handler.inputs import Feature
from handler.messages import Request, Result
from handler.tasks.text_classification import TextClassification, activate
from training.interrupts import INTERRUPTED

RESULTS = ROOT / "benchmarks" / "explanations-results.json"
DOCUMENT = ROOT / "docs" / "explanations.md"
PLOT = DOCUMENT.with_suffix(".svg")
BEGIN, END = "<!-- figures: written by benchmarks/explanations -->", "<!-- end of figures -->"
# Shares of the words that are hidden, or shown.
SHARES = np.linspace(0, 1, 11)
TEXTS, RANDOM_ORDERS, RESAMPLES, SEED = 300, 5, 1000, 11
ROUNDS, SECONDS = 5, 4
RANDOM = "random order"

_EXAMPLES = """examples:
  benchmarks/explanations            # writes benchmarks/explanations-results.json, docs/explanations.*
  benchmarks/explanations --quick    # a model of a few steps, few texts; prints only"""

# A text's words and their scores, from the most to the least important.
Order = Callable[[str], Sequence[int]]


class Judge:
    """The fp32 model: the probability of its answer to a text some of whose words are hidden."""

    def __init__(self, bundle: Path) -> None:
        self.engine = Engine(bundle)
        assert isinstance(self.engine.task, TextClassification)
        self._task = self.engine.task

    def words(self, text: str) -> tuple[Any, list[Feature]]:
        """The text as a row, and its words."""
        [encoded] = self._task.inputs.encode([text])
        assert not isinstance(encoded, Exception)
        [row] = encoded.rows
        [features] = self._task.inputs.features(text, [row], len(row))
        return row, features

    def curves(self, text: str, order: Sequence[int]) -> tuple[list[float], list[float]]:
        """Probabilities of the answer at each share of the words: hidden one after the other, and shown again."""
        row, features = self.words(text)
        ranked = [features[index] for index in order]
        counts = np.round(SHARES * len(ranked)).astype(int)
        rows = [self._task.inputs.hide(row, ranked[:count]) for count in counts]
        rows += [self._task.inputs.hide(row, ranked[count:]) for count in counts]
        arrays = self._task.inputs.collate(rows)
        [outputs] = self.engine.backend.run([arrays])
        scores = np.stack([activate(logits.astype(np.float64), "softmax") for logits in outputs["logits"]])
        answer = int(scores[0].argmax())
        found = scores[:, answer].tolist()
        return found[: len(counts)], found[len(counts) :]


def explained(engine: Engine, method: str) -> Order:
    """The order of a text's words by what an engine says of them."""

    def order(text: str) -> Sequence[int]:
        [result] = engine.predict([Request([text], {"method": method, "top_k": 1}, explain=True)])
        assert isinstance(result, Result), result
        [prediction] = result.predictions
        assert isinstance(prediction, dict), prediction
        [found] = prediction["explanations"]
        scores = np.array([word["score"] for word in found["attributions"]])
        order: list[int] = np.argsort(-scores, kind="stable").tolist()
        return order

    return order


def at_random(judge: Judge, seed: int) -> Order:
    """Any order."""
    chance = np.random.default_rng(seed)

    def order(text: str) -> Sequence[int]:
        shuffled: list[int] = chance.permutation(len(judge.words(text)[1])).tolist()
        return shuffled

    return order


def area(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """The area under each curve [texts, shares], from 0 to 1."""
    return np.asarray(np.trapezoid(curves, SHARES, axis=1))


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of paired differences, by the bootstrap over texts."""
    chance = np.random.default_rng(SEED)
    means = differences[chance.integers(0, len(differences), (RESAMPLES, len(differences)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


def faithfulness(model: models.Model, texts: Sequence[str], quick: bool) -> dict[str, Any]:
    """Curves and areas of each way to explain."""
    judge, shipped = Judge(model.bundle), Engine(model.unpacked)
    # A word must be a word to both.
    texts = [text for text in texts if len(judge.words(text)[1]) >= len(SHARES) // 2]
    chosen = np.random.default_rng(SEED).permutation(len(texts))[: 20 if quick else TEXTS]
    texts = [texts[index] for index in sorted(chosen)]
    ways = {
        "occlusion, torch fp32": [explained(judge.engine, "occlusion")],
        f"occlusion, {shipped.settings.backend} {shipped.settings.precision}": [explained(shipped, "occlusion")],
        "integrated gradients, torch fp32": [explained(judge.engine, "integrated_gradients")],
        RANDOM: [at_random(judge, SEED + number) for number in range(RANDOM_ORDERS)],
    }
    curves: dict[str, NDArray[np.float64]] = {}
    for name, orders in ways.items():
        # [orders, texts, 2, shares], the mean over the orders.
        curves[name] = np.mean([[judge.curves(text, order(text)) for text in texts] for order in orders], axis=0)
        print(f"{name}: done", flush=True)
    found: dict[str, Any] = {"texts": len(texts), "ways": {}}
    for name, both in curves.items():
        entry: dict[str, Any] = {}
        for place, kind in enumerate(("deletion", "insertion")):
            areas = area(both[:, place])
            gain = areas - area(curves[RANDOM][:, place])
            entry[kind] = {
                "area": round(float(areas.mean()), 4),
                "against_random": round(float(gain.mean()), 4),
                "interval": interval(gain),
                "curve": np.round(both[:, place].mean(axis=0), 4).tolist(),
            }
        found["ways"][name] = entry
    return found


def speed(model: models.Model, texts: Sequence[str], work: Path, quick: bool) -> dict[str, Any]:
    """Explanations of the shipped archive over REST, and predictions beside them, in turns."""
    bodies = write_bodies(work / "explained.jsonl", [{"inputs": text} for text in texts])
    server = servers.marble("explained", "Marble", model.archive, work / "explained")
    server.start()
    try:
        explanations = server.url.replace("/predictions/", "/explanations/")
        rounds = []
        for _ in range(1 if quick else ROUNDS):
            samples = {}
            for name, url, connections in (
                ("explanations-1", explanations, 1),
                ("explanations-64", explanations, 64),
                ("predictions-64", server.url, 64),
            ):
                load.rest(url, bodies, connections, 1, server.token)
                sample = load.rest(url, bodies, connections, 2 if quick else SECONDS, server.token)
                samples[name] = {
                    "rate": round(sample.rate, 1),
                    "p50_ms": sample.p50_ms,
                    "p99_ms": sample.p99_ms,
                    "errors": sample.errors,
                }
            rounds.append(samples)
    finally:
        server.stop()
    return {"rounds": rounds}


def targets(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both curves of each way must be better than those of a random order, beyond chance; no explanation may fail."""
    listed = []
    for number, (name, entry) in enumerate(found["faithfulness"]["ways"].items(), 1):
        if name == RANDOM:
            continue
        for kind, sign in (("deletion", -1), ("insertion", 1)):
            low, high = entry[kind]["interval"]
            listed.append(
                {
                    "id": f"{number}-{kind}",
                    "what": f"{name}: area under the {kind} curve, against a random order (95 % of {low} to {high})",
                    "value": entry[kind]["against_random"],
                    "target": "< 0 beyond chance" if sign < 0 else "> 0 beyond chance",
                    "met": bool(sign * low > 0 and sign * high > 0),
                }
            )
    errors = sum(sample["errors"] for round_ in found["speed"]["rounds"] for sample in round_.values())
    listed.append(
        {"id": "errors", "what": "requests that failed under load", "value": errors, "target": 0, "met": errors == 0}
    )
    return listed


def table(found: Mapping[str, Any]) -> str:
    """What docs/explanations.md has."""
    lines = ["| explained by | deletion | insertion | against random |", "|---|---|---|---|"]
    for name, entry in found["faithfulness"]["ways"].items():
        deletion, insertion = entry["deletion"], entry["insertion"]
        gain = "" if name == RANDOM else f"{deletion['against_random']:+.3f}, {insertion['against_random']:+.3f}"
        lines.append(f"| {name} | {deletion['area']:.3f} | {insertion['area']:.3f} | {gain} |")

    def median(load: str, figure: str) -> float:
        return float(np.median([round_[load][figure] for round_ in found["speed"]["rounds"]]))

    lines += [
        "",
        f"{found['faithfulness']['texts']} texts; the archive shipped is {found['archive']}.",
        "",
        "| REST, SST-2 texts | a second | p50, ms | p99, ms |",
        "|---|---|---|---|",
    ]
    for load_, what in (
        ("explanations-1", "explanations, 1 connection"),
        ("explanations-64", "explanations, 64 connections"),
        ("predictions-64", "predictions, 64 connections"),
    ):
        rate, p50, p99 = (median(load_, figure) for figure in ("rate", "p50_ms", "p99_ms"))
        lines.append(f"| {what} | {rate:.0f} | {p50:.0f} | {p99:.0f} |")
    where = found["machine"]
    lines += ["", f"{where['processor']}, {where['cpus']} CPUs; the load generator runs on them too."]
    return "\n".join(lines)


def document(found: Mapping[str, Any], text: str) -> str:
    """docs/explanations.md with these figures between its marks. Raises ValueError if it has none."""
    return rewritten(DOCUMENT, text, (BEGIN, END), table(found))


def plot(found: Mapping[str, Any], path: Path) -> None:
    """The two curves of each way."""
    import matplotlib

    matplotlib.use("svg")
    # The same results give the same file.
    matplotlib.rcParams |= {"svg.hashsalt": "marble", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    for axes, kind, what in zip(both, ("deletion", "insertion"), ("hidden", "shown"), strict=True):
        for name, entry in found["faithfulness"]["ways"].items():
            dashes = {"linestyle": "--", "color": "grey"} if name == RANDOM else {}
            axes.plot(SHARES, entry[kind]["curve"], label=name, **dashes)
        axes.set(title=kind, xlabel=f"share of the words {what}, the most important first")
    both[0].set_ylabel("probability of the answer")
    both[1].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/explanations",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few texts, nothing written")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--work", type=Path, help="folder to keep the model in (default: a temporary one)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    if not (arguments.data / "sst2").is_dir():
        sys.exit(f"benchmarks/explanations: {arguments.data}/sst2 is missing; name the data sets' folder with --data")
    load.check_wrk()
    with tempfile.TemporaryDirectory(prefix="explanations-") as folder:
        work = (arguments.work or Path(folder)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        model = models.prepare("sst2", arguments.data, work, arguments.quick)
        texts = Texts(arguments.data, model.bundle, model.settings.max_length).sst2()
        found: dict[str, Any] = {
            "command": f"benchmarks/explanations{' --quick' if arguments.quick else ''}",
            "machine": machine(),
            "archive": f"{model.settings.backend} {model.settings.precision}",
            "faithfulness": faithfulness(model, texts, arguments.quick),
            "speed": speed(model, texts, work, arguments.quick),
        }
    found["targets"] = targets(found)
    print(table(found))
    for target in found["targets"]:
        print(
            f"{target['what']}: {target['value']} (target {target['target']}): {'met' if target['met'] else 'MISSED'}"
        )
    if not arguments.quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        DOCUMENT.write_text(document(found, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
        plot(found, PLOT)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Unavailable, load.LoadError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks/explanations: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
