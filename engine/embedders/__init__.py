"""Embedders: images to vectors. To add one, write `engine/embedders/<name>.py` with
`<Name>(Embedder)`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from engine.core.spec import Spec


class EmbedderSpec(Spec):
    name: str


class Embedder:
    """`load` runs once in each worker; `embed` is a pure function of pixels from then on."""

    version: ClassVar[int]
    Spec: ClassVar[type[EmbedderSpec]]
    width: int

    def __init__(self, spec: EmbedderSpec) -> None:
        self.spec = spec

    def load(self, device: str) -> None:
        """Load weights and set `width`. Raises `StudyError` where the checkpoint cannot be used."""
        raise NotImplementedError

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, 1 or 3) to float32 (n, `width`)."""
        raise NotImplementedError
