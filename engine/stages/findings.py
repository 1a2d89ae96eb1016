"""The checks of an audit, one method each, and what they found."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from engine.context import Context
from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Part
from engine.core.names import natural
from engine.core.notice import Notice
from engine.core.registry import name_of
from engine.core.shards import OK
from engine.data.arrays import aligned
from engine.data.dataset import assign_splits, by_id, replace_column, without
from engine.data.leaks import seen_in_train
from engine.data.near_duplicates import of_one_colour
from engine.metrics.label_errors import label_errors
from engine.metrics.outliers import LIMIT, neighbour_outliers, odd_sizes
from engine.results.audit import NO_LABEL, Finding, GroupCounts
from engine.settings import EmbedderField
from engine.stages.cells import names_by_image
from engine.stages.confounding import Confounding, find_confounding
from engine.stages.intake import Intake, embed_decoded, find_near, too_small
from engine.stages.records import IntakeSpec, seen_notices, small_class_notices
from engine.vectors.neighbours import Neighbours

_NEIGHBOUR = 5  # the neighbour whose distance measures how isolated an image is


class AuditSpec(IntakeSpec):
    name: str
    embedder: EmbedderField


@dataclass
class Findings:
    """The findings, collected check by check: `broken` and `split` come first."""

    context: Context
    spec: AuditSpec
    problems: list[str]
    warnings: list[Notice]
    findings: list[Finding] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    near_limit: dict[str, float | None] = field(default_factory=dict)
    carved: list[str] = field(default_factory=list)
    confounding: Confounding | None = None
    wrong_labels: tuple[float, float] | None = None
    embedded_in: list[Part] = field(default_factory=list)
    broken_share: float = 0.0
    agreed: float = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - started

    def broken(self, records: pa.Table, intake: Intake) -> None:
        column = rows.label_column(self.spec.task)
        for row in records.select([rows.IMAGE_ID, rows.URI, column, rows.SPLIT]).to_pylist():
            status = intake.fate[row[rows.IMAGE_ID]]
            if status != OK:
                self.findings.append(
                    Finding("broken", row[rows.IMAGE_ID], row[rows.URI], _text(row[column]),
                            row[rows.SPLIT] or "", detail=status)
                )  # fmt: skip
        self.broken_share = len(self.findings) / max(1, records.num_rows)

    def split(self, index: pa.Table) -> None:
        """Split the index as ingest would, as far as possible, with the study's seed, fractions and
        groups."""
        spec = self.spec
        column = rows.label_column(spec.task)
        labels = [_text(label) for label in index[column].to_pylist()]
        place = index.schema.get_field_index(column)
        index = index.set_column(place, column, pa.array(labels, pa.string()))
        ids, groups = index[rows.IMAGE_ID].to_pylist(), index[rows.GROUP_ID].to_pylist()
        grouped = spec.split.group == "column"
        # An image without a group is its own group.
        groups = [group if grouped and group is not None else own
                  for group, own in zip(groups, ids, strict=True)]  # fmt: skip
        index = replace_column(index, rows.GROUP_ID, groups)
        fractions = {"val": spec.split.val, "test": spec.split.test}
        # Ingest keeps the first of equal pictures in a split; doing the same draws the same test.
        given = [split or "train" for split in index[rows.SPLIT].to_pylist()]
        pictures = list(zip(index[rows.PIXEL_SHA256].to_pylist(), given, strict=True))
        first: dict[tuple[str, str], str] = {}
        for picture, image_id in zip(pictures, ids, strict=True):
            first.setdefault(picture, image_id)
        twice = {image_id: "duplicate" for picture, image_id in zip(pictures, ids, strict=True)
                 if first[picture] != image_id}  # fmt: skip
        drawn: dict[str, str] = {}
        try:
            singles = without(index, twice)
            names = names_by_image(singles, spec.task, spec.cells)
            kept, self.carved = assign_splits(singles, names, fractions, grouped, spec.seed)
            drawn = by_id(kept, rows.SPLIT)
        except DataError as error:
            self.problems.append(str(error))
        # Duplicates follow the first; a group stays whole.
        of_group = {group: drawn[own] for group, own, split in zip(groups, ids, given, strict=True)
                    if own in drawn and split == "train"}  # fmt: skip
        splits = [
            drawn.get(own)
            or (of_group.get(group) if split == "train" else None)
            or drawn.get(first[picture], split)
            for own, group, split, picture in zip(ids, groups, given, pictures, strict=True)
        ]
        self.index = replace_column(index, rows.SPLIT, splits)
        self.ids, self.groups = ids, np.asarray(groups, dtype=object)
        self.uris = index[rows.URI].to_pylist()
        self.label = np.asarray(labels, dtype=object)
        self.of = np.asarray(splits, dtype=object)

    def add(self, kind: str, a: int, b: int | None = None, score: float = 0.0, **more: str) -> None:
        second = {}
        if b is not None:
            second = {"other_id": self.ids[b], "other_uri": self.uris[b],
                     "other_label": self.label[b], "other_split": self.of[b]}  # fmt: skip
        self.findings.append(
            Finding(kind, self.ids[a], self.uris[a], self.label[a], self.of[a], score=score,
                    **second, **more)
        )  # fmt: skip

    def pair_kind(self, what: str, a: int, b: int) -> str:
        if self.label[a] != self.label[b]:
            return f"{what}_contradictory"
        return f"{what}_across" if self.of[a] != self.of[b] else f"{what}_within"

    def equal(self) -> None:
        """Find equal pictures, and groups that appear in two splits."""
        # The first row of each label and split, by picture.
        firsts: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
        for row, digest in enumerate(self.index[rows.PIXEL_SHA256].to_pylist()):
            earlier, own = firsts[digest], (self.label[row], self.of[row])
            if earlier:
                # Pairs it with the most informative row: another label first, then another split.
                label, split = own
                says = min(earlier, key=lambda other: (other[0] == label, other[1] == split))
                self.add(self.pair_kind("exact", earlier[says], row), earlier[says], row, 1.0)
            earlier.setdefault(own, row)
        by_group: dict[str, list[int]] = defaultdict(list)
        for row, group in enumerate(self.groups.tolist()):
            by_group[group].append(row)
        for group, members in by_group.items():
            if len(places := {self.of[row] for row in members}) > 1:
                row_of = {self.of[row]: row for row in members}
                a, b = (row_of[split] for split in sorted(places, key=rows.SPLITS.index)[:2])
                self.add("group", a, b, detail=group)

    def embedded(self, intake: Intake) -> np.ndarray | None:
        """Embed the index and find near duplicates; returns the vectors, None without pictures."""
        spec = self.spec
        if not intake.keys:
            return None
        if name_of(spec.embedder) == "pixels":
            self.warnings.append(Notice.of("pixel_embedder"))
        with self.timed("embed"):
            padded = spec.preprocess.fit == "pad"
            self.embedded_in = embed_decoded(self.context, spec.embedder, intake, padded)
            keys = [part.key for part in self.embedded_in]
            vectors = aligned(self.context.store, keys, rows.EMBEDDING, self.ids)
            pictures = aligned(self.context.store, keys, rows.THUMBNAIL, self.ids)
        for row in np.flatnonzero(of_one_colour(pictures)):
            self.add("one_colour", int(row))
        small_side = too_small(self.index, spec.preprocess)
        with self.timed("near duplicates"):
            near = find_near(
                self.index, spec.task, vectors, pictures, spec.audit.near_quantile, spec.seed,
                small_side=small_side,
            )  # fmt: skip
        self.warnings += near.warnings(small_side)
        self.warnings += self.seen(near.pairs)
        appearance = aligned(self.context.store, keys, rows.APPEARANCE, self.ids)
        with self.timed("confounding"):
            self.confounding = find_confounding(
                self.index, spec.task, pictures, appearance, spec.seed
            )
        self.warnings += self.confounding.notices()
        if near.limit is not None:
            self.near_limit = {
                "copies": round(near.limit.copies, 4), "different": round(near.limit.different, 4)
            }  # fmt: skip
        for place in np.argsort(-near.agreement, kind="stable"):
            a, b = near.pairs[place].tolist()
            self.add(self.pair_kind("near", a, b), a, b, float(near.agreement[place]),
                     detail="same group" if self.groups[a] == self.groups[b] else "")  # fmt: skip
        return vectors

    def seen(self, near: np.ndarray) -> list[Notice]:
        """Pictures of val and test that are in train too. near: pairs of rows."""
        digests, splits = self.index[rows.PIXEL_SHA256].to_pylist(), self.of.tolist()
        return seen_notices(seen_in_train(digests, splits, near.tolist()))

    def checkable(self, vectors: np.ndarray) -> np.ndarray:
        """Rows that label checks may use: labelled, embedded, and not in test."""
        usable = np.abs(vectors).max(1) > 0
        return np.flatnonzero(usable & (self.of != "test") & (self.label != NO_LABEL))

    def labels(self, vectors: np.ndarray) -> None:
        members = self.checkable(vectors)
        # Cross-validation over groups needs two groups in each class.
        groups_of: dict[str, set[str]] = defaultdict(set)
        for row in members:
            groups_of[self.label[row]].add(self.groups[row])
        thin = sorted(name for name, groups in groups_of.items() if len(groups) < 2)
        members = members[~np.isin(self.label[members].astype(str), thin)] if thin else members
        names, numbers = np.unique(self.label[members].astype(str), return_inverse=True)
        with self.timed("label errors"):
            errors = None
            if len(names) > 1:
                errors = label_errors(
                    vectors[members], numbers, self.groups[members].astype(str), self.spec.seed
                )
        if thin:
            self.warnings.append(Notice.of("one_group", classes=", ".join(thin)))
        if errors is None:
            return
        self.agreed, self.wrong_labels = errors.agreed, errors.wrong
        if errors.weak:
            self.warnings.append(
                Notice.of("weak_judge", agreed=round(100 * errors.agreed), labels=len(errors.order))
            )
            return
        for row in errors.order:
            self.add(
                "label", int(members[row]), score=float(errors.confidence[row]),
                suggested=str(names[errors.suggested[row]]),
                detail=f"{100 * errors.suggested_confidence[row]:.0f}%",
            )  # fmt: skip

    def outliers(self, vectors: np.ndarray) -> None:
        members = self.checkable(vectors)
        score = np.zeros(len(members))
        with self.timed("outliers"):
            for name in set(self.label[members].tolist()):
                own = np.flatnonzero(self.label[members] == name)
                if len(own) < 4 * _NEIGHBOUR:
                    continue
                mine = vectors[members[own]]
                _, distance = Neighbours(mine).nearest(mine, _NEIGHBOUR + 1)
                score[own] = neighbour_outliers(distance[:, -1])
        for row in np.argsort(-score, kind="stable"):
            if score[row] <= LIMIT:
                break
            self.add("outlier", int(members[row]), score=float(score[row]))

    def sizes(self) -> None:
        if not self.ids:
            return
        widths, heights = (
            np.asarray(self.index[name].to_pylist(), np.float64)
            for name in (rows.WIDTH, rows.HEIGHT)
        )
        score = odd_sizes(widths, heights)
        for row in np.argsort(-score, kind="stable"):
            if score[row] <= LIMIT:
                break
            self.add("size", int(row), score=float(score[row]),
                     detail=f"{widths[row]:.0f} x {heights[row]:.0f}")  # fmt: skip

    def small_classes(self) -> None:
        counts = self.distinct()
        counts.pop(NO_LABEL, None)
        self.warnings += small_class_notices(counts)

    def distinct(self) -> dict[str, dict[str, int]]:
        """Images of each class in each split, without those that ingest removes as duplicates."""
        places = zip(self.index[rows.PIXEL_SHA256].to_pylist(), self.of.tolist(), strict=True)
        _, first = np.unique([f"{digest} {split}" for digest, split in places], return_index=True)
        return counts(self.label[first], self.of[first])


def _text(label: Any) -> str:
    if isinstance(label, list):
        return ", ".join(label) or NO_LABEL
    return NO_LABEL if label is None else str(label)


def counts(labels: np.ndarray, splits: np.ndarray) -> dict[str, dict[str, int]]:
    """Images of each class in each split."""
    images = Counter(zip(labels.tolist(), splits.tolist(), strict=True))
    return {name: {split: images[name, split] for split in rows.SPLITS}
            for name in sorted(set(labels.tolist()), key=natural)}  # fmt: skip


def group_counts(labels: np.ndarray, groups: np.ndarray) -> GroupCounts:
    by_class: dict[str, set[str]] = defaultdict(set)
    for label, group in zip(labels.tolist(), groups.tolist(), strict=True):
        by_class[label].add(group)
    largest = Counter(groups.tolist()).most_common(10)
    return GroupCounts(
        {name: len(members) for name, members in by_class.items()},
        [entry for entry in largest if entry[1] > 1], len(set(groups.tolist())),
    )  # fmt: skip
