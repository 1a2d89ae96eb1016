"""Shared by classifiers with a network of transformers.

Weights are saved as a transformers folder: `pipeline("image-classification", folder)` opens it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.classifiers import Classifier
from engine.core.spec import S
from engine.nets.images import normalised
from engine.nets.pretrained import image_processor_settings

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class TransformersClassifier(Classifier[S]):
    """A subclass builds the network and sets the preprocessing of its inputs: `size` (height,
    width), `mean` and `std`."""

    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def prepare(self, pixels: Tensor) -> Tensor:
        return normalised(pixels, self.size, self.mean, self.std)

    def save(self, network: Module, folder: Path) -> None:
        model: Any = network.model
        model.save_pretrained(folder, safe_serialization=True)
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True, "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255,
            "size": {"height": self.size[0], "width": self.size[1]}, "resample": 3,
            "image_mean": list(self.mean), "image_std": list(self.std),
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))

    def load(self, folder: Path) -> Module:
        from transformers import AutoModelForImageClassification

        self.read_processor(str(folder), None)
        model = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True)
        return logits_of(model).eval()

    def read_processor(self, model: str, revision: str | None) -> None:
        """Read size, mean and deviation from the checkpoint. Raises `StudyError`."""
        settings = image_processor_settings("classifier", model, revision)
        self.size, self.mean, self.std = settings["size"], settings["mean"], settings["std"]

    def labels(self) -> dict[str, Any]:
        """The classes as settings of a transformers configuration."""
        return {
            "num_labels": len(self.classes), "id2label": dict(enumerate(self.classes)),
            "label2id": {name: number for number, name in enumerate(self.classes)},
        }  # fmt: skip


def logits_of(model: Any, frozen: Iterable[Module] = ()) -> Module:
    """A module that returns only logits; the modules `frozen` stay in evaluation mode."""
    from torch import nn

    in_evaluation = list(frozen)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def train(self, mode: bool = True) -> Logits:
            super().train(mode)
            for module in in_evaluation:
                module.eval()
            return self

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.model(images).logits
            return logits

    return Logits()
