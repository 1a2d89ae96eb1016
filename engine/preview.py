"""A preview before an expensive run: a few images of each class next to real ones, and the cost of
the full request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from engine.context import Context
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.names import attempt_name, slug
from engine.core.progress import say
from engine.core.registry import kind_of
from engine.core.shards import OK, Shard, ids_digest, parquet_rows
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.data.arrays import first_images, sampled_images
from engine.data.images import Preprocess, encode
from engine.execute import execute
from engine.profile import Profile
from engine.report.download import data_url
from engine.report.page import render
from engine.results.data import IngestResult
from engine.runtime.base import Runtime
from engine.steps.generate import GenerateSpec, fingerprint, sampling_stages
from engine.steps.request import RequestSpec, needed_images, request_table, training_rows
from engine.study import Study


def preview(
    study: Study,
    steps: Sequence[Step],
    store: Store,
    runtime: Runtime,
    profile: Profile,
    count: int,
) -> None:
    """Run the steps that generation needs, generate `count` images per class, and write one page.

    No shard of the study is committed.
    """
    # Later rounds of a generator replace what curation drops; the first round is enough here.
    generates = [
        step
        for step in steps
        if step.kind == "generate" and "curate" not in step.inputs["request"].inputs
    ]
    needed = [step for step in upstream(generates) if step.kind not in ("request", "generate")]
    manifests = execute(needed, store, runtime, profile)
    sections = [_section(step, manifests, store, runtime, profile, count) for step in generates]
    page = store.page(study.name, "preview.html")
    store.put(page, render("preview.html", study=study, sections=sections, count=count).encode())
    say(f"preview: {store.location(page)}")


def _section(
    step: Step,
    manifests: dict[str, Manifest],
    store: Store,
    runtime: Runtime,
    profile: Profile,
    count: int,
) -> dict[str, Any]:
    request = step.inputs["request"].spec_as(RequestSpec)
    spec = step.spec_as(GenerateSpec)
    needed = {**step.inputs["request"].inputs, **step.inputs}
    context = Context(
        step=step,
        inputs={name: manifests[source.key] for name, source in needed.items()
                if source.key in manifests},
        store=store, runtime=runtime, stage_resources=profile.stage, fit_resources=profile.fit,
        device=profile.device,
    )  # fmt: skip
    generator = kind_of("generators", spec.generator)(spec.generator, spec.preprocess)
    train = training_rows(context, spec.task, generator)
    real_images = context.result("ingest", IngestResult).train
    full = needed_images(request, real_images)
    # A fresh prefix, so that images and timings of an earlier preview are not reused.
    prefix = store.preview(attempt_name())
    shards = []
    for label, wanted in full.items():
        if not wanted:
            continue
        table = request_table(request, generator, label, min(count, wanted), train[label])
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(table, sink)
        key, _ = store.put_part(store.parts(prefix), slug(label), "parquet", sink.getvalue())
        ids = table[rows.IMAGE_ID].to_pylist()
        task = {"part": key, "row_group": 0, "ids_digest": ids_digest(ids)}
        shards.append(Shard(f"{slug(label)}-{ids_digest(ids)}", len(ids), task, {"label": label}))
    commits = context.compute(
        "generate", shards, rows_of=parquet_rows, stages=sampling_stages(context, spec),
        schema=rows.synthetic_schema(spec.tasks), fingerprint=fingerprint(context, spec),
        prefix=prefix,
    )  # fmt: skip
    real = sampled_images(store, context.inputs["ingest"].keys(split="train"), spec.task, count)
    classes = []
    for shard, commit in zip(shards, commits, strict=True):
        label = shard.tags["label"]
        generated = first_images(store, [commit.data.key], spec.task, count) if commit.data else {}
        classes.append(
            {
                "label": label,
                "real": [_tile(image, spec.preprocess) for image in real.get(label, [])],
                "made": [_tile(image, spec.preprocess) for image in generated.get(label, [])],
                "quarantined": [status for status in commit.status if status != OK],
                "train": real_images.get(label, 0),
                "full": full[label],
            }
        )
    resources = profile.stage("generate")
    # A shard of a few images still costs whole batches of the planned shape.
    batches = sum(math.ceil(shard.rows / resources.batch_size) for shard in shards)
    seconds = (
        sum(float(commit.provenance["seconds"]) for commit in commits)
        / batches
        / resources.batch_size
    )
    bytes_each = sum(c.data.bytes for c in commits if c.data) / max(1, sum(c.kept for c in commits))
    total = sum(full.values())
    return {
        "label": step.label,
        "classes": classes,
        "total": total,
        "per_second": 1 / seconds if seconds else 0.0,
        "actors": resources.actors,
        "batch_size": resources.batch_size,
        "device": profile.device,
        "hours": total * seconds / resources.actors / 3600,
        "megabytes": total * bytes_each / 2**20,
    }


def _tile(image: np.ndarray, preprocess: Preprocess) -> str:
    """An image as a data URL."""
    data = encode(image, preprocess.model_copy(update={"codec": "png"}))
    return data_url(data, "image/png")
