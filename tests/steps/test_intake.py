"""Near duplicates of a whole index: few pictures, large groups, and copies of equal pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.core import rows
from engine.core.images import Preprocess, preprocess
from engine.core.near import thumbnail
from engine.steps._intake import Near, find_near

CLOTHING = Path(__file__).parents[3] / "shared" / "data" / "clothing"


def index(
    count: int,
    groups: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    digests: Sequence[str] | None = None,
) -> pa.Table:
    """Ids and, where they are not given, groups are 0, 1, …; all of train, none equal."""
    own = [str(number) for number in range(count)]
    return pa.table(
        {
            rows.IMAGE_ID: own, rows.URI: own, rows.label_column("class"): ["a"] * count,
            rows.GROUP_ID: groups or own, rows.SPLIT: splits or ["train"] * count,
            rows.PIXEL_SHA256: digests or own,
        }
    )  # fmt: skip


def arrays(images: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors, of 12 by 12 pixels, and thumbnails."""
    spec = Preprocess.model_validate({"size": 64, "fit": "pad"})
    pixels = [preprocess(image, spec) for image in images]
    small = [thumbnail(held, *image.size, True).ravel()
             for held, image in zip(pixels, images, strict=True)]  # fmt: skip
    vectors = [np.asarray(Image.fromarray(held).resize((12, 12)), np.float32) for held in pixels]
    return np.stack([held.ravel() - held.mean() for held in vectors]), np.stack(small)


def near(table: pa.Table, images: Sequence[Image.Image]) -> Near:
    return find_near(table, *arrays(images), 1e-4, 0)


def pairs(found: Near) -> set[tuple[int, ...]]:
    return {tuple(sorted(pair)) for pair in found.pairs.tolist()}


@pytest.mark.skipif(not CLOTHING.is_dir(), reason=f"no photographs in {CLOTHING}")
def test_of_a_few_clean_photographs_none_is_accused() -> None:
    files = sorted(CLOTHING.rglob("*.jpg"))
    chosen = np.random.default_rng(0).permutation(len(files))[:300]
    vectors, small = arrays([Image.open(files[number]).convert("RGB") for number in chosen])
    for count in (20, 30, 50):
        for draw in range(20):
            held = np.random.default_rng([count, draw]).permutation(300)[:count]
            found = find_near(index(count), vectors[held], small[held], 1e-4, draw)
            assert pairs(found) == set(), (count, draw)
