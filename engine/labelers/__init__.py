"""Labelers: the class that an image shows, independent of the requested class. To add one, write
`engine/labelers/<name>.py` with `<Name>(Labeler)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from engine.core.labels import LabelSpace
from engine.core.spec import Configured, S, Spec
from engine.data.images import Preprocess


class LabelerSpec(Spec):
    name: str


class Labeler(Configured[S]):
    """Gives probabilities of the study's classes for generated images, and for images of val, whose
    labels show how reliable it is."""

    version: ClassVar[int]
    # pixels: `label` gets images, in a worker on its device. embedding: `label` gets the vectors of
    # the study's embedder, for all images at once.
    reads: ClassVar[Literal["pixels", "embedding"]] = "pixels"
    # Whether a classifier is trained for it on the real training images. Its spec then has the
    # fields `classifier` and `training`; None: the study's.
    trained: ClassVar[bool] = False
    # The tasks of a study with several labels per image, whose classes are cells; set before
    # `load`.
    space: LabelSpace | None = None

    def __init__(self, spec: S, preprocess: Preprocess, classes: Sequence[str]) -> None:
        self.spec, self.preprocess, self.classes = spec, preprocess, tuple(classes)

    def load(self, weights: Path | None, device: str) -> None:
        """Prepare for `label`. weights: the folder that the training published, if any."""

    def learn(self, vectors: np.ndarray, labels: np.ndarray) -> None:
        """Learn from the embeddings of the training images, float32 (n, width), and their class
        numbers, int64 (n,); only called for labelers that read embeddings."""

    def label(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 (n, classes) of pixels, uint8 (n, height, width, channels), or of
        vectors, float32 (n, width)."""
        raise NotImplementedError
