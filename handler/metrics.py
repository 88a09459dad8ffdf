"""What a worker counts: totals in memory, handed on at most once a second.

Adding to a dict costs a batch next to nothing; writing does not, because every value is a line that TorchServe parses.
TorchServe knows no histogram with buckets of one's own, so histograms are counters with the label `le`, which is all
that PromQL asks of one. docs/monitoring.md says what each metric means.
"""

import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from handler.errors import RequestError, WrongAnswer
from handler.messages import Model, Result, Work
from handler.tasks import Task

# The labels of every metric, besides `model` and `version`.
METRICS: Mapping[str, tuple[str, ...]] = {
    "marble_requests_total": ("protocol", "code"),
    "marble_errors_total": ("type",),
    "marble_item_errors_total": ("type",),
    "marble_items_total": (),
    "marble_explanations_total": (),
    "marble_tokens_total": (),
    "marble_truncations_total": (),
    "marble_windows_total": (),
    "marble_canaries_total": ("outcome",),
    "marble_request_seconds_bucket": ("le",),
    "marble_request_seconds_sum": (),
    "marble_request_seconds_count": (),
    "marble_batches_total": (),
    "marble_micro_batch_rows_bucket": ("le",),
    "marble_micro_batch_rows_sum": (),
    "marble_micro_batch_rows_count": (),
    "marble_encoding_seconds_total": (),
    "marble_inference_seconds_total": (),
    "marble_predictions_total": ("label",),
    "marble_confidence_total": (),
    "marble_worker_loads_total": (),
    "marble_validation_share": ("label",),
    "marble_model_info": ("task", "backend", "precision", "digest"),
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
# Labels of a model beyond these are counted together: every label is a time series for Prometheus to keep.
MOST_LABELS = 100
OTHER = "other"
_SECONDS_BETWEEN = 1.0

# A metric's name and the values of its labels.
Series = tuple[str, ...]
Totals = Mapping[Series, float]


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request. canary: whether it was one, and no request of a user's."""

    outcome: Result | RequestError
    protocol: Literal["rest", "grpc"]
    canary: bool = False

    @property
    def code(self) -> int:
        """The HTTP status."""
        return self.outcome.code if isinstance(self.outcome, RequestError) else 200


class Metrics:
    """The totals of one worker. `emit` takes what has been added since it was called last, in a thread of its own."""

    def __init__(self, task: Task, emit: Callable[[Totals], None]) -> None:
        self._task = task
        self._emit = emit
        self._labels = frozenset(task.labels[:MOST_LABELS])
        self._lock = threading.Lock()
        self._waiting: defaultdict[Series, float] = defaultdict(float)

    def loaded(self, facts: Mapping[str, str], shares: Mapping[str, float]) -> None:
        """Says that the model is loaded, and begins every series that can be named at 0: else the first event of its
        kind would be no increase.

        facts: the labels of `marble_model_info`. shares: of the validation set's predictions, by label.
        """
        begin: dict[Series, float] = {(name,): 0.0 for name, labels in METRICS.items() if not labels}
        for name, bounds in (("marble_request_seconds", SECONDS), ("marble_micro_batch_rows", ROWS)):
            begin |= {(f"{name}_bucket", le): 0.0 for le in [*(f"{bound:g}" for bound in bounds), "+Inf"]}
        begin |= {("marble_canaries_total", outcome): 0.0 for outcome in ("right", "wrong", "failed")}
        begin |= {("marble_predictions_total", self._label(label)): 0.0 for label in self._task.labels}
        for label, share in shares.items():
            series = ("marble_validation_share", self._label(label))
            begin[series] = begin.get(series, 0.0) + share
        begin["marble_worker_loads_total",] = 1.0
        begin["marble_model_info", *(facts[label] for label in METRICS["marble_model_info"])] = 1.0
        self._add(begin)

    def batch(self, served: Sequence[Served], seconds: float, work: Work) -> None:
        """Counts one batch. seconds: from its arrival to its answer; work: what the engine spent on it."""
        totals: defaultdict[Series, float] = defaultdict(float)
        for request in served:
            if request.canary:
                totals["marble_canaries_total", _canary(request.outcome)] += 1
            else:
                totals["marble_requests_total", request.protocol, str(request.code)] += 1
                self._count(totals, request.outcome)
        users = sum(not request.canary for request in served)
        _observe(totals, "marble_request_seconds", SECONDS, seconds, users)
        totals["marble_batches_total",] = 1
        totals["marble_encoding_seconds_total",] = work.encoding_seconds
        totals["marble_inference_seconds_total",] = work.inference_seconds
        for rows, count in Counter(work.micro_batches).items():
            _observe(totals, "marble_micro_batch_rows", ROWS, rows, count)
        self._add(totals)

    def flush(self) -> None:
        """Hands on what has been added. Called by a timer; an error in it ends nothing but this call."""
        with self._lock:
            waiting, self._waiting = self._waiting, defaultdict(float)
        self._emit(waiting)

    def _count(self, totals: defaultdict[Series, float], outcome: Result | RequestError) -> None:
        if isinstance(outcome, RequestError):
            totals["marble_errors_total", type(outcome).__name__] += 1
            return
        totals["marble_items_total",] += len(outcome.predictions)
        totals["marble_tokens_total",] += outcome.usage.tokens
        totals["marble_truncations_total",] += outcome.usage.truncated
        totals["marble_windows_total",] += outcome.usage.windows
        if outcome.explains:
            totals["marble_explanations_total",] += len(outcome.predictions)
        for prediction in outcome.predictions:
            if isinstance(prediction, RequestError):
                totals["marble_item_errors_total", type(prediction).__name__] += 1
            elif self._labels and not outcome.explains:
                for label, score in self._task.found(prediction):
                    totals["marble_predictions_total", self._label(label)] += 1
                    totals["marble_confidence_total",] += min(max(score, 0.0), 1.0)

    def _label(self, label: str) -> str:
        return label if label in self._labels else OTHER

    def _add(self, totals: Totals) -> None:
        with self._lock:
            first = not self._waiting
            for series, value in totals.items():
                self._waiting[series] += value
        if first:
            # Only while there is something to say: an idle worker sleeps.
            timer = threading.Timer(_SECONDS_BETWEEN, self.flush)
            timer.daemon = True
            timer.start()


def labels_of(series: Series, model: Model) -> dict[str, str]:
    """All labels of a series by name."""
    name, *values = series
    return {"model": model.name, "version": model.version, **dict(zip(METRICS[name], values, strict=True))}


def _canary(outcome: Result | RequestError) -> str:
    if isinstance(outcome, WrongAnswer):
        return "wrong"
    return "failed" if isinstance(outcome, RequestError) else "right"


def _observe(totals: defaultdict[Series, float], name: str, bounds: Sequence[float], value: float, count: int) -> None:
    """Adds `count` equal observations to a histogram with these upper bounds."""
    for bound in bounds[bisect_left(bounds, value) :]:
        totals[f"{name}_bucket", f"{bound:g}"] += count
    totals[f"{name}_bucket", "+Inf"] += count
    totals[f"{name}_sum",] += value * count
    totals[f"{name}_count",] += count
