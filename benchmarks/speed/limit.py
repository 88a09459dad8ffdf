"""The limit: a model in a process of its own, with no server around it.

`Limit` runs this file as a program that reads one question a line and answers it, so that it takes no time while
servers are measured.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
# Token budgets and numbers of streams that are tried; the fastest pair is the limit.
BUDGETS = (256, 512, 1024, 2048, 4096)
STREAMS = (1, None)

Setting = dict[str, int | None]


class Limit:
    """A model folder (a bundle or an unpacked archive) that is asked in-process."""

    def __init__(self, model_dir: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.limit", str(model_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        )

    def __enter__(self) -> "Limit":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def throughput(self, texts: Sequence[str], seconds: float, setting: Setting, batch: int) -> float:
        """Texts per second in lists of `batch` texts, which the engine sorts by length, with these settings of it."""
        return float(self._ask("throughput", texts=texts, seconds=seconds, setting=setting, batch=batch))

    def fastest(self, texts: Sequence[str], seconds: float, batch: int) -> Setting:
        """The token budget and the number of streams with the highest throughput on these texts."""
        settings: list[Setting] = [{"token_budget": b, "streams": s} for b in BUDGETS for s in STREAMS]
        return max(settings, key=lambda setting: self.throughput(texts, seconds, setting, batch))

    def latency(self, groups: Sequence[Sequence[str]], seconds: float) -> float:
        """Median milliseconds of a request, each with one group of texts."""
        return float(self._ask("latency", groups=groups, seconds=seconds))

    def scores(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Score by label of each text."""
        found: list[dict[str, float]] = self._ask("scores", texts=texts)
        return found

    def _ask(self, what: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"what": what, **arguments}), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the in-process model ended with exit code {self._process.wait()}; its error is above")


def main() -> None:
    from handler.engine import Engine
    from handler.messages import Request, Result

    # No bounds on one request: all texts come in one.
    free: dict[str, Any] = {"max_inputs": 10**9, "max_tokens": 10**9, "max_characters": 10**9}
    shipped = Engine(Path(sys.argv[1]), **free)
    # Of other settings the latest alone is kept: each engine has a copy of the model.
    others: dict[str, Engine] = {}

    def with_setting(setting: Setting) -> Engine:
        key = json.dumps(setting)
        if key not in others:
            others.clear()
            others[key] = Engine(Path(sys.argv[1]), **free, **setting)
        return others[key]

    def predict(texts: Sequence[str], engine: Engine = shipped) -> Result:
        [result] = engine.predict([Request(texts, many=True)])
        if not isinstance(result, Result):
            raise result
        return result

    def throughput(texts: Sequence[str], seconds: float, setting: Setting, batch: int) -> float:
        engine = with_setting(setting)
        batches = [texts[start : start + batch] for start in range(0, len(texts), batch)]

        def go_through() -> None:
            for chosen in batches:
                predict(chosen, engine)

        go_through()  # shapes that are new take longer
        passes, begun = 0, time.perf_counter()
        while (spent := time.perf_counter() - begun) < seconds:
            go_through()
            passes += 1
        return passes * len(texts) / spent

    def latency(groups: Sequence[Sequence[str]], seconds: float) -> float:
        times: list[float] = []
        end = time.perf_counter() + seconds
        for index, group in enumerate(cycle(groups)):
            begun = time.perf_counter()
            predict(group)
            ended = time.perf_counter()
            if index >= min(len(groups), 16):
                times.append(ended - begun)
                if ended > end:
                    break
        return sorted(times)[len(times) // 2] * 1e3

    def scores(texts: Sequence[str]) -> list[dict[str, float]]:
        predictions: Sequence[Any] = predict(texts).predictions
        return [{entry["label"]: entry["score"] for entry in found} for found in predictions]

    measures: dict[str, Callable[..., Any]] = {"throughput": throughput, "latency": latency, "scores": scores}
    for line in sys.stdin:
        question = json.loads(line)
        answer = measures[question.pop("what")](**question)
        print(f"ANSWER {json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
