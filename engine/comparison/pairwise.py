"""Every pair of tested arms, as a description: which images one is right about and the other is
not. Nothing is decided by it."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from engine.comparison.figures import AnyFigures
from engine.metrics.significance import mcnemar
from engine.results.joint import PairOfArms

_LEVEL = 0.05


def pairs_of_arms(figures: AnyFigures) -> list[PairOfArms]:
    """McNemar's test of each pair of paired classifiers. With several tasks a classifier is right
    about an image if all its known labels are right."""
    predictions = figures.predictions
    right = {arm: predictions.right(arm) for arm in predictions.probabilities}
    pairs = []
    for first, second in combinations(right, 2):
        tests = [mcnemar(ours, theirs) for ours, theirs in
                 zip(right[first], right[second], strict=True)]  # fmt: skip
        pairs.append(
            PairOfArms(
                first=first, second=second,
                first_only=float((right[first] & ~right[second]).mean()),
                second_only=float((right[second] & ~right[first]).mean()),
                significant=float(np.mean([p < _LEVEL for p in tests])),
                p_median=float(np.median(tests)),
            )
        )  # fmt: skip
    return pairs
