"""Weighted k-nearest-neighbour vote of the training images, each with the weight exp(cosine / T),
as used to evaluate self-supervised networks (Wu et al. 2018; Caron et al. 2021). Needs no training.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from engine.labelers import Labeler, LabelerSpec
from engine.vectors.neighbours import IndexKind, Neighbours


class KnnSpec(LabelerSpec):
    name: Literal["knn"] = "knn"
    k: Annotated[int, Field(ge=1, le=1000)] = 20
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.07
    index: IndexKind = "auto"


class Knn(Labeler[KnnSpec]):
    version = 1
    reads = "embedding"

    def learn(self, vectors: np.ndarray, labels: np.ndarray) -> None:
        self.neighbours, self.labels = Neighbours(vectors, self.spec.index), labels

    def label(self, images: np.ndarray) -> np.ndarray:
        row, distance = self.neighbours.nearest(images, self.spec.k)
        # Relative to the nearest, so that the exponential cannot overflow.
        weight = np.exp((distance[:, :1] - distance) / self.spec.temperature) * (row >= 0)
        votes = np.zeros((len(images), len(self.classes)), np.float32)
        np.add.at(votes, (np.arange(len(images))[:, None], self.labels[row]), weight)
        return np.asarray(votes / votes.sum(1, keepdims=True))
