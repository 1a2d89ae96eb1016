"""Traditional augmentation as a generator: small geometric and photometric changes of training
images, by kornia.

It is a generator, so that every arm of a comparison takes the same path. Flips and rotations are
off unless the study allows them: they change the meaning of digits, and of left and right eyes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from engine.generators import Generator, GeneratorSpec, SampleBatch
from engine.nets.augmentation import MOVES, by_policy, moved, policy_of

if TYPE_CHECKING:
    from torch import Tensor


class TraditionalSpec(GeneratorSpec):
    name: Literal["traditional"] = "traditional"
    parents: Literal["train", "representatives"] = "train"
    # moves: the fields below. The others draw from a fixed list of operations, which also rotate,
    # shear and posterize; use them only if labels survive that. randaugment: num_ops operations
    # (Cubuk et al. 2020); trivialaugment: one, of any strength (Mueller and Hutter 2021); augmix: a
    # mixture of three chains with the image itself (Hendrycks et al. 2020).
    policy: Literal["moves", "randaugment", "trivialaugment", "augmix"] = "moves"
    # For randaugment: operations for each image, and their strength, below 30.
    num_ops: Annotated[int, Field(ge=1, le=10)] = 2
    magnitude: Annotated[int, Field(ge=1, le=29)] = 9
    # Largest translation, as a share of the side.
    translate: Annotated[float, Field(ge=0, le=0.5)] = 0.08
    # Scales between 1 - scale and 1 + scale.
    scale: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Degrees, to either side.
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    horizontal_flip: bool = False
    vertical_flip: bool = False
    # Factors between 1 - x and 1 + x.
    brightness: Annotated[float, Field(ge=0, lt=1)] = 0.1
    contrast: Annotated[float, Field(ge=0, lt=1)] = 0.15
    saturation: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Traditional(Generator[TraditionalSpec]):
    version = 2
    # An augmented image keeps its meaning, and always resembles its parent.
    filtered = False
    synthetic = False
    digital_source_type = "algorithmicallyEnhanced"

    def parents(self) -> Literal["train", "representatives"] | None:
        return self.spec.parents

    def load(self, weights: Path | None, device: str) -> None:
        self.device = device

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        import torch

        assert batch.parents is not None
        images = torch.from_numpy(np.ascontiguousarray(batch.parents)).to(self.device)
        images = images.permute(0, 3, 1, 2).float() / 255
        if self.spec.policy == "moves":
            augmented = self._moved(images, batch.seeds)
        else:
            augmented = self._by_policy(images, batch.seeds)
        pixels = (augmented.clamp(0, 1) * 255).round().to(torch.uint8)
        return list(pixels.permute(0, 2, 3, 1).cpu().numpy())

    def _by_policy(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        if self.spec.policy == "randaugment":
            policy = policy_of("rand_augment", self.spec.num_ops, self.spec.magnitude)
        else:
            policy = policy_of("trivial_augment", 0, 0)
        if self.spec.policy == "augmix":
            return _by_augmix(images, seeds, policy)
        return by_policy(images, seeds, policy)

    def _moved(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        import torch

        spec = self.spec
        # Always all draws of each image: switching a change off alters no other.
        draws = torch.stack(
            [torch.rand(MOVES, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(self.device)
        return moved(
            images, draws, translate=spec.translate, scale=spec.scale, rotate=spec.rotate,
            horizontal_flip=spec.horizontal_flip, vertical_flip=spec.vertical_flip,
            brightness=spec.brightness, contrast=spec.contrast, saturation=spec.saturation,
        )  # fmt: skip


def _by_augmix(images: Tensor, seeds: Sequence[int], policy: Callable[[Tensor], Tensor]) -> Tensor:
    """Each image separately, because kornia draws from torch's own generator."""
    import torch

    channels = images.shape[1]
    with torch.random.fork_rng(devices=[]):
        mixed = []
        for image, seed in zip(images.expand(-1, 3, -1, -1).unbind(), seeds, strict=True):
            torch.manual_seed(seed)
            mixed.append(_augmix(image[None], policy))
    joined = torch.cat(mixed)
    return joined if channels == 3 else joined.mean(1, keepdim=True)


def _augmix(image: Tensor, policy: Callable[[Tensor], Tensor]) -> Tensor:
    """Mix three chains of one to three operations by Dirichlet weights, and the result with the
    image by a Beta weight, all with concentration 1, as published."""
    import torch

    weights = torch.distributions.Dirichlet(torch.ones(3)).sample()
    mixed = torch.zeros_like(image)
    for weight in weights:
        chain = image
        for _ in range(int(torch.randint(1, 4, (1,)))):
            chain = policy(chain).clamp(0, 1)
        mixed = mixed + weight * chain
    return image.lerp(mixed, torch.rand(1).item())
