"""Is the image a copy of a training image (`engine.metrics.memorization`)?"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judged, Scored
from engine.metrics.memorization import copies, copy_limits, nearest


class CopiesSpec(FilterSpec):
    name: Literal["copies"] = "copies"
    # An image nearer to train than all but this share of val is a copy.
    quantile: Annotated[float, Field(ge=0, le=0.2)] = 0.01
    # Whether a single copy stops the export of this generator's images: one that copies may have
    # learnt persons by heart, and what lies just above the limit is no proof of the contrary.
    strict: bool = False


class Copies(Filter):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[FilterSpec]] = CopiesSpec
    told: ClassVar[str] = "copies of training images"
    judging_fields: ClassVar[tuple[str, ...]] = ("quantile", "strict")
    pair: ClassVar[tuple[str, str] | None] = ("nearest_id", "distance")
    spec: CopiesSpec

    def judge(self, made: Scored, train: Scored, val: Scored, kept: np.ndarray) -> Judged:
        real = train.vectors, train.hashes
        found = nearest(made.vectors, made.hashes, *real)
        limits = copy_limits(nearest(val.vectors, val.hashes, *real), self.spec.quantile)
        copied = copies(found, limits)
        stops = ""
        if self.spec.strict and copied.any():
            stops = f"{copied.sum():,} of {len(made):,} images are copies of training images"
        return Judged(
            copied,
            {
                "nearest_id": train.ids[found.row], "distance": found.distance,
                "bits": found.bits,
            },
            {"distance": limits.distance, "bits": limits.bits},
            stops=stops,
        )  # fmt: skip
