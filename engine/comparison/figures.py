"""Figures of arms from the predictions of their classifiers, with intervals over replicates and
test groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from engine.comparison.arms import replicates
from engine.comparison.classified import Predictions, TaskPredictions
from engine.metrics import intervals
from engine.metrics.probabilities import Reliability, average_precision, roc_auc
from engine.metrics.resampling import resampled_confusions
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

    def of_images(self, rows: np.ndarray) -> Figures:
        """The figures on some images."""
        return Figures(self.predictions.of_images(rows), self.seed)

    def of_replicates(self, places: Sequence[int]) -> Figures:
        """The figures of some replicates."""
        return Figures(self.predictions.of_replicates(places), self.seed)

    def of(self, arm: str, family: str, ratio: float | None, role: str) -> ArmResult:
        """The scores of an arm. Areas under curves are absent if a class has no image."""
        predictions, matrices = self.predictions, self.predictions.confusions(arm)
        of_arm, hard = predictions.probabilities[arm], predictions.hard(arm)
        metrics = {name: self.scores_of(arm, name) for name in predictions.metrics}
        if not hard:
            metrics |= {name: self.scores_of(arm, name) for name in predictions.probability_metrics}
        metrics = {
            name: scores for name, scores in metrics.items() if np.isfinite(scores.values).all()
        }
        whole = predictions.summary(matrices.sum(0))
        areas = {
            name: np.mean([area(predictions.labels, values) for values in of_arm], 0)
            for name, area in (("roc_auc", roc_auc), ("average_precision", average_precision))
        }

        def known(area: float) -> float | None:
            return None if hard or not np.isfinite(area) else float(area)

        f1s = self.scores_of(arm, _F1)
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
            reliability=[] if hard else bins_of(predictions.reliability(arm)),
        )  # fmt: skip

    def mean(self, arm: str, metric: str) -> MeanInterval:
        """The mean of an arm's replicates."""
        scores = self.scores_of(arm, metric)
        return self._interval(scores.values, scores.drawn, share=metric not in _UNBOUNDED)

    def replicates(self, arm: str, metric: str) -> np.ndarray:
        """A metric of each replicate of an arm (replicates,)."""
        return replicates(self.scores_of(arm, metric).values, self.predictions.generator_fits)

    def resampled(self, arm: str, metric: str) -> np.ndarray:
        """A metric of each replicate of an arm in resampled test sets (draws, replicates); the same
        test sets for all arms."""
        drawn = self.scores_of(arm, metric).drawn
        return replicates(drawn.T, self.predictions.generator_fits).T

    def difference(self, arm: str, other: str, metric: str) -> Effect:
        """How much higher a metric is for `arm` than for another arm."""
        ours, theirs = self.scores_of(arm, metric), self.scores_of(other, metric)
        mean = self._interval(ours.values - theirs.values, ours.drawn - theirs.drawn)
        return Effect(estimate=mean.mean, low=mean.low, high=mean.high)

    def class_gains(self, arm: str, other: str) -> list[MeanInterval]:
        """Difference in recall of each class."""
        ours, theirs = self.scores_of(arm, _RECALL), self.scores_of(other, _RECALL)
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

    def scores_of(self, arm: str, metric: str) -> _Scores:
        """A metric of an arm's classifiers, and in resampled test sets."""
        if (arm, metric) not in self._known:
            if metric in self.predictions.probability_metrics:
                self._known[arm, metric] = self._of_probabilities(arm, metric)
            else:
                self._known.update(
                    {(arm, name): scores for name, scores in self._of_confusions(arm).items()}
                )
        return self._known[arm, metric]

    def _of_confusions(self, arm: str) -> dict[str, _Scores]:
        """All metrics of the confusion matrix, and recall and F1 of each class."""
        metrics = {**self.predictions.metrics, **self.predictions.of_class}
        drawn: dict[str, list[np.ndarray]] = {name: [] for name in metrics}
        by_group = self.predictions.counts_by_group(arm)
        for counts in resampled_confusions(by_group, _DRAWS, self.seed, self.predictions.shape):
            for name, metric in metrics.items():
                drawn[name].append(metric(counts))
        matrices = self.predictions.confusions(arm)
        return {
            name: _Scores(metric(matrices), np.concatenate(drawn[name]))
            for name, metric in metrics.items()
        }

    def _of_probabilities(self, arm: str, metric: str) -> _Scores:
        """A metric of probabilities; resampled by leaving out blocks of groups."""
        predictions, figure = self.predictions, self.predictions.probability_metrics[metric]
        names = predictions.group_names
        group_of = np.searchsorted(names, predictions.groups)
        count = min(_BLOCKS, len(names))
        order = np.random.default_rng(self.seed).permutation(len(names))
        block_of = (order % count)[group_of]

        def values(kept: np.ndarray) -> np.ndarray:
            if not kept.any():  # all images of a task may be in one block
                return np.full(len(predictions.probabilities[arm]), np.nan)
            return np.asarray([figure(predictions.labels[kept], probabilities[kept])
                               for probabilities in predictions.probabilities[arm]])  # fmt: skip

        whole = values(np.ones(len(block_of), bool))
        if count < 2:
            return _Scores(whole, whole[None])
        left_out = np.stack([values(block_of != block) for block in range(count)])
        # A class whose only images are left out has no area: the value of all images replaces it.
        left_out = np.where(np.isfinite(left_out), left_out, whole)
        return _Scores(whole, intervals.jackknifed(left_out))


