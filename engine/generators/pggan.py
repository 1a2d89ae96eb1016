"""Progressive growing of GANs (Karras et al. 2018), conditional on the class or on the cluster
within the class.

What is saved is `generator.safetensors`, the averaged weights of `engine.nets.pggan.Generator`, and
`config.json` with what builds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from engine.core.errors import StudyError
from engine.core.fit import FitContext
from engine.generators import (
    Conditions,
    Generator,
    GeneratorSpec,
    SampleBatch,
    TrainingImages,
)
from engine.generators.dcgan import conditioned, fit_adversarial, load_network, sample_network
from engine.nets.adversarial import AdversarialSettings

_LARGEST = 256


class PgganSpec(AdversarialSettings, GeneratorSpec):
    name: Literal["pggan"] = "pggan"
    # class: one vector for each class. cluster: one for each cluster of each class.
    condition: Literal["class", "cluster"] = "class"
    # Channels at full size; twice as many at each smaller one, up to max_width.
    width: Annotated[int, Field(ge=8, le=512)] = 32
    max_width: Annotated[int, Field(ge=8, le=2048)] = 512
    # The share of the steps that full size has.
    last_level_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    # Of the gradient's distance from 1 between real and generated images (Gulrajani et al. 2017).
    gradient_penalty: Annotated[float, Field(gt=0)] = 10.0
    generator_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    discriminator_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.99
    # Sampling: latents nearer to the mean make likelier and more alike images.
    truncation: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _fits(self) -> PgganSpec:
        if self.max_width < self.width:
            raise PydanticCustomError("explained", "max_width is below width")
        return self


class Pggan(Generator):
    version: ClassVar[int] = 2
    Spec: ClassVar[type[GeneratorSpec]] = PgganSpec
    trainable = True
    sampling_fields: ClassVar[tuple[str, ...]] = ("truncation",)
    spec: PgganSpec

    def check(self) -> None:
        size = self.preprocess.size
        if size & (size - 1) or not 8 <= size <= _LARGEST:
            raise StudyError(
                f"generators: pggan grows to 8, 16, 32, 64, 128 or {_LARGEST} px, not {size};"
                " change preprocess.size"
            )

    def uses_clusters(self) -> bool:
        return self.spec.condition == "cluster"

    def fingerprint(self) -> dict[str, Any]:
        return {"truncation": self.spec.truncation}

    def fit(self, context: FitContext, data: TrainingImages, seed: int) -> None:
        from engine.nets.adversarial import AdversarialTraining, Wasserstein

        conditions = Conditions.of(data, self.spec.condition)
        training = AdversarialTraining(
            context,
            lambda: self._networks(len(conditions)),
            Wasserstein(),
            conditioned(data, conditions, self.spec.class_balance),
            self.spec,
            seed,
            gradient_penalty=self.spec.gradient_penalty,
        )
        fit_adversarial(context, training, conditions, self._config(len(conditions)))

    def _config(self, classes: int) -> dict[str, Any]:
        return {
            "latent_dim": self.spec.latent_dim, "classes": classes, "width": self.spec.width,
            "max_width": self.spec.max_width, "levels": self.preprocess.size.bit_length() - 2,
            "channels": self.preprocess.shape[2],
        }  # fmt: skip

    def _networks(self, classes: int) -> tuple[Any, Any]:
        from engine.nets import pggan

        config = self._config(classes)
        schedule = pggan.growth(self.spec.train_steps, config["levels"], self.spec.last_level_share)
        shared = {name: value for name, value in config.items() if name != "latent_dim"}
        return (
            pggan.Generator(**config, schedule=schedule),
            pggan.Discriminator(**shared, schedule=schedule),
        )

    def load(self, weights: Path | None, device: str) -> None:
        from engine.nets import pggan

        if weights is None:
            raise StudyError("pggan has no weights to load; train it first")
        self.device = device
        self.conditions = Conditions.load(weights, self.spec.condition)
        self.network = load_network(pggan.Generator, weights, device)

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        numbers = self.conditions.numbered(batch.labels, batch.clusters)
        return sample_network(
            self.network, numbers, batch.seeds, self.spec.latent_dim, self.spec.truncation,
            self.device,
        )  # fmt: skip
