"""CLIP's image encoder with its projection (Radford et al., 2021): vectors of length 1 in the space
shared with text."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.core.errors import StudyError
from engine.embedders import Embedder, EmbedderSpec
from engine.nets.checkpoints import dtype_of, image_processor_settings
from engine.nets.images import to_model_input


class ClipSpec(EmbedderSpec):
    name: Literal["clip"] = "clip"
    # A hub id or a local folder.
    model: str = "openai/clip-vit-base-patch32"
    revision: str | None = None
    input_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


class Clip(Embedder):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[EmbedderSpec]] = ClipSpec
    spec: ClipSpec

    def load(self, device: str) -> None:
        import torch
        from transformers import CLIPVisionModelWithProjection

        self.torch, self.device = torch, device
        self.dtype = dtype_of(self.spec.precision)
        processor = image_processor_settings("embedder", self.spec.model, self.spec.revision)
        try:
            model = CLIPVisionModelWithProjection.from_pretrained(
                self.spec.model,
                revision=self.spec.revision,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError) as error:
            raise StudyError(
                f"embedder.model: {self.spec.model}: {' '.join(str(error).split())[:200]}"
            ) from None
        side = self.spec.input_size
        self.size = (side, side) if side else processor["size"]
        self.mean, self.std = processor["mean"], processor["std"]
        self.model = model.to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        self.width = int(model.config.projection_dim)

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        torch = self.torch
        with torch.inference_mode():
            images = to_model_input(pixels, self.size, self.mean, self.std, self.device).to(
                self.dtype
            )
            vectors = self.model(images).image_embeds.float()
            return np.asarray(torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy())
