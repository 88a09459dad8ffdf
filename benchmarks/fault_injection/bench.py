"""What all rows share: the archives, and how a figure is written down."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_injection.site import ROOT, Site

# The classifier that is asked, and the generator that streams.
MODEL, STREAMS = "reviews", "writer"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
_REVIEWS = ROOT / "examples" / "reviews"


@dataclass(frozen=True)
class Target:
    """A figure and what it must be. value: what was found, in words or as a number; it stands beside its target."""

    id: str
    what: str
    value: float | int | str
    target: str
    met: bool


@dataclass(frozen=True)
class Bench:
    """One run. quick: fewer repetitions, for CI. store: the archives `reviews` and `writer`."""

    work: Path
    quick: bool

    @property
    def store(self) -> Path:
        return self.work / "store"

    def times(self, full: int, quick: int) -> int:
        """How often something is done."""
        return quick if self.quick else full

    def site(self, name: str, models: Sequence[str] = (MODEL,), **settings: object) -> Site:
        """A server of these models behind its front door, in a folder of its own; a context manager.

        settings: those of front.properties that differ.
        """
        for model in models:
            self.prepare(model)
        folder = self.work / "sites" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return Site(folder, self.store, models, settings)

    def prepare(self, model: str) -> None:
        """Trains and builds a model, unless it is in the store. Raises subprocess.CalledProcessError if it cannot."""
        if (self.store / f"{model}.mar").exists():
            return
        files = [f"--{split}-file={_REVIEWS / split}.csv" for split in ("train", "validation")]
        training = ["--task", "text-classification", *files, "--num-train-epochs", "1"]
        if model == STREAMS:
            corpus = self.work / "corpus.txt"
            corpus.write_text("\n".join(line.split(",")[0] for line in (_REVIEWS / "train.csv").open(encoding="utf-8")))
            small = "gpt2 n_embd=32 n_layer=1 n_head=2 n_positions=1024 vocab_size=400"
            training = ["--task", "text-generation", "--from-scratch", small, "--max-steps", "5", "--max-length", "64"]
            training += ["--train-file", str(corpus)]
        subprocess.run(
            [sys.executable, "train.py", *training, "--output-dir", str(self.work / model), "--overwrite"],
            cwd=ROOT,
            env={**os.environ, **_OFFLINE},
            check=True,
        )
        self._build("--bundle", self.work / model, "--force")

    def next_version(self) -> str:
        """Builds the classifier once more, as version 2.0; returns the file's name in the store."""
        name = f"{MODEL}-2"
        if not (self.store / f"{name}.mar").exists():
            self.prepare(MODEL)
            self._build("--bundle", self.work / MODEL, "--name", name, "--version", "2.0")
        return f"{name}.mar"

    def _build(self, *options: object) -> None:
        command = ["./build_mar.sh", *map(str, options), "--store", str(self.store)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **_OFFLINE}, check=True)
