"""Does the image fit the description of its class? The cosine of the two in the space of CLIP
(Radford et al. 2021) or its kin, as CLIPScore takes it (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judged, Scored, least_by_class, of_labels
from engine.nets.text_image import Described, TextImage


class SimilaritySpec(Described, FilterSpec):
    name: Literal["similarity"] = "similarity"
    # auto: the value that this share of the class's images in val stays below.
    least: Annotated[float, Field(ge=-1, le=1)] | Literal["auto"] = "auto"
    quantile: Annotated[float, Field(ge=0, le=0.5)] = 0.02


class Similarity(Filter):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[FilterSpec]] = SimilaritySpec
    told: ClassVar[str] = "unlike the description of their class"
    measures: ClassVar[tuple[str, ...]] = ("similarity",)
    judging_fields: ClassVar[tuple[str, ...]] = ("least", "quantile")
    spec: SimilaritySpec

    def load(self, device: str) -> None:
        section = "curate.filters.similarity"
        self.model = TextImage.of(section, self.spec, device)
        self.texts = self.model.classes(self.spec, self.classes, section)
        self.number = {label: number for number, label in enumerate(self.classes)}

    def measure(self, pixels: np.ndarray, labels: Sequence[str]) -> Mapping[str, np.ndarray]:
        wanted = self.texts[[self.number[label] for label in labels]]
        return {"similarity": (self.model.images(pixels) * wanted).sum(1)}

    def judge(self, made: Scored, train: Scored, val: Scored, kept: np.ndarray) -> Judged:
        score, real = made.measured["similarity"], val.measured["similarity"]
        if self.spec.least != "auto":
            limits = dict.fromkeys(self.classes, self.spec.least)
        else:
            # Cosines to different texts do not compare.
            limits = least_by_class(
                real, val.labels, self.classes, self.spec.quantile, comparable=False
            )
        drop = score < of_labels(limits, made.labels)
        return Judged(drop, {"similarity": score}, {"similarity": limits})
