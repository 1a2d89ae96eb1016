"""Select: representative images of each cluster of each class.

    nearest    to the centroid
    spread     farthest first: each as far as possible from the previous (`engine.vectors.choose`)
    density    highest local density first
    random     by the seed

Several methods share the places of a cluster in turn. The part `table: representatives` has the
chosen, best first, with the method that chose each; `file: list.csv` the same with the name of each
original, for people, and `file: sheet.png` a row of pictures for each cluster.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.context import Context, Output
from engine.core import rows
from engine.core.names import csv_cell
from engine.core.rng import generator
from engine.core.spec import Spec
from engine.data.arrays import grouped_vectors, pictures
from engine.data.dataset import by_id
from engine.report.sheet import picture_sheet
from engine.results.data import SelectResult
from engine.settings import Select as SelectSettings
from engine.steps import StepKind
from engine.vectors.choose import farthest_first, local_density, shares

# Limits of the sheet: pictures per cluster, clusters per class and in total, rows per column.
_SHOWN, _SHOWN_CLUSTERS, _SHOWN_ROWS, _COLUMN = 12, 20, 200, 24


class SelectSpec(Spec):
    task: str
    settings: SelectSettings
    seed: int


class Select(StepKind[SelectSpec]):
    version = 3
    summary = "choose representatives of each cluster"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(SelectSpec)
        column = rows.label_column(spec.task)
        clusters = pa.concat_tables(
            context.store.tables(context.inputs["cluster"].keys(table="clusters"))
        )
        # The id breaks ties, so that the choice does not depend on the order of rows.
        ordered = clusters.sort_by(
            [
                (column, "ascending"),
                (rows.CLUSTER, "ascending"),
                (rows.DISTANCE, "ascending"),
                (rows.IMAGE_ID, "ascending"),
            ]
        )
        labels, numbers = ordered[column].to_pylist(), ordered[rows.CLUSTER].to_pylist()
        cells: dict[tuple[str, int], list[int]] = {}
        for row, place in enumerate(zip(labels, numbers, strict=True)):
            cells.setdefault(place, []).append(row)
        vectors_of = self._vectors(context, spec, ordered)
        wanted = budget({place: len(members) for place, members in cells.items()}, spec.settings)

        chosen: list[int] = []
        ranks: list[int] = []
        methods: list[str] = []
        with context.progress(len(cells), "clusters") as bar:
            for place, members in cells.items():
                orders: dict[str, list[int]] = {
                    method: order_by(
                        method,
                        vectors_of(members),
                        len(members), wanted[place],
                        generator(spec.seed, "select", *map(str, place)),
                    )
                    for method in spec.settings.method
                }  # fmt: skip
                for rank, (method, number) in enumerate(take_turns(orders, wanted[place])):
                    chosen.append(members[number])
                    ranks.append(rank)
                    methods.append(method)
                bar.advance(1)
        representatives = ordered.take(pa.array(chosen, pa.int64()))
        representatives = representatives.append_column(rows.RANK, pa.array(ranks, pa.int32()))
        representatives = representatives.append_column(rows.METHOD, pa.array(methods, pa.string()))
        sizes = {place: len(members) for place, members in cells.items()}
        parts = [
            context.table("representatives", representatives, table="representatives"),
            context.file(
                "sheet", "png", self._sheet(context, representatives, column, sizes),
                file="sheet.png",
            ),
            context.file(
                "list", "csv", self._list(context, representatives, column), file="list.csv"
            ),
        ]  # fmt: skip
        counts = Counter(representatives[column].to_pylist())
        return Output(
            parts, representatives.num_rows,
            SelectResult(
                headline=f"{representatives.num_rows:,} representatives",
                chosen=dict(sorted(counts.items())),
            ),
        )  # fmt: skip

    def _vectors(
        self, context: Context, spec: SelectSpec, ordered: pa.Table
    ) -> Callable[[list[int]], np.ndarray | None]:
        """A function from rows of `ordered` to embeddings, or to None if no method uses them."""
        if not {"spread", "density"} & set(spec.settings.method):
            return lambda members: None
        ids = ordered[rows.IMAGE_ID].to_pylist()
        grouped = grouped_vectors(
            context.store, context.inputs["embed"].keys(split="train"), dict.fromkeys(ids, "")
        )
        names, vectors = grouped[""]
        place = {image_id: row for row, image_id in enumerate(names)}
        return lambda members: vectors[[place[ids[row]] for row in members]]

    def _sheet(
        self, context: Context, representatives: pa.Table, column: str,
        sizes: dict[tuple[str, int], int],
    ) -> bytes:  # fmt: skip
        """A row for each of a class's largest clusters: its first representatives."""
        chosen: dict[tuple[str, int], list[str]] = {}
        names = (column, rows.CLUSTER, rows.IMAGE_ID)
        columns = (representatives[name].to_pylist() for name in names)
        for label, number, image_id in zip(*columns, strict=True):
            chosen.setdefault((label, number), []).append(image_id)
        places: list[tuple[str, int]] = []
        for label in dict.fromkeys(label for label, _ in chosen):
            largest = sorted(
                (place for place in chosen if place[0] == label), key=lambda place: -sizes[place]
            )
            places += sorted(largest[:_SHOWN_CLUSTERS])
        places = places[:_SHOWN_ROWS]
        images = pictures(
            context.store, context.inputs["ingest"].keys(split="train"),
            {image_id for place in places for image_id in chosen[place][:_SHOWN]},
        )  # fmt: skip
        return picture_sheet(
            [
                (
                    f"{label[:12]} #{number} ({sizes[label, number]:,})",
                    [images[image_id] for image_id in chosen[label, number][:_SHOWN]],
                )
                for label, number in places
            ],
            ("class #cluster (its images): the best first",),
            _COLUMN,
        )

    def _list(self, context: Context, representatives: pa.Table, column: str) -> bytes:
        """A CSV for spreadsheets; no cell is read as a formula."""
        keys = context.inputs["ingest"].keys(split="train")
        uri_of: dict[str, str] = {}
        # Only chosen images: the names of all of train would dominate this process's memory.
        chosen = representatives[rows.IMAGE_ID].combine_chunks()
        for table in context.store.tables(keys, [rows.IMAGE_ID, rows.URI]):
            table = table.filter(pc.is_in(table[rows.IMAGE_ID], chosen))
            uri_of |= by_id(table, rows.URI)
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(
            ["class", rows.CLUSTER, rows.RANK, rows.METHOD, rows.DISTANCE, rows.IMAGE_ID, rows.URI]
        )
        for entry in representatives.to_pylist():
            image_id = entry[rows.IMAGE_ID]
            writer.writerow(
                [csv_cell(entry[column]), entry[rows.CLUSTER], entry[rows.RANK],
                 entry[rows.METHOD], f"{entry[rows.DISTANCE]:.6g}", csv_cell(image_id),
                 csv_cell(uri_of[image_id])]
            )  # fmt: skip
        return text.getvalue().encode()


