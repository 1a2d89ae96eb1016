"""What the classifiers of a comparison predicted for the same images: for one task with a class per
image, for a task with several labels per image, or for several tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from scipy import sparse

from engine.metrics import classification, multilabel, probabilities
from engine.metrics.classification import Metric, confusion
from engine.metrics.probabilities import Reliability
from engine.metrics.resampling import (
    AreaScores,
    ConfusionScores,
    MeanScores,
    Scores,
    confusions_by_group,
    effective_number,
    label_counts_by_group,
)

# Metrics in which the rarest class does not weigh as much as any other.
_BY_IMAGES = ("accuracy", "weighted_f1")


@dataclass(frozen=True)
class Predictions:
    """Predictions of each arm's classifiers for the same images.

    labels: class numbers int64 (n,). groups: names (n,). probabilities: by arm, float32 (generator
    fits * seeds, n, classes), ordered by fit. every_group: the sorted names of all groups, if some
    images of the test set are left out; None: those that occur.
    """

    metrics: ClassVar[Mapping[str, Metric]] = classification.METRICS
    of_class: ClassVar[Mapping[str, Metric]] = {
        "f1": classification.f1, "recall": classification.recall
    }  # fmt: skip
    probability_metrics: ClassVar[Mapping[str, Callable[[np.ndarray, np.ndarray], float]]] = (
        probabilities.PROBABILITY_METRICS
    )

    classes: Sequence[str]
    labels: np.ndarray
    groups: np.ndarray
    probabilities: Mapping[str, np.ndarray]
    generator_fits: int
    every_group: np.ndarray | None = None

    @property
    def seeds(self) -> int:
        """Number of classifiers per arm and generator fit."""
        return len(next(iter(self.probabilities.values()))) // self.generator_fits

    @property
    def replicates(self) -> int:
        return self.generator_fits if self.generator_fits > 1 else self.seeds

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a classifier's counts."""
        return (len(self.classes),) * 2

    @property
    def group_names(self) -> np.ndarray:
        """The sorted names of all groups."""
        return np.unique(self.groups) if self.every_group is None else self.every_group

    def of_images(self, rows: np.ndarray) -> Predictions:
        """The predictions of some images."""
        return replace(
            self, labels=self.labels[rows], groups=self.groups[rows],
            probabilities={arm: values[:, rows] for arm, values in self.probabilities.items()},
        )  # fmt: skip

    def of_replicates(self, places: Sequence[int]) -> Predictions:
        """The predictions of some replicates."""
        rows = replicate_rows(self, places)
        return replace(
            self, generator_fits=len(places) if self.generator_fits > 1 else 1,
            probabilities={arm: values[rows] for arm, values in self.probabilities.items()},
        )  # fmt: skip

    def confusions(self, arm: str) -> np.ndarray:
        """Counts (classifiers, classes, classes)."""
        return np.stack(
            [
                confusion(self.labels, values.argmax(1), len(self.classes))
                for values in self.probabilities[arm]
            ]
        )

    def right(self, arm: str) -> np.ndarray:
        """Whether each classifier is right about each image, bool (classifiers, n)."""
        return np.asarray(self.probabilities[arm].argmax(2) == self.labels)

    def objective(self, arm: str, name: str) -> np.ndarray:
        """The objective of each replicate of an arm (replicates,)."""
        scores = self.scores(arm, name)
        values: np.ndarray = scores(np.ones((1, scores.groups)))[0]
        return values

    def scores(self, arm: str, name: str) -> Scores:
        """The objective of an arm for any weights of the test groups."""
        if name == "roc_auc":
            return AreaScores(self.labels, self.probabilities[arm], self.groups, self.replicates,
                              self.every_group)  # fmt: skip
        return ConfusionScores(
            self.counts_by_group(arm), self.metrics[name], self.replicates, name not in _BY_IMAGES,
            self.shape,
        )  # fmt: skip

    def counts_by_group(self, arm: str) -> list[sparse.csr_array]:
        """For each classifier, the counts of the test groups."""
        return [
            confusions_by_group(
                self.labels, values.argmax(1), self.groups, len(self.classes), self.every_group
            )
            for values in self.probabilities[arm]
        ]

    def effective_groups(self, label: int | None = None) -> float:
        """The number of equal groups that the test groups are equivalent to, or those of a class;
        0 if it has none."""
        groups = self.groups if label is None else self.groups[self._has(label)]
        return effective_number(np.unique(groups, return_counts=True)[1]) if len(groups) else 0.0

    def summary(self, counts: np.ndarray) -> dict[str, Any]:
        """All metrics of the counts of one classifier, or their sum over several."""
        return classification.summary(counts, self.classes)

    def hard(self, arm: str) -> bool:
        """Whether the probabilities are decisions, 0 or 1."""
        values = self.probabilities[arm]
        return bool(((values == 0) | (values == 1)).all())

    def reliability(self, arm: str) -> Reliability:
        """The reliability diagram over all classifiers."""
        values = self.probabilities[arm]
        return probabilities.reliability(np.tile(self.labels, len(values)), np.concatenate(values))

    def occurring(self) -> int:
        """Number of classes with an image."""
        return len(np.unique(self.labels))

    def _has(self, label: int) -> np.ndarray:
        """Whether each image has the class with this number."""
        return np.asarray(self.labels == label)


def replicate_rows(predictions: Any, places: Sequence[int]) -> list[int]:
    """The classifiers of some replicates."""
    each = predictions.seeds if predictions.generator_fits > 1 else 1
    return [place * each + number for place in places for number in range(each)]


