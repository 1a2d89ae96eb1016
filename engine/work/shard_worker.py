"""The worker of a pool: computes shards by stages and commits them.

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
from engine.core.shards import OK, Shard, ShardSet, column, installed_versions
from engine.core.store import Store, attempt_name
from engine.work.attendance import HUNG, Attendance, History, Pace, Piece, Unattended
from engine.work.memory import keep_freed_memory
from engine.work.stage import Batch, Device, Place, Stage, pipeline

# The column of a stored piece that holds the status of its rows.
_PIECE_STATUS = "piece.status"


@dataclass
class ShardWorker:
    """Computes and commits shards: built once in each actor, called with a few shards at a time.

    rows_of: from a store and a shard's task to the table of its rows (every planned row, in order).
    stages: run in a thread each; `status` may be set by any of them.
    schema: of the data that is written, or a function that gives it once the stages are loaded.
    name: of the stage, for messages. attendance: what remembers the processes that died; set by a
    runtime that replaces them.
    Micro-batches never span shards.
    """

    shards: ShardSet
    rows_of: Callable[[Store, Mapping[str, Any]], pa.Table]
    stages: Sequence[Stage]
    schema: pa.Schema | Callable[[], pa.Schema]
    place: Place
    name: str = "shards"
    attendance: Attendance = field(default_factory=Unattended)
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
        """Compute `tasks`; yields a summary of each as soon as it is committed.

        What an attempt before this one has committed is reported, not recomputed.
        """
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
        # One after the other, so that the next death can be laid to one shard.
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
        # While a shard is hashed, synced or uploaded here, the stages go on with the next one.
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
                # Storage has time-outs of its own, and a stage may hang meanwhile.
                watch.store()
                made, status = self._rows_made(collected, table)
                summary = self._commit(shard, made, status, seconds, histories[finished])
                self.attendance.end(shard.name, pace)
                # Who takes the summary may take as long as it likes.
                watch.rest()
                yield summary
                planned[finished] = (shard, table.slice(0, 0))
                collected, pace, finished = [], Pace(), finished + 1
                if finished < len(tasks):
                    watch.wait(finished)
                clock = time.monotonic()
        finally:
            watch.rest()

    def _run(self, batches: Iterable[Batch], ahead: int = 2) -> Iterator[tuple[Batch, Pace]]:
        """Run `batches` through the stages; yields each result with its own pace."""
        stages = [_Timed(stage) for stage in self.stages]
        for batch in pipeline(stages, batches, ahead=ahead):
            # 0 would mean that nothing was computed.
            seconds = max(sum(stage.seconds.popleft() for stage in stages), 1e-6)
            pace = Pace(later=seconds) if self._warm else Pace(first=seconds)
            self._warm = True
            yield batch, pace

    def _compute_piecewise(self, shard: Shard) -> dict[str, Any]:
        """Compute a shard that processes died on, one announced piece after the other.

        Each piece is stored when it is finished, so that the next death costs no other piece.
        """
        self.attendance.watch_long()
        try:
            return self._compute_pieces(shard)
        finally:
            self.attendance.rest()

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
            made, status, pace = self._compute_piece(table, piece)
            done = replace(piece, key=self._store_piece(shard, made, status))
        made, status = self._join(table, history.pieces)
        summary = self._commit(shard, made, status, time.monotonic() - started, history)
        self.attendance.end(shard.name, Pace())
        for piece in history.pieces:
            if piece.key:
                self.shards.store.delete(piece.key)
        return summary

    def _compute_piece(self, table: pa.Table, piece: Piece) -> tuple[pa.Table, list[str], Pace]:
        """Compute some rows of a micro-batch in a batch of the same shape, each in its own place:
        the last bits of a result depend on both. Copies of the first row stand for the others."""
        size = self.place.batch_size
        start = piece.start // size * size
        stop = min(start + size, table.num_rows)
        inside = range(piece.start, piece.stop)
        padded = table.take([row if row in inside else piece.start for row in range(start, stop)])
        self.attendance.watch(1, first=not self._warm)
        ((batch, pace),) = self._run([_batch(padded)])
        self.attendance.watch_long()
        made, status = self._rows_made([batch], padded)
        first, last = piece.start - start, piece.stop - start
        return made.slice(first, last - first), status[first:last], pace

    def _store_piece(self, shard: Shard, made: pa.Table, status: Sequence[str]) -> str:
        store = self.shards.store
        sink = pa.BufferOutputStream()
        made = made.append_column(_PIECE_STATUS, pa.array(status, pa.string()))
        with pa.ipc.new_stream(sink, made.schema) as writer:
            writer.write_table(made)
        folder = store.join(self.shards.prefix, "pieces")
        # Whoever commits the shard deletes its own pieces, and no other attempt's.
        key, _ = store.put_part(folder, f"{shard.name}-{attempt_name()}", "arrow", sink.getvalue())
        return key

    def _join(self, table: pa.Table, pieces: Sequence[Piece]) -> tuple[pa.Table, list[str]]:
        """The rows of a whole shard. A row that was set aside has what was planned and no more."""
        tables: list[pa.Table] = []
        status: list[str] = []
        for piece in pieces:
            if piece.reason:
                planned = table.slice(piece.start, 1)
                tables.append(
                    pa.table(
                        [
                            planned[one.name].cast(one.type)
                            if one.name in planned.column_names
                            else pa.nulls(1, one.type)
                            for one in self._schema
                        ],
                        schema=self._schema,
                    )
                )
                status.append(piece.reason)
            else:
                made = pa.ipc.open_stream(self.shards.store.read(piece.key)).read_all()
                status += made[_PIECE_STATUS].to_pylist()
                tables.append(made.drop_columns([_PIECE_STATUS]))
        return pa.concat_tables(tables).combine_chunks(), status

    def _refuse_set_aside(self, shard: Shard, table: pa.Table, history: History) -> None:
        """Raise `DataError` where a row kills its process and these stages set no row aside: who
        reads their results needs every row."""
        if any(rows.STATUS in stage.writes for stage in self.stages):
            return
        for piece in history.pieces:
            if piece.reason:
                name = table[rows.IMAGE_ID][piece.start].as_py()
                what = "hung" if piece.reason == HUNG else "killed"
                raise DataError(
                    f"stage {self.name}: {name} (shard {shard.name}) {what} its worker twice, and"
                    " this step needs every row; look at that row, or at the worker's log"
                )

    def _rows(self, shard: Shard) -> pa.Table:
        table = self.rows_of(self.shards.store, shard.task)
        if table.num_rows != shard.rows:
            raise StorageError(
                f"shard {shard.name}: {table.num_rows} rows where {shard.rows} were planned"
            )
        return table

    def _micro_batches(self, shard: Shard) -> int:
        return -(-shard.rows // self.place.batch_size)

    def _rows_made(self, batches: Sequence[Batch], table: pa.Table) -> tuple[pa.Table, list[str]]:
        """What the stages made of the rows of `table`, and the status of each."""
        # What no stage writes is as it was planned: taken as a whole, not batch by batch.
        written = {name for stage in self.stages for name in stage.writes}

        def whole(one: pa.Field) -> pa.ChunkedArray:
            if one.name in written or one.name not in table.column_names:
                return pa.chunked_array([column(b[one.name], one.type) for b in batches])
            return table[one.name].cast(one.type)

        made = pa.table([whole(one) for one in self._schema], schema=self._schema)
        status = [entry for batch in batches for entry in _statuses(batch, self._schema.names[0])]
        return made, status

    def _commit(
        self,
        shard: Shard,
        made: pa.Table,
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
            # Processes that were lost to this shard, where there were any.
            **{name: count for name, count in losses.items() if count},
        }
        won = self.shards.commit(shard, made.combine_chunks(), status, provenance)
        return _summary(shard, status, won)


class _Timed:
    """A stage, and the seconds of each of its calls until somebody takes them."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.seconds: deque[float] = deque()

    @property
    def reads(self) -> tuple[str, ...]:
        return self.stage.reads

    @property
    def writes(self) -> tuple[str, ...]:
        return self.stage.writes

    @property
    def device(self) -> Device:
        return self.stage.device

    def load(self, place: Place) -> None:
        self.stage.load(place)

    def __call__(self, batch: Batch) -> Batch:
        started = time.monotonic()
        result = self.stage(batch)
        self.seconds.append(time.monotonic() - started)
        return result


