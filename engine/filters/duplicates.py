"""Does the image repeat another generated one?

Two signals must agree, as for copies of training images. Train shows how similar different pictures
are: the limits are a low quantile of the distance of a training image to its nearest other one, and
of the number of bits in which their hashes differ.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from engine.filters import Filter, FilterSpec, Judgement, Scores
from engine.metrics.memorization import CopyLimits, copy_limits, nearest_other
from engine.vectors.similarity import unit_length

_BLOCK = 1024
# Number of nearest kept images to compare with: the hash may separate the first but not the second.
_CANDIDATES = 8


class DuplicatesSpec(FilterSpec):
    name: Literal["duplicates"] = "duplicates"
    # Share of different pictures that may count as repetitions: the share of training images that
    # are nearer to another one than the limit.
    quantile: Annotated[float, Field(ge=0, le=0.2)] = 0.01


class Duplicates(Filter[DuplicatesSpec]):
    version = 2
    drop_reason = "repeat another generated image"
    judging_fields = ("quantile",)

    def judge(self, generated: Scores, train: Scores, val: Scores, kept: np.ndarray) -> Judgement:
        # In a larger pool the nearest image is nearer. In a pool larger than train, more different
        # pictures would fall below the limit, so the quantile shrinks in proportion.
        quantile = self.spec.quantile * min(1.0, len(train) / max(1, int(kept.sum())))
        limits = copy_limits(nearest_other(train.vectors, train.hashes), quantile)
        # Sorted by id, so that the order of generation does not decide which image stays.
        order = np.argsort(generated.ids[kept].astype(str))
        rows = np.flatnonzero(kept)[order]
        leader = leaders(generated.vectors, generated.hashes, rows, limits)
        drop = leader >= 0
        names = np.full(len(generated), None, dtype=object)
        names[drop] = generated.ids[leader[drop]]
        # Images that repeat none have no distance.
        distance = np.full(len(generated), np.nan, np.float32)
        pair = unit_length(generated.vectors[drop]), unit_length(generated.vectors[leader[drop]])
        distance[drop] = np.maximum(1 - (pair[0] * pair[1]).sum(1), 0)
        return Judgement(
            drop, {"duplicate_of": names, "distance": distance},
            {"distance": limits.distance, "bits": limits.bits},
        )  # fmt: skip


def leaders(
    vectors: np.ndarray, hashes: np.ndarray, rows: np.ndarray, limits: CopyLimits
) -> np.ndarray:
    """For each image the earlier one among `rows` that it repeats, or -1: int64 (n,). Leader
    clustering (Hartigan 1975) in one pass.

    vectors: float32 (n, width). hashes: uint64 (n,). rows: the images to compare, in order.
    """
    import faiss

    leader_of = np.full(len(vectors), -1, np.int64)
    index = faiss.IndexFlatIP(vectors.shape[1])
    leading = np.empty(0, np.int64)
    for start in range(0, len(rows), _BLOCK):
        here = rows[start : start + _BLOCK]
        unit = np.ascontiguousarray(vectors[here], np.float32)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        if len(leading):
            cosine, place = index.search(unit, min(_CANDIDATES, len(leading)))
            others = leading[place]
            alike = _alike(1 - cosine, hashes[here][:, None] ^ hashes[others], limits)
            first = alike.argmax(1)
            leader_of[here] = np.where(alike.any(1), others[np.arange(len(here)), first], -1)
        alike = _alike(1 - unit @ unit.T, hashes[here][:, None] ^ hashes[here][None, :], limits)
        leads = np.zeros(len(here), bool)
        for number, row in enumerate(here):
            if leader_of[row] >= 0:
                continue
            before = alike[number, :number] & leads[:number]
            if before.any():
                leader_of[row] = here[int(before.argmax())]
            else:
                leads[number] = True
        index.add(unit[leads])
        leading = np.concatenate([leading, here[leads]])
    return leader_of


def _alike(distance: np.ndarray, differing: np.ndarray, limits: CopyLimits) -> np.ndarray:
    alike: np.ndarray = (distance <= limits.distance) & (np.bitwise_count(differing) <= limits.bits)
    return alike
