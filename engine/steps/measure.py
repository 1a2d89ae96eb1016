"""Measure: the figures of the labeler and the filters on val.

Generated images are measured in the same way by `curate`; val gives the reference values
and the labeler's accuracy. The parts `table: measured` have a column for each figure.
"""

from __future__ import annotations

import pyarrow as pa

from engine.context import Context, Output
from engine.core import rows
from engine.core.shards import parquet_rows
from engine.results.data import IngestResult
from engine.results.images import MeasureResult
from engine.stages.images import DecodeOwn, image_shards
from engine.stages.measuring import MeasurePixels, MeasureSpec, figures, trained_labeler
from engine.steps import StepKind


class Measure(StepKind[MeasureSpec]):
    version = 1
    summary = "measure val like generated images"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(MeasureSpec)
        data = context.result("ingest", IngestResult)
        classes = data.classes
        shards = image_shards(context, ("val",))
        commits = context.compute(
            "embed", shards, rows_of=parquet_rows,
            stages=[
                DecodeOwn(),
                MeasurePixels(context.store, spec, data, trained_labeler(context.inputs)),
            ],
            schema=pa.schema([pa.field(rows.IMAGE_ID, pa.string()), *figures(spec, classes)]),
            fingerprint={
                "spec": spec.model_dump(),
                "inputs": {name: manifest.digest for name, manifest in context.inputs.items()},
            },
            replace=True,
        )  # fmt: skip
        parts = [
            commit.data.model_copy(update={"tags": {"table": "measured"}})
            for commit in commits
            if commit.data
        ]
        names = [field.name for field in figures(spec, classes)]
        kept = sum(commit.kept for commit in commits)
        return Output(
            parts, kept, MeasureResult(headline=f"{kept:,} images of val: {', '.join(names)}")
        )
