"""Is there anything on the image, and is it sharp?

    contrast     the standard deviation of brightness, 0 to 0.5: 0 of a black or an empty image
    sharpness    the standard deviation of its Laplacian, a measure of focus (Pech-Pacheco et al.
                 2000, who take the variance): low of a blurred one

Both fall below what held-out real images have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judged, Scored, least_by_class, of_labels


class BlankSpec(FilterSpec):
    name: Literal["blank"] = "blank"
    # The share of the class's images in val that has less contrast, or less sharpness, than is
    # asked for.
    quantile: Annotated[float, Field(ge=0, le=0.2)] = 0.005


class Blank(Filter):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[FilterSpec]] = BlankSpec
    told: ClassVar[str] = "blank or blurred"
    measures: ClassVar[tuple[str, ...]] = ("contrast", "sharpness")
    judging_fields: ClassVar[tuple[str, ...]] = ("quantile",)
    spec: BlankSpec

    def measure(self, pixels: np.ndarray, labels: Sequence[str]) -> Mapping[str, np.ndarray]:
        grey = pixels.astype(np.float32).mean(-1) / 255
        padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
        laplacian = (
            padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
            - 4 * grey
        )  # fmt: skip
        return {"contrast": grey.std((1, 2)), "sharpness": laplacian.std((1, 2))}

    def judge(self, made: Scored, train: Scored, val: Scored, kept: np.ndarray) -> Judged:
        limits = {
            name: least_by_class(val.measured[name], val.labels, self.classes, self.spec.quantile)
            for name in self.measures
        }
        drop = np.zeros(len(made), bool)
        for name, least in limits.items():
            drop |= made.measured[name] < of_labels(least, made.labels)
        return Judged(drop, {name: made.measured[name] for name in self.measures}, limits)
