"""Augmentation of a batch on the device by kornia: small moves and changes of light, published
policies, and mixing.

Nothing here draws for itself: uniform draws or a seed are given for each image, so that how a batch
is cut among workers changes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# trivial_augment: one operation of any strength for each image (Mueller and Hutter 2021).
# rand_augment: several, of one strength (Cubuk et al. 2020). auto_augment: one of the pairs that
# were found for ImageNet (Cubuk et al. 2019).
Policy = Literal["trivial_augment", "rand_augment", "auto_augment"]
# Uniform draws of one image that `moved` reads.
MOVES = 9


def policy_of(name: Policy, num_ops: int, magnitude: int) -> Any:
    """kornia's module of a policy. num_ops and magnitude (1 to 29) are those of rand_augment."""
    from kornia.augmentation.auto import AutoAugment, RandAugment, TrivialAugment

    if name == "rand_augment":
        return RandAugment(n=num_ops, m=magnitude)
    return TrivialAugment() if name == "trivial_augment" else AutoAugment()


def by_policy(images: Tensor, seeds: Sequence[int], policy: Any) -> Tensor:
    """Images float (n, 1 or 3, height, width) in 0 to 1, each changed by operations of its own,
    which its seed draws.

    kornia draws one chain of operations for a whole batch, from torch's own generator. So each
    image draws by itself, and those that drew one operation pass it together.
    """
    import torch

    channels = images.shape[1]
    # Operations on colour know three channels alone, and leave grey as it is.
    made = images.expand(-1, 3, -1, -1).clone()
    shape = torch.Size((1, *made.shape[1:]))
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            # The generator of the CPU alone: dropout on a GPU draws on as before.
            torch.default_generator.manual_seed(seed)
            drawn.append(policy.forward_parameters(shape))
    with torch.no_grad():
        for chosen in zip(*drawn, strict=True):
            names = [item.name for item in chosen]
            for name in sorted(set(names)):
                rows = [row for row, found in enumerate(names) if found == name]
                params = _together([chosen[row].data for row in rows])
                made[rows] = policy.get_submodule(name)(made[rows], params=params)
    return (made if channels == 3 else made.mean(1, keepdim=True)).clamp_(0, 1)


def _together(drawn: Sequence[Sequence[Any]]) -> list[Any]:
    """Parameters that images drew for the same operations, as those of one batch."""
    import torch
    from kornia.augmentation.container.params import ParamItem

    joined = []
    for items in zip(*drawn, strict=True):
        first = items[0]
        data = {name: torch.cat([item.data[name] for item in items]) for name in first.data}
        shape = first.data["forward_input_shape"].clone()
        shape[0] = len(items)
        joined.append(ParamItem(first.name, {**data, "forward_input_shape": shape}))
    return joined


def moved(
    images: Tensor,
    draws: Tensor,
    *,
    translate: float = 0.0,
    scale: float = 0.0,
    rotate: float = 0.0,
    horizontal_flip: bool = False,
    vertical_flip: bool = False,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
) -> Tensor:
    """Images float (n, 1 or 3, height, width) in 0 to 1, moved and lit by uniform draws in [0, 1)
    (n, `MOVES`).

    translate: shares of the sides, at most. rotate: degrees to either side, at most. Scales and
    factors of light lie between 1 - x and 1 + x. Switching one off changes no other.
    """
    import torch
    from kornia.enhance import adjust_contrast_with_mean_subtraction, adjust_saturation
    from kornia.geometry.transform import get_affine_matrix2d, warp_affine

    count, _, height, width = images.shape
    signed = draws * 2 - 1
    for allowed, draw, axis in ((horizontal_flip, 3, 3), (vertical_flip, 4, 2)):
        if allowed:
            chosen = (draws[:, draw] < 0.5).view(-1, 1, 1, 1)
            images = torch.where(chosen, images.flip(axis), images)
    if translate or scale or rotate:
        sides = torch.tensor([width, height], device=images.device)
        matrix = get_affine_matrix2d(
            translations=signed[:, :2] * translate * sides,
            center=((sides - 1) / 2).expand(count, 2),
            scale=(1 + signed[:, 2:3] * scale).expand(-1, 2),
            angle=signed[:, 5] * rotate,
        )[:, :2]
        images = warp_affine(
            images, matrix, (height, width), padding_mode="border", align_corners=True
        )
    if brightness:
        images = (images * (1 + signed[:, 6] * brightness).view(-1, 1, 1, 1)).clamp(0, 1)
    if contrast:
        images = adjust_contrast_with_mean_subtraction(images, 1 + signed[:, 7] * contrast)
    if saturation and images.shape[1] == 3:
        images = adjust_saturation(images, 1 + signed[:, 8] * saturation)
    return images


@dataclass(frozen=True)
class Mixing:
    """How a batch is mixed with another. share: of the first; corner: of the box that cutmix takes
    from the other, as shares of the room that it leaves; None for mixup."""

    share: float
    corner: tuple[float, float] | None

    def mix(self, images: Tensor, others: Tensor) -> tuple[Tensor, float]:
        """Images (n, channels, height, width) mixed, or, by mixup, vectors (n, width); and the
        share that the first ones have."""
        if self.corner is None:
            return others.float().lerp(images.float(), self.share), self.share
        height, width = images.shape[2:]
        side = (1 - self.share) ** 0.5
        rows, columns = round(side * height), round(side * width)
        top = round(self.corner[0] * (height - rows))
        left = round(self.corner[1] * (width - columns))
        made = images.clone()
        box = (..., slice(top, top + rows), slice(left, left + columns))
        made[box] = others[box].to(made.dtype)
        return made, 1 - rows * columns / (height * width)


def draw_mixing(
    mixup_alpha: float, cutmix_alpha: float, random: np.random.Generator
) -> Mixing | None:
    """How a step mixes its batch, by Beta(alpha, alpha), or None where both are 0. With both, each
    step takes one."""
    alphas = [mixup_alpha, cutmix_alpha]
    chosen = [kind for kind, alpha in enumerate(alphas) if alpha]
    if not chosen:
        return None
    kind = chosen[int(random.integers(len(chosen)))]
    share = float(random.beta(alphas[kind], alphas[kind]))
    first, second = random.random(2)
    return Mixing(share, (float(first), float(second)) if kind else None)
