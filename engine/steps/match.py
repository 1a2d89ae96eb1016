"""Match: the most similar images in one set for each image of another, by the study's embedder.

A set is a split (train or val) or the kept images of a generator. The part `table:
matches` has a row for each pair, the nearest first; `file: sheet.png` shows some.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import DataError
from engine.core.rng import generator
from engine.core.spec import Spec
from engine.data.arrays import grouped_vectors, pictures
from engine.data.dataset import generated_images, split_index
from engine.report.sheet import picture_sheet
from engine.results.data import MatchResult
from engine.settings import Match as MatchSettings
from engine.steps import StepKind
from engine.vectors.neighbours import Neighbours

QUERY_ID, QUERY_LABEL = "query_id", "query_label"
_BLOCK = 8192
_SHOWN_MATCHES = 20


class MatchSpec(Spec):
    settings: MatchSettings
    task: str
    seed: int


class Match(StepKind[MatchSpec]):
    version = 1
    summary = "find the most similar images in another set"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(MatchSpec)
        settings = spec.settings
        queries, among = (
            ImageSet(context, spec.task, name, role)
            for name, role in ((settings.queries, "queries"), (settings.among, "among"))
        )
        index = Neighbours(among.vectors, settings.index)
        # An image is the most similar to itself.
        same = settings.queries == settings.among
        tables = []
        with context.progress(len(queries.ids), "images") as bar:
            for start in range(0, len(queries.ids), _BLOCK):
                here = slice(start, start + _BLOCK)
                neighbours, distance = index.nearest(queries.vectors[here], settings.n + same)
                tables.append(
                    pairs(queries, here, among, neighbours, distance, settings.n, without_self=same)
                )
                bar.advance(len(neighbours))
        matches = pa.concat_tables(tables)
        nearest = matches.filter(pc.equal(matches[rows.RANK], 0))
        agree = pc.mean(pc.equal(nearest[QUERY_LABEL], nearest[rows.LABEL]).cast(pa.float64()))
        parts = [
            context.table("matches", matches, table="matches"),
            context.file(
                "sheet", "png", self._sheet(context, spec, queries, among, matches),
                file="sheet.png",
            ),
        ]  # fmt: skip
        share = float(agree.as_py() or 0.0)
        return Output(
            parts, matches.num_rows,
            MatchResult(
                headline=f"{len(queries.ids):,} of {settings.queries} among"
                f" {len(among.ids):,} of {settings.among}; the nearest is of the same class for"
                f" {share:.1%}",
                same_class=share, index=index.kind,
                median_distance=pc.approximate_median(nearest[rows.DISTANCE]).as_py(),
            ),
        )  # fmt: skip

    def _sheet(
        self, context: Context, spec: MatchSpec, queries: ImageSet, among: ImageSet,
        matches: pa.Table,
    ) -> bytes:  # fmt: skip
        """Some queries of each class in turn, each with its matches."""
        random = generator(spec.seed, "match", spec.settings.queries, spec.settings.among)
        by_class: dict[str, list[str]] = {}
        for row in random.permutation(len(queries.ids)):
            by_class.setdefault(queries.labels[row], []).append(queries.ids[row])
        turns = max(map(len, by_class.values()))
        chosen = [by_class[name][turn] for turn in range(turns) for name in sorted(by_class)
                  if turn < len(by_class[name])][: spec.settings.shown]  # fmt: skip
        selected = matches.filter(pc.is_in(matches[QUERY_ID], pa.array(chosen))).to_pylist()
        of_query: dict[str, list[str]] = {}
        for pair in selected:
            if pair[rows.RANK] < _SHOWN_MATCHES:
                of_query.setdefault(pair[QUERY_ID], []).append(pair[rows.IMAGE_ID])
        left = pictures(context.store, queries.images, chosen)
        right = pictures(context.store, among.images, {i for ids in of_query.values() for i in ids})
        label_of = dict(zip(queries.ids, queries.labels, strict=True))
        ordered = sorted(chosen, key=lambda image_id: label_of[image_id])
        return picture_sheet(
            [
                (label_of[query], [left[query]], [right[i] for i in of_query.get(query, [])])
                for query in ordered
            ],
            (spec.settings.queries, f"nearest of {spec.settings.among}"),
        )


class ImageSet:
    """The embedded images of a split or of a generator: ids, labels, vectors, and the keys of the
    parts that hold the pictures."""

    def __init__(self, context: Context, task: str, name: str, role: str) -> None:
        store = context.store
        if name in rows.SPLITS:
            index = split_index(store, context.inputs["ingest"], task, name)
            ids, labels = index[rows.IMAGE_ID], index[rows.label_column(task)]
            keys = context.inputs["embed"].keys(split=name)
            self.images = context.inputs["ingest"].keys(split=name)
        else:
            curated = context.inputs[f"{role}.curate"]
            table = pa.concat_tables(store.tables(curated.keys(table="curated")))
            table = table.filter(table[rows.KEPT])
            ids, labels = table[rows.IMAGE_ID], table[rows.LABEL]
            keys = curated.keys(table="scores")
            self.images = generated_images(context.inputs[f"{role}.generate"])
        label_of = dict(zip(ids.to_pylist(), labels.to_pylist(), strict=True))
        grouped = grouped_vectors(store, keys, dict.fromkeys(label_of, name))
        if name not in grouped:
            raise DataError(f"{context.step.label}: no image of {name} was kept; loosen curate")
        self.ids, self.vectors = grouped[name]
        self.labels = [label_of[image_id] for image_id in self.ids]
        self.named = pa.array(self.ids, pa.string())
        self.labelled = pa.array(self.labels, pa.string())


def pairs(
    queries: ImageSet, here: slice, among: ImageSet, neighbours: np.ndarray, distance: np.ndarray,
    n: int, *, without_self: bool,
) -> pa.Table:  # fmt: skip
    """A row for each query and match."""
    wanted = neighbours >= 0
    if without_self:
        wanted &= neighbours != np.arange(len(queries.ids))[here][:, None]
    wanted &= wanted.cumsum(1) <= n
    row, column = np.nonzero(wanted)
    match = pa.array(neighbours[row, column])
    query = pa.array(np.arange(len(queries.ids))[here][row])
    return pa.table(
        {
            QUERY_ID: queries.named.take(query),
            QUERY_LABEL: queries.labelled.take(query),
            rows.RANK: pa.array((wanted.cumsum(1) - 1)[row, column], pa.int32()),
            rows.IMAGE_ID: among.named.take(match),
            rows.LABEL: among.labelled.take(match),
            rows.DISTANCE: pa.array(distance[row, column], pa.float32()),
        }
    )
