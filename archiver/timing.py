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
# A candidate this many times as slow as the fastest cannot win, and is timed in one round only.
_HOPELESS = 2
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
    racing = dict(engines)
    for round_number in range(_ROUNDS + 1):
        for index, engine in racing.items():
            check()
            single, rate = _single_request(engine, asked), _throughput(engine, asked)
            if round_number:  # the first warms up
                singles[index].append(single)
                batches[index].append(rate)
        if round_number:
            fastest = max(batches[index][-1] for index in racing)
            racing = {index: engine for index, engine in racing.items() if batches[index][-1] >= fastest / _HOPELESS}
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
    """The token budget, and with OpenVINO the streams, with which batches go through fastest.

    By successive halving (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943): after every two rounds the
    slower half is timed no more.
    """
    usual = engine.settings
    engines = {engine.backend.streams: engine}
    if engine.backend.streams > 1:
        engines[1] = Engine(model_dir, streams=1)
    default = (usual.token_budget, engine.backend.streams)
    racing = [(budget, streams) for streams in engines for budget in _TOKEN_BUDGETS]
    rates: dict[tuple[int, int], list[float]] = {setting: [] for setting in racing}
    medians: dict[tuple[int, int], float] = {}
    for _ in range(_ROUNDS):
        for budget, streams in 2 * racing:
            check()
            engines[streams].settings = replace(usual, token_budget=budget)
            rates[budget, streams].append(_throughput(engines[streams], asked))
        medians = {setting: statistics.median(found) for setting, found in rates.items()}
        faster = sorted(racing, key=medians.__getitem__, reverse=True)[: (len(racing) + 1) // 2]
        racing = [setting for setting in racing if setting in {*faster, default}]
    best = max(racing, key=medians.__getitem__)
    # Larger micro-batches take more memory: the usual ones stay unless others are clearly faster.
    if medians.get(default, 0) >= (1 - 2 * NOISE) * medians[best]:
        best = default
    budget, streams = best
    # None: as many streams as threads, wherever the archive is served.
    return {"token_budget": budget, "streams": None if streams == engine.backend.streams else streams}
