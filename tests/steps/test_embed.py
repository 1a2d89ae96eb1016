from __future__ import annotations

import imagehash
import numpy as np
import pytest
from PIL import Image

from engine.core import rows
from engine.core.stage import Place
from engine.steps.embed import Hash


@pytest.mark.parametrize("channels", [1, 3])
def test_hashes_are_those_of_imagehash(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 20, 20, channels), dtype=np.uint8)
    pixels[:20, 5:, :9] //= 3
    pixels[0] = 7
    stage = Hash()
    stage.load(Place("cpu", 1, 64))
    pictures = (image[..., 0] if channels == 1 else image for image in pixels)
    expected = [str(imagehash.phash(Image.fromarray(picture))) for picture in pictures]
    assert stage({"pixels": pixels})[rows.PHASH] == expected
