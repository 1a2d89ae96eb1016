"""Does the image show anything, and is it sharp?

    contrast     the standard deviation of brightness, 0 to 0.5; 0 for a uniform image
    sharpness    the standard deviation of the Laplacian, a measure of focus (Pech-Pacheco et al.
                 2000, who use the variance); low for a blurred image

The limits are low quantiles of held-out real images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judgement, Scores, class_limits, image_limits


class BlankSpec(FilterSpec):
    name: Literal["blank"] = "blank"
    # Share of the class's images in val with less contrast, or less sharpness, than the limit.
    quantile: Annotated[float, Field(ge=0, le=0.2)] = 0.005


class Blank(Filter[BlankSpec]):
    version = 1
    drop_reason = "blank or blurred"
    measures = ("contrast", "sharpness")
    judging_fields = ("quantile",)

    def measure(self, pixels: np.ndarray, labels: Sequence[str]) -> Mapping[str, np.ndarray]:
        grey = pixels.astype(np.float32).mean(-1) / 255
        padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
        laplacian = (
            padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
            - 4 * grey
        )  # fmt: skip
        return {"contrast": grey.std((1, 2)), "sharpness": laplacian.std((1, 2))}

    def judge(self, generated: Scores, train: Scores, val: Scores, kept: np.ndarray) -> Judgement:
        limits = {
            name: class_limits(val.measured[name], val.labels, self.classes, self.spec.quantile)
            for name in self.measures
        }
        drop = np.zeros(len(generated), bool)
        for name, least in limits.items():
            drop |= generated.measured[name] < image_limits(least, generated.labels)
        return Judgement(drop, {name: generated.measured[name] for name in self.measures}, limits)
