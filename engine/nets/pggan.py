"""The networks of progressive growing (Karras et al. 2018), conditional on a class.

Both start at 4 px and double: a new level is faded in, then trained at full strength. Equalised
learning rate, pixelwise normalisation and minibatch deviation are as published. The class is a
learnt vector that is joined to the latents and has their length. As in the authors' conditional
networks, the discriminator also predicts the class (Odena et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, interpolate, leaky_relu, linear

if TYPE_CHECKING:
    from torch import Tensor

# Step to level and, while the level is faded in, the share of its new layers.
Schedule = Callable[[int], tuple[int, float]]
_GROUP = 4  # images that share a minibatch deviation


def growth(train_steps: int, levels: int, last_share: float) -> Schedule:
    """The level of each step.

    The last level has `last_share` of the steps, the others equal parts of the rest. The first half
    of a level's steps fades it in, except for the first level.
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
    """A network at a level: the last one, fully faded in, unless a schedule sets another."""

    def __init__(self, levels: int, schedule: Schedule | None) -> None:
        super().__init__()
        self.schedule = schedule
        self.level, self.share = levels - 1, 1.0

    def stage(self, step: int) -> None:
        """Set the level of a step by the schedule."""
        if self.schedule is not None:
            self.level, self.share = self.schedule(step)

    def at_stage(self, images: Tensor) -> Tensor:
        """Images of full size at this stage: shrunk, and faded like the network."""
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
        # As strong as the latents from the first step; a one-hot vector would be negligible.
        self.known = nn.Parameter(torch.randn(classes, latent_dim))
        self.first = Linear(2 * latent_dim, widths[0] * 16, gain=2**0.5 / 4)
        self.blocks = nn.ModuleList(
            nn.ModuleList([Conv(inputs, outputs, 3), Conv(outputs, outputs, 3)])
            for inputs, outputs in zip([widths[0], *widths], widths, strict=False)
        )
        self.to_image = nn.ModuleList(Conv(width, channels, 1, gain=1.0) for width in widths)

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        inputs = torch.cat([_normalised(latents), _normalised(self.known[classes])], 1)
        maps = self.first(inputs).view(len(latents), -1, 4, 4)
        maps = _normalised(leaky_relu(maps, 0.2))
        before = maps
        for level in range(self.level + 1):
            first, second = self.blocks[level].children()
            before = maps
            # At 4 px the layer of the latents replaces the first convolution.
            if level:
                maps = _normalised(leaky_relu(first(_doubled(maps)), 0.2))
            maps = _normalised(leaky_relu(second(maps), 0.2))
        images: Tensor = self.to_image[self.level](maps)
        if self.share < 1 and self.level:
            old = _doubled(self.to_image[self.level - 1](before))
            images = old.lerp(images, self.share)
        return images


class Discriminator(Growing):
    """Images of the stage's size and classes (n,) to scores (n,) and the cross entropy (n,) of the
    predicted class."""

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
            first, second = self.blocks[level - 1].children()
            maps = avg_pool2d(leaky_relu(second(leaky_relu(first(maps), 0.2)), 0.2), 2)
            if level == self.level and self.share < 1:
                old = leaky_relu(self.from_image[level - 1](avg_pool2d(images, 2)), 0.2)
                maps = old.lerp(maps, self.share)
        maps = leaky_relu(self.deviating(torch.cat([maps, _deviation(maps)], 1)), 0.2)
        features = leaky_relu(self.features(maps.flatten(1)), 0.2)
        class_loss = cross_entropy(self.seen(features), classes, reduction="none")
        return self.last(features).squeeze(1), class_loss


class Conv(nn.Module):
    """A convolution whose weights are drawn with a deviation of 1 and scaled at run time by He's
    constant, so that all layers learn equally fast."""

    def __init__(self, inputs: int, outputs: int, side: int, gain: float = 2**0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = gain / (inputs * side * side) ** 0.5
        self.padding = side // 2

    def forward(self, maps: Tensor) -> Tensor:
        return conv2d(maps, self.weight * self.scale, self.bias, padding=self.padding)


class Linear(nn.Module):
    """As `Conv`, for vectors."""

    def __init__(self, inputs: int, outputs: int, gain: float = 2**0.5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = gain / inputs**0.5

    def forward(self, vectors: Tensor) -> Tensor:
        return linear(vectors, self.weight * self.scale, self.bias)


def level_widths(width: int, max_width: int, levels: int) -> list[int]:
    """Channels at each level, from 4 px up: `width` at the last, doubling towards the first, up to
    `max_width`."""
    return [min(max_width, width * 2 ** (levels - 1 - level)) for level in range(levels)]


def _doubled(maps: Tensor) -> Tensor:
    return interpolate(maps, scale_factor=2, mode="nearest")


def _normalised(maps: Tensor) -> Tensor:
    """Each pixel's or latent's vector, scaled to a mean square of 1."""
    return maps * (maps.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def _deviation(maps: Tensor) -> Tensor:
    """An additional channel: the mean deviation within a group of four images, the same for all
    four."""
    count, _, height, width = maps.shape
    size = _GROUP if count % _GROUP == 0 else count
    groups = maps.reshape(count // size, size, -1)
    deviation = (groups.var(1, correction=0) + 1e-8).sqrt().mean(1)
    return deviation.repeat_interleave(size).view(count, 1, 1, 1).expand(-1, 1, height, width)
