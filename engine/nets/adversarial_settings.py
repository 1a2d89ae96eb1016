"""Settings of the training of a generator against a discriminator."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.core.spec import Spec


class AdversarialSettings(Spec):
    """How two networks are trained against each other."""

    train_steps: Annotated[int, Field(ge=1)] = 20_000
    batch_size: Annotated[int, Field(ge=2)] = 64
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    # Steps of the discriminator for each step of the generator.
    discriminator_steps: Annotated[int, Field(ge=1, le=16)] = 1
    generator_learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    discriminator_learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    # How much more often rare classes are drawn: 0 not at all, 1 until all classes are equal.
    class_balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    latent_dim: Annotated[int, Field(ge=1, le=4096)] = 128
    # diffaugment: the discriminator's images are always moved, recoloured and cut (Zhao et al.
    # 2020). ada: with a probability that rises while it overfits (Karras et al. 2020).
    augment: Literal["none", "diffaugment", "ada"] = "none"
    # Weight of the squared gradient at real images (Mescheder et al. 2018), and steps between two
    # such terms.
    r1_weight: Annotated[float, Field(ge=0)] = 0.0
    r1_interval: Annotated[int, Field(ge=1)] = 16
    precision: Literal["fp32", "bf16"] = "fp32"
    # Training stops when a class's variety, relative to its real images, falls below this: the
    # generator repeats one image.
    collapse_below: Annotated[float, Field(ge=0, lt=1)] = 0.05
