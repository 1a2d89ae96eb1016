"""Results of the steps that compare arms."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from engine.core.notice import Notice
from engine.core.spec import Spec
from engine.results.base import StepResult

Word = Literal["helps", "harms", "equivalent", "undecided"]


class MixResult(StepResult):
    """The training images of an arm."""

    kind: ClassVar[str] = "mix"

    # Real images.
    real: int
    # Generated images by generator and class.
    added: dict[str, dict[str, int]]

    @property
    def added_total(self) -> int:
        """All generated images."""
        return sum(sum(by_class.values()) for by_class in self.added.values())


class ClassScores(Spec):
    """Scores of one class on `images` images."""

    precision: float
    recall: float
    f1: float
    images: int


class ValScores(Spec):
    """Scores of a classifier on val: metrics by name are further fields (`figures`)."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    per_class: dict[str, ClassScores]
    # Images by true and predicted class.
    confusion: list[list[int]]

    @property
    def figures(self) -> dict[str, float]:
        """Metrics by name (`engine.metrics`); those without a value are absent."""
        return self.__pydantic_extra__


class TrainResult(StepResult):
    """One classifier."""

    kind: ClassVar[str] = "train"

    # The optimizer step whose weights were kept.
    best_step: int
    val: ValScores
    # Digests of the classifier's external files.
    outside: dict[str, str] = {}


class ValMean(Spec):
    """The objective of an arm on val: mean and standard deviation of its replicates."""

    mean: float
    sd: float


class SearchResult(StepResult):
    """All classifiers compared on val, and the arms chosen by it."""

    kind: ClassVar[str] = "search"

    objective: str
    warnings: list[Notice]
    # Digest of each trial's manifest, by key of its step.
    trials: dict[str, str]
    outside: dict[str, str] = {}
    arms: dict[str, ValMean]
    # The best arm of each family, and the best of the baselines among these.
    chosen: list[str]
    baseline: str
    # The unfiltered twin of each chosen arm that has one: chosen arm by twin.
    twins: dict[str, str]


class MeanInterval(Spec):
    """Mean of replicates with its 95% t interval."""

    mean: float
    low: float
    high: float


class ArmFigure(MeanInterval):
    """A metric of an arm on test, with the value of each replicate."""

    replicates: list[float]


class ClassFigures(ClassScores):
    """Scores of one class on test, from the summed confusion of all classifiers; areas under curves
    are means over classifiers, absent without probabilities."""

    f1_interval: MeanInterval
    roc_auc: float | None = None
    average_precision: float | None = None


class ReliabilityBin(Spec):
    """A bin of a reliability diagram that has images."""

    confidence: float
    accuracy: float
    images: int


class ArmResult(Spec):
    """A tested arm. Metrics without a value are absent."""

    family: str
    # None if the amount of images is not given as a ratio.
    ratio: float | None
    role: str
    figures: dict[str, ArmFigure]
    per_class: dict[str, ClassFigures]
    # Images by true and predicted class, over all classifiers.
    confusion: list[list[int]]
    # Every metric of every classifier.
    classifiers: dict[str, list[float]]
    reliability: list[ReliabilityBin]


class Estimate(Spec):
    """A difference with its interval at `level`, and the two-sided p-value of "no difference"."""

    estimate: float
    low: float
    high: float
    p: float
    level: float = 0.95


class Verdict(Spec):
    """The result of a comparison.

    effect: mean difference of the metric, by paired t. bootstrap: the same by resampling. low,
    high: the range of both intervals. p_adjusted: the larger of the two p-values after Holm.
    equivalence_p: likewise, of two one-sided tests within `margin`. detectable: the difference that
    this many replicates on this test set find in 80 of 100 studies, at the strictest level of
    Holm's correction; None with an obstacle. near_low, near_high: the range of both methods' 90%
    intervals, which match two one-sided tests at 5%. obstacle: why no data could decide.
    replicates_needed, groups_needed: the numbers that find a difference of `margin`; None for more
    than 1,000 replicates. effect_size: mean over standard deviation of the differences. wilcoxon_p:
    of the signed-rank test, from eight replicates on; the verdict does not use it.
    """

    word: Word
    effect: Estimate
    bootstrap: Estimate
    low: float
    high: float
    p_adjusted: float
    equivalence_p: float
    margin: float
    detectable: float | None
    replicates: int
    replicates_needed: int | None
    groups: int
    groups_needed: int
    obstacle: Notice | None
    effect_size: float | None
    wilcoxon_p: float | None
    near_low: float
    near_high: float


class Contrast(Verdict):
    """Two arms compared on test.

    grouped: whether test images come in groups. tries, tries_against: settings that each family had
    on val. drawn: the generator fits are draws of generators that the study does not train.
    """

    arm: str
    against: str
    ratio: float | None = None
    differences: list[float]
    grouped: bool
    tries: int
    tries_against: int
    drawn: bool
    # p-value of McNemar's test for each pair of classifiers.
    mcnemar: list[float]
    # Difference in recall of each class.
    recall_gain: list[MeanInterval]
    recall_gain_to_real: list[MeanInterval] = []
    generator_fits: int
    seeds: int


class Effect(Spec):
    """A difference with its 95% interval."""

    estimate: float
    low: float
    high: float


class SaturationPoint(Spec):
    """The ratio beyond which more images add nothing, with its 95% interval."""

    ratio: float
    low: float
    high: float


class OpenedTest(Spec):
    """The test set. opened: the number of studies in the storage that opened it so far."""

    images: int
    groups: int
    opened: int


class EvaluateResult(StepResult):
    """The comparison on test."""

    kind: ClassVar[str] = "evaluate"

    objective: str
    arms: dict[str, ArmResult]
    baseline: str
    contrasts: list[Contrast]
    # Gain of real images from twice the steps; None if not tried.
    budget: Effect | None
    # By family.
    saturation: dict[str, SaturationPoint]
    test: OpenedTest


class ScoredPredictions(Spec):
    """The evaluation of predictions from a file."""

    study: str
    file: str
    objective: str
    baseline: str
    classes: list[str]
    test: OpenedTest
    arms: dict[str, ArmResult]
    contrasts: list[Contrast]
    verdict: str


class ReportResult(StepResult):
    """The page."""

    kind: ClassVar[str] = "report"

    # The comparison as plain text.
    table: str
    verdict: str
