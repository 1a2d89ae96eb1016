"""The networks of progressive growing (Karras et al. 2018), conditional on a class.

Both begin at 4 px and double: a new level is faded in, then trained by itself. Equalised learning
rate, pixelwise normalisation and the deviation over a minibatch are as published. The class is a
learnt vector beside the latents and as long as they are; as in the authors' conditional networks,
the discriminator says which class it sees (Odena et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, interpolate, leaky_relu, linear

if TYPE_CHECKING:
    from torch import Tensor

# Level and, while it is faded in, the share of the new layers, at a step.
Schedule = Callable[[int], tuple[int, float]]
_GROUP = 4  # images whose deviation is taken together


def growth(train_steps: int, levels: int, last_share: float) -> Schedule:
    """When which level is trained.

    The last level has `last_share` of the steps, the others equal parts of the rest; the first half
    of a level's steps fades it in, but for the first level's.
    """
    early = round(train_steps * (1 - last_share) / max(levels - 1, 1)) if levels > 1 else 0

    def at(step: int) -> tuple[int, float]:
        level = min(step // early, levels - 1) if early else levels - 1
        length = early if level < levels - 1 else train_steps - early * (levels - 1)
        into = step - early * level
        if level == 0:
            return 0, 1.0
        return level, min(1.0, (into + 1) / max(1, length // 2))

    return at


class Growing(nn.Module):
    """A network at a level: the last one, faded in, unless a schedule says another."""

    def __init__(self, levels: int, schedule: Schedule | None) -> None:
        super().__init__()
        self.schedule = schedule
        self.level, self.share = levels - 1, 1.0

    def stage(self, step: int) -> None:
        """Take the level that the schedule has for a step."""
        if self.schedule is not None:
            self.level, self.share = self.schedule(step)

    def at_stage(self, images: Tensor) -> Tensor:
        """Images of full size as this stage sees them: shrunk, and faded like the network."""
        side = 4 * 2**self.level
        small = avg_pool2d(images, images.shape[-1] // side)
        if self.share == 1:
            return small
        return _doubled(avg_pool2d(small, 2)).lerp(small, self.share)


class Generator(Growing):
    """Latents (n, latent_dim) and classes (n,) to images (n, channels, side, side), the side being
    4 · 2^level px."""

    def __init__(
        self, latent_dim: int, classes: int, width: int, max_width: int, levels: int,
        channels: int, schedule: Schedule | None = None,
    ) -> None:  # fmt: skip
        super().__init__(levels, schedule)
        widths = level_widths(width, max_width, levels)
        # As strong as the latents from the first step: a one-hot vector would be lost among them.
        self.known = nn.Parameter(torch.randn(classes, latent_dim))
        self.first = Linear(2 * latent_dim, widths[0] * 16, gain=2**0.5 / 4)
        self.blocks = nn.ModuleList(
            nn.ModuleList([Conv(one, other, 3), Conv(other, other, 3)])
            for one, other in zip([widths[0], *widths], widths, strict=False)
        )
        self.to_image = nn.ModuleList(Conv(width, channels, 1, gain=1.0) for width in widths)

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        given = torch.cat([_normalised(latents), _normalised(self.known[classes])], 1)
        maps = self.first(given).view(len(latents), -1, 4, 4)
        maps = _normalised(leaky_relu(maps, 0.2))
        before = maps
        for level in range(self.level + 1):
            one, other = self.blocks[level]
            before = maps
            # At 4 px the latents' own layer stands for the first convolution.
            if level:
                maps = _normalised(leaky_relu(one(_doubled(maps)), 0.2))
            maps = _normalised(leaky_relu(other(maps), 0.2))
        images: Tensor = self.to_image[self.level](maps)
        if self.share < 1 and self.level:
            old = _doubled(self.to_image[self.level - 1](before))
            images = old.lerp(images, self.share)
        return images


class Discriminator(Growing):
    """Images of the stage's size and classes (n,) to scores (n,) and the cross-entropy (n,) of the
    class that is seen."""

    group = _GROUP

    def __init__(
        self, classes: int, width: int, max_width: int, levels: int, channels: int,
        schedule: Schedule | None = None,
    ) -> None:  # fmt: skip
        super().__init__(levels, schedule)
        widths = level_widths(width, max_width, levels)
        self.from_image = nn.ModuleList(Conv(channels, width, 1) for width in widths)
        self.blocks = nn.ModuleList(
            nn.ModuleList([Conv(width, width, 3), Conv(width, smaller, 3)])
            for width, smaller in zip(widths[1:], widths, strict=False)
        )
        self.deviating = Conv(widths[0] + 1, widths[0], 3)
        self.features = Linear(widths[0] * 16, widths[0])
        self.last = Linear(widths[0], 1, gain=1.0)
        self.seen = Linear(widths[0], classes, gain=1.0)

    def forward(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        maps = leaky_relu(self.from_image[self.level](images), 0.2)
        for level in range(self.level, 0, -1):
            one, other = self.blocks[level - 1]
            maps = avg_pool2d(leaky_relu(other(leaky_relu(one(maps), 0.2)), 0.2), 2)
            if level == self.level and self.share < 1:
                old = leaky_relu(self.from_image[level - 1](avg_pool2d(images, 2)), 0.2)
                maps = old.lerp(maps, self.share)
        maps = leaky_relu(self.deviating(torch.cat([maps, _deviation(maps)], 1)), 0.2)
        features = leaky_relu(self.features(maps.flatten(1)), 0.2)
        misread = cross_entropy(self.seen(features), classes, reduction="none")
        return self.last(features).squeeze(1), misread


class Conv(nn.Module):
    """A convolution whose weights are drawn with a deviation of 1 and scaled when they are used
    (He's constant), so that every layer learns at one pace."""

    def __init__(self, one: int, other: int, side: int, gain: float = 2**0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(other, one, side, side))
        self.bias = nn.Parameter(torch.zeros(other))
        self.scale = gain / (one * side * side) ** 0.5
        self.padding = side // 2

    def forward(self, maps: Tensor) -> Tensor:
        return conv2d(maps, self.weight * self.scale, self.bias, padding=self.padding)


class Linear(nn.Module):
    """As `Conv`, of vectors."""

    def __init__(self, one: int, other: int, gain: float = 2**0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(other, one))
        self.bias = nn.Parameter(torch.zeros(other))
        self.scale = gain / one**0.5

    def forward(self, vectors: Tensor) -> Tensor:
        return linear(vectors, self.weight * self.scale, self.bias)


def level_widths(width: int, max_width: int, levels: int) -> list[int]:
    """Channels at each level, from 4 px up: `width` at the last, twice as many at each before."""
    return [min(max_width, width * 2 ** (levels - 1 - level)) for level in range(levels)]


def _doubled(maps: Tensor) -> Tensor:
    return interpolate(maps, scale_factor=2, mode="nearest")


def _normalised(maps: Tensor) -> Tensor:
    """Each pixel's (or latent's) vector of channels at a mean square of 1."""
    return maps * (maps.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def _deviation(maps: Tensor) -> Tensor:
    """One more channel: how much the images of a group of four differ, the same for all four."""
    count, _, height, width = maps.shape
    size = _GROUP if count % _GROUP == 0 else count
    groups = maps.reshape(count // size, size, -1)
    deviation = (groups.var(1, correction=0) + 1e-8).sqrt().mean(1)
    return deviation.repeat_interleave(size).view(count, 1, 1, 1).expand(-1, 1, height, width)
