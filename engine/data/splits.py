"""The stratified group split, made once before any other step reads the data.

The greedy rule comes close to the wanted shares in one pass, but may leave a class without an image
in a split although another assignment of the groups would not. Then the assignment is repaired by
an integer program, which moves as few images as possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.core.rng import generator

# Images of each class that a split needs.
LEAST_IMAGES: Mapping[str, int] = {"train": 2, "val": 1, "test": 1}
# Seconds for the repair. Measured: under a second for 10,000 groups of 20 classes.
_TIME_LIMIT = 60.0


def stratified_group_split(
    labels: Sequence[Sequence[str]], groups: Sequence[str], fractions: Mapping[str, float],
    seed: int,
) -> np.ndarray:  # fmt: skip
    """Assign each group to one split so that each class comes close to `fractions`.

    labels, groups: of n images; an image has one class, or any number of labels. fractions: share
    of each split; the first split takes the rest. Returns n names of splits. Greedy: larger groups
    first, each to the split that is furthest from its targets in the classes of the group; the seed
    breaks ties. Where images have several labels, groups with the rarest label come first, as in
    iterative stratification (Sechidis et al. 2011). With one image per group and one class per
    image every class is split exactly, up to rounding. If a class then has fewer than
    `LEAST_IMAGES` in some split, groups are moved so that every class has them, if that is
    possible.
    """
    names = list(fractions)
    # Images without a label are spread like a class, but no split needs one.
    labels = [of_image or ("",) for of_image in labels]
    image_of = np.repeat(np.arange(len(labels)), [len(of_image) for of_image in labels])
    flat = np.asarray([name for of_image in labels for name in of_image], dtype=str)
    classes, class_of = np.unique(flat, return_inverse=True)
    unique_groups, group_of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    counts = np.zeros((len(unique_groups), len(classes)), dtype=np.int64)
    np.add.at(counts, (group_of[image_of], class_of), 1)

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
    if any(len(of_image) > 1 for of_image in labels):
        rarity = np.where(counts > 0, totals, np.inf).min(axis=1)
        order = order[np.argsort(rarity[order], kind="stable")]
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
    least = np.asarray([LEAST_IMAGES[name] for name in names])
    named = counts[:, classes != ""]
    if (images_of(named, assigned, len(names)) < least[:, None]).any():
        assigned = _repaired(named, assigned, least, order)
    return np.asarray(names, dtype=object)[assigned[group_of]]


def images_of(counts: np.ndarray, assigned: np.ndarray, splits: int) -> np.ndarray:
    """Images by split and class. counts: by group and class. assigned: number of each group's
    split."""
    totals = np.zeros((splits, counts.shape[1]), dtype=np.int64)
    np.add.at(totals, assigned, counts)
    return totals


def _repaired(
    counts: np.ndarray, assigned: np.ndarray, least: np.ndarray, order: np.ndarray
) -> np.ndarray:
    """The assignment with at least `least` images of each class in each split that moves the fewest
    images; `assigned` itself if there is none. Groups move in the order of `order`.

    Groups with the same images in the same split are interchangeable. The variables are how many
    groups of each such kind go to each split.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_array, csr_array, eye_array, kron

    splits, classes = len(least), counts.shape[1]
    kinds, kind_of, sizes = np.unique(
        np.column_stack([assigned, counts]), axis=0, return_inverse=True, return_counts=True
    )
    before, images = kinds[:, 0], kinds[:, 1:]
    moves = np.repeat(images.sum(axis=1)[:, None], splits, axis=1)
    moves[np.arange(len(kinds)), before] = 0
    each = kron(eye_array(len(kinds)), np.ones((1, splits)))
    enough = block_array(
        [[kron(csr_array(images[:, number][None]), eye_array(splits))] for number in range(classes)]
    )
    solution = milp(
        moves.ravel(),
        integrality=np.ones(moves.size),
        bounds=Bounds(0, np.repeat(sizes, splits)),
        constraints=[
            LinearConstraint(each, sizes, sizes),
            LinearConstraint(enough, np.tile(least, classes), np.inf),
        ],
        options={"time_limit": _TIME_LIMIT},
    )
    if solution.x is None:
        return assigned
    wanted = np.round(solution.x).astype(np.int64).reshape(moves.shape)
    repaired = assigned.copy()
    kind_in_order = kind_of.ravel()[order]
    for kind in np.flatnonzero(wanted[np.arange(len(kinds)), before] < sizes):
        members = order[kind_in_order == kind]
        repaired[members] = np.repeat(np.arange(splits), wanted[kind])
    return repaired
