"""Near duplicates in a whole index: few images, large groups, and copies of equal images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.core import rows
from engine.data.dataset import resolve_leaks
from engine.data.images import Preprocess, preprocess
from engine.data.leaks import find_leaks
from engine.data.near_duplicates import thumbnail
from engine.stages.intake import Near, find_near
from tests.data.test_near_duplicates import crop, scene

CLOTHING = Path(__file__).parents[3] / "shared" / "data" / "clothing"


def index(
    count: int,
    groups: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    digests: Sequence[str] | None = None,
) -> pa.Table:
    """Default ids and groups are 0, 1, …; all images are in train, and none are equal."""
    own = [str(number) for number in range(count)]
    return pa.table(
        {
            rows.IMAGE_ID: own, rows.URI: own, rows.label_column("class"): ["a"] * count,
            rows.GROUP_ID: groups or own, rows.SPLIT: splits or ["train"] * count,
            rows.PIXEL_SHA256: digests or own,
        }
    )  # fmt: skip


def arrays(images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of 12 by 12 pixels, and thumbnails."""
    spec = Preprocess.model_validate({"size": 64, "fit": "pad"})
    pixels = [preprocess(image, spec) for image in images]
    small = [thumbnail(held, *image.size, True).ravel()
             for held, image in zip(pixels, images, strict=True)]  # fmt: skip
    vectors = [np.asarray(Image.fromarray(held).resize((12, 12)), np.float32) for held in pixels]
    return np.stack([held.ravel() - held.mean() for held in vectors]), np.stack(small)


def near(table: pa.Table, images: Sequence[Image.Image]) -> Near:
    return find_near(table, "class", *arrays(images), 1e-4, 0, small_side=None)


def pairs(found: Near) -> set[tuple[int, ...]]:
    return {tuple(sorted(pair)) for pair in found.pairs.tolist()}


@pytest.mark.skipif(not CLOTHING.is_dir(), reason=f"no photographs in {CLOTHING}")
def test_few_clean_photographs_have_no_near_duplicates() -> None:
    files = sorted(CLOTHING.rglob("*.jpg"))
    chosen = np.random.default_rng(0).permutation(len(files))[:300]
    vectors, small = arrays([Image.open(files[number]).convert("RGB") for number in chosen])
    for count in (20, 30, 50):
        for draw in range(20):
            sample = np.random.default_rng([count, draw]).permutation(300)[:count]
            found = find_near(
                index(count), "class", vectors[sample], small[sample], 1e-4, draw, small_side=None
            )
            assert pairs(found) == set(), (count, draw)


def test_crop_in_another_group_is_found_behind_many_frames_of_its_own() -> None:
    # 15 frames each of twelve films: frames are far more similar than a crop is to its original.
    random = np.random.default_rng(0)

    def frame(film: int) -> Image.Image:
        shot = np.asarray(scene(film), float)
        return Image.fromarray((shot + random.normal(0, 3, shot.shape)).clip(0, 255).astype("u1"))

    films = [film for film in range(12) for _ in range(15)]
    images = [*map(frame, films), crop(frame(3), 1), crop(frame(7), 2)]
    groups = [*(f"film {film}" for film in films), "a crop", "another"]
    found = pairs(near(index(len(images), groups), images))
    assert {first // 15 for first, second in found if second == 180} == {3}
    assert {first // 15 for first, second in found if second == 181} == {7}
    assert all(groups[a] == groups[b] for a, b in found if b < 180)


def test_finding_applies_to_equal_images_in_other_splits() -> None:
    scenes = [scene(number) for number in range(24)]
    # 24 is 0 in val; 25 is a crop of it in train.
    table = index(
        26, splits=["train"] * 24 + ["val", "train"],
        digests=[*(str(number) for number in range(24)), "0", "crop"],
    )  # fmt: skip
    found = near(table, [*scenes, scenes[0], crop(scenes[0], 1)])
    assert pairs(found) == {(0, 25), (24, 25)}
    named = [(str(a), str(b), 1.0) for a, b in found.pairs.tolist()]
    mended, leaks = resolve_leaks(table, find_leaks(table, named), named, "drop", {})
    assert {(leak.kind, leak.first) for leak in leaks} == {("exact", "0"), ("near", "25")}
    assert not {"0", "25"} & set(mended[rows.IMAGE_ID].to_pylist())
