"""The stratified group split, made once before any other step reads the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.core.rng import generator


def stratified_group_split(
    labels: Sequence[str], groups: Sequence[str], fractions: Mapping[str, float], seed: int
) -> np.ndarray:
    """Assign each group to one split so that each class comes close to `fractions`.

    labels, groups: of n images. fractions: share of each split; the first split takes the rest.
    Returns n names of splits. Greedy: larger groups first, each to the split that is furthest from
    its targets in the classes of the group; the seed breaks ties. With one image per group every
    class is split exactly, up to rounding.
    """
    names = list(fractions)
    classes, class_of = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    unique_groups, group_of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    counts = np.zeros((len(unique_groups), len(classes)), dtype=np.int64)
    np.add.at(counts, (group_of, class_of), 1)

    totals = counts.sum(axis=0)
    targets = np.stack([np.round(totals * fractions[name]) for name in names])
    targets[0] = totals - targets[1:].sum(axis=0)
    # Small classes: a split that should get at least a third of an image gets one, as long as train
    # keeps two.
    for index in range(1, len(names)):
        due = (targets[index] == 0) & (targets[0] > 2) & (totals * fractions[names[index]] > 1 / 3)
        targets[index][due] += 1
        targets[0][due] -= 1

    order = generator(seed, "split").permutation(len(unique_groups))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    missing = targets.astype(float)
    scale = np.maximum(totals, 1)
    assigned = np.zeros(len(unique_groups), dtype=np.int64)
    for group in order:
        own = counts[group].nonzero()[0]  # the classes of this group
        # The images that fill a gap, minus those that overshoot, in shares of each class.
        need = np.minimum(missing[:, own], counts[group][own]) / scale[own]
        over = np.maximum(counts[group][own] - np.maximum(missing[:, own], 0), 0) / scale[own]
        relative = np.maximum(missing[:, own], 0) / np.maximum(targets[:, own], 1)
        best = int(np.argmax((need - over).sum(axis=1) + 1e-3 * relative.mean(axis=1)))
        assigned[group] = best
        missing[best] -= counts[group]
    return np.asarray(names, dtype=object)[assigned[group_of]]
