"""Does the labeler see the requested class?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judgement, Scores, image_limits

# Share of real images that `confidence: auto` would drop, taking their labels as correct.
_MOST_CONTRADICTED = 0.02


class AgreementSpec(FilterSpec):
    later_fields: ClassVar[tuple[str, ...]] = ("match",)

    name: Literal["agreement"] = "agreement"
    # intended: use the requested label; drop images where the labeler sees another class with at
    # least `confidence`. agree: keep only images where the labeler sees the requested class.
    # labeler: use the class that the labeler sees.
    label_from: Literal["intended", "agree", "labeler"] = "intended"
    # auto: the lowest confidence with which the labeler contradicts at most 2% of the real images
    # in val, and at most 2% of those of the class.
    confidence: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = "auto"
    # With several labels per image, when the labeler sees what was requested: if the labels of all
    # tasks are the same, of any task, or of all these tasks.
    match: Literal["all", "any"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all"


class Agreement(Filter[AgreementSpec]):
    version = 1
    drop_reason = "taken for another class"
    needs_labeler = True
    judging_fields = ("label_from", "confidence", "match")

    def judge(self, generated: Scores, train: Scores, val: Scores, kept: np.ndarray) -> Judgement:
        assert generated.probabilities is not None
        assert val.probabilities is not None
        classes = np.asarray(self.classes, dtype=object)
        seen = classes[generated.probabilities.argmax(1)]
        if self.spec.label_from == "labeler":
            return Judgement(np.zeros(len(generated), bool), labels=seen)
        differs = ~self._same(seen, generated.labels)
        if self.spec.label_from == "agree":
            return Judgement(differs)
        sure = generated.probabilities.max(1)
        if self.spec.confidence != "auto":
            limit = self.spec.confidence
            return Judgement(differs & (sure >= limit), limits={"confidence": limit})
        wrong = ~self._same(classes[val.probabilities.argmax(1)], val.labels)
        limits = confidences(wrong, val.probabilities.max(1), val.labels, self.classes)
        drop = differs & (sure >= image_limits(limits, generated.labels))
        return Judgement(drop, limits={"confidence": limits})

    def _same(self, seen: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Whether the class that is seen counts as that of the label, bool (n,)."""
        match = self.spec.match
        if match == "all" or not self.cells:
            return np.asarray(seen == labels)

        def agrees(ours: str, theirs: str) -> bool:
            # An incomplete or rare combination has no known labels.
            first, second = self.cells.get(ours), self.cells.get(theirs)
            if first is None or second is None:
                return ours == theirs
            tasks = first if match == "any" else match
            same = [first[task] == second[task] for task in tasks]
            return any(same) if match == "any" else all(same)

        return np.asarray([agrees(*pair) for pair in zip(seen, labels, strict=True)], bool)


def confidences(
    wrong: np.ndarray, confidence: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, float]:
    """`confidence_of` for each class, at least that of all classes; otherwise a labeler that is
    weak on a rare class would drop its correct images."""
    overall = confidence_of(wrong, confidence)
    return {
        label: max(overall, confidence_of(wrong[labels == label], confidence[labels == label]))
        for label in classes
    }


def confidence_of(
    wrong: np.ndarray, confidence: np.ndarray, most: float = _MOST_CONTRADICTED
) -> float:
    """The lowest confidence with which the labeler contradicts at most a share `most` of images
    with correct labels; above 1 where it is confidently wrong too often.

    wrong: bool (n,). confidence: (n,).
    """
    confident = np.sort(confidence[wrong])[::-1]
    allowed = int(most * len(wrong))
    if len(confident) <= allowed:
        return 0.0
    # Just above the confidence of the first image beyond the share.
    return float(np.nextafter(np.float32(confident[allowed]), np.float32(2)))
