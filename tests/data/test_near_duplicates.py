"""Copies that were cropped and encoded again are distinguished from merely similar images."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from engine.data.images import Preprocess, preprocess
from engine.data.near_duplicates import (
    SIDE,
    NearLimit,
    calibrate,
    match,
    match_finely,
    near_pairs,
    thumbnail,
)


def scene(number: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    coarse = np.random.default_rng([9, number]).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def crop(image: Image.Image, number: int) -> Image.Image:
    """A further crop of 3% to 10% of each side, saved as JPEG of quality 60."""
    left, top, right, bottom = np.random.default_rng(number).uniform(0.03, 0.1, 4)
    width, height = image.size
    box = (left * width, top * height, width - right * width, height - bottom * height)
    target = io.BytesIO()
    image.crop(tuple(round(edge) for edge in box)).save(target, "JPEG", quality=60)
    return Image.open(target).convert("RGB")


def small(images: Sequence[Image.Image], fit: str = "crop") -> np.ndarray:
    spec = Preprocess.model_validate({"size": 64, "fit": fit})
    return np.stack(
        [thumbnail(preprocess(image, spec), *image.size, fit == "pad") for image in images]
    )


def every_pair(count: int) -> np.ndarray:
    return np.stack(np.triu_indices(count, 1), 1)


def look(pictures: np.ndarray, groups: np.ndarray | None = None) -> tuple[set, NearLimit]:
    """The near duplicates among all pairs, and the limit."""
    matched = match(pictures, every_pair(len(pictures)))
    names = np.arange(len(pictures)) if groups is None else groups
    limit = calibrate(pictures, matched, names, 1e-4, 0)
    return {tuple(pair) for pair in near_pairs(pictures, matched, limit)[0].tolist()}, limit


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_only_planted_crops_are_found(fit: str) -> None:
    # Copies, a third of the images, do not influence the limit.
    scenes = [scene(number, (96, 72)) for number in range(20)]
    copies = [crop(scenes[number], number) for number in range(4)]
    found, limit = look(small([*scenes, *copies], fit))
    assert found == {(number, 20 + number) for number in range(4)}
    assert limit.different < limit.copies


@pytest.mark.parametrize("count", [10, 15, 30])
def test_copies_are_found_at_any_share_of_copied_images(count: int) -> None:
    scenes = [scene(number) for number in range(30)]
    copies = [crop(scenes[number], number) for number in range(count)]
    found, limit = look(small([*scenes, *copies]))
    assert found == {(number, 30 + number) for number in range(count)}
    assert limit.different < limit.copies


def test_several_copies_of_each_image_are_found() -> None:
    scenes = [scene(number) for number in range(12)]
    copies = [crop(image, 3 * number + n) for n in range(3) for number, image in enumerate(scenes)]
    found, _ = look(small([*scenes, *copies]))
    assert {(number, 12 * n + number) for n in (1, 2, 3) for number in range(12)} <= found
    assert all(first % 12 == second % 12 for first, second in found)


def test_similar_images_of_one_group_do_not_set_the_limit() -> None:
    scenes = [scene(number // 2) for number in range(30)]
    bursts = [image if number % 2 else crop(image, number) for number, image in enumerate(scenes)]
    groups = np.arange(30) // 2
    found, limit = look(small(bursts), groups)
    assert limit.different < 0.9
    assert {(number, number + 1) for number in range(0, 30, 2)} <= found


def test_uniformly_similar_images_have_no_copies() -> None:
    same, random = np.asarray(scene(1)).astype(float), np.random.default_rng(0)
    noisy = [
        Image.fromarray((same + random.normal(0, 4, same.shape)).clip(0, 255).astype(np.uint8))
        for _ in range(12)
    ]
    found, limit = look(small(noisy))
    assert limit.fine is None
    assert found == set()


def test_agreement_is_independent_of_which_image_is_the_crop() -> None:
    pictures = small([scene(3), crop(scene(3), 1), scene(4)])
    pairs = np.array([[0, 1], [1, 0], [0, 2]])
    agreement = match_finely(pictures, match(pictures, pairs))
    assert agreement[0] == pytest.approx(agreement[1])
    assert agreement[0] > 0.9 > agreement[2]


def test_thumbnail_excludes_padding() -> None:
    white = Image.new("RGB", (100, 37), "white")
    for image in (white, white.rotate(90, expand=True)):
        assert small([image], "pad").min() == 255
    assert small([white], "pad").shape == (1, SIDE, SIDE)


def test_uniform_images_match_nothing() -> None:
    pictures = small([Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")])
    assert match_finely(pictures, match(pictures, np.array([[0, 1]])))[0] < 0.5


def test_pairs_of_a_single_group_give_no_limit() -> None:
    pictures = small([scene(number) for number in range(4)])
    found, limit = look(pictures, np.zeros(4, int))
    assert found == set()
    assert limit.fine is None