class _Watch:
    """The limit that holds for a call of a worker, which reads the rows of its shards in one thread
    and waits for their results in another.

    batches: micro-batches of each shard.
    """

    def __init__(self, attendance: Attendance, batches: Sequence[int]) -> None:
        self.attendance, self.batches = attendance, batches
        self._lock = threading.Lock()
        # Shards whose rows are read.
        self._read = 0
        # The shard that is waited for, its finished micro-batches, and whether the next one is the
        # first of this process.
        self._awaited: tuple[int, int, bool] | None = None
        self._armed: tuple[int, int, bool] | None = None

    def rows_read(self) -> None:
        """The rows of the next shard are read."""
        with self._lock:
            self._read += 1
            self._arm()

    def wait(self, shard: int, finished: int = 0, first: bool = False) -> None:
        """From now on `shard` is waited for, of which so many micro-batches are finished."""
        with self._lock:
            self._awaited = shard, finished, first
            if self._read <= shard:
                # Storage may be slow, and has time-outs of its own.
                self.attendance.watch_long()
            else:
                self._arm()

    def store(self) -> None:
        with self._lock:
            self._awaited = None
            self.attendance.watch_long()

    def rest(self) -> None:
        with self._lock:
            self._awaited = None
            self.attendance.rest()

    def _arm(self) -> None:
        if self._awaited is None:
            return
        shard, finished, first = self._awaited
        # The rows of a later shard are no news of the one that is waited for.
        if self._read > shard and self._armed != self._awaited:
            self._armed = self._awaited
            self.attendance.watch(1 if first else self.batches[shard] - finished, first)


def _batch(table: pa.Table) -> Batch:
    return {name: table[name] for name in table.column_names}


def _summary(shard: Shard, status: Sequence[str], won: bool) -> dict[str, Any]:
    reasons = Counter(entry for entry in status if entry != OK)
    return {"shard": shard.name, "rows": shard.rows, "won": won, "reasons": dict(reasons)}


def _statuses(batch: Batch, first: str) -> list[str]:
    status = batch.get(rows.STATUS)
    return list(status) if status is not None else [OK] * len(batch[first])
