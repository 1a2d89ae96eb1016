"""Results of the steps that compare arms."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from engine.core.notice import Notice
from engine.core.rows import TaskKind
from engine.core.spec import Spec
from engine.results.base import StepResult
from engine.results.joint import JointResult, PairOfArms, ZeroShotResult

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
    # Images by true and predicted class; empty for several labels per image.
    confusion: list[list[int]]
    # Of several tasks, whose means are the figures.
    tasks: dict[str, ValScores] = {}

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
    # Of several tasks: the threshold of each output, with the best F1 on val.
    thresholds: list[float] = []


class ValMean(Spec):
    """The objective of an arm on val: mean and standard deviation of its replicates."""

    mean: float
    sd: float


class SearchResult(StepResult):
    """All classifiers compared on val, and the arms chosen by it."""

    kind: ClassVar[str] = "search"

    objective: str
    # Digest of each trial's manifest, by key of its step.
    trials: dict[str, str]
    outside: dict[str, str] = {}
    arms: dict[str, ValMean]
    # The best arm of each family, and the best of the baselines among these.
    chosen: list[str]
    baseline: str
    # Written by versions below 6, which trained unfiltered twins in the search.
    twins: dict[str, str] = {}


class FailedReplicate(Spec):
    """A replicate that failed on val, by its place among the replicates, and the arm and reason."""

    replicate: int
    arm: str
    reason: Notice


class ConfirmResult(StepResult):
    """The classifiers of the chosen arms that had no part in the choice."""

    kind: ClassVar[str] = "confirm"

    # Digest of each trial's manifest, by key of its step.
    trials: dict[str, str]
    outside: dict[str, str] = {}
    # On val.
    arms: dict[str, ValMean]
    # The unfiltered twin of each chosen arm that has one: chosen arm by twin.
    twins: dict[str, str]
    # The same images with twice the steps: chosen arm by arm.
    doubles: dict[str, str] = {}
    # Found before test is opened.
    failed: list[FailedReplicate] = []


class MeanInterval(Spec):
    """Mean of replicates with its 95% interval over replicates and images."""

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


class Effect(Spec):
    """A difference with its interval; at 95% unless there is a level."""

    estimate: float
    low: float
    high: float


class Estimate(Effect):
    """A difference with its interval at `level`, and the two-sided p-value of "no difference"."""

    p: float
    level: float = 0.95


class AgainstBaseline(Spec):
    """The difference from one baseline, by paired t and by resampling. p: the larger of both
    one-sided p-values of "the arm is not better", not adjusted."""

    against: str
    effect: Estimate
    bootstrap: Estimate
    p: float

    @property
    def low(self) -> float:
        return min(self.effect.low, self.bootstrap.low)

    @property
    def high(self) -> float:
        return max(self.effect.high, self.bootstrap.high)


class Verdict(Spec):
    """The result of a comparison with all baselines.

    against: the baseline that the word rests on: the one that the arm beats least; for `harms`,
    real images; for `equivalent`, the baseline that was best on val. The figures are of this
    comparison.
    effect: mean difference of the metric, by paired t. bootstrap: the same by resampling. low,
    high: the range of both intervals. p_helps, p_harms: one-sided, the larger of both methods after
    Holm; of "no better than some baseline" and of "no worse than real images". equivalence_p:
    likewise, of two one-sided tests within `margin`. detectable: the difference from every baseline
    that 80 of 100 studies of this size find by the whole rule, at the strictest level of Holm's
    correction, with its 95% interval; None with an obstacle. near_low, near_high: the range of both
    methods' 90% intervals, which match two one-sided tests at 5%. obstacle: why no data could
    decide.
    replicates_needed, groups_needed: the numbers that together find a difference of `margin` in 80
    of 100 studies; None with an obstacle, and beyond 200 replicates or 100 times the groups.
    effect_size: mean over standard deviation of the differences. wilcoxon_p:
    of the signed-rank test, from eight replicates on; the verdict does not use it.
    """

    word: Word
    against: str
    baselines: list[AgainstBaseline]
    effect: Estimate
    bootstrap: Estimate
    low: float
    high: float
    p_helps: float
    p_harms: float
    equivalence_p: float
    margin: float
    detectable: float | None
    # The largest difference that the metric allows; `detectable` ends there.
    possible: float | None = None
    detectable_low: float | None = None
    detectable_high: float | None = None
    replicates: int
    replicates_needed: int | None
    groups: int
    groups_needed: int | None
    obstacle: Notice | None
    effect_size: float | None
    wilcoxon_p: float | None
    near_low: float
    near_high: float

    def to(self, baseline: str) -> AgainstBaseline | None:
        """The comparison with one of the baselines."""
        return next((pair for pair in self.baselines if pair.against == baseline), None)

    def interval_to(self, baseline: str) -> tuple[float, float]:
        """The range of both methods' intervals of the difference from one of the baselines. Raises
        `KeyError`."""
        pair = self.to(baseline)
        if pair is None:
            raise KeyError(baseline)
        return pair.low, pair.high

    @property
    def worse(self) -> bool:
        """Whether an undecided arm is clearly worse than the baseline that it beats least. That is
        no harm, which is judged against real images alone."""
        return self.word == "undecided" and self.obstacle is None and self.high < 0

    @property
    def p_adjusted(self) -> float:
        """Two-sided p-value of the better supported direction."""
        return min(1.0, 2 * min(self.p_helps, self.p_harms))


class WithoutFailed(Spec):
    """The comparison without the replicates that failed on val; no verdict if fewer than two are
    left."""

    replicates: int
    verdict: Verdict | None


class Contrast(Verdict):
    """An arm compared on test.

    twin: the comparison is with the arm's unfiltered twin. grouped: whether test images come in
    groups. tries, tries_against: settings that each family had on val. drawn: the generator fits
    are draws of generators that the study does not train. differences: of each replicate.
    """

    arm: str
    twin: bool = False
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
    # Whether these numbers are those of a file with predictions, which cannot be verified.
    claimed: bool = False
    # None if no replicate failed.
    without_failed: WithoutFailed | None = None


class SaturationPoint(Spec):
    """The ratio beyond which more images add nothing, with its 95% interval."""

    ratio: float
    low: float
    high: float


class Subgroup(Spec):
    """A part of the test set: the images with a value in a column; or another test set.

    scores: the objective by arm. to_baseline, to_real: of each compared arm, the difference from
    the baseline of its verdict, and from real images. Empty if the images are few.
    """

    column: str
    value: str
    images: int
    # The number of equal groups that those of its images are equivalent to.
    groups: float
    scores: dict[str, MeanInterval] = {}
    to_baseline: dict[str, Effect] = {}
    to_real: dict[str, Effect] = {}


class TaskResult(Spec):
    """One of several tasks on test.

    weight: in the objective, all add up to 1. images: with a label in the task. to_baseline,
    to_real: the objective's difference of each other arm from the baseline and from real images.
    to_against: of each compared arm, from the baseline that its verdict rests on.
    """

    kind: TaskKind
    weight: float
    classes: list[str]
    images: int
    arms: dict[str, ArmResult]
    to_baseline: dict[str, Effect]
    to_real: dict[str, Effect]
    to_against: dict[str, Effect]


class OpenedTest(Spec):
    """The test set. opened: the number of studies in the storage, this one included, that opened
    at least one of its images so far. opened_before: images that others opened. learnt_now: images
    of train and val that another study opened as test.
    """

    images: int
    groups: int
    opened: int
    opened_before: int = 0
    learnt_now: int = 0


class EvaluateResult(StepResult):
    """The comparison on test."""

    kind: ClassVar[str] = "evaluate"

    objective: str
    arms: dict[str, ArmResult]
    baseline: str
    contrasts: list[Contrast]
    # Of every other tested arm: how much higher the objective is than that of the baseline, and
    # than with real images.
    to_baseline: dict[str, Effect] = {}
    to_real: dict[str, Effect] = {}
    # Gain of real images from twice the steps; None if not tried. And that of chosen arms.
    budget: Effect | None
    budget_of: dict[str, Effect] = {}
    # The objective on val, by the classifiers that chose.
    val: dict[str, MeanInterval] = {}
    # By family, and how its images are used.
    saturation: dict[str, SaturationPoint]
    subgroups: list[Subgroup] = []
    # Test sets from elsewhere; `value` is their name.
    external: list[Subgroup] = []
    test: OpenedTest
    # Of a study with several labels per image: `arms` then have the means over the tasks.
    tasks: dict[str, TaskResult] = {}
    joint: JointResult | None = None
    pairs: list[PairOfArms] = []
    zero_shot: ZeroShotResult | None = None


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
