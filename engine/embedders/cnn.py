"""Pooled features of any vision checkpoint of transformers (ResNet, MobileNet, EfficientNet, ViT
…) or timm, as its own classifier would be given them.

`model` is a hub id or a local folder; `timm/<name>` asks timm where it is installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from engine.core.errors import StudyError
from engine.embedders import EmbedderSpec
from engine.embedders._checkpoint import CheckpointEmbedder, CheckpointSpec
from engine.nets.model_input import ModelInput

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class CnnSpec(CheckpointSpec):
    name: Literal["cnn"] = "cnn"


class Cnn(CheckpointEmbedder):
    version: ClassVar[int] = 2
    Spec: ClassVar[type[EmbedderSpec]] = CnnSpec
    spec: CnnSpec

    def open(self) -> None:
        if not self.spec.model.startswith("timm/"):
            super().open()
            return
        from transformers import CLIPImageProcessorPil

        settings = _timm().data.resolve_model_data_config(self._timm_model(pretrained=False))
        side = settings["input_size"][-1]
        resampling = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": math.floor(side / settings["crop_pct"])},
            crop_size={"height": side, "width": side},
            resample=resampling[settings["interpolation"]],
            image_mean=list(settings["mean"]), image_std=list(settings["std"]),
        )  # fmt: skip
        self.input = ModelInput(processor, self.spec.input_size)

    def network(self) -> tuple[Module, Callable[[Module, Tensor], Tensor]]:
        from transformers import AutoModel

        if self.spec.model.startswith("timm/"):
            return self._timm_model(pretrained=True), _as_it_is
        model, missing = self.pretrained(AutoModel)
        # A pooler that the checkpoint has no weights for would answer with noise: its classifier
        # was given the class token.
        return model, _class_token if missing else _pooled

    def _timm_model(self, pretrained: bool) -> Any:
        name = self.spec.model.removeprefix("timm/")
        return _timm().create_model(name, pretrained=pretrained, num_classes=0)


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise StudyError(
            "embedder.model: timm/ needs timm, which is not installed; pip install timm"
        ) from None
    return timm


def _as_it_is(network: Module, images: Tensor) -> Tensor:
    found: Tensor = network(images)
    return found


def _pooled(network: Module, images: Tensor) -> Tensor:
    output = network(images)
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    return _of_hidden(output.last_hidden_state) if pooled is None else pooled


def _class_token(network: Module, images: Tensor) -> Tensor:
    return _of_hidden(network(images).last_hidden_state)


def _of_hidden(hidden: Tensor) -> Tensor:
    """Maps are averaged over space; of a sequence of tokens, the class token stands first."""
    return hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden[:, 0]
