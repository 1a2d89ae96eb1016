"""The worker of a pool: computes shards with stages and commits them.

<prefix>/pieces/<name>-<attempt>.<digest>.arrow    rows of a shard that is computed piece by
                                                   piece, until it is committed
"""

from __future__ import annotations

import platform
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from engine.core import rows
from engine.core.errors import DataError, EngineError, StorageError
from engine.core.names import attempt_name
from engine.core.shards import OK, Shard, ShardSet, column, installed_versions, reason_of
from engine.core.store import Store
from engine.work.attendance import HUNG, Attendance, History, Pace, Piece
from engine.work.memory import keep_freed_memory
from engine.work.stage import Batch, Place, Stage, pipeline

# The status column of a stored piece.
_PIECE_STATUS = "piece.status"


@dataclass
class ShardWorker:
    """Computes and commits shards: built once in each actor, called with a few shards at a time.
    Micro-batches never span shards.

    rows_of: maps a store and a shard's task to the table of its rows (every planned row, in order).
    stages: run in a thread each; any of them may set `status`.
    schema: of the written data, or a function that returns it once the stages are loaded.
    name: of the stage, for messages.
    attendance: the register of processes that died; set by a runtime that restarts them.
    """

    shards: ShardSet
    rows_of: Callable[[Store, Mapping[str, Any]], pa.Table]
    stages: Sequence[Stage]
    schema: pa.Schema | Callable[[], pa.Schema]
    place: Place
    name: str = "shards"
    attendance: Attendance = field(default_factory=Attendance)
    # Whether this process has finished a micro-batch.
    _warm: bool = field(default=False, init=False)

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
        versions = installed_versions("torch", "diffusers", "transformers")
        self._software = ", ".join(f"{name} {version}" for name, version in versions.items())

    def __call__(self, tasks: Sequence[Shard]) -> Iterator[dict[str, Any]]:
        """Compute `tasks`; yields a summary of each as soon as it is committed. Shards that an
        earlier attempt committed are reported, not recomputed."""
        missing: list[Shard] = []
        for shard in tasks:
            if (commit := self.shards.find_commit(shard.name)) is None:
                missing.append(shard)
            else:
                yield _summary(shard, commit.status, won=False)
        if not missing:
            return
        histories = self.attendance.history([shard.name for shard in missing])
        if not any(history.losses for history in histories):
            yield from self._compute(missing, histories)
            return
        # One after the other, so that the next death points to one shard.
        for shard, history in zip(missing, histories, strict=True):
            if history.stop:
                raise EngineError(history.stop)
            if history.piecewise:
                yield self._compute_piecewise(shard)
            else:
                yield from self._compute([shard], [history])

    def _compute(
        self, tasks: Sequence[Shard], histories: Sequence[History]
    ) -> Iterator[dict[str, Any]]:
        planned: list[tuple[Shard, pa.Table]] = []
        watch = _Watch(self.attendance, [self._micro_batches(shard) for shard in tasks])

        def batches() -> Iterator[Batch]:
            for shard in tasks:
                self.attendance.begin(shard.name)
                table = self._rows(shard)
                planned.append((shard, table))
                watch.rows_read()
                for start in range(0, shard.rows, self.place.batch_size):
                    yield _batch(table.slice(start, self.place.batch_size))

        collected: list[Batch] = []
        pace, finished = Pace(), 0
        # While this thread hashes, syncs or uploads a shard, the stages compute the next one.
        ahead = -(-max(shard.rows for shard in tasks) // self.place.batch_size)
        watch.wait(0, first=not self._warm)
        clock = time.monotonic()
        try:
            for batch, batch_pace in self._run(batches(), ahead):
                collected.append(batch)
                pace = pace.slower(batch_pace)
                shard, table = planned[finished]
                if len(collected) < self._micro_batches(shard):
                    if batch_pace.first:
                        watch.wait(finished, len(collected))
                    continue
                seconds = time.monotonic() - clock
                # Storage has time-outs of its own; a stage may still hang meanwhile.
                watch.store()
                result, status = self._result_rows(collected, table)
                summary = self._commit(shard, result, status, seconds, histories[finished])
                self.attendance.end(shard.name, pace)
                # The consumer may take any time over the summary.
                watch.unwatch()
                yield summary
                planned[finished] = (shard, table.slice(0, 0))
                collected, pace, finished = [], Pace(), finished + 1
                if finished < len(tasks):
                    watch.wait(finished)
                clock = time.monotonic()
        finally:
            watch.unwatch()

    def _run(self, batches: Iterable[Batch], ahead: int = 2) -> Iterator[tuple[Batch, Pace]]:
        """Run `batches` through the stages; yields each result with its pace."""
        stages = [_Timed(stage) for stage in self.stages]
        for batch in pipeline(stages, batches, ahead=ahead):
            # A pace of 0 means that none was measured.
            seconds = max(sum(stage.seconds.popleft() for stage in stages), 1e-6)
            pace = Pace(later=seconds) if self._warm else Pace(first=seconds)
            self._warm = True
            yield batch, pace

    def _compute_piecewise(self, shard: Shard) -> dict[str, Any]:
        """Compute a shard that processes died on, one announced piece after the other. Each
        finished piece is stored, so that the next death costs no other piece."""
        self.attendance.watch_long()
        try:
            return self._compute_pieces(shard)
        finally:
            self.attendance.unwatch()

    def _compute_pieces(self, shard: Shard) -> dict[str, Any]:
        self.attendance.begin(shard.name)
        table = self._rows(shard)
        started = time.monotonic()
        done: Piece | None = None
        pace = Pace()
        while True:
            history = self.attendance.next_piece(
                shard.name, shard.rows, self.place.batch_size, done, pace
            )
            if history.stop:
                raise EngineError(history.stop)
            self._refuse_set_aside(shard, table, history)
            if (piece := history.next) is None:
                break
            result, status, pace = self._compute_piece(table, piece)
            done = replace(piece, key=self._store_piece(shard, result, status))
        result, status = self._join(table, history.pieces)
        summary = self._commit(shard, result, status, time.monotonic() - started, history)
        self.attendance.end(shard.name, Pace())
        for piece in history.pieces:
            if piece.key:
                self.shards.store.delete(piece.key)
        return summary

    def _compute_piece(self, table: pa.Table, piece: Piece) -> tuple[pa.Table, list[str], Pace]:
        """Compute some rows of a micro-batch in a batch of the same shape, each in its own place,
        because the last bits of a result depend on both. Copies of the first row fill the other
        places."""
        size = self.place.batch_size
        start = piece.start // size * size
        stop = min(start + size, table.num_rows)
        inside = range(piece.start, piece.stop)
        padded = table.take([row if row in inside else piece.start for row in range(start, stop)])
        self.attendance.watch(1, first=not self._warm)
        ((batch, pace),) = self._run([_batch(padded)])
        self.attendance.watch_long()
        result, status = self._result_rows([batch], padded)
        first, last = piece.start - start, piece.stop - start
        return result.slice(first, last - first), status[first:last], pace

    def _store_piece(self, shard: Shard, result: pa.Table, status: Sequence[str]) -> str:
        store = self.shards.store
        sink = pa.BufferOutputStream()
        result = result.append_column(_PIECE_STATUS, pa.array(status, pa.string()))
        with pa.ipc.new_stream(sink, result.schema) as writer:
            writer.write_table(result)
        folder = store.join(self.shards.prefix, "pieces")
        # The attempt name is in the key: a worker deletes its own pieces, and no other attempt's.
        key, _ = store.put_part(folder, f"{shard.name}-{attempt_name()}", "arrow", sink.getvalue())
        return key

    def _join(self, table: pa.Table, pieces: Sequence[Piece]) -> tuple[pa.Table, list[str]]:
        """The rows of a whole shard. A row that was set aside has only its planned columns."""
        tables: list[pa.Table] = []
        status: list[str] = []
        for piece in pieces:
            if piece.reason:
                planned = table.slice(piece.start, 1)
                tables.append(
                    pa.table(
                        [
                            planned[field.name].cast(field.type)
                            if field.name in planned.column_names
                            else pa.nulls(1, field.type)
                            for field in self._schema
                        ],
                        schema=self._schema,
                    )
                )
                status.append(piece.reason)
            else:
                stored = pa.ipc.open_stream(self.shards.store.read(piece.key)).read_all()
                status += stored[_PIECE_STATUS].to_pylist()
                tables.append(stored.drop_columns([_PIECE_STATUS]))
        return pa.concat_tables(tables).combine_chunks(), status

    def _refuse_set_aside(self, shard: Shard, table: pa.Table, history: History) -> None:
        """Raise `DataError` if a row was set aside and no stage writes `status`: then every row is
        needed."""
        if any(rows.STATUS in stage.writes for stage in self.stages):
            return
        for piece in history.pieces:
            if piece.reason:
                name = table[rows.IMAGE_ID][piece.start].as_py()
                effect = "hung" if piece.reason == HUNG else "killed"
                raise DataError(
                    f"stage {self.name}: row {name} (shard {shard.name}) {effect} its worker twice,"
                    " and this step needs every row; check the row and the worker's log"
                )

    def _rows(self, shard: Shard) -> pa.Table:
        table = self.rows_of(self.shards.store, shard.task)
        if table.num_rows != shard.rows:
            raise StorageError(
                f"{self.shards.store.location(self.shards.prefix)}: shard {shard.name} has"
                f" {table.num_rows} rows, planned were {shard.rows}; discard the steps that wrote"
                " its input with --discard"
            )
        return table

    def _micro_batches(self, shard: Shard) -> int:
        return -(-shard.rows // self.place.batch_size)

    def _result_rows(self, batches: Sequence[Batch], table: pa.Table) -> tuple[pa.Table, list[str]]:
        """The results of the stages for the rows of `table`, and the status of each row."""
        written = {name for stage in self.stages for name in stage.writes}

        def whole_column(field: pa.Field) -> pa.ChunkedArray:
            if field.name in written or field.name not in table.column_names:
                return pa.chunked_array([column(b[field.name], field.type) for b in batches])
            # No stage writes this column, so that it need not be joined from batches.
            return table[field.name].cast(field.type)

        result = pa.table([whole_column(field) for field in self._schema], schema=self._schema)
        status = [entry for batch in batches for entry in _statuses(batch, self._schema.names[0])]
        return result, status

    def _commit(
        self,
        shard: Shard,
        result: pa.Table,
        status: Sequence[str],
        seconds: float,
        history: History,
    ) -> dict[str, Any]:
        losses = {"deaths": history.deaths, "hangs": history.hangs}
        provenance = {
            "batch_size": self.place.batch_size,
            "device": self.place.device,
            "machine": self._machine,
            "host": socket.gethostname(),
            "node": self.attendance.node,
            "software": self._software,
            **{
                name: value
                for stage in self.stages
                for name, value in getattr(stage, "provenance", {}).items()
            },
            "seconds": round(seconds, 3),
            # Processes lost on this shard, if any.
            **{name: count for name, count in losses.items() if count},
        }
        won = self.shards.commit(shard, result.combine_chunks(), status, provenance)
        return _summary(shard, status, won)


class _Timed:
    """A stage that queues the seconds of each of its calls."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.seconds: deque[float] = deque()

    def __call__(self, batch: Batch) -> Batch:
        started = time.monotonic()
        result = self.stage(batch)
        self.seconds.append(time.monotonic() - started)
        return result


class _Watch:
    """Chooses the time limit of a worker that reads the rows of its shards in one thread and waits
    for their results in another.

    batches: number of micro-batches of each shard.
    """

    def __init__(self, attendance: Attendance, batches: Sequence[int]) -> None:
        self.attendance, self.batches = attendance, batches
        self._lock = threading.Lock()
        # Number of shards whose rows have been read.
        self._read = 0
        # The awaited shard, its finished micro-batches, and whether the next micro-batch is the
        # first of this process.
        self._awaited: tuple[int, int, bool] | None = None
        self._armed: tuple[int, int, bool] | None = None

    def rows_read(self) -> None:
        """The rows of the next shard have been read."""
        with self._lock:
            self._read += 1
            self._arm()

    def wait(self, shard: int, finished: int = 0, first: bool = False) -> None:
        """From now on `shard` is awaited. finished: its finished micro-batches."""
        with self._lock:
            self._awaited = shard, finished, first
            if self._read <= shard:
                # Its rows are still being read; storage has time-outs of its own.
                self.attendance.watch_long()
            else:
                self._arm()

    def store(self) -> None:
        """A shard is being stored."""
        with self._lock:
            self._awaited = None
            self.attendance.watch_long()

    def unwatch(self) -> None:
        with self._lock:
            self._awaited = None
            self.attendance.unwatch()

    def _arm(self) -> None:
        if self._awaited is None:
            return
        shard, finished, first = self._awaited
        # Reading the rows of a later shard must not extend the limit of the awaited one.
        if self._read > shard and self._armed != self._awaited:
            self._armed = self._awaited
            self.attendance.watch(1 if first else self.batches[shard] - finished, first)


def _batch(table: pa.Table) -> Batch:
    return {name: table[name] for name in table.column_names}


def _summary(shard: Shard, status: Sequence[str], won: bool) -> dict[str, Any]:
    reasons = Counter(reason_of(entry) for entry in status if entry != OK)
    return {"shard": shard.name, "rows": shard.rows, "won": won, "reasons": dict(reasons)}


def _statuses(batch: Batch, first: str) -> list[str]:
    status = batch.get(rows.STATUS)
    return list(status) if status is not None else [OK] * len(batch[first])
