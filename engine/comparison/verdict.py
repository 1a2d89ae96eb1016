"""Results from the predictions of a comparison's classifiers: figures of each arm, and the
verdict of each declared contrast.

`evaluate` uses this for the study's own predictions, `score` for those in a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from engine.metrics.resampling import (
    AreaScores,
    ConfusionScores,
    Scores,
    bootstrap,
    confusions_by_group,
)
from engine.metrics.significance import Claim, Paired, mcnemar, paired_t, saturation, verdicts
from engine.results.comparison import (
    ArmFigure,
    ArmResult,
    ClassFigures,
    Contrast,
    Effect,
    MeanInterval,
    ReliabilityBin,
    SaturationPoint,
    Verdict,
)
from engine.settings import Evaluate


@dataclass(frozen=True)
class DeclaredContrast:
    """An arm that the study compares with all opened baselines, or with its unfiltered twin.

    best: the baseline that was best on val. real: the one that harm is judged against. tries:
    number of settings of each arm's family on val. drawn: the study does not train the generators,
    so the generator fits are only different draws of their images.
    """

    arm: str
    baselines: tuple[str, ...]
    best: str
    real: str
    tries: Mapping[str, int] = field(default_factory=dict)
    drawn: bool = False
    ratio: float | None = None
    twin: bool = False


@dataclass(frozen=True)
class Predictions:
    """Predictions of each arm's classifiers for the same images.

    labels: class numbers int64 (n,). groups: names (n,). probabilities: by arm, float32 (generator
    fits * seeds, n, classes), ordered by fit.
    """

    classes: Sequence[str]
    labels: np.ndarray
    groups: np.ndarray
    probabilities: Mapping[str, np.ndarray]
    generator_fits: int

    @property
    def seeds(self) -> int:
        """Number of classifiers per arm and generator fit."""
        return len(next(iter(self.probabilities.values()))) // self.generator_fits

    @property
    def replicates(self) -> int:
        return self.generator_fits if self.generator_fits > 1 else self.seeds

    def confusions(self, arm: str) -> np.ndarray:
        """Counts (classifiers, classes, classes)."""
        return np.stack(
            [
                confusion(self.labels, probabilities.argmax(1), len(self.classes))
                for probabilities in self.probabilities[arm]
            ]
        )

    def objective(self, arm: str, name: str) -> np.ndarray:
        """The objective of each replicate of an arm (replicates,)."""
        scores = self.scores(arm, name)
        values: np.ndarray = scores(np.ones((1, scores.groups)))[0]
        return values

    def scores(self, arm: str, name: str) -> Scores:
        """The objective of an arm for any weights of the test groups."""
        of_arm = self.probabilities[arm]
        if name == "roc_auc":
            return AreaScores(self.labels, of_arm, self.groups, self.replicates)
        by_group = [
            confusions_by_group(
                self.labels, probabilities.argmax(1), self.groups, len(self.classes)
            )
            for probabilities in of_arm
        ]
        return ConfusionScores(by_group, METRICS[name], self.replicates, name != "accuracy")


def figures_of(
    predictions: Predictions, arm: str, family: str, ratio: float | None, role: str
) -> ArmResult:
    """The scores of an arm on test. Areas under curves are absent if a class has no image."""
    matrices, of_arm = predictions.confusions(arm), predictions.probabilities[arm]
    of_classifiers = {name: metric(matrices) for name, metric in METRICS.items()}
    # Classifiers that only name a class have no probabilities.
    hard = bool(((of_arm == 0) | (of_arm == 1)).all())
    for name, figure in PROBABILITY_METRICS.items():
        if hard:
            break
        values = np.asarray([figure(predictions.labels, probabilities) for probabilities in of_arm])
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
        "roc_auc": np.stack([roc_auc(predictions.labels, values) for values in of_arm]).mean(0),
        "average_precision":
            np.stack([average_precision(predictions.labels, values) for values in of_arm]).mean(0),
    }  # fmt: skip
    per_class = {
        class_name: ClassFigures(
            **scores, f1_interval=mean_with_interval(f1s[:, number]),
            roc_auc=known(areas["roc_auc"][number]),
            average_precision=known(areas["average_precision"][number]),
        )
        for number, (class_name, scores) in enumerate(whole["per_class"].items())
    }  # fmt: skip
    calibration = reliability(np.tile(predictions.labels, len(of_arm)), np.concatenate(of_arm))
    return ArmResult(
        family=family, ratio=ratio, role=role, figures=figures, per_class=per_class,
        confusion=whole["confusion"],
        classifiers={name: values.tolist() for name, values in of_classifiers.items()},
        reliability=[] if hard else bins_of(calibration),
    )  # fmt: skip


def mean_with_interval(values: np.ndarray) -> MeanInterval:
    interval = paired_t(values.tolist())
    return MeanInterval(mean=interval.estimate, low=interval.low, high=interval.high)


def bins_of(calibration: Reliability) -> list[ReliabilityBin]:
    """The bins of a reliability diagram that contain images."""
    return [
        ReliabilityBin(confidence=float(confidence), accuracy=float(share), images=int(count))
        for confidence, share, count in zip(
            calibration.confidence, calibration.accuracy, calibration.count, strict=True
        )
        if count
    ]


def compare(
    predictions: Predictions, declared: Sequence[DeclaredContrast], objective: str,
    settings: Evaluate, seed: int,
) -> list[Contrast]:  # fmt: skip
    """The effect, intervals and verdict of each contrast. Holm's correction is over the contrasts
    with baselines, and separately over those with twins."""
    arms = dict.fromkeys(name for pair in declared for name in (pair.arm, *pair.baselines))
    scores = {name: predictions.scores(name, objective) for name in arms}
    values = {name: predictions.objective(name, objective) for name in arms}

    def claim(pair: DeclaredContrast) -> Claim:
        return Claim(
            {
                name: Paired(
                    (values[pair.arm] - values[name]).tolist(),
                    bootstrap(scores[pair.arm], scores[name], settings.bootstrap_draws, seed),
                )
                for name in pair.baselines
            },
            pair.best, pair.real,
        )  # fmt: skip

    claims = [claim(pair) for pair in declared]
    judged: dict[int, Verdict] = {}
    for twin in (False, True):
        places = [place for place, pair in enumerate(declared) if pair.twin == twin]
        judged |= zip(
            places, verdicts([claims[place] for place in places], settings.margin), strict=True
        )
    contrasts = []
    for place, pair in enumerate(declared):
        verdict = judged[place]
        against = verdict.against
        gain_to_real = []
        if "real" in predictions.probabilities:
            gain_to_real = class_gains(predictions, pair.arm, "real")
        contrasts.append(Contrast(
            **dict(verdict), arm=pair.arm, twin=pair.twin, ratio=pair.ratio,
            differences=list(claims[place].against[against].differences),
            grouped=verdict.groups < len(predictions.labels),
            tries=pair.tries.get(pair.arm, 1), tries_against=pair.tries.get(against, 1),
            drawn=pair.drawn,
            mcnemar=[
                mcnemar(predictions.labels, ours.argmax(1), theirs.argmax(1))
                for ours, theirs in zip(
                    predictions.probabilities[pair.arm], predictions.probabilities[against],
                    strict=True,
                )
            ],
            recall_gain=class_gains(predictions, pair.arm, against),
            recall_gain_to_real=gain_to_real,
            generator_fits=predictions.generator_fits, seeds=predictions.seeds,
        ))  # fmt: skip
    return contrasts


def class_gains(predictions: Predictions, arm: str, against: str) -> list[MeanInterval]:
    """Difference in recall of each class: mean over replicates with its paired t interval."""
    of_arms = [
        replicates(recall(predictions.confusions(name)), predictions.generator_fits)
        for name in (arm, against)
    ]
    return [mean_with_interval(values) for values in (of_arms[0] - of_arms[1]).T]


def saturations(
    trials: Sequence[Mapping[str, Any]], objective: str, generator_fits: int, margin: float
) -> dict[str, SaturationPoint]:
    """For each family, the ratio beyond which more images add at most the margin on val.

    trials: rows of search's table.
    """
    of_arm: dict[tuple[str, float], list[float]] = {}
    for row in trials:
        if row["role"] != "shown" and row[rows.RATIO] is not None:
            of_arm.setdefault((row["family"], row[rows.RATIO]), []).append(row[objective])
    points = {}
    for family in dict.fromkeys(family for family, ratio in of_arm if ratio):
        ratios = sorted({0.0, *(ratio for name, ratio in of_arm if name == family)})
        values = [of_arm[(family, ratio) if ratio else ("real", 0.0)] for ratio in ratios]
        scores = replicates(np.asarray(values).T, generator_fits)
        point, low, high = saturation(ratios, scores, margin)
        points[family] = SaturationPoint(ratio=point, low=low, high=high)
    return points


def budget_effect(results: Mapping[str, ArmResult], objective: str) -> Effect | None:
    """Gain of real images from twice the steps; a gain means that the budget limits all arms."""
    if not {"real", "real_double"} <= set(results):
        return None
    twice, once = (results[name].figures[objective] for name in ("real_double", "real"))
    interval = paired_t(np.subtract(twice.replicates, once.replicates).tolist())
    return Effect(estimate=interval.estimate, low=interval.low, high=interval.high)
