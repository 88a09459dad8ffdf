"""The data sets of benchmarks/quality in the form that train.py reads."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SEED = 42


@dataclass(frozen=True)
class Context:
    """Where an experiment finds and puts things. data: the data sets; work: bundles and prepared files of this run."""

    data: Path
    work: Path
    quick: bool

    def bundle(self, name: str) -> Path:
        """The bundle of an experiment."""
        return self.work / name


def jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def example(name: str) -> list[str]:
    """The arguments that name the three files of examples/NAME."""
    splits = ("train", "validation", "test")
    return [part for split in splits for part in (f"--{split}-file", f"examples/{name}/{split}.csv")]


def files(context: Context, task: str, folder: str, train: str, validation: str | None, test: str) -> list[str]:
    """The arguments that name a task and the files of a data set."""
    place = context.data / folder
    splits = (("train", train), ("validation", validation), ("test", test))
    named = (part for name, file in splits if file for part in (f"--{name}-file", str(place / file)))
    return ["--task", task, *named]


def mnist(context: Context) -> list[str]:
    """MNIST as folders of PNG files; a tenth of the training images, of each digit the last, is for validation."""
    root = context.work / "mnist"
    if not root.is_dir():
        arrays = np.load(context.data / "mnist" / "mnist_small.npz")
        seen: Counter[int] = Counter()
        for split in ("train", "test"):
            for number, (pixels, label) in enumerate(zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)):
                seen[int(label)] += split == "train"
                name = "validation" if split == "train" and seen[int(label)] > 270 else split
                folder = root / name / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    splits = (part for name in ("train", "validation", "test") for part in (f"--{name}-file", str(root / name)))
    return list(splits)


def spoken_digits(context: Context, column: str) -> list[str]:
    """The splits of fsdd as index files with absolute paths; `column`: "label", or "text" with the digit as a word."""
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    source = context.data / "fsdd"
    rows = pd.read_csv(source / "index.csv", dtype=str)
    rows["path"] = [str(source / path) for path in rows["path"]]
    rows["text"] = [words[int(label)] for label in rows["label"]]
    arguments = []
    for split, name in (("train", "train"), ("dev", "validation"), ("test", "test")):
        place = context.work / f"fsdd-{column}-{name}.csv"
        rows[rows["split"] == split][["path", column]].to_csv(place, index=False)
        arguments += [f"--{name}-file", str(place)]
    return arguments


def shakespeare(context: Context) -> list[str]:
    """The usual split: the first nine tenths to train, the rest for the test. A piece amid the former is validation.

    Not their end, which has the names of the play that goes on in the test.
    """
    text = (context.data / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    start, end, last = (int(share * len(text)) for share in (0.44, 0.46, 0.9))
    parts = {"train": text[:start] + text[end:last], "validation": text[start:end], "test": text[last:]}
    arguments = []
    for name, part in parts.items():
        place = context.work / f"shakespeare-{name}.txt"
        place.write_text(part, encoding="utf-8")
        arguments += [f"--{name}-file", str(place)]
    return arguments
