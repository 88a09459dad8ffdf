"""The heat map of an explained image, drawn over it."""

import io
from collections.abc import Sequence
from typing import Any

try:
    from PIL import Image, ImageOps
except ImportError as error:
    raise ImportError(f"a heat map needs Pillow ({error}): pip install 'marble-client[image]'") from None

# What speaks for the answer, and what speaks against it.
_FOR, _AGAINST = (217, 72, 15), (24, 100, 171)
_MOST_OPAQUE = 0.75
# A smaller picture is enlarged to about this many pixels a side.
_SIDE = 480


def draw(picture: bytes, rows: Sequence[Sequence[float]], box: Any) -> bytes:
    """A PNG of the picture with its squares coloured, each as opaque as it counts.

    rows: what each square counts, from the top; box: the pixels that they cover. Raises ValueError if Pillow cannot
    read the picture.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(picture))).convert("RGBA")
    except OSError:
        raise ValueError("the image cannot be read here: convert it to PNG or JPEG") from None
    scale = max(1, _SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    strongest = max(abs(score) for row in rows for score in row) or 1
    squares = Image.new("RGBA", (len(rows[0]), len(rows)))
    squares.putdata(
        [
            (*(_FOR if score > 0 else _AGAINST), round(255 * _MOST_OPAQUE * abs(score) / strongest))
            for row in rows
            for score in row
        ]
    )
    left, top, right, bottom = (round(box[side] * scale) for side in ("xmin", "ymin", "xmax", "ymax"))
    image.alpha_composite(squares.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))
    drawn = io.BytesIO()
    image.convert("RGB").save(drawn, "PNG")
    return drawn.getvalue()
