"""Chooses what an archive ships: every candidate is converted, put through the gate and timed on this machine."""

import contextlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from archiver import gate, timing
from archiver.convert import Converter
from archiver.source import Bundle
from handler import cpus
from handler.backends import PRECISIONS
from handler.digests import sha256
from handler.engine import Engine
from training import defaults
from training.errors import UserError

FILE_NAME = "candidates.json"
SHIPPED = "shipped"
_WEIGHTS = {".bin", ".safetensors"}
_PACKAGES = ("torch", "transformers", "tokenizers", "openvino", "nncf")


@dataclass(slots=True)
class Candidate:
    """One backend and precision. size: bytes of its weights; latency: median milliseconds of a single request;
    throughput: requests a second in batches of 64; both None where nothing was timed."""

    backend: str
    precision: str
    verdict: gate.Verdict | None = None
    failure: str | None = None
    size: int | None = None
    latency: float | None = None
    throughput: float | None = None
    shipped: bool = False

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"

    @property
    def reason(self) -> str | None:
        """Why it cannot ship, None if it can."""
        return self.failure or (self.verdict.reason if self.verdict else "not checked")

    def row(self) -> dict[str, Any]:
        """Its line of the table, as JSON values."""
        verdict = self.verdict
        return {
            "backend": self.backend,
            "precision": self.precision,
            "size": self.size,
            "latency_ms": self.latency and round(self.latency, 3),
            "throughput": self.throughput and round(self.throughput, 1),
            "metric": verdict and verdict.metric,
            "value": verdict and verdict.value,
            "golden_drift": verdict and verdict.drift,
            "verdict": self.reason or (SHIPPED if self.shipped else "passed"),
        }


@dataclass(frozen=True, slots=True)
class Choice:
    """What ships: the folder of the model, and which candidate it is. record: of all candidates, see `lines`."""

    model_dir: Path
    backend: str
    precision: str
    record: Mapping[str, Any]


