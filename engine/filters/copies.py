"""Is the image a copy of a training image (`engine.metrics.memorization`)?"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from engine.core.notice import Notice
from engine.filters import Filter, FilterSpec, Judgement, Scores
from engine.metrics.memorization import candidates, copies, copy_limits, nearest


class CopiesSpec(FilterSpec):
    name: Literal["copies"] = "copies"
    # An image that is nearer to train than all but this share of val is a copy.
    quantile: Annotated[float, Field(ge=0, le=0.2)] = 0.01
    # Whether a single copy stops the export of this generator's images: it may have memorised
    # persons, and an image just above the limit does not prove the contrary.
    strict: bool = False


class Copies(Filter[CopiesSpec]):
    version = 2
    drop_reason = "copies of training images"
    judging_fields = ("quantile", "strict")
    pair = ("nearest_id", "distance")

    def judge(self, generated: Scores, train: Scores, val: Scores, kept: np.ndarray) -> Judgement:
        real = train.vectors, train.hashes
        near = candidates(generated.vectors, generated.hashes, *real)
        limits = copy_limits(nearest(val.vectors, val.hashes, *real), self.spec.quantile)
        original = copies(near, limits)
        copied = original >= 0
        # The nearest one, of images that copy none.
        row = np.where(copied, original, near.row[:, 0])
        place = (near.row == row[:, None]).argmax(1)[:, None]
        stops = None
        if self.spec.strict and copied.any():
            stops = Notice.of("copies", copies=int(copied.sum()), images=len(generated))
        return Judgement(
            copied,
            {
                "nearest_id": train.ids[row],
                "distance": np.take_along_axis(near.distance, place, 1)[:, 0],
                "bits": np.take_along_axis(near.bits, place, 1)[:, 0].astype(np.int64),
            },
            {"distance": limits.distance, "bits": limits.bits},
            stops=stops,
        )  # fmt: skip
