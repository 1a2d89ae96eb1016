"""Does the labeler see the class that was asked for?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judged, Scored, of_labels

# Of real images, whose labels are taken for right: what `confidence: auto` would drop of them.
_MOST_CONTRADICTED = 0.02


class AgreementSpec(FilterSpec):
    name: Literal["agreement"] = "agreement"
    # intended: the label asked for; dropped where the labeler sees another with `confidence`.
    # agree: kept only where the labeler sees the label asked for. labeler: what the labeler sees.
    label_from: Literal["intended", "agree", "labeler"] = "intended"
    # auto: so that the labeler contradicts with such confidence at most one in fifty real images of
    # val, and of each class of it.
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
        sure = made.probabilities.max(1)
        if self.spec.confidence != "auto":
            limit = self.spec.confidence
            return Judged(differs & (sure >= limit), limits={"confidence": limit})
        wrong = classes[val.probabilities.argmax(1)] != val.labels
        limits = confidences(wrong, val.probabilities.max(1), val.labels, self.classes)
        return Judged(
            differs & (sure >= of_labels(limits, made.labels)), limits={"confidence": limits}
        )


def confidences(
    wrong: np.ndarray, confidence: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, float]:
    """`confidence_of` for each class, and never below that of all: a labeler that sees little of a
    rare class would else drop what is right there."""
    whole = confidence_of(wrong, confidence)
    return {
        label: max(whole, confidence_of(wrong[labels == label], confidence[labels == label]))
        for label in classes
    }


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
