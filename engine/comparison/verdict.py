"""What the predictions of a comparison's classifiers come to: figures of each arm, the contrasts
that the study declares, and the verdict in words.

Whoever made the predictions: `evaluate` judges its own by this, and those of a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.comparison.arms import replicates
from engine.core import rows
from engine.metrics.classification import METRICS, confusion, f1, recall, summary
from engine.metrics.probabilities import (
    PROBABILITY_METRICS,
    Reliability,
    average_precision,
    reliability,
    roc_auc,
)
from engine.metrics.significance import (
    AreaScores,
    ConfusionScores,
    Scores,
    bootstrap,
    confusions_by_group,
    mcnemar,
    paired_t,
    saturation,
    verdicts,
)
from engine.results.comparison import (
    ArmFigure,
    ArmResult,
    ClassFigures,
    Contrast,
    Effect,
    MeanInterval,
    ReliabilityBin,
    SaturationPoint,
)
from engine.sections import Evaluate


@dataclass(frozen=True)
class DeclaredContrast:
    """Two arms that the study compares. tries: settings that each one's family had on val. drawn:
    its generators are not trained by the study, so that its fits are draws of the same images."""

    arm: str
    against: str
    tries: tuple[int, int] = (1, 1)
    drawn: bool = False
    ratio: float | None = None


@dataclass(frozen=True)
class Predictions:
    """What the classifiers of each arm say of the same images.

    labels: class numbers int64 (n,). groups: names (n,). probabilities: by arm, float32 (generator
    fits * seeds, n, classes), fit after fit.
    """

    classes: Sequence[str]
    labels: np.ndarray
    groups: np.ndarray
    probabilities: Mapping[str, np.ndarray]
    generator_fits: int

    @property
    def seeds(self) -> int:
        """Classifiers of each arm and generator fit."""
        return len(next(iter(self.probabilities.values()))) // self.generator_fits

    @property
    def replicates(self) -> int:
        return self.generator_fits if self.generator_fits > 1 else self.seeds

    def confusions(self, arm: str) -> np.ndarray:
        """Counts (classifiers, classes, classes)."""
        return np.stack(
            [
                confusion(self.labels, held.argmax(1), len(self.classes))
                for held in self.probabilities[arm]
            ]
        )

    def objective(self, arm: str, name: str) -> np.ndarray:
        """The objective of each replicate of an arm (replicates,)."""
        scores = self.scores(arm, name)
        values: np.ndarray = scores(np.ones((1, scores.groups)))[0]
        return values

    def scores(self, arm: str, name: str) -> Scores:
        """The objective of an arm for any weights of the test groups."""
        held = self.probabilities[arm]
        if name == "roc_auc":
            return AreaScores(self.labels, held, self.groups, self.replicates)
        by_group = [
            confusions_by_group(self.labels, one.argmax(1), self.groups, len(self.classes))
            for one in held
        ]
        return ConfusionScores(by_group, METRICS[name], self.replicates, name != "accuracy")


def figures_of(
    predictions: Predictions, arm: str, family: str, ratio: float | None, role: str
) -> ArmResult:
    """The scores of an arm on test. An area under a curve where a class has no image has no
    value."""
    matrices, held = predictions.confusions(arm), predictions.probabilities[arm]
    of_classifiers = {name: metric(matrices) for name, metric in METRICS.items()}
    # Of who names a class and nothing more, no probability is known.
    hard = bool(((held == 0) | (held == 1)).all())
    for name, figure in PROBABILITY_METRICS.items():
        if hard:
            break
        values = np.asarray([figure(predictions.labels, one) for one in held])
        if np.isfinite(values).all():
            of_classifiers[name] = values
    figures = {}
    for name, values in of_classifiers.items():
        of_fits = replicates(values, predictions.generator_fits)
        interval = mean_with_interval(of_fits)
        figures[name] = ArmFigure(**dict(interval), replicates=of_fits.tolist())
    whole = summary(matrices.sum(0), predictions.classes)
    f1s = replicates(f1(matrices), predictions.generator_fits)

    def known(area: float) -> float | None:
        return None if hard or not np.isfinite(area) else float(area)

    areas = {
        "roc_auc": np.stack([roc_auc(predictions.labels, one) for one in held]).mean(0),
        "average_precision":
            np.stack([average_precision(predictions.labels, one) for one in held]).mean(0),
    }  # fmt: skip
    per_class = {
        class_name: ClassFigures(
            **scores, f1_interval=mean_with_interval(f1s[:, number]),
            roc_auc=known(areas["roc_auc"][number]),
            average_precision=known(areas["average_precision"][number]),
        )
        for number, (class_name, scores) in enumerate(whole["per_class"].items())
    }  # fmt: skip
    seen = reliability(np.tile(predictions.labels, len(held)), np.concatenate(held))
    return ArmResult(
        family=family, ratio=ratio, role=role, figures=figures, per_class=per_class,
        confusion=whole["confusion"],
        classifiers={name: values.tolist() for name, values in of_classifiers.items()},
        reliability=[] if hard else bins_of(seen),
    )  # fmt: skip


def mean_with_interval(values: np.ndarray) -> MeanInterval:
    interval = paired_t(values.tolist())
    return MeanInterval(mean=interval.estimate, low=interval.low, high=interval.high)


def bins_of(seen: Reliability) -> list[ReliabilityBin]:
    """The bins of a reliability diagram that hold images."""
    return [
        ReliabilityBin(confidence=float(confidence), accuracy=float(share), images=int(count))
        for confidence, share, count in zip(seen.confidence, seen.accuracy, seen.count, strict=True)
        if count
    ]


def compare(
    predictions: Predictions, declared: Sequence[DeclaredContrast], objective: str,
    settings: Evaluate, seed: int,
) -> list[Contrast]:  # fmt: skip
    """Each contrast's effect, intervals and verdict; Holm's correction is over all of them."""
    arms = dict.fromkeys(name for one in declared for name in (one.arm, one.against))
    scores = {name: predictions.scores(name, objective) for name in arms}
    judged = []
    for one in declared:
        differences = predictions.objective(one.arm, objective) - predictions.objective(
            one.against, objective
        )
        resampled = bootstrap(scores[one.arm], scores[one.against], settings.bootstrap_draws, seed)
        judged.append((differences.tolist(), resampled))
    contrasts = []
    for one, (differences, _), verdict in zip(
        declared, judged, verdicts(judged, settings.margin), strict=True
    ):
        gain_to_real = []
        if "real" in predictions.probabilities:
            gain_to_real = class_gains(predictions, one.arm, "real")
        contrast = Contrast(
            arm=one.arm, against=one.against, ratio=one.ratio,
            differences=differences, **asdict(verdict),
            grouped=verdict.groups < len(predictions.labels),
            tries=one.tries[0], tries_against=one.tries[1], drawn=one.drawn,
            mcnemar=[
                mcnemar(predictions.labels, ours.argmax(1), theirs.argmax(1))
                for ours, theirs in zip(
                    predictions.probabilities[one.arm], predictions.probabilities[one.against],
                    strict=True,
                )
            ],
            recall_gain=class_gains(predictions, one.arm, one.against),
            recall_gain_to_real=gain_to_real,
            generator_fits=predictions.generator_fits, seeds=predictions.seeds,
        )  # fmt: skip
        contrasts.append(contrast.model_copy(update={"settle": what_would_settle(contrast)}))
    return contrasts


def class_gains(predictions: Predictions, one: str, other: str) -> list[MeanInterval]:
    """Difference of recall of each class: mean over replicates, with its paired t interval."""
    of_arms = [
        replicates(recall(predictions.confusions(arm)), predictions.generator_fits)
        for arm in (one, other)
    ]
    return [mean_with_interval(values) for values in (of_arms[0] - of_arms[1]).T]


def saturations(
    trials: Sequence[Mapping[str, Any]], objective: str, generator_fits: int, margin: float
) -> dict[str, SaturationPoint]:
    """By family, the ratio from which on more images add no more than the margin, on val. trials:
    rows of search's table."""
    of_arm: dict[tuple[str, float], list[float]] = {}
    for row in trials:
        if row["role"] != "shown" and row[rows.RATIO] is not None:
            of_arm.setdefault((row["family"], row[rows.RATIO]), []).append(row[objective])
    found = {}
    for family in dict.fromkeys(family for family, ratio in of_arm if ratio):
        ratios = sorted({0.0, *(ratio for name, ratio in of_arm if name == family)})
        values = [of_arm[(family, ratio) if ratio else ("real", 0.0)] for ratio in ratios]
        scores = replicates(np.asarray(values).T, generator_fits)
        point, low, high = saturation(ratios, scores, margin)
        found[family] = SaturationPoint(ratio=point, low=low, high=high)
    return found


