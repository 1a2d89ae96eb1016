"""Pooled features of any vision checkpoint of transformers (ResNet, MobileNet, EfficientNet, ViT
…) or timm: the input of its own classification head.

`model` is a hub id or a local folder; `timm/<name>` loads from timm, which must be installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from engine.core.errors import StudyError
from engine.embedders._checkpoint import CheckpointEmbedder, CheckpointSpec
from engine.nets.model_input import ModelInput

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class CnnSpec(CheckpointSpec):
    name: Literal["cnn"] = "cnn"


class Cnn(CheckpointEmbedder[CnnSpec]):
    version = 2

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
            return self._timm_model(pretrained=True), _output
        model, missing = self.pretrained(AutoModel)
        # A pooler without weights in the checkpoint would return noise; such a checkpoint's
        # classifier reads the class token.
        return model, _class_token if missing else _pooled

    def _timm_model(self, pretrained: bool) -> Any:
        name = self.spec.model.removeprefix("timm/")
        return _timm().create_model(name, pretrained=pretrained, num_classes=0)


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise StudyError(
            "embedder.model: timm/ needs timm, which is not installed; run pip install timm"
        ) from None
    return timm


def _output(network: Any, images: Tensor) -> Any:
    return network(images)


def _pooled(network: Module, images: Tensor) -> Tensor:
    output = network(images)
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    return _from_hidden(output.last_hidden_state) if pooled is None else pooled


def _class_token(network: Module, images: Tensor) -> Tensor:
    return _from_hidden(network(images).last_hidden_state)


def _from_hidden(hidden: Tensor) -> Tensor:
    """The mean of feature maps over space, or the first (class) token of a sequence."""
    return hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden[:, 0]
