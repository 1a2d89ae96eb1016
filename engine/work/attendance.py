"""A register of which process computes which rows, to find the rows that kill or hang a process.

Ray restarts a dead process and gives it the same shards again, without a limit and without a
memory. The register, one for each stream of shards, is that memory. A worker announces what it is
about to compute. If it dies, everything announced and not finished is suspect.

After two deaths on a shard, the shard is computed piece by piece: first by micro-batches, and a
piece that kills its process is halved. A single row that kills two processes is set aside with a
reason. Finished pieces are kept. Such a row therefore costs log2(batch size) + 2 process starts,
and its shard two more, whatever the size of the shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from engine.work.resources import StageResources

DIED, HUNG = "process_died", "process_hung"
# Deaths on a shard, or on a single row, after which it is the suspected cause. One death may be the
# machine's fault.
_DEATHS_TO_BLAME = 2
# Deaths on a shard while it was read or stored, after which the stream ends.
_MAX_IO_DEATHS = 5
# Rows that one actor sets aside without finishing a micro-batch in between, after which the machine
# is the suspected cause.
_MAX_SET_ASIDE = 8
# Consecutive deaths of one actor's processes while loading, after which the stream ends.
_MAX_FAILED_LOADS = 5


@dataclass(frozen=True)
class Pace:
    """Seconds that the stages spent on the slowest micro-batch, without waiting for each other, for
    rows or for storage. 0: none measured yet.

    first: over first micro-batches of a process, which include warm-up and compilation. later: over
    all others.
    """

    first: float = 0.0
    later: float = 0.0

    def slower(self, other: Pace) -> Pace:
        return Pace(max(self.first, other.first), max(self.later, other.later))


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a shard, within one micro-batch.

    deaths: processes that died on it. key: of its stored result, once computed. reason: why its
    single row was set aside.
    """

    start: int
    stop: int
    deaths: int = 0
    key: str = ""
    reason: str = ""

    @property
    def pending(self) -> bool:
        return not self.key and not self.reason


@dataclass(frozen=True)
class History:
    """The history of a shard in this stream.

    deaths: processes that died on it. hangs: processes that were ended because they hung on it.
    pieces: in order; empty until the shard is computed piece by piece. stop: why the stream must
    end; empty if it need not.
    """

    deaths: int = 0
    hangs: int = 0
    pieces: tuple[Piece, ...] = ()
    stop: str = ""

    @property
    def losses(self) -> int:
        return self.deaths + self.hangs

    @property
    def piecewise(self) -> bool:
        """Whether to compute the shard piece by piece."""
        return self.losses >= _DEATHS_TO_BLAME

    @property
    def next(self) -> Piece | None:
        """The first piece that is not computed yet."""
        return next((piece for piece in self.pieces if piece.pending), None)


class Attendance:
    """A worker's side of the register. Picklable. As it is, it belongs to a process that is never
    restarted: no register, no limit."""

    # Id of the Ray node that this process runs on; empty without Ray.
    node: str = ""

    def history(self, shards: Sequence[str]) -> list[History]:
        return [History() for _ in shards]

    def begin(self, shard: str) -> None:
        """Announce a whole shard; returns when the register has it."""

    def end(self, shard: str, pace: Pace) -> None:
        """The shard is committed. pace: of its micro-batches."""

    def next_piece(
        self, shard: str, rows: int, batch_size: int, done: Piece | None, pace: Pace
    ) -> History:
        """Record the result of the piece `done` (with its key), computed at `pace`, and announce
        the next one: `History.next`."""
        raise AssertionError("without a register no shard is computed piece by piece")

    def watch(self, batches: int, first: bool = False) -> None:
        """End this process unless `unwatch` or another watch is called within the limit for so many
        micro-batches. first: the next one is the first of this process."""

    def watch_long(self) -> None:
        """As `watch`, for work that the pace does not bound: loading, reading and storing rows."""

    def unwatch(self) -> None:
        """End no process."""


def hang_limit(resources: StageResources, pace: Pace, batches: int, first: bool = False) -> float:
    """Seconds that so many micro-batches may take. pace: of the stream so far. first: for the first
    micro-batch of a process."""
    # Each process warms up again. A hanging row is in the first micro-batch of every process that
    # is started for it, so that hang_first each time would add up to hours.
    longest = pace.first if first else pace.later or pace.first
    if not longest:
        return resources.hang_first
    return max(resources.hang_floor, resources.hang_multiple * longest * batches)


@dataclass
class _Actor:
    """An actor of the pool, whose process may be replaced."""

    process: str = ""
    place: str = ""
    loaded: bool = True
    # Consecutive processes that died while loading.
    failed_loads: int = 0
    # Rows set aside since one of its processes last finished a micro-batch.
    set_aside: int = 0
    # Shards that its process computes, with the start of the current piece, if any.
    begun: dict[str, int | None] = field(default_factory=dict)
    since: float = 0.0


@dataclass
class _ShardState:
    history: History = field(default_factory=History)
    # Deaths while the shard was read or stored.
    io_deaths: int = 0


