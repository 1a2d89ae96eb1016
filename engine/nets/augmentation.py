"""Augmentation of a batch on the device by kornia: small geometric and photometric changes,
published policies, and mixing.

The caller passes uniform draws or a seed for each image, so that the division of a batch among
workers changes no draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# trivial_augment: one operation of any strength for each image (Mueller and Hutter 2021).
# rand_augment: several of one strength (Cubuk et al. 2020). auto_augment: a pair of operations from
# the policy learnt on ImageNet (Cubuk et al. 2019).
Policy = Literal["trivial_augment", "rand_augment", "auto_augment"]
# Uniform draws that `moved` reads for each image.
MOVES = 9


def policy_of(name: Policy, num_ops: int, magnitude: int) -> Any:
    """kornia's module of a policy. num_ops and magnitude (1 to 29) belong to rand_augment."""
    from kornia.augmentation.auto import AutoAugment, RandAugment, TrivialAugment

    if name == "rand_augment":
        return RandAugment(n=num_ops, m=magnitude)
    return TrivialAugment() if name == "trivial_augment" else AutoAugment()


def by_policy(images: Tensor, seeds: Sequence[int], policy: Any) -> Tensor:
    """Images float (n, 1 or 3, height, width) in 0 to 1, each changed by the operations that its
    seed draws.

    kornia draws one chain of operations for a whole batch, from torch's own generator. So each
    image draws separately, and images with the same operation pass it together.
    """
    import torch

    channels = images.shape[1]
    # Operations on colour need three channels, and leave grey unchanged.
    changed = images.expand(-1, 3, -1, -1).clone()
    shape = torch.Size((1, *changed.shape[1:]))
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            # Only the generator of the CPU: dropout on a GPU draws as before.
            torch.default_generator.manual_seed(seed)
            drawn.append(policy.forward_parameters(shape))
    with torch.no_grad():
        for chosen in zip(*drawn, strict=True):
            names = [item.name for item in chosen]
            for name in sorted(set(names)):
                rows = [row for row, drawn_name in enumerate(names) if drawn_name == name]
                params = _joined([chosen[row].data for row in rows])
                changed[rows] = policy.get_submodule(name)(changed[rows], params=params)
    return (changed if channels == 3 else changed.mean(1, keepdim=True)).clamp_(0, 1)


def _joined(drawn: Sequence[Sequence[Any]]) -> list[Any]:
    """The parameters that images drew for the same operations, as those of one batch."""
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


def cropped(
    images: Tensor, random: np.random.Generator, count: int, piece: slice, border: int, flip: bool
) -> Tensor:
    """Images (n, channels, height, width), padded by `border` and cropped back; with `flip` half of
    them are mirrored. They are the slice `piece` of a batch of `count`; `random` draws for the
    whole batch."""
    from torch.nn.functional import pad

    height, width = images.shape[2:]
    corners = random.integers(0, 2 * border + 1, (count, 2))[piece]
    mirrored = random.random(count)[piece] < 0.5
    padded = pad(images.float(), [border] * 4, mode="replicate") if border else images
    result = padded.new_empty(images.shape)
    for row, (top, left) in enumerate(corners):
        crop = padded[row, :, top : top + height, left : left + width]
        result[row] = crop.flip(-1) if flip and mirrored[row] else crop
    return result


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
    """Images float (n, 1 or 3, height, width) in 0 to 1, changed by uniform draws in [0, 1)
    (n, `MOVES`).

    translate: at most this share of the sides. rotate: at most these degrees to either side. scale
    and the photometric factors lie between 1 - x and 1 + x. Switching one change off alters no
    other.
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
    """How a batch is mixed with its partners. share: of the batch itself. corner: of the box that
    cutmix takes from the partners, as shares of the free space; None for mixup."""

    share: float
    corner: tuple[float, float] | None

    def mix(self, images: Tensor, partners: Tensor) -> tuple[Tensor, float]:
        """Mixed images (n, channels, height, width), or vectors (n, width) for mixup, and the exact
        share of `images`."""
        if self.corner is None:
            return partners.float().lerp(images.float(), self.share), self.share
        height, width = images.shape[2:]
        side = (1 - self.share) ** 0.5
        rows, columns = round(side * height), round(side * width)
        top = round(self.corner[0] * (height - rows))
        left = round(self.corner[1] * (width - columns))
        mixed = images.clone()
        box = (..., slice(top, top + rows), slice(left, left + columns))
        mixed[box] = partners[box].to(mixed.dtype)
        return mixed, 1 - rows * columns / (height * width)


def draw_mixing(
    mixup_alpha: float, cutmix_alpha: float, random: np.random.Generator
) -> Mixing | None:
    """How a step mixes its batch, by Beta(alpha, alpha), or None if both are 0. With both, each
    step draws one."""
    alphas = [mixup_alpha, cutmix_alpha]
    kinds = [kind for kind, alpha in enumerate(alphas) if alpha]
    if not kinds:
        return None
    kind = kinds[int(random.integers(len(kinds)))]
    share = float(random.beta(alphas[kind], alphas[kind]))
    first, second = random.random(2)
    return Mixing(share, (float(first), float(second)) if kind else None)
