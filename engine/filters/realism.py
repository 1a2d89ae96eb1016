"""Does the image lie where real ones do?

    realism    the largest ratio, over training images, of the radius of one's neighbourhood to the
               distance from it: 1 and more inside the manifold of train (Kynkäänniemi et al. 2019)
    density    how many neighbourhoods of training images it lies in, relative to k (Naeem et al.
               2020)

Held-out real images say how low realism may be.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judged, Scored, least_by_class, of_labels
from engine.metrics.prdc import realism


class RealismSpec(FilterSpec):
    name: Literal["realism"] = "realism"
    # The radius of a neighbourhood is the distance to the k-th nearest other training image.
    k: Annotated[int, Field(ge=1, le=100)] = 5
    # auto: the value that this share of the class's images in val stays below.
    least: Annotated[float, Field(ge=0, le=100)] | Literal["auto"] = "auto"
    quantile: Annotated[float, Field(ge=0, le=0.5)] = 0.01


class Realism(Filter):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[FilterSpec]] = RealismSpec
    told: ClassVar[str] = "unlike any real image"
    judging_fields: ClassVar[tuple[str, ...]] = ("k", "least", "quantile")
    spec: RealismSpec

    def judge(self, made: Scored, train: Scored, val: Scored, kept: np.ndarray) -> Judged:
        k = min(self.spec.k, len(train) - 1)
        score, density = realism(train.vectors, made.vectors, k)
        columns = {"realism": score, "density": density}
        if self.spec.least != "auto":
            return Judged(score < self.spec.least, columns, {"realism": self.spec.least})
        of_val, _ = realism(train.vectors, val.vectors, k)
        least = least_by_class(of_val, val.labels, self.classes, self.spec.quantile)
        drop = score < of_labels(least, made.labels)
        return Judged(drop, columns, {"realism": least})