def budget_effect(results: Mapping[str, ArmResult], objective: str) -> Effect | None:
    """What twice the steps do to real images: by how much the budget limits every arm."""
    if not {"real", "real_double"} <= set(results):
        return None
    twice, once = (results[name].figures[objective] for name in ("real_double", "real"))
    interval = paired_t(np.subtract(twice.replicates, once.replicates).tolist())
    return Effect(estimate=interval.estimate, low=interval.low, high=interval.high)


def budget_in_words(budget: Effect, objective: str) -> str:
    return (
        f"Beware: real images alone gain {100 * budget.estimate:.1f} points of {objective} from"
        " twice the steps, so that the budget limits every arm; raise training.steps."
    )


def in_words(contrasts: Sequence[Contrast], objective: str, baseline: str) -> str:
    """The verdict in a sentence for each contrast."""
    if not contrasts:
        return f"no synthetic arm was compared; the strongest baseline on val is {baseline}"
    return " ".join(one_in_words(contrast, objective) for contrast in contrasts)


def one_in_words(contrast: Contrast, objective: str) -> str:
    effect, margin = contrast.effect, contrast.margin
    name, against = contrast.arm, contrast.against
    shown = (
        f"{objective} {100 * effect.estimate:+.1f} points against {against}, 95% interval"
        f" {100 * contrast.low:+.1f} to {100 * contrast.high:+.1f}"
    )
    condition = replicates_in_words(contrast)
    if contrast.word in ("helps", "harms"):
        small = ", by less than the study's margin" if abs(effect.estimate) < margin else ""
        return f"{name} {contrast.word}{small}: {shown} ({condition})."
    if contrast.word == "equivalent":
        # Two one-sided tests at 5% go with an interval of 90%.
        near = (
            f"{objective} {100 * effect.estimate:+.1f} points against {against}, 90% interval"
            f" {100 * contrast.near_low:+.1f} to {100 * contrast.near_high:+.1f}"
        )
        return f"{name} makes no difference beyond ±{100 * margin:g} points: {near} ({condition})."
    return f"{name} is undecided: {shown} ({condition}; {contrast.settle})."


