"""The data sets of benchmarks/quality in the form that train.py reads."""

import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SEED = 42

# What a message of examples/messages may be about: one thing, or several; each can stand in another's place.
_THINGS = (
    "backpack, bed, bench, bike, blanket, blender, book, bowl, box, bucket, candle, carpet, chair, clock, coat, "
    "coffee machine, cupboard, curtain rail, cushion, desk, drawer, dress, drill, fan, fork, freezer, fridge, "
    "frame, garden hose, grill, guitar, hammer, hat, heater, helmet, jacket, jar, jug, kettle, keyboard, knife, "
    "ladder, lamp, mat, mattress, mirror, mixer, mug, pan, phone case, piano, pillow, plant pot, plate, printer, "
    "radio, ring, rug, saw, scale, scarf, shelf, shirt, shower curtain, sink, sofa, speaker, spoon, stool, "
    "suitcase, table, tap, teapot, television, tent, toaster, towel, toy train, tray, vacuum cleaner, vase, "
    "washing machine, watch",
    "bags, boots, bowls, bulbs, candles, chairs, cups, curtains, cushions, forks, glasses, gloves, headphones, "
    "jackets, knives, lamps, mats, mugs, pillows, pans, plates, sandals, scissors, sheets, shoes, skates, "
    "slippers, socks, spoons, stools, tiles, towels, trousers",
)
_SWAPS = 12


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


def messages(context: Context) -> list[str]:
    """examples/messages, each training row repeated a dozen times with another thing in its place, in both texts.

    So few messages do not teach a model to take the thing from the text; these do, although not all make sense.
    """
    chance = random.Random(SEED)
    kinds = [kind.split(", ") for kind in _THINGS]
    rows = pd.read_csv(ROOT / "examples" / "messages" / "train.csv")
    written = [(text, summary) for text, summary in rows.itertuples(index=False)]
    more = []
    for text, summary in written:
        found = [thing for kind in kinds for thing in kind if _whole(thing).search(text)]
        # What the summary is about, if it names a thing; of "lamp" and "bike lamp" the longer.
        thing = max(found, key=lambda thing: (bool(_whole(thing).search(summary)), len(thing)), default="")
        others = chance.sample(next((kind for kind in kinds if thing in kind), [""] * _SWAPS), _SWAPS)
        more += [(_swap(thing, other, text), _swap(thing, other, summary)) for other in others]
    place = context.work / "messages-train.csv"
    pd.DataFrame(written + more, columns=rows.columns).to_csv(place, index=False)
    return ["--train-file", str(place), *example("messages")[2:]]


def _whole(thing: str) -> re.Pattern[str]:
    return re.compile(rf"\b{thing}\b", re.IGNORECASE)


def _swap(thing: str, other: str, text: str) -> str:
    """A text with `other` in place of a thing, with a capital letter where that has one."""
    if not thing:
        return text
    return _whole(thing).sub(lambda match: other.capitalize() if match[0][0].isupper() else other, text)


def files(context: Context, task: str, folder: str, train: str, validation: str, test: str) -> list[str]:
    """The arguments that name a task and the three files of a data set."""
    place = context.data / folder
    splits = (("train", train), ("validation", validation), ("test", test))
    return ["--task", task, *(part for name, file in splits for part in (f"--{name}-file", str(place / file)))]


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
    """The usual split: the first nine tenths to train, half of the rest for validation, half for the test."""
    text = (context.data / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    arguments = []
    for name, start, end in (("train", 0.0, 0.9), ("validation", 0.9, 0.95), ("test", 0.95, 1.0)):
        place = context.work / f"shakespeare-{name}.txt"
        place.write_text(text[int(start * len(text)) : int(end * len(text))], encoding="utf-8")
        arguments += [f"--{name}-file", str(place)]
    return arguments