@dataclass(frozen=True)
class LabelPredictions(Predictions):
    """Predictions for a task with several labels per image: labels bool (n, labels), probabilities
    of each label, and decisions by arm, bool (generator fits * seeds, n, labels)."""

    metrics = multilabel.METRICS
    of_class: ClassVar[Mapping[str, Metric]] = {"f1": multilabel.f1, "recall": multilabel.recall}
    probability_metrics = multilabel.PROBABILITY_METRICS

    decisions: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.classes), 2, 2)

    def of_images(self, rows: np.ndarray) -> Predictions:
        decisions = {arm: values[:, rows] for arm, values in self.decisions.items()}
        chosen = super().of_images(rows)
        assert isinstance(chosen, LabelPredictions)
        return replace(chosen, decisions=decisions)

    def of_replicates(self, places: Sequence[int]) -> Predictions:
        rows = replicate_rows(self, places)
        decisions = {arm: values[rows] for arm, values in self.decisions.items()}
        chosen = super().of_replicates(places)
        assert isinstance(chosen, LabelPredictions)
        return replace(chosen, decisions=decisions)

    def confusions(self, arm: str) -> np.ndarray:
        """Counts (classifiers, labels, 2, 2)."""
        return np.stack([multilabel.label_counts(self.labels, values)
                         for values in self.decisions[arm]])  # fmt: skip

    def right(self, arm: str) -> np.ndarray:
        return np.asarray((self.decisions[arm] == self.labels).all(2))

    def counts_by_group(self, arm: str) -> list[sparse.csr_array]:
        return [
            label_counts_by_group(self.labels, values, self.groups, self.every_group)
            for values in self.decisions[arm]
        ]

    def summary(self, counts: np.ndarray) -> dict[str, Any]:
        return multilabel.summary(counts, self.classes)

    def hard(self, arm: str) -> bool:
        return False

    def reliability(self, arm: str) -> Reliability:
        values = self.probabilities[arm]
        truth = np.tile(self.labels, (len(values), 1))
        return multilabel.reliability(truth, np.concatenate(values))

    def occurring(self) -> int:
        return int(self.labels.any(0).sum())

    def _has(self, label: int) -> np.ndarray:
        return np.asarray(self.labels[:, label])


@dataclass(frozen=True)
class TaskPredictions:
    """Predictions for several tasks, or for one with several labels per image.

    tasks: of the images with a label in the task. shares: weights that add up to 1. rows: for each
    task, which of the n images these are. groups: names (n,).
    """

    tasks: Mapping[str, Predictions]
    shares: Mapping[str, float]
    rows: Mapping[str, np.ndarray]
    groups: np.ndarray
    classes: Sequence[str]

    @property
    def first(self) -> Predictions:
        return next(iter(self.tasks.values()))

    @property
    def labels(self) -> np.ndarray:
        """A row for each image."""
        return self.groups

    @property
    def probabilities(self) -> Mapping[str, np.ndarray]:
        """Those of the first task, by arm."""
        return self.first.probabilities

    @property
    def generator_fits(self) -> int:
        return self.first.generator_fits

    @property
    def seeds(self) -> int:
        return self.first.seeds

    @property
    def replicates(self) -> int:
        return self.first.replicates

    def of_images(self, rows: np.ndarray) -> TaskPredictions:
        """The predictions of some images."""
        number = np.full(len(self.groups), -1)
        number[rows] = np.arange(len(rows))
        kept = {name: np.flatnonzero(number[own] >= 0) for name, own in self.rows.items()}
        every = np.unique(self.groups[rows])
        return replace(
            self,
            tasks={name: replace(part.of_images(kept[name]), every_group=every)
                   for name, part in self.tasks.items()},
            rows={name: number[own[kept[name]]] for name, own in self.rows.items()},
            groups=self.groups[rows],
        )  # fmt: skip

    def of_replicates(self, places: Sequence[int]) -> TaskPredictions:
        """The predictions of some replicates."""
        parts = {name: part.of_replicates(places) for name, part in self.tasks.items()}
        return replace(self, tasks=parts)

    def right(self, arm: str) -> np.ndarray:
        """Whether each classifier is right about all known labels of each image."""
        right = np.ones((self.seeds * self.generator_fits, len(self.groups)), bool)
        for name, part in self.tasks.items():
            right[:, self.rows[name]] &= part.right(arm)
        return right

    def objective(self, arm: str, name: str) -> np.ndarray:
        """The weighted mean of the tasks' objectives, of each replicate (replicates,)."""
        values: np.ndarray = np.sum(
            [self.shares[task] * part.objective(arm, name) for task, part in self.tasks.items()], 0
        )
        return values

    def scores(self, arm: str, name: str) -> Scores:
        """The weighted mean of the tasks' objectives for any weights of the test groups."""
        return MeanScores(
            [(self.shares[task], part.scores(arm, name)) for task, part in self.tasks.items()],
            self.effective_groups(),
        )

    def effective_groups(self) -> float:
        """The least number of equal groups that the test groups of a task are equivalent to; tasks
        without images do not count."""
        own = effective_number(np.unique(self.groups, return_counts=True)[1])
        return min([own, *(part.effective_groups() for name, part in self.tasks.items()
                           if self.shares[name] and len(part.labels))])  # fmt: skip

    def occurring(self) -> int:
        """The least number of classes with an image of any task."""
        return min(part.occurring() for part in self.tasks.values())
