"""Images as tensors, and tensors as images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Mean and standard deviation of ImageNet's channels, of values from 0 to 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalised(
    pixels: Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """uint8 (n, 1 or 3, height, width) to float32 (n, 3, *size), resized (bicubic, antialiased) and
    normalised on the device of the pixels."""
    import torch

    images = pixels.float().div_(255)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if tuple(images.shape[2:]) != tuple(size):
        images = torch.nn.functional.interpolate(
            images, size=size, mode="bicubic", antialias=True, align_corners=False
        ).clamp_(0, 1)
    center, scale = (
        torch.tensor(list(values), device=images.device).view(1, 3, 1, 1) for values in (mean, std)
    )
    return ((images - center) / scale).to(memory_format=torch.channels_last)


def seeded_noise(seeds: Sequence[int], *shape: int) -> Tensor:
    """Standard normal noise (n, *shape) on the CPU, one generator for each image: neighbours, batch
    size and device change no draw."""
    import torch

    return torch.stack(
        [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def to_pixels(images: Tensor) -> list[np.ndarray | str]:
    """Images (n, channels, height, width) in [-1, 1] as uint8 (height, width, channels) each;
    `not_finite` in place of an image that holds NaN or infinity."""
    import torch

    finite = images.isfinite().flatten(1).all(dim=1).tolist()
    scaled = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return [image if good else "not_finite" for image, good in zip(pixels, finite, strict=True)]


def or_black(images: Sequence[np.ndarray | str], shape: tuple[int, ...]) -> list[np.ndarray]:
    """Images for a sample grid: black of `shape` in place of a reason."""
    return [np.zeros(shape, np.uint8) if isinstance(image, str) else image for image in images]