class Optimiser:
    """Finds what the archive of one bundle ships.

    max_drop: points of the validation metric that may be lost, see `gate`. work: an empty folder. check: called between
    two steps; raises to end the build.
    """

    def __init__(self, bundle: Bundle, max_drop: float, work: Path, check: Callable[[], None]) -> None:
        self._bundle, self._max_drop, self._work, self._check = bundle, max_drop, work, check
        self._converter = Converter(bundle)

    def choose(self, backend: str, precision: str, *, force: bool) -> Choice:
        """The fastest candidate on this machine that passes the gate, its model folder ready to be packed.

        backend and precision: the wanted ones, or "auto". A lone candidate is not timed, and with `force` it ships
        whatever the gate says. What was measured is kept in the bundle's `candidates.json` and used again, so that the
        same build on the same kind of machine gives the same archive. Raises UserError if no candidate passes.
        """
        candidates = list(_candidates(self._bundle, backend, precision))
        if len(candidates) == 1:
            return self._ship_only(candidates[0], force=force)
        conditions = self._conditions(backend, precision)
        record = self._recorded(conditions)
        if record is not None:
            print(
                f"measured before (remove {self._bundle.path / FILE_NAME} to measure again):\n{table(record)}",
                flush=True,
            )
            [row] = [row for row in record["candidates"] if row["verdict"] == SHIPPED]
            winner = Candidate(row["backend"], row["precision"])
            if self._prepare(winner) is None:
                raise UserError(f"{winner} passed before and does not now; remove {self._bundle.path / FILE_NAME}")
        else:
            winner, record = self._compare(candidates)
            record = {"conditions": conditions, **record}
            self._keep(record)
            print(table(record), flush=True)
        stage = self._stage(winner)
        self._write_config(winner, record["settings"])
        (stage / FILE_NAME).write_text(_render(record), encoding="utf-8")
        return Choice(stage, winner.backend, winner.precision, record)

    def _ship_only(self, candidate: Candidate, *, force: bool) -> Choice:
        engine = self._prepare(candidate)
        if engine is None and candidate.verdict is not None and force:
            print(f"warning: built because of --force, though {candidate.reason}", file=sys.stderr)
        elif engine is None:
            raise UserError(
                f"{candidate} did not pass the quality gate, as said above; try another --backend or --precision, "
                "--max-drop, or --force"
                if candidate.verdict is not None
                else candidate.failure
            )
        self._write_config(candidate, {})
        candidate.shipped = True
        return Choice(self._stage(candidate), candidate.backend, candidate.precision, {"candidates": [candidate.row()]})

    def _compare(self, candidates: Sequence[Candidate]) -> tuple[Candidate, dict[str, Any]]:
        """The winner, and the record of how it was found."""
        engines: dict[int, Engine] = {}
        for index, candidate in enumerate(candidates):
            if engine := self._prepare(candidate):
                engines[index] = engine
        if not engines:
            raise UserError(
                f"none of {', '.join(map(str, candidates))} passed the quality gate, as said above; "
                "try another --backend or --precision, or --max-drop"
            )
        requests = timing.requests(self._bundle.validation or self._bundle.calibration)
        print(f"timing {len(engines)} candidates …", flush=True)
        for index, (latency, throughput) in timing.compare(engines, requests, self._check).items():
            candidates[index].latency, candidates[index].throughput = latency, throughput
        fastest = max(candidates[index].throughput or 0 for index in engines)
        near = [index for index in engines if (candidates[index].throughput or 0) >= (1 - timing.NOISE) * fastest]
        best = min(near, key=lambda index: candidates[index].size or 0)
        winner = candidates[best]
        winner.shipped = True
        settings = timing.tune(self._stage(winner), engines[best], requests, self._check)
        return winner, {"candidates": [candidate.row() for candidate in candidates], "settings": settings}

    def _prepare(self, candidate: Candidate) -> Engine | None:
        """Converts a candidate and puts it through the gate; its engine if it passes, else says on stderr why not."""
        self._check()
        stage = self._stage(candidate)
        stage.mkdir()
        inputs = (
            f" (calibrated on {self._converter.calibration_inputs} inputs)" if candidate.precision == "int8" else ""
        )
        print(f"{candidate}: converting{inputs} and checking …", flush=True)
        try:
            self._converter.write(candidate.backend, candidate.precision, stage)
            self._write_config(candidate, {})
            engine = self._gate(candidate)
            if candidate.precision == "int8" and candidate.verdict is not None and candidate.verdict.lost:
                print(f"{candidate}: {candidate.verdict}; trying with layers in floating point …", flush=True)
                self._converter.write_accurate_int8(gate.allowed_drop(self._bundle, self._max_drop), stage)
                engine = self._gate(candidate)
        except (UserError, ImportError, ValueError) as error:
            self._check()
            candidate.failure = str(error)
            print(f"{candidate}: {error}", file=sys.stderr)
            return None
        print(f"{candidate}: {candidate.verdict}", flush=True)
        if candidate.reason is not None:
            print(f"{candidate} does not pass: {candidate.reason}", file=sys.stderr)
            return None
        return engine

    def _gate(self, candidate: Candidate) -> Engine:
        stage = self._stage(candidate)
        candidate.size = sum(path.stat().st_size for path in stage.rglob("*") if path.suffix in _WEIGHTS)
        engine = Engine(stage)
        candidate.verdict = gate.check(self._bundle, engine, self._max_drop)
        return engine

    def _stage(self, candidate: Candidate) -> Path:
        return self._work / f"{candidate.backend}-{candidate.precision}"

    def _write_config(self, candidate: Candidate, settings: Mapping[str, Any]) -> None:
        """The archive's `model-config.yaml`: the bundle's, with the choices made here."""
        config = yaml.safe_load((self._bundle.path / "model-config.yaml").read_text(encoding="utf-8"))
        config["handler"] |= {
            "backend": candidate.backend,
            "precision": candidate.precision,
            "golden_tolerance": gate.GOLDEN_TOLERANCE[candidate.precision],
            **settings,
        }
        path = self._stage(candidate) / "model-config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")

    def _conditions(self, backend: str, precision: str) -> dict[str, Any]:
        """What a measurement depends on."""
        return {
            "backend": backend,
            "precision": precision,
            "max_drop": self._max_drop,
            "bundle": {
                name: sha256(self._bundle.path / name)
                for name in sorted({*self._bundle.weights(), *self._bundle.model_files(), "model-config.yaml"})
            },
            "machine": {"processor": _processor(), "cpus": cpus.available()},
            "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        }

    def _recorded(self, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured under the same conditions before."""
        try:
            record: dict[str, Any] = json.loads((self._bundle.path / FILE_NAME).read_text(encoding="utf-8"))
            return record if record["conditions"] == conditions else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep(self, record: Mapping[str, Any]) -> None:
        try:
            (self._bundle.path / FILE_NAME).write_text(_render(record), encoding="utf-8")
        except OSError as error:
            print(
                f"warning: {self._bundle.path} cannot be written to ({error.strerror}); the next build measures again",
                file=sys.stderr,
            )


def lines(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The candidates of a record as people read them, under a line of titles."""
    found: list[tuple[str, ...]] = [
        ("candidate", "size", "one request", "batches of 64", "metric", "golden drift", "verdict")
    ]
    for row in record["candidates"]:
        found.append(
            (
                f"{row['backend']} {row['precision']}",
                "-" if row["size"] is None else f"{row['size'] / 1e6:.1f} MB",
                "-" if row["latency_ms"] is None else f"{row['latency_ms']:.2f} ms",
                "-" if row["throughput"] is None else f"{row['throughput']:.0f}/s",
                "-" if row["value"] is None else f"{row['metric']} {row['value']:.4f}",
                "-" if row["golden_drift"] is None else f"{row['golden_drift']:.2g}",
                row["verdict"].partition(":")[0],  # what to do about it was said when it was found
            )
        )
    return found


def table(record: Mapping[str, Any]) -> str:
    """The candidates of a record, one a line."""
    rows = lines(record)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _candidates(bundle: Bundle, backend: str, precision: str) -> Iterator[Candidate]:
    """The candidates there are. Raises UserError if the wish for one cannot be met."""
    if backend == "openvino" and not bundle.runs_on_openvino:
        raise UserError(f"--backend openvino: {bundle.settings.task} runs on torch only; leave --backend out")
    backends = ["torch", "openvino"] if backend == "auto" and bundle.runs_on_openvino else [backend]
    if backends == ["auto"]:
        backends = ["torch"]
    if precision != "auto" and not any(precision in PRECISIONS[name] for name in backends):
        raise UserError(
            f"--precision {precision}: {' and '.join(backends)} has no such precision; "
            f"there are {', '.join(dict.fromkeys(p for name in backends for p in PRECISIONS[name]))}"
        )
    for name in backends:
        wanted = PRECISIONS[name] if precision == "auto" else (precision,)
        if precision == "auto" and not bundle.runs_on_openvino:
            wanted = ("fp32",)  # a generated answer has no scores to judge a lower precision by
        for choice in wanted:
            if choice in PRECISIONS[name] and (precision != "auto" or _is_native(name, choice)):
                yield Candidate(name, choice)


def _is_native(backend: str, precision: str) -> bool:
    """Whether this machine computes in a precision; what is only emulated can be tens of times slower than fp32."""
    if precision == "fp16":
        return torch.cuda.is_available()
    if precision == "bf16":
        fast, _ = defaults.bf16() if backend == "torch" else defaults.bf16_on_cpu()
        return fast
    return True


def _processor() -> str:
    """The CPU's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _render(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"
