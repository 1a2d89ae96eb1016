"""Embed: a vector for each image of train and val. Test is not read."""

from __future__ import annotations

from engine.context import Context, Output
from engine.core import rows
from engine.core.shards import parquet_rows
from engine.core.spec import Spec
from engine.results.data import EmbedResult
from engine.settings import EmbedderField
from engine.stages.images import EmbedImages, image_shards
from engine.steps import StepKind

SPLITS = ("train", "val")


class EmbedSpec(Spec):
    embedder: EmbedderField


class Embed(StepKind[EmbedSpec]):
    version = 2
    summary = "turn train and val images into vectors"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(EmbedSpec)
        shards = image_shards(context, SPLITS)
        stages, schema = EmbedImages.stages(spec.embedder)
        commits = context.compute(
            "embed", shards, rows_of=parquet_rows, stages=stages, schema=schema,
            fingerprint={
                "embedder": spec.embedder.model_dump(),
                "images": context.inputs["ingest"].digest,
            },
            replace=True,
        )  # fmt: skip
        parts = [commit.data for commit in commits if commit.data]
        kept, planned = sum(commit.kept for commit in commits), sum(shard.rows for shard in shards)
        with context.store.parquet(parts[0].key) as file:
            width = file.schema_arrow.field(rows.EMBEDDING).type.list_size
        headline = f"{kept:,} vectors of width {width}"
        if kept < planned:
            headline += f"; {planned - kept:,} quarantined"
        return Output(
            parts,
            kept,
            EmbedResult(headline=headline, width=width, quarantined=planned - kept),
        )
