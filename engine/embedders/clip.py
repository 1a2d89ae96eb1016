"""The image encoders of CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023) and their kin:
vectors of length 1 in the space that they share with text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from engine.embedders import EmbedderSpec
from engine.embedders._checkpoint import CheckpointEmbedder, CheckpointSpec

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class ClipSpec(CheckpointSpec):
    name: Literal["clip"] = "clip"
    model: str = "openai/clip-vit-base-patch32"


class Clip(CheckpointEmbedder):
    version: ClassVar[int] = 2
    Spec: ClassVar[type[EmbedderSpec]] = ClipSpec
    unit_length: ClassVar[bool] = True

    def network(self) -> tuple[Module, Callable[[Module, Tensor], Tensor]]:
        from transformers import (
            AutoConfig,
            AutoModel,
            CLIPVisionModelWithProjection,
            SiglipVisionModel,
        )

        kind = AutoConfig.from_pretrained(
            self.spec.model, revision=self.spec.revision, trust_remote_code=False
        ).model_type
        # The two that are common are loaded without their text encoders.
        if kind in ("clip", "clip_vision_model"):
            return self.pretrained(CLIPVisionModelWithProjection)[0], _projected
        if kind in ("siglip", "siglip_vision_model"):
            return self.pretrained(SiglipVisionModel)[0], _pooled
        model, _ = self.pretrained(AutoModel)
        if not hasattr(model, "get_image_features"):
            raise ValueError(f"a {kind} shares no space with text; name it as cnn or dino")
        return model, _features


def _projected(network: Module, images: Tensor) -> Tensor:
    found: Tensor = network(images).image_embeds
    return found


def _pooled(network: Module, images: Tensor) -> Tensor:
    found: Tensor = network(images).pooler_output
    return found


def _features(network: Any, images: Tensor) -> Tensor:
    found = network.get_image_features(pixel_values=images)
    made: Tensor = getattr(found, "pooler_output", found)
    return made
