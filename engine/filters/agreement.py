"""Does the labeler see the class that was asked for?"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judged, Scored

# Of real images, whose labels are taken for right: what `confidence: auto` would drop of them.
_MOST_CONTRADICTED = 0.02


class AgreementSpec(FilterSpec):
    name: Literal["agreement"] = "agreement"
    # intended: the label asked for; dropped where the labeler sees another with `confidence`.
    # agree: kept only where the labeler sees the label asked for. labeler: what the labeler sees.
    label_from: Literal["intended", "agree", "labeler"] = "intended"
    # auto: so that the labeler contradicts with such confidence at most one in fifty real images of
    # val.
    confidence: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"


class Agreement(Filter):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[FilterSpec]] = AgreementSpec
    told: ClassVar[str] = "taken for another class"
    needs_labeler: ClassVar[bool] = True
    judging_fields: ClassVar[tuple[str, ...]] = ("label_from", "confidence")
    spec: AgreementSpec

    def judge(self, made: Scored, train: Scored, val: Scored, kept: np.ndarray) -> Judged:
        assert made.probabilities is not None
        assert val.probabilities is not None
        classes = np.asarray(self.classes, dtype=object)
        seen = classes[made.probabilities.argmax(1)]
        if self.spec.label_from == "labeler":
            return Judged(np.zeros(len(made), bool), labels=seen)
        differs = seen != made.labels
        if self.spec.label_from == "agree":
            return Judged(differs)
        limit = self.spec.confidence
        if limit == "auto":
            wrong = classes[val.probabilities.argmax(1)] != val.labels
            limit = confidence_of(wrong, val.probabilities.max(1))
        sure = made.probabilities.max(1) >= limit
        return Judged(differs & sure, limits={"confidence": limit})


def confidence_of(
    wrong: np.ndarray, confidence: np.ndarray, most: float = _MOST_CONTRADICTED
) -> float:
    """The least confidence with which the labeler contradicts at most a share `most` of images
    whose labels are right; above 1 where it is too often certain and wrong.

    wrong: bool (n,). confidence: (n,).
    """
    confident = np.sort(confidence[wrong])[::-1]
    allowed = int(most * len(wrong))
    if len(confident) <= allowed:
        return 0.0
    # Just above the first that would be one too many.
    return float(np.nextafter(np.float32(confident[allowed]), np.float32(2)))
