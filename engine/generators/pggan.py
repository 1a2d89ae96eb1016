"""Progressive growing of GANs (Karras et al. 2018), conditional on the class or on the cluster
within the class."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from engine.core.spec import explained
from engine.generators._adversarial import AdversarialGenerator, AdversarialSpec


class PgganSpec(AdversarialSpec):
    name: Literal["pggan"] = "pggan"
    # Channels at full size; they double at each smaller size, up to max_width.
    width: Annotated[int, Field(ge=8, le=512)] = 32
    max_width: Annotated[int, Field(ge=8, le=2048)] = 512
    # Share of the steps that train full size.
    last_level_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    # Weight of (gradient norm - 1)² between real and generated images (Gulrajani et al. 2017).
    gradient_penalty: Annotated[float, Field(gt=0)] = 10.0
    generator_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    discriminator_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    adam_beta2: Annotated[float, Field(gt=0, lt=1)] = 0.99

    @model_validator(mode="after")
    def _augment(self) -> PgganSpec:
        if self.augment == "ada":
            # ada needs the sign of logits, which a Wasserstein score does not have.
            raise explained("pggan does not support augment: ada; set diffaugment")
        return self


class Pggan(AdversarialGenerator[PgganSpec]):
    version = 3
    sizes = (8, 16, 32, 64, 128, 256)

    def objective(self) -> str:
        return "wasserstein"

    def gradient_penalty(self) -> float:
        return self.spec.gradient_penalty

    def config(self, classes: int) -> dict[str, Any]:
        return {
            "latent_dim": self.spec.latent_dim, "classes": classes, "width": self.spec.width,
            "max_width": self.spec.max_width, "levels": self.preprocess.size.bit_length() - 2,
            "channels": self.preprocess.shape[2],
        }  # fmt: skip

    def network(self, config: dict[str, Any]) -> Any:
        from engine.nets import pggan

        return pggan.Generator(**config)

    def networks(self, classes: int) -> tuple[Any, Any]:
        from engine.nets import pggan

        config = self.config(classes)
        schedule = pggan.growth(self.spec.train_steps, config["levels"], self.spec.last_level_share)
        shared = {name: value for name, value in config.items() if name != "latent_dim"}
        return (
            pggan.Generator(**config, schedule=schedule),
            pggan.Discriminator(**shared, schedule=schedule),
        )
