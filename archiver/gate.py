"""The quality gate: an archive is built only if it still gives the answers its bundle was trained to give."""

from dataclasses import dataclass
from pathlib import Path

from archiver.source import Bundle
from handler import golden
from handler.engine import Engine
from handler.errors import RequestError
from training import evaluation, tasks

# Largest drift of a golden score from the fp32 answer. bf16 keeps 8 bits of a number, and softmax passes that on.
GOLDEN_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found. value and reference: the archive's and torch fp32's metric on the validation set.

    Both are None for a bundle without a validation set: the golden set alone decides then.
    """

    metric: str
    value: float | None
    reference: float | None
    drift: float | None
    reason: str | None

    @property
    def passed(self) -> bool:
        """Whether the archive may ship."""
        return self.reason is None

    def __str__(self) -> str:
        golden_set = f"largest golden drift {self.drift:.2g}" if self.drift is not None else "golden set not kept"
        if self.value is None:
            return f"no validation set, {golden_set}"
        return f"validation {self.metric} {self.value:.4f} (torch fp32 {self.reference:.4f}), {golden_set}"


def check(bundle: Bundle, model_dir: Path, max_drop: float) -> Verdict:
    """Loads `model_dir` as a worker would, replays the golden set and scores the validation set.

    max_drop: allowed loss of the task's metric, in points (0.5 is half a percent). One row may always change: with
    fewer than 200 rows it would be over half a point by itself.
    """
    engine = Engine(model_dir)
    task = tasks.load(bundle.settings.task)
    metric, value, drift = bundle.metric.replace("_", "-"), None, None
    try:
        drift = golden.replay(engine, model_dir / golden.FILE_NAME)
        if bundle.validation:
            predictions = evaluation.predict(engine, bundle.validation)
            targets = [row["target"] for row in bundle.validation]
            value = float(task.score(predictions, targets, bundle.labels)[bundle.metric])
    except (golden.GoldenMismatch, RequestError) as error:
        return Verdict(metric, value, bundle.reference, drift, str(error))
    if value is not None and bundle.reference is not None:
        allowed = max(max_drop / 100, 1 / len(bundle.validation)) + 1e-9
        if not bundle.reference - value <= allowed:
            reason = (
                f"validation {metric} falls from {bundle.reference:.4f} to {value:.4f}, more than {max_drop:g} points"
            )
            return Verdict(metric, value, bundle.reference, drift, reason)
    return Verdict(metric, value, bundle.reference, drift, None)
