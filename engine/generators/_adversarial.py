"""What generators share that are trained against a discriminator.

What is saved is `generator.safetensors`, the averaged weights of the generator's network, and
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
from engine.core.rng import derive_seed
from engine.data.images import grid
from engine.generators import Conditions, Generator, GeneratorSpec, SampleBatch, TrainingImages
from engine.nets.adversarial import AdversarialSettings, Conditioned, Objective
from engine.nets.training import balanced_weights, run
from engine.work.fit import FitContext

# Of a look at a training: classes, and images of each.
_SHOWN, _EACH = 16, 8


class AdversarialSpec(AdversarialSettings, GeneratorSpec):
    # class: one embedding for each class. cluster: one for each cluster of each class.
    condition: Literal["class", "cluster"] = "class"
    # Channels of the generator's widest maps, and most channels of any.
    width: Annotated[int, Field(ge=8, le=512)]
    max_width: Annotated[int, Field(ge=8, le=2048)] = 512
    # Sampling: latents nearer to the mean make likelier and more alike images.
    truncation: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _widths(self) -> AdversarialSpec:
        if self.max_width < self.width:
            raise PydanticCustomError("explained", "max_width is below width")
        return self


class AdversarialGenerator(Generator):
    """A subclass says which networks, and which sizes of images it makes."""

    trainable = True
    sampling_fields: ClassVar[tuple[str, ...]] = ("truncation",)
    sizes: ClassVar[tuple[int, ...]]
    spec: AdversarialSpec

    def config(self, classes: int) -> dict[str, Any]:
        """What builds the generator's network."""
        raise NotImplementedError

    def network(self, config: dict[str, Any]) -> Any:
        """The generator's network, to sample with."""
        raise NotImplementedError

    def networks(self, classes: int) -> tuple[Any, Any]:
        """Generator and discriminator, to train."""
        raise NotImplementedError

    def objective(self) -> Objective:
        raise NotImplementedError

    def gradient_penalty(self) -> float:
        return 0.0

    def check(self) -> None:
        if self.preprocess.size not in self.sizes:
            *most, last = (str(size) for size in self.sizes)
            raise StudyError(
                f"generators: {self.spec.name} makes images of {', '.join(most)} or {last} px, not"
                f" {self.preprocess.size}; change preprocess.size"
            )

    def uses_clusters(self) -> bool:
        return self.spec.condition == "cluster"

    def fingerprint(self) -> dict[str, Any]:
        return {"truncation": self.spec.truncation}

    def fit(self, context: FitContext, data: TrainingImages, seed: int) -> None:
        from safetensors.torch import save_file

        from engine.nets.adversarial import AdversarialTraining

        conditions = Conditions.of(data, self.spec.condition)
        training = AdversarialTraining(
            context,
            lambda: self.networks(len(conditions)),
            self.objective(),
            Conditioned(
                data.pixels, conditions.numbered(data.labels, data.clusters),
                balanced_weights(data.labels, self.spec.class_balance), data.image_ids,
            ),
            self.spec,
            seed,
            gradient_penalty=self.gradient_penalty(),
        )  # fmt: skip
        steps = self.spec.train_steps

        def look() -> bytes:
            shown = range(min(_SHOWN, len(conditions)))
            images = self._images(
                training.average,
                np.repeat(np.asarray(shown), _EACH),
                [derive_seed(seed, "look", number) for number in range(len(shown) * _EACH)],
                str(training.accelerator.device),
            )
            small = [np.zeros(self.preprocess.shape, np.uint8) if isinstance(image, str) else image
                     for image in images]  # fmt: skip
            return grid([small[row * _EACH : (row + 1) * _EACH] for row in shown])

        history = run(
            context, training, steps, checkpoint_every=context.checkpoint_every,
            report_every=max(1, min(50, steps // 20)), measure=training.look_at_variety,
            look=look,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            state = training.average.state_dict()
            save_file(
                {key: value.cpu().contiguous() for key, value in state.items()},
                folder / "generator.safetensors",
            )
            (folder / "config.json").write_text(json.dumps(self.config(len(conditions))))
            (folder / "history.json").write_text(json.dumps(history))
            conditions.save(folder)
            last = {name: value for name, value in history[-1].items() if name != "step"}
            context.publish(folder, {**last, "steps": steps})

    def load(self, weights: Path | None, device: str) -> None:
        import torch
        from safetensors.torch import load_file

        if weights is None:
            raise StudyError(f"{self.spec.name} has no weights to load; train it first")
        self.device = device
        self.conditions = Conditions.load(weights, self.spec.condition)
        network = self.network(json.loads((weights / "config.json").read_text()))
        network.load_state_dict(load_file(weights / "generator.safetensors"))
        self.loaded = network.to(device, memory_format=torch.channels_last).eval()

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        numbers = self.conditions.numbered(batch.labels, batch.clusters)
        return self._images(self.loaded, numbers, batch.seeds, self.device)

    def _images(
        self, network: Any, numbers: np.ndarray, seeds: Any, device: str
    ) -> list[np.ndarray | str]:
        """An image for each condition number and seed, or the reason why there is none."""
        import torch

        # On the CPU, one generator for each image: neighbours, batch size and device change no
        # draw.
        latents = torch.stack(
            [
                torch.randn(self.spec.latent_dim, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )
        with torch.inference_mode():
            images = network(
                (self.spec.truncation * latents).to(device), torch.from_numpy(numbers).to(device)
            ).float()
        side = self.preprocess.size
        if images.shape[-1] != side:  # a network that has not grown up yet
            images = torch.nn.functional.interpolate(images, (side, side))
        finite = images.isfinite().flatten(1).all(dim=1).tolist()
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        held = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return [image if good else "not_finite" for image, good in zip(held, finite, strict=True)]
