"""DINOv2 (Oquab et al. 2023) and DINOv3 (Siméoni et al. 2025): the class token after the last
normalisation, scaled to length 1, as their authors use it for nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from engine.embedders._checkpoint import CheckpointEmbedder, CheckpointSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class DinoSpec(CheckpointSpec):
    name: Literal["dino"] = "dino"
    model: str = "facebook/dinov2-base"


class Dino(CheckpointEmbedder[DinoSpec]):
    version = 1
    unit_length = True

    def network(self) -> tuple[Module, Callable[[Module, Tensor], Tensor]]:
        from transformers import AutoModel

        return self.pretrained(AutoModel)[0], _class_token


def _class_token(network: Any, images: Tensor) -> Any:
    return network(images).last_hidden_state[:, 0]
