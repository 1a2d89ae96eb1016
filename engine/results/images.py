"""Results of the steps that make images and choose among them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict

from engine.core.spec import Spec
from engine.results.base import StepResult


class RequestResult(StepResult):
    """The images to make."""

    kind: ClassVar[str] = "request"

    # By class.
    counts: dict[str, int]
    # Digests of what the generator reads outside the study's data.
    outside: dict[str, str]
    warnings: list[str] = []


class FinetuneResult(StepResult):
    """A trained generator. Its training's figures are further fields."""

    model_config = ConfigDict(extra="allow")
    kind: ClassVar[str] = "finetune"

    loss: float | None = None
    steps: float | None = None
    outside: dict[str, str] = {}


class GenerateResult(StepResult):
    """Images made by a generator."""

    kind: ClassVar[str] = "generate"

    # By class.
    requested: dict[str, int]
    # By reason.
    quarantined: dict[str, int]
    warnings: list[str] = []


class MeasureResult(StepResult):
    """What the labeler and the filters measure on val."""

    kind: ClassVar[str] = "measure"


class ClassFunnel(Spec):
    """Images of a class from the request to use. kept: those used as the class, whatever was
    requested. reasons: why the others are not used."""

    requested: int
    generated: int
    kept: int
    reasons: dict[str, int]


class FilterReport(Spec):
    """What one filter did. limits: by name, for all classes or by class. stops: why the images must
    not be exported, or empty."""

    name: str
    dropped: int
    limits: dict[str, float | dict[str, float | None] | None]
    stops: str


class LabelerReport(Spec):
    """How often the labeler sees the class that was requested, and on val the true one. Confusions:
    images by class (requested, seen) and (true, seen)."""

    agreement: float | None
    agreement_kept: float | None
    agreement_val: float
    confusion: list[list[int]]
    confusion_val: list[list[int]]


class CurateResult(StepResult):
    """The images that are used, class by class."""

    kind: ClassVar[str] = "curate"

    funnel: dict[str, ClassFunnel]
    warnings: list[str] = []
    filters: list[FilterReport] = []
    labeler: LabelerReport | None = None


class FidelitySet(Spec):
    """Figures of a set of `n` images; an interval is (figure, low, high). sampled: images that the
    figures rest on; None where there are too few."""

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
    """One class, or all together."""

    classes: list[str]
    val: int
    few: str
    sets: dict[str, FidelitySet]
    floor: dict[str, FidelitySet]
    val_sampled: int | None = None
    val_nearest: float | None = None


class FidelityResult(StepResult):
    """How close generated images are to real ones. scopes: see `engine.steps.fidelity`."""

    kind: ClassVar[str] = "fidelity"

    scopes: list[FidelityScope]
    warnings: list[str]
