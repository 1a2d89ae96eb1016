"""Zero-shot classification: the class whose descriptions are nearest to the image in the joint
space of CLIP (Radford et al. 2021), SigLIP or a similar model. Several templates of a class are
averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from engine.labelers import Labeler, LabelerSpec
from engine.nets.text_image import Described, TextImage


class ClipSpec(Described, LabelerSpec):
    name: Literal["clip"] = "clip"
    # Inverse temperature of the softmax; None: that of the checkpoint.
    logit_scale: Annotated[float, Field(gt=0, le=1000)] | None = None


class Clip(Labeler[ClipSpec]):
    version = 1

    def load(self, weights: Path | None, device: str) -> None:
        self.model = TextImage.of("curate.labeler", self.spec, device)
        self.texts = self.model.classes(self.spec, self.classes, "curate.labeler")

    def label(self, images: np.ndarray) -> np.ndarray:
        scale = self.spec.logit_scale or self.model.logit_scale
        logits = scale * self.model.images(images) @ self.texts.T
        logits -= logits.max(1, keepdims=True)
        weights = np.exp(logits)
        return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)
