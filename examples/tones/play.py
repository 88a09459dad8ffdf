"""Plays the tones of a telephone's keys, as data for tasks on sounds: python examples/tones/play.py FOLDER

Each key sounds as two sines at once, one for its row and one for its column (ITU-T Q.23). Writes sounds of one key
(keys-SPLIT.csv: path, label) and of several, one after the other (numbers-SPLIT.csv: path, text).
"""

import csv
import random
import sys
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

RATE = 8000
ROWS, COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
KEYS = "123456789*0#"
NAMES = {"*": "star", "#": "hash"}  # as files may be called
SPLITS = {"train": 40, "validation": 5, "test": 5}  # sounds of each key, and numbers for each key


def play(keys: str, chance: random.Random) -> NDArray[np.float32]:
    """Samples (float32, [time], RATE a second): each key for 0.06 to 0.1 s, a pause before and after it, and noise."""
    parts = [silence(chance)]
    for key in keys:
        row, column = divmod(KEYS.index(key), 3)
        time = np.arange(round(RATE * chance.uniform(0.06, 0.1))) / RATE
        loudness = chance.uniform(0.1, 0.4)
        tones = sum(np.sin(2 * np.pi * pitch * time + chance.uniform(0, 6)) for pitch in (ROWS[row], COLUMNS[column]))
        parts += [loudness * tones, silence(chance)]
    sound = np.concatenate(parts)
    return (sound + 0.02 * np.random.default_rng(chance.randrange(2**32)).standard_normal(len(sound))).astype(
        np.float32
    )


def silence(chance: random.Random) -> NDArray[np.float64]:
    return np.zeros(round(RATE * chance.uniform(0.03, 0.06)))


def main() -> None:
    [folder] = map(Path, sys.argv[1:])
    (folder / "sounds").mkdir(parents=True, exist_ok=True)
    for split, count in SPLITS.items():
        chance = random.Random(split)
        keys = [(f"{split}-key-{NAMES.get(key, key)}-{number}", key) for key in KEYS for number in range(count)]
        numbers = [
            (f"{split}-number-{number}", "".join(chance.choices("0123456789", k=chance.randrange(1, 4))))
            for number in range(count * len(KEYS))
        ]
        for kind, column, sounds in (("keys", "label", keys), ("numbers", "text", numbers)):
            with (folder / f"{kind}-{split}.csv").open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(("path", column))
                for name, text in sounds:
                    path = f"sounds/{name}.wav"
                    soundfile.write(folder / path, play(text, chance), RATE)
                    table.writerow((path, text))


if __name__ == "__main__":
    main()
