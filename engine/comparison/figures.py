"""Figures of arms from the predictions of their classifiers, with intervals over replicates and
test groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import sparse

from engine.comparison.arms import replicates
from engine.metrics import intervals
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
    confusions_by_group,
    effective_number,
    resampled_confusions,
)
from engine.results.comparison import (
    ArmFigure,
    ArmResult,
    ClassFigures,
    Effect,
    MeanInterval,
    ReliabilityBin,
)

# Resampled test sets for the metrics of a confusion matrix, and blocks of groups left out for those
# of probabilities, which take far longer.
_DRAWS, _BLOCKS = 400, 20
# Metrics whose intervals are not those of a share.
_UNBOUNDED = ("brier", "ece")
# Of each class.
_F1, _RECALL = "f1", "recall"


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

    def of_images(self, rows: np.ndarray) -> Predictions:
        """The predictions of some images."""
        return replace(
            self, labels=self.labels[rows], groups=self.groups[rows],
            probabilities={arm: values[:, rows] for arm, values in self.probabilities.items()},
        )  # fmt: skip

    def of_replicates(self, places: Sequence[int]) -> Predictions:
        """The predictions of some replicates."""
        each = self.seeds if self.generator_fits > 1 else 1
        rows = [place * each + number for place in places for number in range(each)]
        return replace(
            self, generator_fits=len(places) if self.generator_fits > 1 else 1,
            probabilities={arm: values[rows] for arm, values in self.probabilities.items()},
        )  # fmt: skip

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
        # Means in which the rarest class weighs as much as any other.
        of_classes = name not in ("accuracy", "weighted_f1")
        by_group = self.confusions_by_group(arm)
        return ConfusionScores(by_group, METRICS[name], self.replicates, of_classes)

    def confusions_by_group(self, arm: str) -> list[sparse.csr_array]:
        """For each classifier, the confusions of the test groups."""
        return [
            confusions_by_group(
                self.labels, probabilities.argmax(1), self.groups, len(self.classes)
            )
            for probabilities in self.probabilities[arm]
        ]

    def effective_groups(self, label: int | None = None) -> float:
        """The number of equal groups that the test groups are equivalent to, or those of a class;
        0 if it has none."""
        groups = self.groups if label is None else self.groups[self.labels == label]
        return effective_number(np.unique(groups, return_counts=True)[1]) if len(groups) else 0.0


@dataclass(frozen=True)
class _Scores:
    """A metric of an arm's classifiers: on the real test set (classifiers, …), and in resampled
    test sets (draws, classifiers, …)."""

    values: np.ndarray
    drawn: np.ndarray


@dataclass(frozen=True)
class Figures:
    """The figures of a comparison's arms and their differences.

    `of` and `difference` also serve val, with the predictions of val.
    """

    predictions: Predictions
    seed: int
    _known: dict[tuple[str, str], _Scores] = field(default_factory=dict)

    def of(self, arm: str, family: str, ratio: float | None, role: str) -> ArmResult:
        """The scores of an arm. Areas under curves are absent if a class has no image."""
        predictions, matrices = self.predictions, self.predictions.confusions(arm)
        of_arm = predictions.probabilities[arm]
        hard = bool(((of_arm == 0) | (of_arm == 1)).all())
        metrics = {name: self._scores(arm, name) for name in METRICS}
        if not hard:
            metrics |= {name: self._scores(arm, name) for name in PROBABILITY_METRICS}
        metrics = {
            name: scores for name, scores in metrics.items() if np.isfinite(scores.values).all()
        }
        whole = summary(matrices.sum(0), predictions.classes)
        areas = {
            name: np.mean([area(predictions.labels, values) for values in of_arm], 0)
            for name, area in (("roc_auc", roc_auc), ("average_precision", average_precision))
        }

        def known(area: float) -> float | None:
            return None if hard or not np.isfinite(area) else float(area)

        f1s = self._scores(arm, _F1)
        per_class = {
            class_name: ClassFigures(
                **scores,
                f1_interval=self._interval(
                    f1s.values[:, number], f1s.drawn[:, :, number], number, share=True
                ),
                roc_auc=known(areas["roc_auc"][number]),
                average_precision=known(areas["average_precision"][number]),
            )
            for number, (class_name, scores) in enumerate(whole["per_class"].items())
        }
        calibration = reliability(np.tile(predictions.labels, len(of_arm)), np.concatenate(of_arm))
        return ArmResult(
            family=family, ratio=ratio, role=role,
            figures={
                name: ArmFigure(
                    **dict(self.mean(arm, name)), replicates=self.replicates(arm, name).tolist()
                )
                for name in metrics
            },
            per_class=per_class, confusion=whole["confusion"],
            classifiers={name: scores.values.tolist() for name, scores in metrics.items()},
            reliability=[] if hard else bins_of(calibration),
        )  # fmt: skip

    def mean(self, arm: str, metric: str) -> MeanInterval:
        """The mean of an arm's replicates."""
        scores = self._scores(arm, metric)
        return self._interval(scores.values, scores.drawn, share=metric not in _UNBOUNDED)

    def replicates(self, arm: str, metric: str) -> np.ndarray:
        """A metric of each replicate of an arm (replicates,)."""
        return replicates(self._scores(arm, metric).values, self.predictions.generator_fits)

    def resampled(self, arm: str, metric: str) -> np.ndarray:
        """A metric of each replicate of an arm in resampled test sets (draws, replicates); the same
        test sets for all arms."""
        drawn = self._scores(arm, metric).drawn
        return replicates(drawn.T, self.predictions.generator_fits).T

    def difference(self, arm: str, other: str, metric: str) -> Effect:
        """How much higher a metric is for `arm` than for another arm."""
        ours, theirs = self._scores(arm, metric), self._scores(other, metric)
        mean = self._interval(ours.values - theirs.values, ours.drawn - theirs.drawn)
        return Effect(estimate=mean.mean, low=mean.low, high=mean.high)

    def class_gains(self, arm: str, other: str) -> list[MeanInterval]:
        """Difference in recall of each class."""
        ours, theirs = self._scores(arm, _RECALL), self._scores(other, _RECALL)
        values, drawn = ours.values - theirs.values, ours.drawn - theirs.drawn
        return [self._interval(values[:, number], drawn[:, :, number], number)
                for number in range(len(self.predictions.classes))]  # fmt: skip

    def _interval(
        self, values: np.ndarray, drawn: np.ndarray, label: int | None = None, share: bool = False
    ) -> MeanInterval:
        """The mean of values of classifiers (classifiers,), with their values in resampled test
        sets (draws, classifiers). label: the class whose groups count."""
        of_fits = replicates(values, self.predictions.generator_fits)
        groups = self.predictions.effective_groups(label)
        effect = intervals.of_mean(of_fits, drawn.mean(1), groups, share=share)
        return MeanInterval(mean=effect.estimate, low=effect.low, high=effect.high)

    def _scores(self, arm: str, metric: str) -> _Scores:
        if (arm, metric) not in self._known:
            if metric in PROBABILITY_METRICS:
                self._known[arm, metric] = self._of_probabilities(arm, metric)
            else:
                self._known.update(
                    {(arm, name): scores for name, scores in self._of_confusions(arm).items()}
                )
        return self._known[arm, metric]

    def _of_confusions(self, arm: str) -> dict[str, _Scores]:
        """All metrics of the confusion matrix, and recall and F1 of each class."""
        metrics = {**METRICS, _F1: f1, _RECALL: recall}
        drawn: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
        by_group = self.predictions.confusions_by_group(arm)
        for counts in resampled_confusions(by_group, _DRAWS, self.seed):
            for name, metric in metrics.items():
                drawn[name].append(metric(counts))
        matrices = self.predictions.confusions(arm)
        return {
            name: _Scores(metric(matrices), np.concatenate(drawn[name]))
            for name, metric in metrics.items()
        }

    def _of_probabilities(self, arm: str, metric: str) -> _Scores:
        """A metric of probabilities; resampled by leaving out blocks of groups."""
        predictions, figure = self.predictions, PROBABILITY_METRICS[metric]
        names, group_of = np.unique(predictions.groups, return_inverse=True)
        count = min(_BLOCKS, len(names))
        order = np.random.default_rng(self.seed).permutation(len(names))
        block_of = (order % count)[group_of]

        def values(kept: np.ndarray) -> np.ndarray:
            return np.asarray([figure(predictions.labels[kept], probabilities[kept])
                               for probabilities in predictions.probabilities[arm]])  # fmt: skip

        whole = values(np.ones(len(block_of), bool))
        if count < 2:
            return _Scores(whole, whole[None])
        left_out = np.stack([values(block_of != block) for block in range(count)])
        # A class whose only images are left out has no area: the value of all images replaces it.
        left_out = np.where(np.isfinite(left_out), left_out, whole)
        return _Scores(whole, intervals.jackknifed(left_out))


def bins_of(calibration: Reliability) -> list[ReliabilityBin]:
    """The bins of a reliability diagram that contain images."""
    return [
        ReliabilityBin(confidence=float(confidence), accuracy=float(share), images=int(count))
        for confidence, share, count in zip(
            calibration.confidence, calibration.accuracy, calibration.count, strict=True
        )
        if count
    ]
