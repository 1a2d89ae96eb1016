"""Generators that are trained against a discriminator.

The weights are `generator.safetensors`, the averaged weights of the generator's network, and
`config.json`, the arguments that build it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import TypeVar

from engine.core.errors import StudyError
from engine.core.rng import derive_seed
from engine.core.spec import explained
from engine.data.images import grid
from engine.generators import Conditions, Generator, GeneratorSpec, SampleBatch, TrainingImages
from engine.nets.adversarial_settings import AdversarialSettings
from engine.nets.images import or_black, seeded_noise, to_pixels
from engine.nets.training import balanced_weights, run
from engine.work.fit import FitContext

# A sample grid: classes, and images of each.
_CLASSES, _EACH = 16, 8


class AdversarialSpec(AdversarialSettings, GeneratorSpec):
    # class: one embedding for each class. cluster: one for each cluster of each class.
    condition: Literal["class", "cluster"] = "class"
    # Channels of the generator's widest maps, and the maximum for all maps.
    width: Annotated[int, Field(ge=8, le=512)]
    max_width: Annotated[int, Field(ge=8, le=2048)] = 512
    # Sampling: latents nearer to the mean make likelier and more similar images.
    truncation: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _widths(self) -> AdversarialSpec:
        if self.max_width < self.width:
            raise explained("max_width is below width")
        return self


A = TypeVar("A", bound=AdversarialSpec, default=Any)


class AdversarialGenerator(Generator[A]):
    """A subclass defines the networks, and the sizes of images that they make."""

    trainable = True
    sampling_fields = ("truncation",)
    sizes: ClassVar[tuple[int, ...]]

    def config(self, classes: int) -> dict[str, Any]:
        """The arguments that build the generator's network."""
        raise NotImplementedError

    def network(self, config: dict[str, Any]) -> Any:
        """The generator's network, for sampling."""
        raise NotImplementedError

    def networks(self, classes: int) -> tuple[Any, Any]:
        """Generator and discriminator, for training."""
        raise NotImplementedError

    def objective(self) -> str:
        """The losses of both networks, by name (`engine.nets.adversarial`)."""
        raise NotImplementedError

    def gradient_penalty(self) -> float:
        """Weight of the gradient penalty; 0: none."""
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

        from engine.nets.adversarial import AdversarialTraining, ConditionedImages

        conditions = Conditions.of(data, self.spec.condition)
        training = AdversarialTraining(
            context,
            lambda: self.networks(len(conditions)),
            self.objective(),
            ConditionedImages(
                data.pixels, conditions.numbered(data.labels, data.clusters),
                balanced_weights(data.labels, self.spec.class_balance), data.image_ids,
            ),
            self.spec,
            seed,
            gradient_penalty=self.gradient_penalty(),
        )  # fmt: skip
        steps = self.spec.train_steps

        def sample_grid() -> bytes:
            count = min(_CLASSES, len(conditions))
            images = self._images(
                training.average,
                np.repeat(np.arange(count), _EACH),
                [derive_seed(seed, "look", number) for number in range(count * _EACH)],
                str(training.accelerator.device),
            )
            cells = or_black(images, self.preprocess.shape)
            return grid([cells[row * _EACH : (row + 1) * _EACH] for row in range(count)])

        history = run(
            context, training, steps, checkpoint_every=context.checkpoint_every,
            report_every=max(1, min(50, steps // 20)), measure=training.measure_variety,
            sample_grid=sample_grid,
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
            raise StudyError(f"generators: {self.spec.name} has no weights to load; train it first")
        self.device = device
        self.conditions = Conditions.load(weights, self.spec.condition)
        network = self.network(json.loads((weights / "config.json").read_text()))
        network.load_state_dict(load_file(weights / "generator.safetensors"))
        self.loaded = network.to(device, memory_format=torch.channels_last).eval()

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        numbers = self.conditions.numbered(batch.labels, batch.clusters)
        return self._images(self.loaded, numbers, batch.seeds, self.device)

    def _images(
        self, network: Any, numbers: np.ndarray, seeds: Sequence[int], device: str
    ) -> list[np.ndarray | str]:
        """An image for each condition number and seed, or the reason why there is none."""
        import torch

        latents = self.spec.truncation * seeded_noise(seeds, self.spec.latent_dim)
        with torch.inference_mode():
            images = network(latents.to(device), torch.from_numpy(numbers).to(device)).float()
        side = self.preprocess.size
        if images.shape[-1] != side:  # a network that has not grown to full size yet
            images = torch.nn.functional.interpolate(images, (side, side))
        return to_pixels(images)
