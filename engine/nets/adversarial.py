"""Training of a generator against a discriminator, for any two networks.

A step updates the discriminator, once or more often, and then the generator on fresh latents.
Every draw (images, latents, augmentation) is a function of the seed, the step, the image and its
position in the batch, so that the number of workers and a resume change no draw. The gradients of
several workers are averaged by hand: a step passes both networks more than once, which DDP does not
support.

Samples come from the generator's averaged weights (Karras et al. 2018, appendix A).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pdist, relu, softplus
from torch.optim.swa_utils import get_ema_multi_avg_fn

from engine.core.errors import EngineError, StudyError
from engine.core.rng import derive_seed
from engine.core.rng import generator as random_generator
from engine.nets.adversarial_settings import AdversarialSettings
from engine.nets.diffaugment import DRAWS, diffaugment
from engine.nets.training import (
    WeightedSampler,
    average_gradients,
    make_accelerator,
    optimizer_tensors,
    restore_optimizer,
    share_of_batch,
    strip_prefix,
)
from engine.work.fit import FitContext

# Images of each class, of a fixed batch, that variety is measured on.
_VARIETY_IMAGES = 8
# Poor measurements in a row that count as a collapse.
_POOR_MEASUREMENTS = 3
# Karras et al. 2020: the discriminator overfits while the mean sign of real images' logits exceeds
# the target; the share of augmented images can rise from 0 to 1 in this many images.
_ADA_TARGET = 0.6
_ADA_IMAGES = 50_000


@dataclass(frozen=True)
class ConditionedImages:
    """Training images. pixels: uint8 (n, height, width, channels). classes: int64 (n,). weights:
    how often each image is drawn, relative to the others."""

    pixels: np.ndarray
    classes: np.ndarray
    weights: np.ndarray
    image_ids: Sequence[str]


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Lim and Ye 2017."""
    return relu(1 - real).mean() + relu(1 + fake).mean()


def non_saturating(real: Tensor, fake: Tensor) -> Tensor:
    """Goodfellow et al. 2014; the generator maximises log D."""
    return softplus(-real).mean() + softplus(fake).mean()


def wasserstein(real: Tensor, fake: Tensor) -> Tensor:
    """Arjovsky et al. 2017, with the drift term of Karras et al. 2018. It needs a gradient
    penalty."""
    return fake.mean() - real.mean() + 1e-3 * (real**2).mean()


# The discriminator's loss of logits (n,), by the name of the objective.
DISCRIMINATOR_LOSSES = {
    "hinge": hinge, "non_saturating": non_saturating, "wasserstein": wasserstein
}  # fmt: skip


