"""Is the image one more of another generated one?

Two signals must agree, as for copies of training images. How alike different pictures come, train
tells: the limits are a small quantile of the distance of its images to their nearest other one, and
of the bits by which their hashes differ.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judged, Scored
from engine.metrics.memorization import CopyLimits, copy_limits, nearest_other
from engine.vectors.similarity import unit_length

_BLOCK = 1024
# Of those kept, so many of the nearest are held against an image: the hash may tell the first from
# it and not the second.
_LOOKED_AT = 8


class DuplicatesSpec(FilterSpec):
    name: Literal["duplicates"] = "duplicates"
    # The share of different pictures that may count as repetitions, as train has it: of its images,
    # so many lie nearer to another one.
    quantile: Annotated[float, Field(ge=0, le=0.2)] = 0.01


class Duplicates(Filter):
    version: ClassVar[int] = 2
    Spec: ClassVar[type[FilterSpec]] = DuplicatesSpec
    told: ClassVar[str] = "repeat another generated image"
    judging_fields: ClassVar[tuple[str, ...]] = ("quantile",)
    spec: DuplicatesSpec

    def judge(self, made: Scored, train: Scored, val: Scored, kept: np.ndarray) -> Judged:
        # The nearest of many is nearer than the nearest of few: in a pool larger than train, the
        # share of different pictures that lie so near grows with it.
        quantile = self.spec.quantile * min(1.0, len(train) / max(1, int(kept.sum())))
        limits = copy_limits(nearest_other(train.vectors, train.hashes), quantile)
        # By id: which of two stays does not depend on the order in which they were made.
        order = np.argsort(made.ids[kept].astype(str))
        rows = np.flatnonzero(kept)[order]
        of = leaders(made.vectors, made.hashes, rows, limits)
        drop = of >= 0
        names = np.full(len(made), None, dtype=object)
        names[drop] = made.ids[of[drop]]
        # Of what repeats nothing the nearest is not looked for.
        apart = np.full(len(made), np.nan, np.float32)
        pair = unit_length(made.vectors[drop]), unit_length(made.vectors[of[drop]])
        apart[drop] = np.maximum(1 - (pair[0] * pair[1]).sum(1), 0)
        return Judged(
            drop, {"duplicate_of": names, "distance": apart},
            {"distance": limits.distance, "bits": limits.bits},
        )  # fmt: skip


def leaders(
    vectors: np.ndarray, hashes: np.ndarray, rows: np.ndarray, limits: CopyLimits
) -> np.ndarray:
    """For each image (n,) the one before it among `rows` that it repeats, or -1: leader clustering
    (Hartigan 1975), one pass, whatever the number of repetitions.

    vectors: float32 (n, width). hashes: uint64 (n,). rows: those that are looked at, in order.
    """
    import faiss

    found = np.full(len(vectors), -1, np.int64)
    index = faiss.IndexFlatIP(vectors.shape[1])
    standing = np.empty(0, np.int64)
    for start in range(0, len(rows), _BLOCK):
        here = rows[start : start + _BLOCK]
        unit = np.ascontiguousarray(vectors[here], np.float32)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        if len(standing):
            near, place = index.search(unit, min(_LOOKED_AT, len(standing)))
            others = standing[place]
            alike = _alike(1 - near, hashes[here][:, None] ^ hashes[others], limits)
            first = alike.argmax(1)
            found[here] = np.where(alike.any(1), others[np.arange(len(here)), first], -1)
        alike = _alike(1 - unit @ unit.T, hashes[here][:, None] ^ hashes[here][None, :], limits)
        leads = np.zeros(len(here), bool)
        for number, row in enumerate(here):
            if found[row] >= 0:
                continue
            before = alike[number, :number] & leads[:number]
            if before.any():
                found[row] = here[int(before.argmax())]
            else:
                leads[number] = True
        index.add(unit[leads])
        standing = np.concatenate([standing, here[leads]])
    return found


def _alike(distance: np.ndarray, differing: np.ndarray, limits: CopyLimits) -> np.ndarray:
    return (distance <= limits.distance) & (np.bitwise_count(differing) <= limits.bits)
