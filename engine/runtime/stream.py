"""Streams shards through pools of Ray Data actors.

Only descriptions of shards and their summaries flow through Ray. Pixels stay inside the actor that
reads, computes, encodes and writes them: through the object store they would cost four times as
much (`python -m benchmarks.scale` measures it).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from engine.core.errors import EngineError
from engine.core.shards import Shard
from engine.runtime.attendance import RayAttendance, attending
from engine.runtime.base import Worker
from engine.runtime.errors import find_engine_error
from engine.work.resources import StageResources

SUMMARY_INTERVAL = 0.5  # seconds


class _Actor:
    """One member of the pool."""

    def __init__(self, worker: Worker, attendance: RayAttendance) -> None:
        self.worker = worker
        worker.attendance = attendance
        self.failed: EngineError | None = None
        if stop := attendance.arrive():
            self.failed = EngineError(stop)
            return
        attendance.watch_long()
        try:
            self.worker.load()
            attendance.loaded()
        except EngineError as error:
            # Raised in the first call: of an error raised here, Ray keeps only the traceback text.
            self.failed = error
        finally:
            attendance.unwatch()

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        if self.failed is not None:
            raise self.failed
        shards = [Shard.from_json(text) for call in batch["item"] for text in json.loads(str(call))]
        # A block costs Ray 20 ms, so that summaries of quick shards share one.
        summaries, last = [], time.monotonic()
        for summary in self.worker(shards):
            summaries.append(summary)
            if time.monotonic() - last >= SUMMARY_INTERVAL:
                yield _block(summaries)
                summaries, last = [], time.monotonic()
        if summaries:
            yield _block(summaries)


def _block(summaries: list[dict[str, Any]]) -> pa.Table:
    # JSON text rather than nested columns: an empty `reasons` has no Arrow type.
    return pa.table({"summaries": [json.dumps(summaries)]})


def stream(
    worker: Worker, shards: Sequence[Shard], resources: StageResources, registers: Any
) -> Iterator[dict[str, Any]]:
    """Compute `shards` in a pool of fixed size; yields summaries as calls finish.

    registers: the actor of `start_registers`.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    # Few enough shards in one call that the pool's last calls end at about the same time.
    actors = min(resources.actors, len(shards))
    per_call = max(1, min(resources.shards_per_call, len(shards) // (4 * actors)))
    calls = [
        json.dumps([shard.to_json() for shard in shards[start : start + per_call]])
        for start in range(0, len(shards), per_call)
    ]
    # One block per call. from_items counts the rows locally; from_arrow would start a task for each
    # block, 30 ms apiece on two cores.
    source = ray.data.from_items(calls, override_num_blocks=len(calls))
    # The dataset's own context, because the process-wide one belongs to others.
    context = source.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Every yield becomes a block at once. Collected into larger blocks, summaries would arrive only
    # at the end of a call, and slow shards would show no progress.
    context.target_max_block_size = 1
    # An exception means a fault of the program or of storage, never bad data: stop and report it.
    context.max_errored_blocks = 0
    # Ray replaces a dead process without a limit; the register makes sure that each death makes
    # progress.
    with attending(registers, worker.name, resources) as attendance:
        dataset = source.map_batches(
            _Actor,
            fn_constructor_args=(worker, attendance),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
        )
        try:
            for batch in dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                assert isinstance(batch, pa.Table)  # batch_format="pyarrow"
                for text in batch["summaries"].to_pylist():
                    yield from json.loads(text)
        except Exception as error:
            # Ray wraps an actor's error several times; the user needs the one line inside.
            if (own := find_engine_error(error)) is not None:
                # Ray Data appends lines about its own settings.
                own.args = (str(own).partition("\n")[0],)
                raise own from None
            raise
