"""Embedders: images to vectors. To add one, write `engine/embedders/<name>.py` with
`<Name>(Embedder)`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from engine.core.spec import Configured, S, Spec


class EmbedderSpec(Spec):
    name: str


class Embedder(Configured[S]):
    """`open` and `load` run once in each worker; `prepare` and `encode` are pure functions.

    `prepare` runs on CPU threads while the device works on earlier images; `encode` runs on the
    device.
    """

    version: ClassVar[int]
    # Whether it has no network: embedding a few images is then faster than starting workers.
    light: ClassVar[bool] = False
    width: int

    def __init__(self, spec: S) -> None:
        self.spec = spec

    def open(self) -> None:
        """Read the settings that `prepare` needs, without weights. Raises `StudyError`."""

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """One image, uint8 (height, width, 1 or 3), to one input of `encode`."""
        return image

    def load(self, device: str) -> None:
        """Load weights and set `width`. Raises `StudyError` if the checkpoint is unusable."""
        raise NotImplementedError

    def encode(self, prepared: np.ndarray) -> np.ndarray:
        """Prepared images (n, …) to float32 (n, `width`)."""
        raise NotImplementedError

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Images, uint8 (n, height, width, 1 or 3), to float32 (n, `width`)."""
        return self.encode(np.stack([self.prepare(image) for image in pixels]))