def replicates_in_words(contrast: Contrast) -> str:
    """What the interval is over."""
    fits, seeds = contrast.generator_fits, contrast.seeds
    if fits == 1:
        return f"{seeds} classifier seeds, conditional on one generator"
    if contrast.drawn:
        return (
            f"{fits} draws of images"
            + (f" of {seeds} classifier seeds each" if seeds > 1 else "")
            + ", conditional on one generator, which the study did not train"
        )
    return f"{fits} generator fits" + (f" of {seeds} classifier seeds each" if seeds > 1 else "")


def what_would_settle(contrast: Contrast) -> str:
    """Of an undecided contrast: what there is too little of."""
    if contrast.obstacle:
        return contrast.obstacle
    points = f"{100 * contrast.margin:g}"
    groups, count = contrast.groups_needed, contrast.replicates_needed
    needed = []
    if groups > contrast.groups:
        unit = "test groups" if contrast.grouped else "test images"
        needed.append(f"about {groups:,} {unit} (here {contrast.groups:,})")
    if count is None or count > contrast.replicates:
        unit = "generator fits" if contrast.generator_fits > 1 else "seeds"
        number = "more than 1,000" if count is None else f"about {count:,}"
        needed.append(f"{number} {unit} (here {contrast.replicates})")
    unit = "point" if points == "1" else "points"
    what = "at least " + " and ".join(needed) if needed else "no more than there is here"
    return f"to find a difference of {points} {unit}, the study's margin, takes {what}"
