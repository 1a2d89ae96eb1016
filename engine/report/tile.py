"""A picture on a page: as a data URL that needs no network, and no larger than it is seen."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

# Up to this side (px) a picture is kept as it is, pixel for pixel.
SMALL = 64


def tile(image: np.ndarray, side: int) -> str:
    """An image (uint8 height, width, channels) that is shown at most `side` px large.

    A small one is a PNG of its own pixels. A larger one is a JPEG of at most twice the side, which
    is what a fine screen shows: at 224 px, some 4 kB in place of 140.
    """
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    target, kind = io.BytesIO(), "png"
    if max(picture.size) <= SMALL:
        picture.save(target, "PNG")
    else:
        kind = "jpeg"
        picture.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
        picture.save(target, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(target.getvalue()).decode()}"
