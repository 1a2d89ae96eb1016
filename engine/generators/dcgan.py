"""DCGAN (Radford et al. 2016), conditional on the class or on the cluster within the class.

What is saved is `generator.safetensors`, the averaged weights of `engine.nets.dcgan.Generator`, and
`config.json` with what builds it.
"""

from __future__ import annotations

import json
import tempfile
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
from engine.nets.adversarial import AdversarialSettings, Conditioned
from engine.nets.training import balanced_weights, run

_LARGEST = 128


class DcganSpec(AdversarialSettings, GeneratorSpec):
    name: Literal["dcgan"] = "dcgan"
    # class: one embedding for each class. cluster: one for each cluster of each class.
    condition: Literal["class", "cluster"] = "class"
    # Channels of the generator before its last doubling; twice as many at each smaller size, up to
    # max_width.
    width: Annotated[int, Field(ge=16, le=512, multiple_of=16)] = 64
    max_width: Annotated[int, Field(ge=16, le=2048, multiple_of=16)] = 512
    loss: Literal["hinge", "non_saturating"] = "hinge"
    generator_norm: Literal["batch", "group"] = "batch"
    # spectral: bounds the discriminator's slope. batch, group: of its feature maps.
    discriminator_normalisation: Literal["spectral", "batch", "group", "none"] = "spectral"
    # Sampling: latents nearer to the mean make likelier and more alike images.
    truncation: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _widths(self) -> DcganSpec:
        if self.max_width < self.width:
            raise PydanticCustomError("explained", "max_width is below width")
        return self


class Dcgan(Generator):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[GeneratorSpec]] = DcganSpec
    trainable = True
    sampling_fields: ClassVar[tuple[str, ...]] = ("truncation",)
    spec: DcganSpec

    def check(self) -> None:
        size = self.preprocess.size
        if size & (size - 1) or not 8 <= size <= _LARGEST:
            raise StudyError(
                f"generators: dcgan makes images of 8, 16, 32, 64 or {_LARGEST} px, not {size};"
                " change preprocess.size"
            )

    def uses_clusters(self) -> bool:
        return self.spec.condition == "cluster"

    def fingerprint(self) -> dict[str, Any]:
        return {"truncation": self.spec.truncation}

    def fit(self, context: FitContext, data: TrainingImages, seed: int) -> None:
        from engine.nets.adversarial import AdversarialTraining, Hinge, NonSaturating

        conditions = Conditions.of(data, self.spec.condition)
        training = AdversarialTraining(
            context,
            lambda: self._networks(len(conditions)),
            Hinge() if self.spec.loss == "hinge" else NonSaturating(),
            conditioned(data, conditions, self.spec.class_balance),
            self.spec,
            seed,
        )
        fit_adversarial(context, training, conditions, self._config(len(conditions)))

    def _config(self, classes: int) -> dict[str, Any]:
        widths = [self.spec.width]
        while 4 * 2 ** len(widths) < self.preprocess.size:
            widths.append(min(2 * widths[-1], self.spec.max_width))
        return {
            "latent_dim": self.spec.latent_dim, "classes": classes, "widths": widths[::-1],
            "channels": self.preprocess.shape[2], "norm": self.spec.generator_norm,
        }  # fmt: skip

    def _networks(self, classes: int) -> tuple[Any, Any]:
        from engine.nets import dcgan

        config = self._config(classes)
        return dcgan.Generator(**config), dcgan.Discriminator(
            classes, config["widths"][::-1], config["channels"],
            self.spec.discriminator_normalisation,
        )  # fmt: skip

    def load(self, weights: Path | None, device: str) -> None:
        from engine.nets import dcgan

        if weights is None:
            raise StudyError("dcgan has no weights to load; train it first")
        self.device = device
        self.conditions = Conditions.load(weights, self.spec.condition)
        self.network = load_network(dcgan.Generator, weights, device)

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        numbers = self.conditions.numbered(batch.labels, batch.clusters)
        return sample_network(
            self.network, numbers, batch.seeds, self.spec.latent_dim, self.spec.truncation,
            self.device,
        )  # fmt: skip


def conditioned(data: TrainingImages, conditions: Conditions, balance: float) -> Conditioned:
    """Training images by the numbers of their conditions."""
    return Conditioned(
        data.pixels, conditions.numbered(data.labels, data.clusters),
        balanced_weights(data.labels, balance), data.image_ids,
    )  # fmt: skip


def fit_adversarial(
    context: FitContext, training: Any, conditions: Conditions, config: dict[str, Any]
) -> None:
    """Train to the end and publish the averaged generator with what builds it."""
    from safetensors.torch import save_file

    settings: AdversarialSettings = training.settings
    history = run(
        context, training, settings.train_steps, checkpoint_every=context.checkpoint_every,
        report_every=max(1, min(50, settings.train_steps // 20)), measure=training.look_at_variety,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state = training.average.state_dict()
        save_file(
            {key: value.cpu().contiguous() for key, value in state.items()},
            folder / "generator.safetensors",
        )
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "history.json").write_text(json.dumps(history))
        conditions.save(folder)
        last = {name: value for name, value in history[-1].items() if name != "step"}
        context.publish(folder, {**last, "steps": settings.train_steps})


def load_network(build: Any, weights: Path, device: str) -> Any:
    """The generator that `fit_adversarial` published."""
    import torch
    from safetensors.torch import load_file

    network = build(**json.loads((weights / "config.json").read_text()))
    network.load_state_dict(load_file(weights / "generator.safetensors"))
    return network.to(device, memory_format=torch.channels_last).eval()


def sample_network(
    network: Any, numbers: np.ndarray, seeds: Any, latent_dim: int, truncation: float, device: str
) -> list[np.ndarray | str]:
    """An image for each condition number and seed, or the reason why there is none."""
    import torch

    # On the CPU, one generator for each image: neighbours, batch size and device change no draw.
    latents = torch.stack(
        [torch.randn(latent_dim, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    with torch.inference_mode():
        images = network(
            (truncation * latents).to(device), torch.from_numpy(numbers).to(device)
        ).float()
    finite = images.isfinite().flatten(1).all(dim=1).tolist()
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    held = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [image if good else "not_finite" for image, good in zip(held, finite, strict=True)]
