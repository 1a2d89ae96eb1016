"""Rows that kill or hang the process that computes them, and functions that compute them."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa

from engine.context import Context
from engine.core import rows
from engine.core.shards import OK, Commit, Shard, ids_digest, image_column
from engine.core.spec import Spec
from engine.core.step import Step, Subject
from engine.core.store import Store
from engine.profile import Profile
from engine.runtime.base import Runtime
from engine.work.resources import StageResources
from engine.work.stage import Batch, Device, Place

Fate = Literal["exit", "kill", "sleep", "spin"]
SCHEMA = pa.schema([(rows.IMAGE_ID, pa.string()), (rows.IMAGE, rows.IMAGE_TYPE)])


def meet(fate: Fate) -> None:
    """End this process, or never return."""
    if fate == "exit":
        os._exit(1)
    if fate == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "sleep":
        time.sleep(1e6)
    # Endless, in C, without releasing the GIL.
    sum(itertools.repeat(0))


@dataclass
class Lethal:
    """A stage that paints rows, and dies on some. A row's pixels depend on the batch's shape and on
    the row's place in it, as the last bits of a network's output do."""

    fates: Mapping[str, Fate] = field(default_factory=dict)
    reads: ClassVar[tuple[str, ...]] = (rows.IMAGE_ID,)
    writes: ClassVar[tuple[str, ...]] = (rows.IMAGE, rows.STATUS)
    device: ClassVar[Device] = "accelerator"

    def load(self, place: Place) -> None:
        return

    def __call__(self, batch: Batch) -> Batch:
        ids = batch[rows.IMAGE_ID].to_pylist()
        for name in ids:
            if name in self.fates:
                meet(self.fates[name])
        painted = [f"{name} {place} of {len(ids)}".encode() for place, name in enumerate(ids)]
        return {
            **batch, rows.IMAGE: image_column(painted, ids, ".png"), rows.STATUS: [OK] * len(ids)
        }  # fmt: skip


def row_ids(count: int) -> list[str]:
    return [f"row-{number:04d}" for number in range(count)]


def plan(count: int, shard_rows: int) -> list[Shard]:
    ids = row_ids(count)
    return [
        Shard(
            f"s{start:04d}", len(part := ids[start : start + shard_rows]),
            {"ids": part, "ids_digest": ids_digest(part)}, {},
        )
        for start in range(0, count, shard_rows)
    ]  # fmt: skip


def rows_of(store: Store, task: Mapping[str, Any]) -> pa.Table:
    return pa.table({rows.IMAGE_ID: task["ids"]})


def make_context(store: Store, runtime: Runtime, resources: StageResources) -> Context:
    return Context(
        step=Step("generate", Subject(), Spec(), {}), inputs={}, store=store, runtime=runtime,
        stage_resources=lambda name: resources, fit_resources=Profile().fit, device="cpu",
    )  # fmt: skip


def compute(context: Context, shards: list[Shard], stage: Any) -> list[Commit]:
    return context.compute(
        "generate", shards, rows_of=rows_of, stages=[stage], schema=SCHEMA, fingerprint={}
    )


def painted(commits: list[Commit]) -> dict[str, str]:
    """Digests of the bytes of rows with status `ok`, by id."""
    return {
        image_id: sha256
        for commit in commits
        for image_id, sha256, status in zip(
            commit.image_id, commit.sha256, commit.status, strict=True
        )
        if status == OK
    }


def set_aside(commits: list[Commit]) -> dict[str, str]:
    return {
        image_id: status
        for commit in commits
        for image_id, status in zip(commit.image_id, commit.status, strict=True)
        if status != OK
    }
