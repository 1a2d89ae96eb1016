from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.data.images import Preprocess
from engine.generators import SampleBatch, TrainingRows
from engine.generators.traditional import Traditional, TraditionalSpec

PREPROCESS = Preprocess(size=16)
STILL = {"translate": 0.0, "scale": 0.0, "brightness": 0.0, "contrast": 0.0}


def parents(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(40, 200, (count, 16, 16, 3), dtype=np.uint8)


def sample(pixels: np.ndarray, seeds: list[int], **fields: Any) -> np.ndarray:
    generator = Traditional(TraditionalSpec(**fields), PREPROCESS)
    generator.load(None, "cpu")
    nothing = [None] * len(seeds)
    made = SampleBatch(
        ["a"] * len(seeds), nothing, nothing, nothing, nothing, nothing, seeds, pixels
    )
    return np.stack(generator.sample(made))


def test_parent_is_returned_if_everything_is_off() -> None:
    pixels = parents(3)
    assert np.abs(sample(pixels, [1, 2, 3], **STILL).astype(int) - pixels).max() <= 1


def test_defaults_change_every_image_a_little_and_flip_none() -> None:
    pixels = np.repeat(np.linspace(40, 200, 16, dtype=np.uint8)[None, None, :, None], 16, 1)
    pixels = np.repeat(np.repeat(pixels, 3, 3), 20, 0)
    made = sample(pixels, list(range(20)))
    assert all(not np.array_equal(image, pixels[0]) for image in made)
    # Bright on the right before and after: not mirrored.
    assert (made[:, :, 12:].mean(axis=(1, 2, 3)) > made[:, :, :4].mean(axis=(1, 2, 3))).all()


def test_allowed_flips_affect_about_half_of_the_images() -> None:
    pixels = np.repeat(parents(1), 60, axis=0)
    made = sample(pixels, list(range(60)), horizontal_flip=True, **STILL)
    mirrored = [np.abs(image.astype(int) - pixels[0][:, ::-1]).max() <= 1 for image in made]
    assert 15 <= sum(mirrored) <= 45


def test_row_depends_only_on_its_seed_and_parent() -> None:
    pixels = parents(4)
    together = sample(pixels, [5, 6, 7, 8], rotate=20)
    alone = sample(pixels[2:3], [7], rotate=20)
    assert np.array_equal(together[2], alone[0])


def test_brightness_does_not_move_pixels() -> None:
    pixels = parents(2)
    plain = sample(pixels, [1, 2], **{**STILL, "translate": 0.2})
    bright = sample(pixels, [1, 2], **{**STILL, "translate": 0.2, "brightness": 0.3})
    same = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(plain, bright, strict=True)]
    assert min(same) > 0.99


def test_larger_plan_extends_a_smaller_one_and_uses_parents_equally() -> None:
    generator = Traditional(TraditionalSpec(), PREPROCESS)
    train = TrainingRows([f"p{n}" for n in range(7)], [0] * 7)
    small = list(generator.plan("a", 5, train, seed=1))
    large = list(generator.plan("a", 21, train, seed=1))
    assert large[:5] == small
    uses = [entry.parent_id for entry in large]
    assert all(uses.count(parent) == 3 for parent in train.image_ids)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment", "augmix"])
@pytest.mark.parametrize("channels", [1, 3])
def test_policy_row_depends_only_on_its_seed_and_parent(policy: str, channels: int) -> None:
    pixels = parents(12)[..., :channels]
    seeds = list(range(12))
    together = sample(pixels, seeds, policy=policy)
    again = sample(pixels[::-1], seeds[::-1], policy=policy)[::-1]
    assert np.array_equal(together, again)
    assert together.shape == pixels.shape
    changed = [not np.array_equal(*pair) for pair in zip(together, pixels, strict=True)]
    assert sum(changed) >= 9
    other = sample(pixels, [seed + 100 for seed in seeds], policy=policy)
    assert not np.array_equal(together, other)


def test_policy_does_not_use_global_random_state() -> None:
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    sample(parents(2), [1, 2], policy="randaugment")
    assert torch.equal(torch.rand(1), first)


def test_contrast_keeps_the_mean() -> None:
    pixels = np.repeat(parents(1), 20, axis=0)
    made = sample(pixels, list(range(20)), **{**STILL, "contrast": 0.4}).astype(float)
    means, spreads = made.mean(axis=(1, 2, 3)), made.std(axis=(1, 2, 3))
    assert np.abs(means - pixels[0].mean()).max() < 3
    assert spreads.min() < 0.8 * pixels[0].std() < 1.1 * pixels[0].std() < spreads.max()
