"""Results of the steps that generate and select images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, ConfigDict

from engine.core.notice import Notice
from engine.core.spec import Spec
from engine.results.base import StepResult

# None was stored as "" before.
Reason = Annotated[Notice | None, BeforeValidator(lambda value: value or None)]


class RequestResult(StepResult):
    """The images to generate."""

    kind: ClassVar[str] = "request"

    # By class.
    counts: dict[str, int]
    # Digests of the generator's external files.
    outside: dict[str, str]


class AllocatedClass(Spec):
    """What a class gets, and why. f1: of its weakest label on val. tier: its number, None above all
    tiers. correlation, impact: from 0 to 1. weight: of its share of the total."""

    real: int
    f1: float | None
    tier: int | None
    correlation: float
    impact: float
    weight: float
    images: int


class AllocateResult(StepResult):
    """How many images each target class gets."""

    kind: ClassVar[str] = "allocate"

    classes: dict[str, AllocatedClass]

    @property
    def images(self) -> dict[str, int]:
        return {name: entry.images for name, entry in self.classes.items()}


class FinetuneResult(StepResult):
    """A trained generator. Training figures are further fields."""

    model_config = ConfigDict(extra="allow")
    kind: ClassVar[str] = "finetune"

    loss: float | None = None
    steps: float | None = None
    outside: dict[str, str] = {}


class GenerateResult(StepResult):
    """Images of a generator."""

    kind: ClassVar[str] = "generate"

    # By class.
    requested: dict[str, int]
    # By reason.
    quarantined: dict[str, int]


class MeasureResult(StepResult):
    """Measurements of the labeler and the filters on val."""

    kind: ClassVar[str] = "measure"


class ClassFunnel(Spec):
    """Images of a class from the request to use. kept: images used as the class, whatever class
    was requested. reasons: numbers of unused images by reason."""

    requested: int
    generated: int
    kept: int
    reasons: dict[str, int]


class FilterReport(Spec):
    """The effect of one filter. limits: by name, for all classes or by class. stops: the reason
    that forbids the export."""

    name: str
    dropped: int
    limits: dict[str, float | dict[str, float | None] | None]
    stops: Reason


class LabelerReport(Spec):
    """How often the labeler sees the class that was requested, and on val the true one. Confusions:
    images by class (requested, seen) and (true, seen)."""

    agreement: float | None
    agreement_kept: float | None
    agreement_val: float
    confusion: list[list[int]]
    confusion_val: list[list[int]]

    def accuracy_on_val(self, weights: Sequence[float]) -> float:
        """Its accuracy on val if the classes were as frequent there as the weights say; classes
        that val lacks do not count."""
        of_classes = enumerate(zip(weights, self.confusion_val, strict=True))
        parts = [(weight, row[place] / sum(row)) for place, (weight, row) in of_classes if sum(row)]
        whole = sum(weight for weight, _ in parts)
        if not whole:
            return self.agreement_val
        return sum(weight * recall for weight, recall in parts) / whole

    @property
    def accuracy_as_requested(self) -> float:
        """Its accuracy on val if the classes were as frequent there as they were requested."""
        return self.accuracy_on_val([sum(row) for row in self.confusion])


class Usefulness(Spec):
    """Signs of whether a generator learnt anything, from its images before any filter; None where
    there are too few.

    coverage: share of real images (of val, or of train if val has too few) with a generated image
    in their neighbourhood. area: area under
    the ROC curve that separates real from generated images. spread: mean distance of two generated
    images of a class, in that of two real ones. seen: share of images in which the
    labeler sees the requested class; chance, seen_val: the same by chance, and on val.
    """

    # Working generators of this project's benchmarks reach a coverage of 0.5 and more.
    COVERAGE: ClassVar[float] = 0.1
    SPREAD: ClassVar[float] = 0.2
    # Least share of what the labeler achieves on real images beyond chance, and what it must
    # achieve there to count as a witness.
    SEEN: ClassVar[float] = 0.25
    WITNESS: ClassVar[float] = 0.2

    # Real images and generated ones of the same classes, if they are too few to look at.
    pairs: int | None = None
    coverage: float | None = None
    area: float | None = None
    spread: float | None = None
    seen: float | None = None
    chance: float | None = None
    seen_val: float | None = None

    def notices(self) -> list[Notice]:
        """The signs that it learnt nothing."""
        notices = []
        if self.coverage is not None and self.area is not None and self.coverage < self.COVERAGE:
            notices.append(
                Notice.of("covers_nothing", percent=100 * self.coverage, floor=100 * self.COVERAGE,
                          area=self.area)
            )  # fmt: skip
        if self.spread is not None and self.spread < self.SPREAD:
            notices.append(
                Notice.of("one_picture", percent=100 * self.spread, floor=100 * self.SPREAD)
            )
        if self.seen is not None and self.chance is not None and self.seen_val is not None:
            possible = self.seen_val - self.chance
            if possible > self.WITNESS and self.seen - self.chance < self.SEEN * possible:
                notices.append(
                    Notice.of("shows_no_class", seen=100 * self.seen, chance=100 * self.chance,
                              val=100 * self.seen_val)
                )  # fmt: skip
        return notices


class CurateResult(StepResult):
    """The used images by class."""

    kind: ClassVar[str] = "curate"

    funnel: dict[str, ClassFunnel]
    filters: list[FilterReport] = []
    labeler: LabelerReport | None = None
    # None if no image was measured.
    usefulness: Usefulness | None = None


class FidelitySet(Spec):
    """Figures of a set of `n` images; an interval is (figure, low, high). sampled: number of images
    that the figures use; None if there are too few."""

    n: int
    sampled: int | None = None
    frechet: float | None = None
    kernel: list[float] | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    vendi: float | None = None
    nearest: float | None = None
    near: list[float] | None = None


class FidelityScope(Spec):
    """One class, or all together. few: why there are no figures."""

    classes: list[str]
    val: int
    few: Reason
    sets: dict[str, FidelitySet]
    floor: dict[str, FidelitySet]
    val_sampled: int | None = None
    val_nearest: float | None = None
    # The share of kept images near to train if none is copied: expected, and its 95% range.
    near_expected: list[float] | None = None


class FidelityResult(StepResult):
    """How close generated images are to real ones. scopes: see `engine.steps.fidelity`."""

    kind: ClassVar[str] = "fidelity"

    scopes: list[FidelityScope]
