"""The image encoders of CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023) and similar models:
vectors of length 1 in the joint space of images and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from engine.core.paths import expanded
from engine.embedders._checkpoint import CheckpointEmbedder, CheckpointSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class ClipSpec(CheckpointSpec):
    name: Literal["clip"] = "clip"
    model: str = "openai/clip-vit-base-patch32"


class Clip(CheckpointEmbedder[ClipSpec]):
    version = 2
    unit_length = True

    def network(self) -> tuple[Module, Callable[[Module, Tensor], Tensor]]:
        from transformers import (
            AutoConfig,
            AutoModel,
            CLIPVisionModelWithProjection,
            SiglipVisionModel,
        )

        kind = AutoConfig.from_pretrained(
            expanded(self.spec.model), revision=self.spec.revision, trust_remote_code=False
        ).model_type
        # The two common kinds are loaded without their text encoders.
        if kind in ("clip", "clip_vision_model"):
            return self.pretrained(CLIPVisionModelWithProjection)[0], _projected
        if kind in ("siglip", "siglip_vision_model"):
            return self.pretrained(SiglipVisionModel)[0], _pooled
        model, _ = self.pretrained(AutoModel)
        if not hasattr(model, "get_image_features"):
            raise ValueError(f"a {kind} has no joint space with text; use the embedder cnn or dino")
        return model, _features


def _projected(network: Any, images: Tensor) -> Any:
    return network(images).image_embeds


def _pooled(network: Any, images: Tensor) -> Any:
    return network(images).pooler_output


def _features(network: Any, images: Tensor) -> Any:
    output = network.get_image_features(pixel_values=images)
    return getattr(output, "pooler_output", output)