def budget(
    sizes: dict[tuple[str, int], int], settings: SelectSettings
) -> dict[tuple[str, int], int]:
    """Number of images to choose from each cluster of each class: `per_cluster`, or a class's
    `per_class` in proportion to its clusters' sizes, one from each before two from any."""
    if settings.per_class is None:
        return {place: min(size, settings.per_cluster) for place, size in sizes.items()}
    budgets: dict[tuple[str, int], int] = {}
    for label in dict.fromkeys(label for label, _ in sizes):
        places = [place for place in sizes if place[0] == label]
        counts = np.asarray([sizes[place] for place in places])
        given = shares(settings.per_class, counts.astype(float), counts)
        budgets |= {place: int(number) for place, number in zip(places, given, strict=True)}
    return budgets


def order_by(
    method: str, vectors: np.ndarray | None, count: int, wanted: int, random: np.random.Generator
) -> list[int]:
    """The first `wanted` or more rows of a cluster by a method; rows come by distance to the
    centroid."""
    if method == "nearest":
        return list(range(count))
    if method == "random":
        return [int(row) for row in random.permutation(count)]
    assert vectors is not None
    if method == "spread":
        return [int(row) for row in farthest_first(vectors, wanted, first=0)]
    return [int(row) for row in np.argsort(-local_density(vectors), kind="stable")]


def take_turns(orders: Mapping[str, list[int]], wanted: int) -> list[tuple[str, int]]:
    """(method, row): the methods in turn take their best row that is not taken yet."""
    taken: dict[int, str] = {}
    left = {method: iter(order) for method, order in orders.items()}
    while len(taken) < wanted and left:
        for method in list(left):
            row = next((row for row in left[method] if row not in taken), None)
            if row is None:
                del left[method]
            elif len(taken) < wanted:
                taken[row] = method
    return [(method, row) for row, method in taken.items()]
