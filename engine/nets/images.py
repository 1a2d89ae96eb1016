"""Images as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Of each channel, from 0 to 1, over ImageNet.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalised(
    pixels: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """uint8 (n, 1 or 3, height, width) to float32 (n, 3, *size), resized (bicubic, antialiased) and
    normalised where the pixels lie."""
    import torch

    images = pixels.float().div_(255)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[2:]) != tuple(size):
        images = torch.nn.functional.interpolate(
            images, size=size, mode="bicubic", antialias=True, align_corners=False
        ).clamp_(0, 1)
    center, scale = (
        torch.tensor(list(v), device=images.device).view(1, 3, 1, 1) for v in (mean, std)
    )
    return ((images - center) / scale).to(memory_format=torch.channels_last)
