"""Differentiable augmentation of a discriminator's images (Zhao et al. 2020).

Real and generated images are recoloured, moved and cut in the same way, and gradients flow back
through this: the discriminator cannot memorise a small train split, and the generator does not
learn to make augmented images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Uniform draws of one image: whether to augment, brightness, saturation, contrast, translation (2),
# centre of the cutout (2).
DRAWS = 8
# Shares of the side: the largest translation, and the cutout.
_MOVED = 0.125
_CUT = 0.5


def diffaugment(images: Tensor, draws: np.ndarray, share: float) -> Tensor:
    """Augment a share of the images (n, channels, height, width), by uniform draws in [0, 1)
    (n, `DRAWS`)."""
    import torch

    drawn = torch.from_numpy(draws).to(images)
    chosen = (drawn[:, 0] < share).view(-1, 1, 1, 1)
    augmented = _moved(_recoloured(images, drawn[:, 1:4]), drawn[:, 4:6])
    augmented = augmented * _kept(augmented, drawn[:, 6:8])
    return torch.where(chosen, augmented, images)


def _recoloured(images: Tensor, drawn: Tensor) -> Tensor:
    brightness, saturation, contrast = (value.view(-1, 1, 1, 1) for value in drawn.unbind(1))
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _moved(images: Tensor, drawn: Tensor) -> Tensor:
    """Move by whole pixels, up to an eighth of the side; the uncovered border is grey."""
    import torch

    count, _, height, width = images.shape
    reach = torch.tensor([round(_MOVED * height), round(_MOVED * width)], device=images.device)
    shift = (drawn * (2 * reach + 1)).floor().long() - reach
    rows = torch.arange(height, device=images.device)[None] + shift[:, :1]
    columns = torch.arange(width, device=images.device)[None] + shift[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[
        :, None, :
    ]
    number = torch.arange(count, device=images.device)[:, None, None]
    taken = images.permute(0, 2, 3, 1)[
        number, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]
    return (taken * inside[..., None]).permute(0, 3, 1, 2)


def _kept(images: Tensor, drawn: Tensor) -> Tensor:
    """(n, 1, height, width): 0 in a square of half the side, 1 elsewhere."""
    import torch

    height, width = images.shape[2:]
    middle = drawn * torch.tensor([height, width], device=images.device)
    rows = (torch.arange(height, device=images.device)[None] - middle[:, :1]).abs()
    columns = (torch.arange(width, device=images.device)[None] - middle[:, 1:]).abs()
    cut = (rows < _CUT * height / 2)[:, :, None] & (columns < _CUT * width / 2)[:, None, :]
    return (~cut)[:, None].to(images)