@dataclass(frozen=True)
class TaskFigures:
    """The figures of arms in several tasks: of the weighted mean of each metric over the tasks, and
    of each task (`tasks`)."""

    predictions: TaskPredictions
    seed: int
    tasks: Mapping[str, Figures]

    @classmethod
    def of_predictions(cls, predictions: TaskPredictions, seed: int) -> TaskFigures:
        parts = {name: Figures(part, seed) for name, part in predictions.tasks.items()}
        return cls(predictions, seed, parts)

    def of_images(self, rows: np.ndarray) -> TaskFigures:
        """The figures on some images."""
        return TaskFigures.of_predictions(self.predictions.of_images(rows), self.seed)

    def of_replicates(self, places: Sequence[int]) -> TaskFigures:
        """The figures of some replicates."""
        return TaskFigures.of_predictions(self.predictions.of_replicates(places), self.seed)

    def over_occurring(self, of_classes: bool) -> TaskFigures:
        """The same with means over the tasks that have images and, for metrics in which a class
        without images counts as 0 (`of_classes`), over the classes that occur."""
        own = self.predictions
        occurring = {name: part.occurring() for name, part in own.tasks.items()}
        whole = sum(own.shares[name] for name, count in occurring.items() if count)
        shares = {
            name: own.shares[name] / whole
            * (len(own.tasks[name].classes) / count if of_classes else 1.0) if count else 0.0
            for name, count in occurring.items()
        }  # fmt: skip
        return replace(self, predictions=replace(own, shares=shares))

    def of(self, arm: str, family: str, ratio: float | None, role: str) -> ArmResult:
        """The mean of each metric that all tasks have, and the labels of all tasks; each task's own
        figures have its confusion and its calibration."""
        parts = {name: part.of(arm, family, ratio, role) for name, part in self.tasks.items()}
        common = [name for name in next(iter(parts.values())).figures
                  if all(name in part.figures for part in parts.values())]  # fmt: skip
        per_class = [scores for part in parts.values() for scores in part.per_class.values()]
        return ArmResult(
            family=family, ratio=ratio, role=role,
            figures={
                name: ArmFigure(
                    **dict(self.mean(arm, name)), replicates=self.replicates(arm, name).tolist()
                )
                for name in common
            },
            per_class=dict(zip(self.predictions.classes, per_class, strict=True)),
            confusion=[],
            classifiers={name: self._mean_scores(arm, name).values.tolist() for name in common},
            reliability=[],
        )  # fmt: skip

    def mean(self, arm: str, metric: str) -> MeanInterval:
        """The mean of an arm's replicates."""
        scores = self._mean_scores(arm, metric)
        return self._interval(scores.values, scores.drawn, share=metric not in _UNBOUNDED)

    def replicates(self, arm: str, metric: str) -> np.ndarray:
        """A metric of each replicate of an arm (replicates,)."""
        return replicates(self._mean_scores(arm, metric).values, self.predictions.generator_fits)

    def resampled(self, arm: str, metric: str) -> np.ndarray:
        """As `Figures.resampled`."""
        drawn = self._mean_scores(arm, metric).drawn
        return replicates(drawn.T, self.predictions.generator_fits).T

    def difference(self, arm: str, other: str, metric: str) -> Effect:
        """How much higher a metric is for `arm` than for another arm."""
        ours, theirs = self._mean_scores(arm, metric), self._mean_scores(other, metric)
        mean = self._interval(ours.values - theirs.values, ours.drawn - theirs.drawn)
        return Effect(estimate=mean.mean, low=mean.low, high=mean.high)

    def class_gains(self, arm: str, other: str) -> list[MeanInterval]:
        """Difference in recall of each label, task by task."""
        return [gain for part in self.tasks.values() for gain in part.class_gains(arm, other)]

    def _interval(self, values: np.ndarray, drawn: np.ndarray, share: bool = False) -> MeanInterval:
        of_fits = replicates(values, self.predictions.generator_fits)
        groups = self.predictions.effective_groups()
        effect = intervals.of_mean(of_fits, drawn.mean(1), groups, share=share)
        return MeanInterval(mean=effect.estimate, low=effect.low, high=effect.high)

    def _mean_scores(self, arm: str, metric: str) -> _Scores:
        """The tasks draw the same test sets, because all know every group."""
        shares = self.predictions.shares
        scores = {name: part.scores_of(arm, metric) for name, part in self.tasks.items()}
        return _Scores(
            np.sum([shares[name] * of_task.values for name, of_task in scores.items()], 0),
            np.sum([shares[name] * of_task.drawn for name, of_task in scores.items()], 0),
        )


AnyFigures = Figures | TaskFigures


def bins_of(calibration: Reliability) -> list[ReliabilityBin]:
    """The bins of a reliability diagram that contain images."""
    return [
        ReliabilityBin(confidence=float(confidence), accuracy=float(share), images=int(count))
        for confidence, share, count in zip(
            calibration.confidence, calibration.accuracy, calibration.count, strict=True
        )
        if count
    ]
