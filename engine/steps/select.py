"""Select: representatives of each cluster, the images nearest to its centroid."""

from __future__ import annotations

from typing import ClassVar

import pyarrow as pa

from engine.context import Context, Result
from engine.core import rows
from engine.core.spec import Spec
from engine.steps import StepKind


class SelectSpec(Spec):
    task: str
    per_cluster: int


class Select(StepKind):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[Spec]] = SelectSpec
    summary: ClassVar[str] = "choose representatives of each cluster"

    def run(self, context: Context) -> Result:
        spec = context.step.spec_as(SelectSpec)
        column = rows.label_column(spec.task)
        clusters = pa.concat_tables(
            context.store.tables(context.inputs["cluster"].keys(table="clusters"))
        )
        # Equal distances fall by id, so that the choice does not depend on the order of rows.
        ordered = clusters.sort_by(
            [
                (column, "ascending"),
                (rows.CLUSTER, "ascending"),
                (rows.DISTANCE, "ascending"),
                (rows.IMAGE_ID, "ascending"),
            ]
        )
        rank, ranks, previous = 0, [], None
        for place in zip(
            ordered[column].to_pylist(), ordered[rows.CLUSTER].to_pylist(), strict=True
        ):
            rank = rank + 1 if place == previous else 0
            ranks.append(rank)
            previous = place
        ordered = ordered.append_column(rows.RANK, pa.array(ranks, pa.int32()))
        chosen = ordered.filter(pa.array([rank < spec.per_cluster for rank in ranks]))
        part = context.table("representatives", chosen, table="representatives")
        return Result([part], chosen.num_rows, {"headline": f"{chosen.num_rows:,} representatives"})
