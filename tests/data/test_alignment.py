"""What remains after an overlay distinguishes copies from pictures that look alike."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from engine.data.alignment import SAME, differences, overlaid_differences, same_in_place
from engine.data.near_duplicates import match, same_pictures

SIDE = 64
PAIR = np.array([[0, 1]])


def film(number: int, change: float) -> np.ndarray:
    """A smooth scene that all share, with details of its own whose weight is `change`."""
    shared = np.random.default_rng(1).normal(size=(6, 6))
    own = np.random.default_rng([2, number]).normal(size=(16, 16))
    layers = [
        np.asarray(Image.fromarray(part.astype(np.float32)).resize((128, 128)))
        for part in (shared, own)
    ]
    return (128 + 40 * layers[0] + 40 * change * layers[1]).clip(0, 255).astype(np.uint8)


def small(image: np.ndarray | Image.Image) -> np.ndarray:
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def encoded(image: np.ndarray, quality: int, margin: int = 0) -> np.ndarray:
    height, width = image.shape
    target = io.BytesIO()
    cropped = Image.fromarray(image).crop((margin, margin, width - margin, height - margin))
    cropped.save(target, "JPEG", quality=quality)
    return small(Image.open(target))


@pytest.mark.parametrize("quality", [50, 95])
def test_a_new_encoding_differs_by_less_than_a_picture_that_looks_alike(quality: int) -> None:
    image = film(0, 0.4)
    pictures = np.stack([small(image), encoded(image, quality), small(film(1, 0.4))])
    copy, other = differences(pictures, np.array([[0, 1], [0, 2]]))
    assert copy < same_in_place(28) / 2
    assert other > 2 * SAME


def test_a_crop_is_found_by_overlay_alone() -> None:
    image = film(0, 0.4)
    pictures = np.stack([small(image), encoded(image, 80, margin=3)])
    assert differences(pictures, PAIR)[0] > SAME
    # It begins 2% away from the true window.
    start = np.full((1, 4), 3 / 128 + 0.02)
    assert overlaid_differences(pictures, PAIR, start)[0] < SAME / 2


def test_pictures_that_look_alike_stay_apart_after_overlay() -> None:
    pictures = np.stack([small(film(number, 0.3)) for number in range(20)])
    pairs = np.stack(np.triu_indices(20, 1), 1)
    assert len(same_pictures(pictures, match(pictures, pairs))[0]) == 0


def test_brightness_does_not_matter_and_plain_pictures_are_never_the_same() -> None:
    image = small(film(0, 0.4))
    darker = (image * 0.85).astype(np.uint8)
    plain = (120 + np.random.default_rng(0).normal(0, 1, (2, SIDE, SIDE))).astype(np.uint8)
    pictures = np.stack([image, darker, *plain])
    same, different = differences(pictures, np.array([[0, 1], [2, 3]]))
    assert same < 0.02
    assert np.isinf(different)


def test_crops_are_not_searched_for_in_place() -> None:
    image = film(0, 0.4)
    pictures = np.stack([small(image), encoded(image, 90), encoded(image, 90, margin=5)])
    pairs = np.stack(np.triu_indices(3, 1), 1)
    matched = match(pictures, pairs)
    in_place, _ = same_pictures(pictures, matched, small_side=28)
    assert in_place.tolist() == [[0, 1]]
    overlaid, agreement = same_pictures(pictures, matched)
    assert overlaid.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert (agreement > 0.995).all()


def test_small_pictures_must_be_more_alike() -> None:
    assert same_in_place(28) == same_in_place(24) == pytest.approx(0.075)
    assert same_in_place(16) == pytest.approx(0.05)
