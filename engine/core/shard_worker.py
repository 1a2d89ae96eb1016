"""The worker of a pool: computes shards by stages and commits them."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from engine.core import rows
from engine.core.errors import StorageError
from engine.core.memory import keep_freed_memory
from engine.core.shards import OK, Shard, ShardSet, column, installed
from engine.core.stage import Batch, Place, Stage, pipeline
from engine.core.store import Store


@dataclass
class ShardWorker:
    """Computes and commits shards: built once in each actor, called with a few shards at a time.

    rows_of: from a store and a shard's task to the table of its rows (every planned row, in order).
    stages: run in a thread each; `status` may be set by any of them.
    schema: of the data that is written, or a function that gives it once the stages are loaded.
    Micro-batches never span shards.
    """

    shards: ShardSet
    rows_of: Callable[[Store, Mapping[str, Any]], pa.Table]
    stages: Sequence[Stage]
    schema: pa.Schema | Callable[[], pa.Schema]
    place: Place

    def load(self) -> None:
        keep_freed_memory()
        for stage in self.stages:
            stage.load(
                self.place if stage.device == "accelerator" else self.place._replace(device="cpu")
            )
        self._schema = self.schema if isinstance(self.schema, pa.Schema) else self.schema()
        self._machine = platform.machine()
        if self.place.device == "cuda":
            import torch

            if torch.cuda.is_available():
                self._machine = torch.cuda.get_device_name()
        self._software = installed("torch", "diffusers", "transformers")

    def __call__(self, tasks: Sequence[Shard]) -> Iterator[dict[str, Any]]:
        """Compute `tasks`; yields a summary of each as soon as it is committed.

        What an attempt before this one has committed is told and not computed again.
        """
        missing: list[Shard] = []
        for shard in tasks:
            if (commit := self.shards.standing(shard.name)) is None:
                missing.append(shard)
            else:
                yield _summary(shard, commit.status, won=False)
        if missing:
            yield from self._compute(missing)

    def _compute(self, tasks: Sequence[Shard]) -> Iterator[dict[str, Any]]:
        planned: list[tuple[Shard, pa.Table]] = []

        def batches() -> Iterator[Batch]:
            for shard in tasks:
                table = self.rows_of(self.shards.store, shard.task)
                if table.num_rows != shard.rows:
                    raise StorageError(
                        f"shard {shard.name}: {table.num_rows} rows where {shard.rows} were planned"
                    )
                planned.append((shard, table))
                for start in range(0, shard.rows, self.place.batch_size):
                    piece = table.slice(start, self.place.batch_size)
                    yield {name: piece[name] for name in piece.column_names}

        collected: list[Batch] = []
        clock = time.monotonic()
        finished = 0
        # While a shard is hashed, synced or uploaded here, the stages go on with the next one.
        ahead = -(-max(shard.rows for shard in tasks) // self.place.batch_size)
        for batch in pipeline(self.stages, batches(), ahead=ahead):
            collected.append(batch)
            shard, table = planned[finished]
            if len(collected) * self.place.batch_size >= shard.rows:
                yield self._commit(shard, table, collected, time.monotonic() - clock)
                planned[finished] = (shard, table.slice(0, 0))
                collected, finished, clock = [], finished + 1, time.monotonic()

    def _commit(
        self, shard: Shard, table: pa.Table, batches: list[Batch], seconds: float
    ) -> dict[str, Any]:
        # What no stage writes is as it was planned: taken as a whole, not batch by batch.
        written = {name for stage in self.stages for name in stage.writes}

        def whole(field: pa.Field) -> pa.ChunkedArray:
            if field.name in written or field.name not in table.column_names:
                return pa.chunked_array([column(b[field.name], field.type) for b in batches])
            return table[field.name].cast(field.type)

        made = pa.table([whole(field) for field in self._schema], schema=self._schema)
        status = [entry for batch in batches for entry in _statuses(batch, self._schema.names[0])]
        provenance = {
            "batch_size": self.place.batch_size,
            "device": self.place.device,
            "machine": self._machine,
            "software": self._software,
            **{
                name: value
                for stage in self.stages
                for name, value in getattr(stage, "provenance", {}).items()
            },
            "seconds": round(seconds, 3),
        }
        won = self.shards.commit(shard, made.combine_chunks(), status, provenance)
        return _summary(shard, status, won)


def _summary(shard: Shard, status: Sequence[str], won: bool) -> dict[str, Any]:
    reasons = Counter(entry for entry in status if entry != OK)
    return {"shard": shard.name, "rows": shard.rows, "won": won, "reasons": dict(reasons)}


def _statuses(batch: Batch, first: str) -> list[str]:
    status = batch.get(rows.STATUS)
    return list(status) if status is not None else [OK] * len(batch[first])
