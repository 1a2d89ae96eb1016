"""How many images to generate for which class or combination of labels, from scores on val and
counts in train.

A class gets a share of the total in proportion to its weight. `inverse_frequency`: one over its
training images. `tiers`: a weight by the F1 of its weakest label, times one plus two bonuses:

    correlation    the mean correlation (phi) of its pairs of labels over train, where positive: an
                   image of it serves labels that occur together
    impact         the share of the objective that its labels lack, relative to the class whose
                   labels lack most: weight of the task / number of its labels * (1 - F1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from engine.results.images import AllocatedClass
from engine.settings_labels import Allocation


def allocate(
    settings: Allocation, counts: Mapping[str, int], labels: Mapping[str, Sequence[str]],
    f1: Mapping[str, float], worth: Mapping[str, float], phi: Mapping[tuple[str, str], float],
) -> dict[str, AllocatedClass]:  # fmt: skip
    """What each class gets, and why.

    counts: real training images of each target class. labels: those that each class consists of.
    f1, worth: of each label, on val, and its weight in the objective; empty for a method that does
    not read them. phi: of pairs of labels, in the order of `labels`.
    """
    lacking = {name: sum(worth[label] * (1 - f1[label]) for label in of_class) if f1 else 0.0
               for name, of_class in labels.items()}  # fmt: skip
    most = max((lacking[name] for name in counts), default=0.0)
    entries = {}
    for name, images in counts.items():
        pairs = [max(0.0, phi.get(pair, 0.0)) for pair in combinations(labels[name], 2)]
        weakest = min((f1[label] for label in labels[name]), default=1.0) if f1 else None
        correlation = float(np.mean(pairs)) if pairs else 0.0
        impact = lacking[name] / most if most > 0 else 0.0
        if settings.method == "inverse_frequency" or weakest is None:
            weight, tier = 1 / images, None
        else:
            tier, base = tier_of(settings, weakest)
            weight = base * (1 + settings.correlation * correlation + settings.impact * impact)
        entries[name] = AllocatedClass(
            real=images, f1=weakest, tier=tier, correlation=correlation, impact=impact,
            weight=weight, images=0,
        )  # fmt: skip
    limits = {name: int(settings.largest_ratio * images) for name, images in counts.items()}
    shares = divided(
        settings.total, {name: entry.weight for name, entry in entries.items()}, limits
    )
    return {name: entry.model_copy(update={"images": shares[name]})
            for name, entry in entries.items()}  # fmt: skip


def tier_of(settings: Allocation, f1: float) -> tuple[int | None, float]:
    """The number of the first tier whose limit an F1 is below, and its weight; None and 0 above
    all."""
    for number, (limit, weight) in enumerate(settings.tiers):
        if f1 < limit:
            return number, weight
    return None, 0.0


def divided(total: int, weights: Mapping[str, float], limits: Mapping[str, int]) -> dict[str, int]:
    """`total` in proportion to the weights, by largest remainders, with at most `limits` each; what
    a limit cuts off goes to the others. Less than `total` if the limits allow no more."""
    given = dict.fromkeys(weights, 0)
    open_names = [name for name, weight in weights.items() if weight > 0 and limits[name]]
    left = total
    while left and open_names:
        whole = sum(weights[name] for name in open_names)
        wanted = {name: left * weights[name] / whole for name in open_names}
        full = [name for name in open_names if given[name] + wanted[name] >= limits[name]]
        if full:
            for name in full:
                left -= limits[name] - given[name]
                given[name] = limits[name]
            open_names = [name for name in open_names if name not in full]
            continue
        floors = {name: int(value) for name, value in wanted.items()}
        rest = left - sum(floors.values())
        by_remainder = sorted(open_names, key=lambda name: (floors[name] - wanted[name], name))
        for place, name in enumerate(by_remainder):
            given[name] += floors[name] + (place < rest)
        left = 0
    return given


def phi_coefficients(targets: np.ndarray, names: Sequence[str]) -> dict[tuple[str, str], float]:
    """The correlation of each pair of labels over the images that have both tasks: Pearson's, of
    binary values. targets: (n, labels), NaN without a label in the task."""
    values = {}
    for first, second in combinations(range(len(names)), 2):
        both = np.isfinite(targets[:, first]) & np.isfinite(targets[:, second])
        a, b = targets[both, first], targets[both, second]
        spread = a.std() * b.std() if both.any() else 0.0
        values[names[first], names[second]] = (
            float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 0 else 0.0
        )
    return values
