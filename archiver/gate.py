"""The quality gate: an archive is built only if it still gives the answers its bundle was trained to give."""

from dataclasses import dataclass

from archiver.source import Bundle
from handler import golden
from handler.engine import Engine
from handler.errors import RequestError
from handler.tasks import EncoderTask
from training import evaluation, tasks

# Largest drift of a golden score from the fp32 answer. bf16 keeps 8 bits of a number, and softmax passes that on. int8
# moves the scores of unsure answers more than that, so its answers themselves are compared as well.
GOLDEN_TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02, "int8": 0.35}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found. value and reference: the archive's and torch fp32's metric on the validation set.

    A bundle without a validation set has neither: the golden set alone decides then. lost: whether the metric fell by
    more than is allowed.
    """

    metric: str
    value: float | None
    reference: float | None
    drift: float | None
    reason: str | None
    lost: bool = False

    @property
    def passed(self) -> bool:
        """Whether the archive may ship."""
        return self.reason is None

    def __str__(self) -> str:
        golden_set = f"largest golden drift {self.drift:.2g}" if self.drift is not None else "golden set not kept"
        if self.value is None:
            return f"{'no validation set' if self.reference is None else 'validation set not answered'}, {golden_set}"
        return f"validation {self.metric} {self.value:.4f} (torch fp32 {self.reference:.4f}), {golden_set}"


def check(bundle: Bundle, engine: Engine, max_drop: float) -> Verdict:
    """Replays the golden set as a worker would and scores the validation set.

    engine: the archive's. max_drop: allowed loss of the task's metric, see `allowed_drop`.
    """
    metric, value, drift, reason = bundle.metric.replace("_", "-"), None, None, None
    try:
        drift = golden.replay(engine, bundle.path / golden.FILE_NAME)
        if engine.settings.precision == "int8":
            _check_answers(bundle, engine)
    except (golden.GoldenMismatch, RequestError) as error:
        reason = str(error)
    if not bundle.validation or bundle.reference is None:
        return Verdict(metric, None, bundle.reference, drift, reason)
    try:
        task = tasks.load(bundle.settings.task)
        value = float(evaluation.measure(engine, task, bundle.validation, bundle.labels)[bundle.metric])
    except RequestError as error:
        return Verdict(metric, None, bundle.reference, drift, reason or str(error))
    lost = not bundle.reference - value <= allowed_drop(bundle, max_drop)
    if lost and reason is None:
        reason = f"validation {metric} falls from {bundle.reference:.4f} to {value:.4f}, more than {max_drop:g} points"
    return Verdict(metric, value, bundle.reference, drift, reason, lost)


def allowed_drop(bundle: Bundle, max_drop: float) -> float:
    """How much the metric may fall: `max_drop` points, 0.5 being half a percent.

    One row may always change: with fewer than 200 rows it would be over half a point by itself.
    """
    return max(max_drop / 100, 1 / max(1, len(bundle.validation))) + 1e-9


def _check_answers(bundle: Bundle, engine: Engine) -> None:
    """Raises GoldenMismatch, saying which, if a golden example is answered otherwise than in fp32."""
    assert isinstance(engine.task, EncoderTask)
    examples = golden.read(bundle.path / golden.FILE_NAME)
    for number, example in enumerate(examples, start=1):
        if not engine.task.agrees(example["predictions"], golden.predict(engine, example)):
            raise golden.GoldenMismatch(f"golden example {number} of {len(examples)} has another answer than in fp32")
