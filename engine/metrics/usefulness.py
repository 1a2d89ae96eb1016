"""Did a generator learn anything? Signs that need few images and no training.

Filters drop bad images, so a generator that learnt nothing shows only as many dropped images and a
long wait. These signs come before more images are requested.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import pdist

from engine.core.rng import generator
from engine.metrics.prdc import prdc
from engine.metrics.probe import probe
from engine.results.images import Usefulness

# Vectors of each side, and neighbours.
LEAST, _MOST, _NEIGHBOURS = 20, 500, 5
_LEAST_OF_CLASS = 5


def usefulness(
    real: np.ndarray, real_labels: np.ndarray, generated: np.ndarray, labels: np.ndarray, seed: int
) -> Usefulness:
    """Coverage, area and spread of generated vectors float32 (m, width) against real ones
    (n, width), both with the same number of each class."""
    order = generator(seed, "usefulness")
    rows: list[list[int]] = [[], []]
    for label in sorted(set(labels.tolist())):
        sides = [np.flatnonzero(names == label) for names in (real_labels, labels)]
        count = min(map(len, sides))
        for side, places in zip(rows, sides, strict=True):
            side += places[order.permutation(len(places))[:count]].tolist()
    if len(rows[0]) < LEAST:
        return Usefulness(pairs=len(rows[0]))
    chosen = np.sort(order.permutation(len(rows[0]))[:_MOST])
    first, second = (side[np.asarray(places)[chosen]]
                     for side, places in zip((real, generated), rows, strict=True))  # fmt: skip
    return Usefulness(
        coverage=prdc(first, second, _NEIGHBOURS).coverage,
        area=probe(first, second, len(chosen), seed, ("usefulness",)),
        spread=_spread(first, second, labels[np.asarray(rows[1])[chosen]]),
    )


def _spread(real: np.ndarray, generated: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean distance between two generated images of a class, in that of two real ones; the median
    over the classes. Row i of both sides has the class `labels[i]`."""
    ratios = []
    for label in sorted(set(labels.tolist())):
        of_class = labels == label
        if of_class.sum() >= _LEAST_OF_CLASS and (apart := pdist(real[of_class]).mean()) > 0:
            ratios.append(float(pdist(generated[of_class]).mean() / apart))
    return float(np.median(ratios)) if ratios else None