class AdversarialTraining:
    """One training in progress, for `engine.nets.training.run`.

    build: returns the generator, forward(latents, classes) -> images in [-1, 1], and the
    discriminator, forward(images, classes) -> logits (n,), or a tuple of logits and the cross
    entropy (n,) of the class, which both networks minimise (Odena et al. 2017).

    Optional members serve networks that grow: `stage(step)` of both is called before each step, and
    the discriminator's `at_stage(images)` resizes real images. If the discriminator has a `group`,
    it compares that many neighbours in the batch, which then have one class.

    objective: the name of both losses, one of `DISCRIMINATOR_LOSSES`.
    """

    def __init__(
        self,
        context: FitContext,
        build: Callable[[], tuple[Module, Module]],
        objective: str,
        data: ConditionedImages,
        settings: AdversarialSettings,
        seed: int,
        *,
        gradient_penalty: float = 0.0,
    ) -> None:
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
                f"generators: batch_size: {settings.batch_size} is not a multiple of"
                f" {group * context.world_size * settings.gradient_accumulation_steps} (groups of"
                f" {group} images x {context.world_size} workers x"
                f" {settings.gradient_accumulation_steps} accumulation steps); change it"
            )
        self.accelerator = make_accelerator(
            context, settings.precision, settings.gradient_accumulation_steps
        )
        device = self.accelerator.device
        self.generator: Any = generator.to(device)
        self.discriminator: Any = discriminator.to(device)
        for network in (generator, discriminator):
            # torch declares no overload of `to` with a memory format alone.
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        self.poor_measurements = 0

    def update(self, step: int) -> dict[str, float]:
        for network in (self.generator, self.discriminator, self.average):
            if (stage := getattr(network, "stage", None)) is not None:
                stage(step)
        times = self.settings.discriminator_steps
        losses = [self._discriminator_step(step * times + number) for number in range(times)]
        rows = self._rows(step * times)
        figures = {
            "discriminator_loss": float(np.mean(losses)),
            "generator_loss": self._optimizer_step(
                "generator", lambda piece: self._generator_loss(step, rows, piece)
            ),
        }
        self._update_average(step)
        if self.settings.augment == "ada":
            figures["augment_share"] = self.augment_share
        return figures

    def _discriminator_step(self, step: int) -> float:
        rows = self._rows(step)
        return self._optimizer_step(
            "discriminator", lambda piece: self._discriminator_loss(step, rows, piece)
        )

    def _rows(self, step: int) -> np.ndarray:
        """The rows of a batch; each group that the discriminator compares has one class.

        The discriminator sees the variation within a class only in groups of one class. Otherwise a
        generator could repeat one image per class.
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

    def _optimizer_step(self, name: str, loss_of: Callable[[slice], Tensor]) -> float:
        """Step one network with the other one frozen; returns the mean loss."""
        trained: Module = getattr(self, name)
        for network in (self.generator, self.discriminator):
            network.requires_grad_(network is trained)
        optimizer, total = self.optimizers[name], 0.0
        optimizer.zero_grad(set_to_none=True)
        for piece in self.slices:
            loss = loss_of(piece) / len(self.slices)
            loss.backward()
            total += float(self.accelerator.reduce(loss.detach(), "mean"))
        average_gradients(self.accelerator, trained)
        optimizer.step()
        return total

    def _discriminator_loss(self, step: int, rows: np.ndarray, piece: slice) -> Tensor:
        """The discriminator's loss on a slice of the batch."""
        classes = self._classes(rows[piece])
        with torch.no_grad(), self.accelerator.autocast():
            fake = self.generator(self._latents("judge", step, rows, piece), classes).float()
        real = self._augmented("real", self._real(rows[piece]), step, piece)
        fake = self._augmented("fake", fake, step, piece)
        with self.accelerator.autocast():
            # Separately: batch statistics over both would describe neither.
            real_logits, real_class_loss = self._logits(real, classes)
            fake_logits, fake_class_loss = self._logits(fake, classes)
        loss = DISCRIMINATOR_LOSSES[self.objective](real_logits, fake_logits)
        loss = loss + real_class_loss + fake_class_loss
        if self.settings.augment == "ada":
            self._adapt_augmentation(real_logits.detach())
        if self.settings.r1_weight and step % self.settings.r1_interval == 0:
            # Weighted for the steps without this term.
            weight = 0.5 * self.settings.r1_weight * self.settings.r1_interval
            loss = loss + weight * self._squared_gradient(real, classes).mean()
        if self.gradient_penalty:
            between = self._between(step, piece, real, fake)
            norm = (self._squared_gradient(between, classes) + 1e-12).sqrt()
            loss = loss + self.gradient_penalty * ((norm - 1) ** 2).mean()
        return loss

    def _generator_loss(self, step: int, rows: np.ndarray, piece: slice) -> Tensor:
        """The generator's loss on a slice of the batch."""
        classes = self._classes(rows[piece])
        with self.accelerator.autocast():
            fake = self.generator(self._latents("deceive", step, rows, piece), classes).float()
            augmented = self._augmented("deceive", fake, step, piece)
            logits, class_loss = self._logits(augmented, classes)
        deceived = softplus(-logits) if self.objective == "non_saturating" else -logits
        return deceived.mean() + class_loss

    def _logits(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor | float]:
        """Logits (n,), and the mean cross entropy of the class if the discriminator predicts it."""
        output = self.discriminator(images, classes)
        if isinstance(output, tuple):
            logits, class_loss = output
            return logits.float(), class_loss.float().mean()
        return output.float(), 0.0

    def _squared_gradient(self, images: Tensor, classes: Tensor) -> Tensor:
        """Squared norm (n,) of the discriminator's gradient at each image, differentiable."""
        images = images.detach().requires_grad_(True)
        logits, _ = self._logits(images, classes)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradient.square().flatten(1).sum(1)

    def _between(self, step: int, piece: slice, real: Tensor, fake: Tensor) -> Tensor:
        """A random point between each real image and its fake one (Gulrajani et al. 2017)."""
        draws = random_generator(self.seed, "between", step).random(self.settings.batch_size)
        share = torch.from_numpy(draws[piece]).to(real).view(-1, 1, 1, 1)
        return real + share * (fake - real)

    def _adapt_augmentation(self, logits: Tensor) -> None:
        """Augment more while the discriminator is sure of real images, less otherwise."""
        sure = float(self.accelerator.reduce(logits.sign().mean(), "mean"))
        change = len(logits) * self.accelerator.num_processes / _ADA_IMAGES
        share = self.augment_share + (change if sure > _ADA_TARGET else -change)
        self.augment_share = min(max(share, 0.0), 0.8)

    def _augmented(self, purpose: str, images: Tensor, step: int, piece: slice) -> Tensor:
        """Images as the discriminator sees them."""
        if self.settings.augment == "none":
            return images
        draws = random_generator(self.seed, "augment", purpose, step).random(
            (self.settings.batch_size, DRAWS)
        )
        return diffaugment(images, draws[piece], self.augment_share)

    def _real(self, rows: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(self.data.pixels[rows]))
        images = pixels.to(self.accelerator.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        if hasattr(self.discriminator, "at_stage"):
            images = self.discriminator.at_stage(images)
        return images

    def _classes(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(self.data.classes[rows]).to(self.accelerator.device)

    def _latents(self, purpose: str, step: int, rows: np.ndarray, piece: slice) -> Tensor:
        latents = [
            random_generator(
                self.seed, purpose, self.data.image_ids[row], place, step
            ).standard_normal(self.settings.latent_dim, dtype=np.float32)
            for place, row in zip(range(piece.start, piece.stop), rows[piece], strict=True)
        ]
        return torch.from_numpy(np.stack(latents)).to(self.accelerator.device)

    def _update_average(self, step: int) -> None:
        """Move the averaged weights towards the generator's, faster in the first steps."""
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        averages, weights = list(self.average.parameters()), list(self.generator.parameters())
        move: Any = get_ema_multi_avg_fn(decay)
        move(averages, weights, step)
        with torch.no_grad():
            for mean, buffer in zip(self.average.buffers(), self.generator.buffers(), strict=True):
                mean.copy_(buffer)

    def measure_variety(self, step: int) -> dict[str, float]:
        """How much the images of a fixed batch differ from each other, relative to real images of
        the same class: the median over classes. Raises `EngineError` when a class has collapsed."""
        ratios: dict[int, float] = {}
        for number in np.unique(self.data.classes):
            real = np.flatnonzero(self.data.classes == number)[:_VARIETY_IMAGES]
            if len(real) < 2:
                continue
            expected = _spread(self._real(real))
            if expected > 0:
                ratios[int(number)] = _spread(self._variety_images(int(number))) / expected
        if not ratios:
            return {}
        variety = float(np.median(list(ratios.values())))
        # One class is enough, because rare ones collapse first. Early images are always alike.
        worst = min(ratios, key=lambda number: ratios[number])
        poor = ratios[worst] < self.settings.collapse_below and step > self.settings.train_steps / 2
        self.poor_measurements = self.poor_measurements + 1 if poor else 0
        if self.poor_measurements >= _POOR_MEASUREMENTS:
            raise EngineError(
                f"training collapsed at step {step}: images of class {worst} (of {len(ratios)},"
                f" counted from 0) differ from each other {ratios[worst]:.2f} times as much as real"
                " ones; lower the learning rates, set r1_weight, or augment: ada"
            )
        return {"variety": variety}

    def _variety_images(self, number: int) -> Tensor:
        latents = random_generator(self.seed, "watched", number).standard_normal(
            (_VARIETY_IMAGES, self.settings.latent_dim), dtype=np.float32
        )
        device = self.accelerator.device
        classes = torch.full((_VARIETY_IMAGES,), number, device=device)
        with torch.inference_mode():
            images: Tensor = self.average(torch.from_numpy(latents).to(device), classes)
        return images

    def tensors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name in ("generator", "discriminator", "average"):
            network: Module = getattr(self, name)
            named |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            named |= optimizer_tensors(optimizer, f"optimizer.{name}.")
        named["augment_share"] = torch.tensor(self.augment_share, dtype=torch.float64)
        named["poor_looks"] = torch.tensor(self.poor_measurements)
        return named

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name in ("generator", "discriminator", "average"):
            getattr(self, name).load_state_dict(strip_prefix(f"{name}.", tensors))
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, f"optimizer.{name}.", tensors)
        self.augment_share = float(tensors["augment_share"])
        self.poor_measurements = int(tensors["poor_looks"])


def _spread(images: Tensor) -> float:
    """Mean distance between images (n, …)."""
    return float(pdist(images.flatten(1).float()).mean())
