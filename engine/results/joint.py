"""Descriptions next to a comparison: several tasks together, pairs of arms, and a model without
training. Nothing is decided by them."""

from __future__ import annotations

from engine.core.spec import Spec


class CombinationResult(Spec):
    """A combination of labels on test. right: the share of its images with all labels right, by
    arm, over all classifiers; f1: of the combination, by arm."""

    name: str
    train: int
    images: int
    right: dict[str, float]
    f1: dict[str, float]


class PairOfArms(Spec):
    """Two tested arms. first_only, second_only: the share of images that only one is right about,
    mean over paired classifiers. significant: the share of pairs of classifiers with a p-value of
    McNemar's test below 0.05; p_median: the median of these p-values."""

    first: str
    second: str
    first_only: float
    second_only: float
    significant: float
    p_median: float


class ZeroShotResult(Spec):
    """A model of images and texts on test, without training. figures: as those of an arm; of
    several tasks the weighted means, and each task's in `tasks`."""

    model: str
    figures: dict[str, float]
    tasks: dict[str, dict[str, float]] = {}


class CommonErrors(Spec):
    """The share of images that are wrong in both of two tasks, and what it would be if errors were
    independent."""

    arm: str
    first: str
    second: str
    both: float
    by_chance: float


class Exchange(Spec):
    """A label that is missed where another is wrongly predicted. share: of the images with it."""

    arm: str
    task: str
    missed: str
    predicted: str
    share: float


class JointResult(Spec):
    """Several tasks together. images: with a label in every task. exact: the share of them with all
    labels right, by arm."""

    images: int
    exact: dict[str, float]
    combinations: list[CombinationResult]
    common_errors: list[CommonErrors]
    exchanges: list[Exchange]
