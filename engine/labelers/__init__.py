"""Labelers: which class is seen on an image, whatever was asked for. To add one, write
`engine/labelers/<name>.py` with `<Name>(Labeler)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from engine.core.spec import Spec
from engine.data.images import Preprocess


class LabelerSpec(Spec):
    name: str


class Labeler:
    """Gives probabilities of the study's classes: for generated images, and for those of val, whose
    labels tell how far it can be believed."""

    version: ClassVar[int]
    Spec: ClassVar[type[LabelerSpec]]
    # pixels: looks at images, in a worker, on its device. embedding: at their vectors by the
    # study's embedder, once all are there.
    reads: ClassVar[Literal["pixels", "embedding"]] = "pixels"
    # Whether a classifier is trained for it on the real training images; its spec then has
    # `classifier` and `training`, None standing for the study's.
    trained: ClassVar[bool] = False

    def __init__(self, spec: Any, preprocess: Preprocess, classes: Sequence[str]) -> None:
        self.spec, self.preprocess, self.classes = spec, preprocess, tuple(classes)

    def load(self, weights: Path | None, device: str) -> None:
        """Get ready; `weights` is the folder that the training published, if there was one."""

    def learn(self, vectors: np.ndarray, labels: np.ndarray) -> None:
        """Of one that reads embeddings: the training images' float32 (n, width) and class numbers
        int64 (n,)."""

    def label(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 (n, classes) of pixels uint8 (n, height, width, channels), or of
        vectors float32 (n, width)."""
        raise NotImplementedError
