"""DCGAN (Radford et al. 2016), conditional on the class or on the cluster within the class."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from engine.generators._adversarial import AdversarialGenerator, AdversarialSpec


class DcganSpec(AdversarialSpec):
    name: Literal["dcgan"] = "dcgan"
    # Channels of the generator before its last doubling; they double at each smaller size, up to
    # max_width.
    width: Annotated[int, Field(ge=16, le=512, multiple_of=16)] = 64
    max_width: Annotated[int, Field(ge=16, le=2048, multiple_of=16)] = 512
    loss: Literal["hinge", "non_saturating"] = "hinge"
    generator_norm: Literal["batch", "group"] = "batch"
    # spectral: bounds the discriminator's slope. batch, group: normalise its feature maps.
    discriminator_normalisation: Literal["spectral", "batch", "group", "none"] = "spectral"


class Dcgan(AdversarialGenerator[DcganSpec]):
    version = 1
    sizes = (8, 16, 32, 64, 128)

    def objective(self) -> str:
        return self.spec.loss

    def config(self, classes: int) -> dict[str, Any]:
        widths = [self.spec.width]
        while 4 * 2 ** len(widths) < self.preprocess.size:
            widths.append(min(2 * widths[-1], self.spec.max_width))
        return {
            "latent_dim": self.spec.latent_dim, "classes": classes, "widths": widths[::-1],
            "channels": self.preprocess.shape[2], "norm": self.spec.generator_norm,
        }  # fmt: skip

    def network(self, config: dict[str, Any]) -> Any:
        from engine.nets import dcgan

        return dcgan.Generator(**config)

    def networks(self, classes: int) -> tuple[Any, Any]:
        from engine.nets import dcgan

        config = self.config(classes)
        return self.network(config), dcgan.Discriminator(
            classes, config["widths"][::-1], config["channels"],
            self.spec.discriminator_normalisation,
        )  # fmt: skip
