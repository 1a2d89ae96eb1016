"""The objective of all arms on val, by the classifiers that chose: with intervals, and the ratio
beyond which more images add nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.comparison.arms import Arm
from engine.comparison.figures import AnyFigures
from engine.metrics.significance import saturation
from engine.results.comparison import MeanInterval, SaturationPoint


def on_val(figures: AnyFigures, objective: str) -> dict[str, MeanInterval]:
    """The objective of each arm. figures: of val."""
    return {arm: figures.mean(arm, objective) for arm in figures.predictions.probabilities}


def saturations(
    figures: AnyFigures, arms: Mapping[str, Arm], objective: str, margin: float
) -> dict[str, SaturationPoint]:
    """For each family and use, the ratio beyond which more images add at most the margin.

    figures: of val.
    """
    of_ratio = {(arm.line, arm.ratio): name for name, arm in arms.items()
                if arm.role != "shown" and arm.ratio}  # fmt: skip
    points = {}
    for line in dict.fromkeys(line for line, _ in of_ratio):
        ratios = [0.0, *sorted(ratio for name, ratio in of_ratio if name == line and ratio)]
        names = ["real", *(of_ratio[line, ratio] for ratio in ratios[1:])]
        points[line] = _saturation(figures, names, ratios, objective, margin)
    return points


def _saturation(
    figures: AnyFigures,
    names: Sequence[str],
    ratios: Sequence[float],
    objective: str,
    margin: float,
) -> SaturationPoint:
    scores = np.stack([figures.replicates(name, objective) for name in names], -1)
    resampled = np.stack([figures.resampled(name, objective) for name in names], -1)
    point, low, high = saturation(ratios, scores, resampled, margin)
    return SaturationPoint(ratio=point, low=low, high=high)
