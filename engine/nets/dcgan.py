"""The networks of DCGAN (Radford et al. 2016), conditional on a class.

The class sets the scale and shift of the generator's normalisations (de Vries et al. 2017), and
projects the discriminator's features (Miyato and Koyama 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

Norm = Literal["batch", "group"]
_GROUP = 16  # channels of a group


class ConditionalNorm(nn.Module):
    """Normalisation whose scale and shift depend on the class."""

    def __init__(self, norm: Norm, channels: int, classes: int) -> None:
        super().__init__()
        self.norm: nn.Module = (
            nn.BatchNorm2d(channels, affine=False)
            if norm == "batch"
            else nn.GroupNorm(max(1, channels // _GROUP), channels, affine=False)
        )
        self.scale = nn.Embedding(classes, channels)
        self.shift = nn.Embedding(classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, maps: Tensor, classes: Tensor) -> Tensor:
        scale, shift = self.scale(classes), self.shift(classes)
        normalised: Tensor = self.norm(maps) * scale[:, :, None, None] + shift[:, :, None, None]
        return normalised


class Generator(nn.Module):
    """Latents (n, latent_dim) and classes (n,) to images (n, channels, side, side) in [-1, 1].

    widths: channels at 4 px, 8 px, …; the last doubling makes the image of 4 · 2^len(widths) px.
    """

    def __init__(
        self, latent_dim: int, classes: int, widths: Sequence[int], channels: int, norm: Norm
    ) -> None:
        super().__init__()
        self.first = nn.Linear(latent_dim, widths[0] * 16, bias=False)
        self.norms = nn.ModuleList(ConditionalNorm(norm, width, classes) for width in widths)
        self.doublings = nn.ModuleList(
            nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)
            for inputs, outputs in pairwise(widths)
        )
        self.last = nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1)
        self.apply(_initialise)

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        maps = self.first(latents).view(len(latents), -1, 4, 4)
        for number, norm in enumerate(self.norms):
            if number:
                maps = self.doublings[number - 1](maps)
            maps = norm(maps, classes).relu()
        return torch.tanh(self.last(maps))


class Discriminator(nn.Module):
    """Images (n, channels, side, side) and classes (n,) to logits (n,).

    widths: channels at half the side, a quarter, … down to 4 px. normalisation: spectral bounds
    each layer's slope (Miyato et al. 2018); batch and group normalise feature maps; none needs a
    gradient penalty.
    """

    def __init__(
        self,
        classes: int,
        widths: Sequence[int],
        channels: int,
        normalisation: Literal["spectral", "batch", "group", "none"],
    ) -> None:
        super().__init__()
        bounded = nn.utils.parametrizations.spectral_norm if normalisation == "spectral" else _same
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise([channels, *widths])):
            layers.append(bounded(nn.Conv2d(inputs, outputs, 4, 2, 1)))
            if number and normalisation in ("batch", "group"):
                groups = max(1, outputs // _GROUP)
                layers.append(
                    nn.BatchNorm2d(outputs) if normalisation == "batch"
                    else nn.GroupNorm(groups, outputs)
                )  # fmt: skip
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers)
        self.last = bounded(nn.Linear(widths[-1] * 16, 1))
        self.projection = bounded(nn.Embedding(classes, widths[-1] * 16))
        self.apply(_initialise)
        _draw(self.projection)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        features = self.layers(images).flatten(1)
        projected = (self.projection(classes) * features).sum(1)
        logits: Tensor = self.last(features).squeeze(1) + projected
        return logits


def _same(layer: nn.Module) -> nn.Module:
    return layer


def _initialise(layer: nn.Module) -> None:
    """Normal with a deviation of 0.02, as published."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        _draw(layer)


def _draw(layer: nn.Module) -> None:
    with torch.no_grad():
        for name, value in layer.named_parameters():
            # Spectral norm computes the weight from the parameter that is drawn here.
            if "weight" in name:
                value.normal_(0.0, 0.02)
