from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from engine.report.tile import tile


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_picture_keeps_its_pixels(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, channels), dtype=np.uint8)
    url = tile(pixels, 52)
    assert url.startswith("data:image/png")
    assert np.array_equal(np.asarray(opened(url)).reshape(pixels.shape), pixels)


def test_a_large_picture_is_no_larger_than_a_fine_screen_shows() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    url = tile(pixels, 52)
    assert url.startswith("data:image/jpeg")
    assert opened(url).size == (104, 104)
    assert len(url) < 10_000
    # One that lies between is not enlarged, and the longer side is what counts.
    assert opened(tile(pixels[:80, :80], 52)).size == (80, 80)
    assert opened(tile(pixels[:50], 52)).size == (104, 23)
