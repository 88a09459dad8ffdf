"""Times engines against each other on this machine: which is fastest, and with which settings."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from handler.engine import Engine
from handler.messages import Request

_ROUNDS = 3
_EXAMPLES = 256
_SINGLE_REQUESTS = 48
_BATCH = 64
# One round with one engine takes no longer than this many seconds, or one batch.
_ROUND_SECONDS = 1.0
_TOKEN_BUDGETS = (256, 512, 1024, 2048, 4096)
# Speeds closer than this are equal.
NOISE = 0.03


def requests(examples: Sequence[Mapping[str, Any]]) -> list[Request]:
    """What to time with: one request an example, repeated up to a whole batch."""
    chosen = list(examples[:_EXAMPLES])
    chosen *= -(-_BATCH // len(chosen))
    return [Request([example["inputs"]], example.get("parameters", {})) for example in chosen]


def compare(
    engines: Mapping[int, Engine], asked: Sequence[Request], check: Callable[[], None]
) -> dict[int, tuple[float, float]]:
    """Median milliseconds of a single request and median requests a second in batches, by engine.

    The engines take turns, so that what else the machine does hits all alike.
    """
    singles: dict[int, list[float]] = {index: [] for index in engines}
    batches: dict[int, list[float]] = {index: [] for index in engines}
    for round_number in range(_ROUNDS + 1):
        for index, engine in engines.items():
            check()
            single, rate = _single_request(engine, asked), _throughput(engine, asked)
            if round_number:  # the first warms up
                singles[index].append(single)
                batches[index].append(rate)
    return {index: (statistics.median(singles[index]), statistics.median(batches[index])) for index in engines}


def _single_request(engine: Engine, asked: Sequence[Request]) -> float:
    """Median milliseconds of a request by itself."""
    times = []
    for request in asked[:_SINGLE_REQUESTS]:
        start = time.perf_counter()
        engine.predict([request])
        times.append(time.perf_counter() - start)
        if sum(times) > _ROUND_SECONDS:
            break
    return 1000 * statistics.median(times)


def _throughput(engine: Engine, asked: Sequence[Request]) -> float:
    """Requests a second in batches."""
    start, done = time.perf_counter(), 0
    for first in range(0, len(asked) - _BATCH + 1, _BATCH):
        engine.predict(asked[first : first + _BATCH])
        done += _BATCH
        if time.perf_counter() - start > _ROUND_SECONDS:
            break
    return done / (time.perf_counter() - start)


def tune(model_dir: Path, engine: Engine, asked: Sequence[Request], check: Callable[[], None]) -> dict[str, Any]:
    """The token budget, and with OpenVINO the streams, with which batches go through fastest."""
    usual = engine.settings
    engines = [engine]
    if engine.backend.streams > 1:
        engines.append(Engine(model_dir, streams=1))
    rates: dict[tuple[int, int], list[float]] = {}
    for _ in range(2 * _ROUNDS):
        for streamed in engines:
            for budget in _TOKEN_BUDGETS:
                check()
                streamed.settings = replace(usual, token_budget=budget)
                rates.setdefault((budget, streamed.backend.streams), []).append(_throughput(streamed, asked))
    medians = {setting: statistics.median(found) for setting, found in rates.items()}
    best = max(medians, key=medians.__getitem__)
    # Larger micro-batches take more memory: the usual ones stay unless others are clearly faster.
    default = (usual.token_budget, engine.backend.streams)
    if medians.get(default, 0) >= (1 - 2 * NOISE) * medians[best]:
        best = default
    budget, streams = best
    # None: as many streams as threads, wherever the archive is served.
    return {"token_budget": budget, "streams": None if streams == engine.backend.streams else streams}
