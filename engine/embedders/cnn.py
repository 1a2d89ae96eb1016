"""Pooled features of any vision checkpoint of transformers (ResNet, MobileNet, EfficientNet, ViT,
DINOv2 …) or timm.

`model` is a hub id or a local folder; `timm/<name>` asks timm where it is installed. Images are
resized and normalised as the checkpoint's own preprocessor file says, on tensors.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.core.errors import StudyError
from engine.embedders import Embedder, EmbedderSpec
from engine.nets.checkpoints import dtype_of, image_processor_settings
from engine.nets.images import to_model_input


class CnnSpec(EmbedderSpec):
    name: Literal["cnn"] = "cnn"
    model: str
    revision: str | None = None
    # Side in pixels; None: what the checkpoint was trained at.
    input_size: Annotated[int, Field(ge=16, le=1024)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


class Cnn(Embedder):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[EmbedderSpec]] = CnnSpec
    spec: CnnSpec

    def load(self, device: str) -> None:
        import torch

        self.torch, self.device = torch, device
        self.dtype = dtype_of(self.spec.precision)
        if self.spec.model.startswith("timm/"):
            self._load_timm()
        else:
            self._load_transformers()
        self.model.to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        with torch.inference_mode():
            self.width = int(
                self._features(
                    torch.zeros(1, 3, *self.size, device=device, dtype=self.dtype)
                ).shape[1]
            )

    def _load_transformers(self) -> None:
        from transformers import AutoModel

        processor = image_processor_settings("embedder", self.spec.model, self.spec.revision)
        try:
            self.model = AutoModel.from_pretrained(
                self.spec.model,
                revision=self.spec.revision,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError) as error:
            raise StudyError(
                f"embedder.model: {self.spec.model}: {' '.join(str(error).split())[:200]}"
            ) from None
        self.size, self.mean, self.std = processor["size"], processor["mean"], processor["std"]
        if self.spec.input_size:
            self.size = (self.spec.input_size, self.spec.input_size)
        self._features = self._transformers_features

    def _transformers_features(self, images: Any) -> Any:
        output = self.model(images)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            hidden = output.last_hidden_state
            # Convolutional maps are averaged over space; of token sequences the class token stands
            # first.
            pooled = hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden[:, 0]
        return pooled.flatten(1)

    def _load_timm(self) -> None:
        try:
            import timm
        except ImportError:
            raise StudyError(
                f"embedder.model: {self.spec.model} needs timm, which is not installed; pip"
                " install timm"
            ) from None
        self.model = timm.create_model(
            self.spec.model.removeprefix("timm/"), pretrained=True, num_classes=0
        )
        settings = timm.data.resolve_model_data_config(self.model)
        side = self.spec.input_size
        self.size = (side, side) if side else tuple(settings["input_size"][1:])
        self.mean, self.std = settings["mean"], settings["std"]
        self._features = self.model

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        torch = self.torch
        with torch.inference_mode():
            images = to_model_input(pixels, self.size, self.mean, self.std, self.device).to(
                self.dtype
            )
            return np.asarray(self._features(images).float().cpu().numpy())
