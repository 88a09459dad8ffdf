"""What all rows share: the archives, and how a figure is written down."""

import os
import shutil
import subprocess
import sys
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

    def site(self, name: str, **settings: object) -> Site:
        """A server of `reviews` behind its front door, in a folder of its own; a context manager.

        settings: those of front.properties that differ.
        """
        folder = self.work / "sites" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return Site(folder, self.store, [MODEL], settings)

    def prepare(self) -> None:
        """Trains and builds what is not in the store yet. Raises subprocess.CalledProcessError if it cannot."""
        text = [f"--{split}-file={_REVIEWS / split}.csv" for split in ("train", "validation")]
        self._build(MODEL, ["--task", "text-classification", *text, "--num-train-epochs", "1"])
        corpus = self.work / "corpus.txt"
        corpus.write_text("\n".join(line.split(",")[0] for line in (_REVIEWS / "train.csv").open(encoding="utf-8")))
        small = "gpt2 n_embd=32 n_layer=1 n_head=2 n_positions=1024 vocab_size=400"
        task = ["--task", "text-generation", "--from-scratch", small, "--max-steps", "5", "--max-length", "64"]
        self._build(STREAMS, [*task, "--train-file", str(corpus)])

    def _build(self, name: str, training: list[str]) -> None:
        if (self.store / f"{name}.mar").exists():
            return
        bundle = self.work / name
        environment = {**os.environ, **_OFFLINE}
        train = [sys.executable, "train.py", *training, "--output-dir", str(bundle), "--overwrite"]
        subprocess.run(train, cwd=ROOT, env=environment, check=True)
        build = ["./build_mar.sh", "--bundle", str(bundle), "--store", str(self.store), "--force"]
        subprocess.run(build, cwd=ROOT, env=environment, check=True)
