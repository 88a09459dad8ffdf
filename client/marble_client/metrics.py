"""What a server counts, by model, from its Prometheus text format (docs/monitoring.md)."""

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from marble_client.errors import BadResponse

_LINE = re.compile(r"(\w+)\{(.*)\} ([-+.\w]+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class ModelMetrics:
    """What all versions of a model have done since the server started, or between two looks: `later - earlier`.

    `requests`: that a handler answered, by HTTP status. `seconds`: how many of them took at most so many seconds in the
    handler, by that bound. `arrivals`: requests, canaries too, that TorchServe handed to a worker; `queue_seconds`: how
    long those that came over REST had waited for one, together.
    """

    requests: Mapping[int, int] = field(default_factory=dict)
    seconds: Mapping[float, int] = field(default_factory=dict)
    arrivals: int = 0
    queue_seconds: float = 0.0

    def __sub__(self, earlier: "ModelMetrics") -> "ModelMetrics":
        return ModelMetrics(
            {code: count - earlier.requests.get(code, 0) for code, count in self.requests.items()},
            {bound: count - earlier.seconds.get(bound, 0) for bound, count in self.seconds.items()},
            self.arrivals - earlier.arrivals,
            self.queue_seconds - earlier.queue_seconds,
        )

    @property
    def failed(self) -> int:
        """Requests that were answered with an error, the caller's or the server's."""
        return sum(count for code, count in self.requests.items() if code >= 400)

    def quantile(self, share: float) -> float | None:
        """The seconds within which that share of the requests was answered, None without any.

        As Prometheus estimates it: spread evenly between two bounds; of what lies above the last, that bound.
        """
        bounds = sorted(self.seconds)
        counts = [self.seconds[bound] for bound in bounds]
        if not counts or counts[-1] <= 0:
            return None
        wanted = share * counts[-1]
        place = bisect_left(counts, wanted)
        low, before = (bounds[place - 1], counts[place - 1]) if place else (0.0, 0)
        if bounds[place] == inf:
            return low
        return low + (bounds[place] - low) * (wanted - before) / max(1, counts[place] - before)


def decode_metrics(content: bytes) -> dict[str, ModelMetrics]:
    """Metrics by model. Raises BadResponse if they are not Prometheus' text, or not of a Marble server."""
    requests: defaultdict[str, Counter[int]] = defaultdict(Counter)
    seconds: defaultdict[str, Counter[float]] = defaultdict(Counter)
    arrivals: Counter[str] = Counter()
    queue: defaultdict[str, float] = defaultdict(float)
    try:
        for name, written, value in _LINE.findall(content.decode("utf-8")):
            labels = dict(_LABEL.findall(written))
            if name == "marble_requests_total":
                requests[labels["model"]][int(labels["code"])] += round(float(value))
            elif name == "marble_request_seconds_bucket":
                seconds[labels["model"]][float(labels["le"])] += round(float(value))
            elif name == "ts_inference_requests_total":
                arrivals[labels["model_name"]] += round(float(value))
            elif name == "ts_queue_latency_microseconds":
                queue[labels["model_name"]] += float(value) / 1e6
    except (KeyError, ValueError) as error:
        raise BadResponse(f"these are no metrics of a Marble server: {error!r}") from None
    return {
        name: ModelMetrics(dict(requests[name]), dict(seconds[name]), arrivals[name], queue[name])
        for name in sorted({*requests, *seconds, *arrivals})
    }
