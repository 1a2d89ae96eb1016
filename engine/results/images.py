"""Results of the steps that generate and select images."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, ConfigDict

from engine.core.notice import Notice
from engine.core.spec import Spec
from engine.results.base import StepResult


class RequestResult(StepResult):
    """The images to generate."""

    kind: ClassVar[str] = "request"

    # By class.
    counts: dict[str, int]
    # Digests of the generator's external files.
    outside: dict[str, str]
    warnings: list[Notice] = []


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
    warnings: list[Notice] = []


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
    # Stored as "" by earlier versions.
    stops: Annotated[Notice | None, BeforeValidator(lambda value: value or None)]


class LabelerReport(Spec):
    """How often the labeler sees the class that was requested, and on val the true one. Confusions:
    images by class (requested, seen) and (true, seen)."""

    agreement: float | None
    agreement_kept: float | None
    agreement_val: float
    confusion: list[list[int]]
    confusion_val: list[list[int]]


class CurateResult(StepResult):
    """The used images by class."""

    kind: ClassVar[str] = "curate"

    funnel: dict[str, ClassFunnel]
    warnings: list[Notice] = []
    filters: list[FilterReport] = []
    labeler: LabelerReport | None = None


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
    warnings: list[Notice]
