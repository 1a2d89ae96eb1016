"""Does the image fit the description of its class? The cosine of the two in the space of CLIP
(Radford et al. 2021) or a similar model, as in CLIPScore (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judgement, Scores, class_limits, image_limits
from engine.nets.text_image import Described, TextImage


class SimilaritySpec(Described, FilterSpec):
    name: Literal["similarity"] = "similarity"
    # auto: the `quantile` of the class's images in val.
    least: Annotated[float, Field(ge=-1, le=1)] | Literal["auto"] = "auto"
    quantile: Annotated[float, Field(ge=0, le=0.5)] = 0.02


class Similarity(Filter[SimilaritySpec]):
    version = 1
    drop_reason = "unlike the description of their class"
    measures = ("similarity",)
    judging_fields = ("least", "quantile")

    def load(self, device: str) -> None:
        section = "curate.filters.similarity"
        self.model = TextImage.of(section, self.spec, device)
        self.texts = self.model.classes(self.spec, self.classes, section)
        self.number = {label: number for number, label in enumerate(self.classes)}

    def measure(self, pixels: np.ndarray, labels: Sequence[str]) -> Mapping[str, np.ndarray]:
        wanted = self.texts[[self.number[label] for label in labels]]
        return {"similarity": (self.model.images(pixels) * wanted).sum(1)}

    def judge(self, generated: Scores, train: Scores, val: Scores, kept: np.ndarray) -> Judgement:
        score, real = generated.measured["similarity"], val.measured["similarity"]
        if self.spec.least != "auto":
            limits = dict.fromkeys(self.classes, self.spec.least)
        else:
            # Cosines to different texts are not comparable.
            limits = class_limits(
                real, val.labels, self.classes, self.spec.quantile, comparable=False
            )
        drop = score < image_limits(limits, generated.labels)
        return Judgement(drop, {"similarity": score}, {"similarity": limits})
