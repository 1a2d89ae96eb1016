"""Embedders: images to vectors. To add one, write `engine/embedders/<name>.py` with
`<Name>(Embedder)`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from engine.core.spec import Spec


class EmbedderSpec(Spec):
    name: str


class Embedder:
    """`open` and `load` run once in each worker; what follows are pure functions of pixels.

    An image passes `prepare` on a CPU thread while the device is busy with those before it, and
    `encode` on the device.
    """

    version: ClassVar[int]
    Spec: ClassVar[type[EmbedderSpec]]
    # Whether it has no network: a few images are then embedded sooner than workers start.
    light: ClassVar[bool] = False
    width: int

    def __init__(self, spec: EmbedderSpec) -> None:
        self.spec = spec

    def open(self) -> None:
        """Read what `prepare` needs, and no weights. Raises `StudyError` where it cannot."""

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """uint8 (height, width, 1 or 3) to what `encode` takes of one image."""
        return image

    def load(self, device: str) -> None:
        """Load weights and set `width`. Raises `StudyError` where the checkpoint cannot be used."""
        raise NotImplementedError

    def encode(self, prepared: np.ndarray) -> np.ndarray:
        """Prepared images (n, …) to float32 (n, `width`)."""
        raise NotImplementedError

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, 1 or 3) to float32 (n, `width`)."""
        return self.encode(np.stack([self.prepare(image) for image in pixels]))
