"""The pixels themselves, small, grey and normalised in brightness and contrast: a baseline without
weights."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from engine.embedders import Embedder, EmbedderSpec


class PixelsSpec(EmbedderSpec):
    name: Literal["pixels"] = "pixels"
    side: Annotated[int, Field(ge=4, le=64)] = 16


class Pixels(Embedder[PixelsSpec]):
    version = 1
    light = True

    def load(self, device: str) -> None:
        self.width = self.spec.side**2

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        from PIL import Image

        side = (self.spec.side, self.spec.side)
        grey = pixels.astype(np.float32).mean(axis=-1)
        small = np.stack(
            [
                np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BOX)).ravel()
                for image in grey
            ]
        )
        small = small - small.mean(axis=1, keepdims=True)
        norm = np.linalg.norm(small, axis=1, keepdims=True)
        # A uniform picture becomes the zero vector.
        return np.asarray(small / np.where(norm > 1e-6, norm, np.inf), np.float32)
