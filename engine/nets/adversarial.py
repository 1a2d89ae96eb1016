"""Training of a generator against a discriminator, whatever networks the two are.

A step updates the discriminator, once or more often, and then the generator on fresh latents.
Every draw (images, latents, augmentation) is a function of the seed, the step, the image and its
place in the batch, so that workers and a resume change none. Gradients of several workers are
averaged by hand: a step passes both networks more than once, which wrappers that count passes do
not bear.

What samples is the generator of averaged weights (Karras et al. 2018, appendix A).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import numpy as np
from pydantic import Field

from engine.core.errors import EngineError, StudyError
from engine.core.rng import derive_seed
from engine.core.rng import generator as random_generator
from engine.core.spec import Spec
from engine.nets.diffaugment import DRAWS, diffaugment
from engine.nets.training import (
    WeightedSampler,
    average_gradients,
    below,
    make_accelerator,
    optimizer_tensors,
    restore_optimizer,
    share_of_batch,
)
from engine.work.fit import FitContext

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

# Images of each class, of a fixed batch, by which variety is judged.
_WATCHED = 8
_LOOKS = 3


class AdversarialSettings(Spec):
    """How two networks are trained against each other."""

    train_steps: Annotated[int, Field(ge=1)] = 20_000
    batch_size: Annotated[int, Field(ge=2)] = 64
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    # Of the discriminator, for each of the generator's.
    discriminator_steps: Annotated[int, Field(ge=1, le=16)] = 1
    generator_learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    discriminator_learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    # How far rare classes are drawn more often: 0 not at all, 1 until all classes are drawn alike.
    class_balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    latent_dim: Annotated[int, Field(ge=1, le=4096)] = 128
    # diffaugment: what the discriminator sees is always moved, recoloured and cut (Zhao et al.
    # 2020). ada: with a probability that rises while it overfits (Karras et al. 2020).
    augment: Literal["none", "diffaugment", "ada"] = "none"
    # Weight of the squared gradient at real images (Mescheder et al. 2018), taken every so many
    # steps.
    r1_weight: Annotated[float, Field(ge=0)] = 0.0
    r1_interval: Annotated[int, Field(ge=1)] = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    # Variety of a class's fixed batch, relative to its real images, below which training stops: the
    # generator makes one image over and over.
    collapse_below: Annotated[float, Field(ge=0, lt=1)] = 0.05


@dataclass(frozen=True)
class Conditioned:
    """What is trained on. pixels: uint8 (n, height, width, channels). classes: int64 (n,).
    weights: how often each is drawn, relative to the others."""

    pixels: np.ndarray
    classes: np.ndarray
    weights: np.ndarray
    image_ids: Sequence[str]


class Objective(Protocol):
    """The losses of one kind of training. `real`, `fake`: logits (n,)."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor: ...

    def generator(self, fake: Tensor) -> Tensor: ...


class Hinge:
    """Lim and Ye 2017."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        from torch.nn.functional import relu

        return relu(1 - real).mean() + relu(1 + fake).mean()

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()


class NonSaturating:
    """Goodfellow et al. 2014, the generator maximising log D."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        from torch.nn.functional import softplus

        return softplus(-real).mean() + softplus(fake).mean()

    def generator(self, fake: Tensor) -> Tensor:
        from torch.nn.functional import softplus

        return softplus(-fake).mean()


