"""The quality gate: an archive is built only if it still gives the answers its bundle was trained to give."""

from dataclasses import dataclass
from pathlib import Path

from archiver.source import Bundle
from handler import golden
from handler.engine import Engine
from handler.errors import RequestError
from training.evaluation import classification_metrics, predicted_labels

# Largest drift of a golden score from the fp32 answer. bf16 keeps 8 bits of a number, and softmax passes that on.
GOLDEN_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found. accuracy and reference: validation accuracy of the archive and of torch fp32."""

    accuracy: float
    reference: float
    drift: float | None
    reason: str | None

    @property
    def passed(self) -> bool:
        """Whether the archive may ship."""
        return self.reason is None


def check(bundle: Bundle, model_dir: Path, max_drop: float) -> Verdict:
    """Loads `model_dir` as a worker would, replays the golden set and scores the validation set.

    max_drop: allowed loss of validation accuracy, in points (0.5 is half a percent). One row may always change: with
    fewer than 200 rows it would be over half a point by itself.
    """
    engine = Engine(model_dir)
    rows = bundle.validation
    found = predicted_labels(engine, [row["text"] for row in rows])
    accuracy = classification_metrics([row["label"] for row in rows], found, bundle.labels)["accuracy"]
    reference = bundle.accuracy
    try:
        drift = golden.replay(engine, model_dir / golden.FILE_NAME)
    except (golden.GoldenMismatch, RequestError) as error:
        return Verdict(accuracy, reference, None, str(error))
    if reference - accuracy > max(max_drop / 100, 1 / len(rows)) + 1e-9:
        reason = f"validation accuracy falls from {reference:.4f} to {accuracy:.4f}, more than {max_drop:g} points"
        return Verdict(accuracy, reference, drift, reason)
    return Verdict(accuracy, reference, drift, None)
