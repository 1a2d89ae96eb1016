"""A small convolutional network, trained from scratch, for small pictures and quick studies.

One block per entry of `channels`: convolution 3 x 3, batch normalisation, ReLU, and max-pooling by
2; then the mean over space and one linear layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from engine.classifiers import Classifier, ClassifierSpec
from engine.core.errors import StudyError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from engine.nets.classification import Training

_WEIGHTS = "model.safetensors"


class SmallSpec(ClassifierSpec):
    name: Literal["small"] = "small"
    channels: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1, max_length=8)
    ] = (16, 32, 64)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Small(Classifier[SmallSpec]):
    version = 1

    @staticmethod
    def in_words(spec: SmallSpec) -> str:
        widths = ", ".join(str(width) for width in spec.channels)
        blocks = f"{len(spec.channels)} block{'s' if len(spec.channels) > 1 else ''}"
        return f"a convolutional network of {blocks} ({widths} channels) trained from scratch"

    def check(self, training: Training) -> None:
        halvings = len(self.spec.channels)
        if self.preprocess.size < 2**halvings:
            raise StudyError(
                f"classifier: small halves the image {halvings} times, but it has only"
                f" {self.preprocess.size} px; shorten channels"
            )

    def build(self) -> Module:
        from torch import nn

        layers: list[Module] = []
        width = self.preprocess.shape[2]
        for channels in self.spec.channels:
            layers += [
                nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True), nn.MaxPool2d(2),
            ]  # fmt: skip
            width = channels
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(self.spec.dropout)]
        return nn.Sequential(*layers, nn.Linear(width, len(self.classes)))

    def prepare(self, pixels: Tensor) -> Tensor:
        import torch

        images = pixels.float().div_(127.5).sub_(1)
        return images.contiguous(memory_format=torch.channels_last)

    def save(self, network: Module, folder: Path) -> None:
        from safetensors.torch import save_file

        named = {name: value.contiguous() for name, value in network.state_dict().items()}
        save_file(named, folder / _WEIGHTS)

    def load(self, folder: Path) -> Module:
        from safetensors.torch import load_file

        network = self.build()
        network.load_state_dict(load_file(folder / _WEIGHTS))
        return network.eval()
