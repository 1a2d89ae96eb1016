"""Is the image close to real ones?

    realism    the largest ratio, over training images, of the radius of their neighbourhood to
               their distance from the image; at least 1 inside the manifold of train
               (Kynkäänniemi et al. 2019)
    density    the number of neighbourhoods of training images that contain the image, divided by k
               (Naeem et al. 2020)

Held-out real images set the minimum of realism.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judgement, Scores, class_limits, image_limits
from engine.metrics.prdc import realism


class RealismSpec(FilterSpec):
    name: Literal["realism"] = "realism"
    # The radius of a neighbourhood is the distance to the k-th nearest other training image.
    k: Annotated[int, Field(ge=1, le=100)] = 5
    # auto: the `quantile` of the class's images in val.
    least: Annotated[float, Field(ge=0, le=100)] | Literal["auto"] = "auto"
    quantile: Annotated[float, Field(ge=0, le=0.5)] = 0.01


class Realism(Filter[RealismSpec]):
    version = 1
    drop_reason = "unlike any real image"
    judging_fields = ("k", "least", "quantile")

    def judge(self, generated: Scores, train: Scores, val: Scores, kept: np.ndarray) -> Judgement:
        k = min(self.spec.k, len(train) - 1)
        score, density = realism(train.vectors, generated.vectors, k)
        columns = {"realism": score, "density": density}
        if self.spec.least != "auto":
            return Judgement(score < self.spec.least, columns, {"realism": self.spec.least})
        of_val, _ = realism(train.vectors, val.vectors, k)
        least = class_limits(of_val, val.labels, self.classes, self.spec.quantile)
        drop = score < image_limits(least, generated.labels)
        return Judgement(drop, columns, {"realism": least})
