"""Draws circles, squares and triangles, as data for tasks on images: python examples/shapes/draw.py FOLDER"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 32
SPLITS = {"train": 200, "validation": 20, "test": 20}  # images of each shape


def draw(shape: str, chance: random.Random) -> Image.Image:
    """One shape, bright on dark, of any size, at any place that it fits in; grey noise over all."""
    image = Image.new("L", (SIZE, SIZE), chance.randrange(60))
    radius = chance.randrange(7, 13)
    x, y = (chance.randrange(radius, SIZE - radius) for _ in range(2))
    ink = chance.randrange(150, 256)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    else:
        sides = {"triangle": 3, "square": 4}[shape]
        pen.regular_polygon((x, y, radius), sides, rotation=chance.randrange(-15, 16), fill=ink)
    noise = Image.frombytes("L", image.size, chance.randbytes(SIZE * SIZE))
    return Image.blend(image, noise, 0.15)


def main() -> None:
    [folder] = map(Path, sys.argv[1:])
    for split, count in SPLITS.items():
        for shape in ("circle", "square", "triangle"):
            place = folder / split / shape
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                draw(shape, random.Random(f"{split} {shape} {number}")).save(place / f"{number}.png")


if __name__ == "__main__":
    main()
