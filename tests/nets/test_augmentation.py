from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.nets.augmentation import MOVES, Policy, by_policy, moved, policy_of

POLICIES = ("trivial_augment", "rand_augment", "auto_augment")


def pictures(count: int, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 12, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", POLICIES)
def test_policy_equals_kornia_on_each_image(name: Policy) -> None:
    images, policy = pictures(24), policy_of(name, 2, 9)
    alone = []
    for seed, image in enumerate(images):
        torch.manual_seed(seed)
        alone.append(policy(image[None]).clamp(0, 1))
    together = by_policy(images, range(24), policy)
    torch.testing.assert_close(together, torch.cat(alone).detach())
    # Each image has its own operations.
    assert len({tuple(image.flatten().tolist()) for image in together - images}) > 12


@pytest.mark.parametrize("channels", [1, 3])
def test_policy_leaves_images_generator_and_range_unchanged(channels: int) -> None:
    images = pictures(16, channels)
    before = images.clone()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    made = by_policy(images, range(16), policy_of("rand_augment", 3, 20))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(images, before)
    assert made.shape == images.shape
    assert 0 <= float(made.min()) <= float(made.max()) <= 1


def test_augmentations_that_are_off_change_nothing() -> None:
    images, draws = pictures(6), torch.rand(6, MOVES)
    assert torch.equal(moved(images, draws), images)
    bright = moved(images, draws, brightness=0.3)
    factors = 1 + (2 * draws[:, 6] - 1) * 0.3
    torch.testing.assert_close(bright, (images * factors.view(-1, 1, 1, 1)).clamp(0, 1))
    flipped = moved(images, torch.zeros(6, MOVES), horizontal_flip=True)
    assert torch.equal(flipped, images.flip(3))
    turned = moved(images, torch.ones(6, MOVES), rotate=90)
    close = [torch.allclose(turned, images.rot90(k, (2, 3)), atol=1e-5) for k in (1, 3)]
    assert sum(close) == 1