class Wasserstein:
    """Arjovsky et al. 2017, with the drift of Karras et al. 2018; a gradient penalty must go with
    it."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean() - real.mean() + 1e-3 * (real**2).mean()

    def generator(self, fake: Tensor) -> Tensor:
        return -fake.mean()


class AdversarialTraining:
    """One training in progress, for `engine.nets.training.run`.

    build: gives the generator, forward(latents, classes) -> images in [-1, 1], and the
    discriminator, forward(images, classes) -> logits (n,), or those and the cross-entropy (n,) of
    the class that it sees, which both networks lower (Odena et al. 2017). Where they have it,
    `stage(step)` of both is called before each step, for networks that grow, and the
    discriminator's `at_stage(images)` says what it is shown of real ones; of its `group`, so many
    neighbours of a batch are compared by it, and are of one class.
    """

    def __init__(
        self,
        context: FitContext,
        build: Callable[[], tuple[Module, Module]],
        objective: Objective,
        data: Conditioned,
        settings: AdversarialSettings,
        seed: int,
        *,
        gradient_penalty: float = 0.0,
    ) -> None:
        import torch

        self.settings, self.data, self.seed = settings, data, seed
        self.objective, self.gradient_penalty = objective, gradient_penalty
        self.slices = share_of_batch(
            settings.batch_size, context.rank, context.world_size,
            settings.gradient_accumulation_steps,
        )  # fmt: skip
        self.sampler = WeightedSampler(data.weights, settings.batch_size, seed)
        self.members = {
            int(number): np.flatnonzero(data.classes == number)
            for number in np.unique(data.classes)
        }
        torch.manual_seed(derive_seed(seed, "weights"))
        generator, discriminator = build()
        group = getattr(discriminator, "group", 1)
        if any((piece.stop - piece.start) % group for piece in self.slices):
            raise StudyError(
                f"generators: batch_size {settings.batch_size} is no multiple of {group} *"
                f" {context.world_size} workers * {settings.gradient_accumulation_steps}"
                f" gradient_accumulation_steps: {group} images are compared with each other"
            )
        self.accelerator = make_accelerator(
            context, settings.precision, settings.gradient_accumulation_steps
        )
        device = self.accelerator.device
        self.generator = generator.to(device, memory_format=torch.channels_last)
        self.discriminator = discriminator.to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.generator).requires_grad_(False).eval()
        betas = (settings.adam_beta1, settings.adam_beta2)
        self.optimizers = {
            "generator": torch.optim.Adam(
                self.generator.parameters(), settings.generator_learning_rate, betas, foreach=True
            ),
            "discriminator": torch.optim.Adam(
                self.discriminator.parameters(), settings.discriminator_learning_rate, betas,
                foreach=True,
            ),
        }  # fmt: skip
        self.augment_share = 1.0 if settings.augment == "diffaugment" else 0.0
        self.poor_looks = 0

    def update(self, step: int) -> dict[str, float]:
        for network in (self.generator, self.discriminator, self.average):
            if hasattr(network, "stage"):
                network.stage(step)
        times = self.settings.discriminator_steps
        judged = [self._discriminate(step * times + number) for number in range(times)]
        rows = self._rows(step * times)
        figures = {
            "discriminator_loss": float(np.mean(judged)),
            "generator_loss": self._descend(
                "generator", rows, lambda piece: self._deceive(step, rows, piece)
            ),
        }
        self._follow(step)
        if self.settings.augment == "ada":
            figures["augment_share"] = self.augment_share
        return figures

    def _discriminate(self, step: int) -> float:
        rows = self._rows(step)
        return self._descend("discriminator", rows, lambda piece: self._judge(step, rows, piece))

    def _rows(self, step: int) -> np.ndarray:
        """The rows of a batch, those of each of the discriminator's groups of one class.

        A discriminator that compares the images of a group sees how they vary within a class only
        where they are of one; else a generator may make each class's image over and over.
        """
        rows = self.sampler.rows(step)
        size = getattr(self.discriminator, "group", 1)
        if size == 1:
            return rows
        rows = rows.copy()
        random = random_generator(self.seed, "alike", step)
        for start in range(0, len(rows) - size + 1, size):
            same = self.members[int(self.data.classes[rows[start]])]
            rows[start + 1 : start + size] = same[random.integers(len(same), size=size - 1)]
        return rows

    def _descend(self, which: str, rows: np.ndarray, loss_of: Callable[[slice], Tensor]) -> float:
        """One optimizer step of one of the two networks; the other one stands still."""
        network: Module = getattr(self, which)
        for held in (self.generator, self.discriminator):
            held.requires_grad_(held is network)
        optimizer, total = self.optimizers[which], 0.0
        optimizer.zero_grad(set_to_none=True)
        for piece in self.slices:
            loss = loss_of(piece) / len(self.slices)
            loss.backward()
            total += float(self.accelerator.reduce(loss.detach(), "mean"))
        average_gradients(self.accelerator, network)
        optimizer.step()
        return total

    def _judge(self, step: int, rows: np.ndarray, piece: slice) -> Tensor:
        """The discriminator's loss on a slice of the batch."""
        import torch

        classes = self._classes(rows[piece])
        with torch.no_grad(), self.accelerator.autocast():
            fake = self.generator(self._latents("judge", step, rows, piece), classes).float()
        real = self._real(rows[piece])
        seen_real = self._seen("real", real, step, piece)
        seen_fake = self._seen("fake", fake, step, piece)
        with self.accelerator.autocast():
            # Each by itself: statistics over a batch of both would tell nothing of either.
            of_real, misread_real = self._judged(seen_real, classes)
            of_fake, misread_fake = self._judged(seen_fake, classes)
        loss = self.objective.discriminator(of_real, of_fake) + misread_real + misread_fake
        if self.settings.augment == "ada":
            self._adapt(of_real.detach())
        if self.settings.r1_weight and step % self.settings.r1_interval == 0:
            # Weighted for the steps that it is left out of.
            weight = 0.5 * self.settings.r1_weight * self.settings.r1_interval
            loss = loss + weight * self._squared_gradient(seen_real, classes).mean()
        if self.gradient_penalty:
            between = self._between(step, piece, seen_real, seen_fake)
            norm = (self._squared_gradient(between, classes) + 1e-12).sqrt()
            loss = loss + self.gradient_penalty * ((norm - 1) ** 2).mean()
        return loss

    def _deceive(self, step: int, rows: np.ndarray, piece: slice) -> Tensor:
        """The generator's loss on a slice of the batch."""
        classes = self._classes(rows[piece])
        with self.accelerator.autocast():
            fake = self.generator(self._latents("deceive", step, rows, piece), classes).float()
            seen = self._seen("deceive", fake, step, piece)
            logits, misread = self._judged(seen, classes)
        return self.objective.generator(logits) + misread

    def _judged(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | float]:
        """Logits (n,), and the loss of reading the class where the discriminator reads it."""
        judged = self.discriminator(images, classes)
        if isinstance(judged, tuple):
            logits, misread = judged
            return logits.float(), misread.float().mean()
        return judged.float(), 0.0

    def _squared_gradient(self, images: Tensor, classes: Tensor) -> Tensor:
        """Squared norm (n,) of the discriminator's gradient at each image, to be differentiated
        again."""
        import torch

        images = images.detach().requires_grad_(True)
        logits, _ = self._judged(images, classes)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.square().flatten(1).sum(1)

    def _between(self, step: int, piece: slice, real: Tensor, fake: Tensor) -> Tensor:
        """A point on the line from each real image to its fake one (Gulrajani et al. 2017)."""
        import torch

        draws = random_generator(self.seed, "between", step).random(self.settings.batch_size)
        share = torch.from_numpy(draws[piece]).to(real).view(-1, 1, 1, 1)
        return real + share * (fake - real)

    def _adapt(self, logits: Tensor) -> None:
        """Augment more while the discriminator is sure of real images, less where it is not."""
        sure = float(self.accelerator.reduce(logits.sign().mean(), "mean"))
        change = len(logits) * self.accelerator.num_processes / _ADA_IMAGES
        share = self.augment_share + (change if sure > _ADA_TARGET else -change)
        self.augment_share = min(max(share, 0.0), 0.8)

    def _seen(self, purpose: str, images: Tensor, step: int, piece: slice) -> Tensor:
        """Images as the discriminator sees them."""
        if self.settings.augment == "none":
            return images
        draws = random_generator(self.seed, "augment", purpose, step).random(
            (self.settings.batch_size, DRAWS)
        )
        return diffaugment(images, draws[piece], self.augment_share)

    def _real(self, rows: np.ndarray) -> Tensor:
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(self.data.pixels[rows]))
        images = pixels.to(self.accelerator.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        if hasattr(self.discriminator, "at_stage"):
            images = self.discriminator.at_stage(images)
        return images

    def _classes(self, rows: np.ndarray) -> Tensor:
        import torch

        return torch.from_numpy(self.data.classes[rows]).to(self.accelerator.device)

    def _latents(self, purpose: str, step: int, rows: np.ndarray, piece: slice) -> Tensor:
        import torch

        drawn = [
            random_generator(
                self.seed, purpose, self.data.image_ids[row], place, step
            ).standard_normal(self.settings.latent_dim, dtype=np.float32)
            for place, row in zip(range(piece.start, piece.stop), rows[piece], strict=True)
        ]
        return torch.from_numpy(np.stack(drawn)).to(self.accelerator.device)

    def _follow(self, step: int) -> None:
        """Move the averaged weights towards the generator's, faster while there are few steps."""
        import torch

        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.generator.parameters()), 1 - decay
            )
            for mean, buffer in zip(self.average.buffers(), self.generator.buffers(), strict=True):
                mean.copy_(buffer)

    def look_at_variety(self, step: int) -> dict[str, float]:
        """How different the images of a fixed batch are from each other, relative to real ones of
        the same class: the median over classes. Raises `EngineError` where they have become one."""
        found = {}
        for number in np.unique(self.data.classes):
            real = np.flatnonzero(self.data.classes == number)[:_WATCHED]
            if len(real) < 2:
                continue
            expected = _spread(self._real(real))
            if expected > 0:
                found[int(number)] = _spread(self._watched(int(number))) / expected
        if not found:
            return {}
        variety = float(np.median(list(found.values())))
        # One class is enough, for rare ones go first. Early images are all alike anyway.
        worst = min(found, key=lambda number: found[number])
        poor = found[worst] < self.settings.collapse_below and step > self.settings.train_steps / 2
        self.poor_looks = self.poor_looks + 1 if poor else 0
        if self.poor_looks >= _LOOKS:
            raise EngineError(
                f"training collapsed at step {step}: images of class {worst} (of"
                f" {len(found)}, counted from 0) differ from each other"
                f" {found[worst]:.2f} times as much as real ones; lower the learning rates, set"
                " r1_weight, or augment: ada"
            )
        return {"variety": variety}

    def _watched(self, number: int) -> Tensor:
        import torch

        latents = random_generator(self.seed, "watched", number).standard_normal(
            (_WATCHED, self.settings.latent_dim), dtype=np.float32
        )
        device = self.accelerator.device
        with torch.inference_mode():
            return self.average(
                torch.from_numpy(latents).to(device), torch.full((_WATCHED,), number, device=device)
            )

    def tensors(self) -> dict[str, Tensor]:
        import torch

        named: dict[str, Tensor] = {}
        for name in ("generator", "discriminator", "average"):
            network: Module = getattr(self, name)
            named |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            named |= optimizer_tensors(optimizer, f"optimizer.{name}.")
        named["augment_share"] = torch.tensor(self.augment_share, dtype=torch.float64)
        named["poor_looks"] = torch.tensor(self.poor_looks)
        return named

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name in ("generator", "discriminator", "average"):
            getattr(self, name).load_state_dict(below(f"{name}.", tensors))
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, f"optimizer.{name}.", tensors)
        self.augment_share = float(tensors["augment_share"])
        self.poor_looks = int(tensors["poor_looks"])


# Karras et al. 2020: the mean sign of the logits of real images above which the discriminator is
# taken to overfit, and the images in which the share of augmented ones may rise from 0 to 1.
_ADA_TARGET = 0.6
_ADA_IMAGES = 50_000


def _spread(images: Tensor) -> float:
    """Mean distance between images (n, …)."""
    import torch

    flat = images.flatten(1).float()
    return float(torch.nn.functional.pdist(flat).mean())