class Register:
    """The register of one stream. An actor keeps its name across restarts; each process has its
    own.

    name: of the stage, for messages.
    """

    def __init__(
        self, name: str, resources: StageResources, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name, self.resources, self.clock = name, resources, clock
        self.pace = Pace()
        self.actors: dict[str, _Actor] = {}
        self.shards: dict[str, _ShardState] = {}
        self.load_deaths = 0

    def arrive(self, actor: str, process: str, place: str, hung: bool | None) -> str:
        """Record that a process starts, before it loads. Returns why the stream must end, or an
        empty text.

        hung: whether the previous process was ended because it hung. None: unknown, and decided by
        the time that has passed.
        """
        state = self.actors.setdefault(actor, _Actor())
        if state.process == process:
            return ""  # a repeated call: no process died
        if not state.loaded:
            state.failed_loads += 1
            self.load_deaths += 1
        if hung is None:
            limit = hang_limit(self.resources, self.pace, 1)
            hung = self.clock() - state.since >= limit
        self._lose(state, hung)
        last_place = state.place
        state.process, state.place, state.loaded = process, place, False
        if state.failed_loads < _MAX_FAILED_LOADS:
            return ""
        return (
            f"stage {self.name}: its workers died {self.load_deaths} times while loading (the last"
            f" on {last_place}); check the worker's log, and that the model fits into that"
            " machine's memory"
        )

    def loaded(self, actor: str, process: str) -> None:
        state = self._current(actor, process)
        state.loaded, state.failed_loads = True, 0

    def history(self, shards: Sequence[str]) -> list[History]:
        unknown = _ShardState()
        return [self.shards.get(name, unknown).history for name in shards]

    def begin(self, actor: str, process: str, shard: str) -> Pace:
        """Record the announcement of a shard; returns the stream's pace so far."""
        self._announce(actor, process, shard, None)
        return self.pace

    def end(self, actor: str, process: str, shard: str, pace: Pace) -> None:
        state = self._current(actor, process)
        state.begun.pop(shard, None)
        state.since = self.clock()
        # A committed shard never starts again, so that its history can go.
        ended = self.shards.pop(shard, None)
        # In a shard computed by pieces, `next_piece` has reported each finished one.
        if ended is None or not ended.history.pieces:
            self._finished(state, pace)

    def next_piece(
        self,
        actor: str,
        process: str,
        shard: str,
        rows: int,
        batch_size: int,
        done: Piece | None,
        pace: Pace,
    ) -> tuple[History, Pace]:
        """As `Attendance.next_piece`; also returns the stream's pace so far."""
        state = self._shard(shard)
        if not state.history.pieces:
            starts = range(0, rows, batch_size)
            pieces = tuple(Piece(start, min(start + batch_size, rows)) for start in starts)
            state.history = replace(state.history, pieces=pieces)
        if done is not None:
            self._finished(self._current(actor, process), pace)
            self._replace(state, done, [done])
        piece = state.history.next
        self._announce(actor, process, shard, None if piece is None else piece.start)
        return state.history, self.pace

    def _announce(self, actor: str, process: str, shard: str, start: int | None) -> None:
        # Ray gives a shard to another actor only after the process that had it died.
        for name, other in self.actors.items():
            if name != actor and shard in other.begun:
                self._lose(other, hung=False)
        state = self._current(actor, process)
        state.begun[shard] = start
        state.since = self.clock()

    def _lose(self, actor: _Actor, hung: bool) -> None:
        """Record the death of an actor's process for all shards that it had begun."""
        for name, start in actor.begun.items():
            state = self._shard(name)
            history = state.history
            if start is not None:
                self._blame(actor, name, state, start, hung)
            elif history.piecewise:
                state.io_deaths += 1
                if state.io_deaths >= _MAX_IO_DEATHS:
                    self._stop(
                        state,
                        f"stage {self.name}: its workers died {state.io_deaths} times while reading"
                        f" or storing shard {name}, not on a row of it; check the worker's log",
                    )
            state.history = replace(
                state.history,
                deaths=history.deaths + (not hung),
                hangs=history.hangs + hung,
            )
        actor.begun.clear()

    def _blame(self, actor: _Actor, name: str, state: _ShardState, start: int, hung: bool) -> None:
        """Record a death on the piece at `start`: halve the piece, or set its single row aside."""
        piece = next((piece for piece in state.history.pieces if piece.start == start), None)
        if piece is None or not piece.pending:
            return
        middle = (piece.start + piece.stop) // 2
        if piece.start < middle:
            self._replace(state, piece, [Piece(start, middle), Piece(middle, piece.stop)])
            return
        blamed = replace(piece, deaths=piece.deaths + 1)
        if blamed.deaths >= _DEATHS_TO_BLAME:
            blamed = replace(blamed, reason=HUNG if hung else DIED)
            actor.set_aside += 1
        self._replace(state, piece, [blamed])
        if actor.set_aside >= _MAX_SET_ASIDE:
            self._stop(
                state,
                f"stage {self.name}: a worker died on {actor.set_aside} consecutive rows (the last"
                f" in shard {name}), so the rows are probably not the cause; check its machine"
                f" ({actor.place}) and its log",
            )

    def _finished(self, actor: _Actor, pace: Pace) -> None:
        actor.set_aside = 0
        self.pace = self.pace.slower(pace)

    def _stop(self, state: _ShardState, reason: str) -> None:
        state.history = replace(state.history, stop=reason)

    def _replace(self, state: _ShardState, old: Piece, new: Sequence[Piece]) -> None:
        """Replace the piece `old`. A restarted register may not know it; then nothing changes."""
        replaced: list[Piece] = []
        for piece in state.history.pieces:
            same = (piece.start, piece.stop) == (old.start, old.stop)
            replaced += new if same else [piece]
        state.history = replace(state.history, pieces=tuple(replaced))

    def _shard(self, name: str) -> _ShardState:
        return self.shards.setdefault(name, _ShardState())

    def _current(self, actor: str, process: str) -> _Actor:
        """The actor of a process. A restarted register adds it again."""
        state = self.actors.setdefault(actor, _Actor())
        state.process = process
        return state
