"""Images on a page as data URLs, no larger than displayed."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

# Images up to this side (px) keep their pixels.
SMALL = 64


def tile(image: np.ndarray, side: int) -> str:
    """The data URL of an image (uint8 height, width, channels) displayed at most `side` px wide.

    A small image is a PNG with its own pixels. A larger one is a JPEG of at most twice the side,
    for screens of high resolution: at 224 px, about 4 kB instead of 140.
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
