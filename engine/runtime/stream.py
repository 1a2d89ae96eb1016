"""Shards through pools of Ray Data actors.

What flows through Ray are descriptions of shards and their summaries. Pixels stay inside the actor
that
reads, computes, encodes and writes them: through the object store they would cost four times as
much (`python -m benchmarks.scale` measures it).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from engine.core.resources import StageResources
from engine.core.shards import Shard
from engine.runtime.base import Worker
from engine.runtime.cluster import ray_error_text


class _Actor:
    """One member of the pool."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.worker.load()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        shards = [Shard.from_json(text) for text in batch["shard"].to_pylist()]
        for summary in self.worker(shards):
            # JSON text rather than nested columns: an empty `reasons` has no Arrow type.
            yield pa.table({"summary": [_dump(summary)]})


def _dump(summary: dict[str, Any]) -> str:
    return json.dumps(summary)


def stream(
    worker: Worker, shards: Sequence[Shard], resources: StageResources
) -> Iterator[dict[str, Any]]:
    """Compute `shards` by a pool of fixed size; yields summaries as calls finish."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # An exception of ours is a fault of the program or of storage, never bad data: stop and say so.
    context.max_errored_blocks = 0
    # No more in one call than leaves every actor something to do, and nothing waits behind a busy
    # actor.
    actors = min(resources.actors, len(shards))
    per_call = max(1, min(resources.shards_per_call, len(shards) // (2 * actors)))
    calls = -(-len(shards) // per_call)
    dataset = ray.data.from_arrow(
        [
            pa.table(
                {
                    "shard": [
                        shard.to_json()
                        for shard in shards[index * per_call : (index + 1) * per_call]
                    ]
                }
            )
            for index in range(calls)
        ]
    ).map_batches(
        _Actor,
        fn_constructor_args=(worker,),
        batch_size=per_call,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
    )
    try:
        for batch in dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=0
        ):
            for text in batch["summary"].to_pylist():
                yield json.loads(text)
    except Exception as error:
        # Ray wraps what an actor raised several times over; the person needs the one line inside.
        if (own := ray_error_text(error)) is not None:
            raise own from None
        raise
