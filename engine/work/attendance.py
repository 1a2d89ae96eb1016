"""Which process computes which rows, so that the next one knows what the last one died on.

Ray restarts a process that died and gives it the same shards again, without end and without a
memory. A register, one for each stream of shards, is that memory. A worker announces what it is
about to compute; what its predecessor had announced and not finished, its predecessor died on.

A shard that two processes died on is computed piece by piece: micro-batches first, and a piece that
kills its process is halved. A row that is alone in its piece and kills two processes is set aside
with a reason. Finished pieces are kept, so that such a row costs log2(batch size) + 2 process
starts, and its shard two more, whatever the size of the shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.work.resources import StageResources

DIED, HUNG = "process_died", "process_hung"
# Deaths on a shard, or on a row that is alone in its piece: one may be the machine's fault.
_ENOUGH = 2
# Deaths on a shard that happened while no row was computed, beyond which the stream ends.
_OUTSIDE = 5
# Rows that an actor's processes set aside in a row, with no finished micro-batch in between: then
# the rows are not the cause.
_HOPELESS = 8
# Times in a row that the process of one actor may die while it loads.
_LOADS = 5


@dataclass(frozen=True)
class Pace:
    """Seconds of the slowest micro-batch: what its stages took for it, without waiting for each
    other, for rows or for storage. 0 before any.

    first: among the first ones of processes, which include warm-up and compilation. later: among
    all others.
    """

    first: float = 0.0
    later: float = 0.0

    def slower(self, other: Pace) -> Pace:
        return Pace(max(self.first, other.first), max(self.later, other.later))


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a shard, within one micro-batch.

    deaths: processes that died on it. key: of its result, once it is computed. reason: why its one
    row is set aside.
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
    """What happened to a shard in this stream so far.

    deaths, hangs: processes that died on it by themselves, and those that were ended because they
    did not come back. pieces: in order, empty until the shard is computed piece by piece. stop: why
    the stream has to end; empty while it has not.
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
        """Whether the shard is to be computed piece by piece."""
        return self.losses >= _ENOUGH

    @property
    def next(self) -> Piece | None:
        """The first piece that is still to be computed."""
        return next((piece for piece in self.pieces if piece.pending), None)


class Attendance(Protocol):
    """A worker's side of the register. Picklable."""

    @property
    def node(self) -> str:
        """Name of the cluster's node that this process runs on; empty where there is none."""
        ...

    def history(self, shards: Sequence[str]) -> list[History]: ...

    def begin(self, shard: str) -> None:
        """Announce a whole shard; returns when the register knows."""
        ...

    def end(self, shard: str, pace: Pace) -> None:
        """The shard is committed. pace: of its micro-batches."""
        ...

    def next_piece(
        self, shard: str, rows: int, batch_size: int, done: Piece | None, pace: Pace
    ) -> History:
        """Record the result of the piece `done` (with its key), computed at `pace`, and announce
        the next one: `History.next`."""
        ...

    def watch(self, batches: int, first: bool = False) -> None:
        """End this process unless `rest` or another watch is called within the limit for so many
        micro-batches. first: the first one of this process."""
        ...

    def watch_long(self) -> None:
        """As `watch`, for what the pace does not bound: loading, and reading and storing rows."""
        ...

    def rest(self) -> None: ...


class Unattended:
    """`Attendance` of a process that nobody restarts: no register, no limit."""

    node = ""

    def history(self, shards: Sequence[str]) -> list[History]:
        return [History() for _ in shards]

    def begin(self, shard: str) -> None:
        return

    def end(self, shard: str, pace: Pace) -> None:
        return

    def next_piece(
        self, shard: str, rows: int, batch_size: int, done: Piece | None, pace: Pace
    ) -> History:
        raise AssertionError("no shard is computed piece by piece where no process died")

    def watch(self, batches: int, first: bool = False) -> None:
        return

    def watch_long(self) -> None:
        return

    def rest(self) -> None:
        return


def hang_limit(resources: StageResources, pace: Pace, batches: int, first: bool = False) -> float:
    """Seconds that so many micro-batches may take. pace: of the stream so far. first: the first
    micro-batch of a process."""
    # A process warms up again even where later micro-batches are quick, and a row that hangs is
    # in the first micro-batch of each process that is started for it: hang_first each time would
    # add up to hours.
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
    # Processes in a row that died while they loaded.
    failed_loads: int = 0
    # Rows that its processes set aside since one of them last finished a micro-batch.
    set_aside: int = 0
    # What its process is computing: shards, and the start of the piece where it computes one.
    begun: dict[str, int | None] = field(default_factory=dict)
    since: float = 0.0


@dataclass
class _ShardState:
    history: History = field(default_factory=History)
    outside: int = 0


class Register:
    """The memory of one stream. An actor is known by a name that its restarts keep, a process by
    one of its own.

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
        """A process starts, before it loads. Returns why the stream has to end, or nothing.

        hung: whether the process before it was ended for a hang; None where nothing tells, and then
        the time that has passed does.
        """
        state = self.actors.setdefault(actor, _Actor())
        if state.process == process:
            return ""  # the same call again: no other process died
        if not state.loaded:
            state.failed_loads += 1
            self.load_deaths += 1
        if hung is None:
            limit = hang_limit(self.resources, self.pace, 1)
            hung = self.clock() - state.since >= limit
        self._lose(state, hung)
        before = state.place
        state.process, state.place, state.loaded = process, place, False
        if state.failed_loads < _LOADS:
            return ""
        return (
            f"the workers of stage {self.name} died {self.load_deaths} times while loading (the"
            f" last on {before}): check that the model fits into that machine's memory, and the"
            " worker's log"
        )

    def loaded(self, actor: str, process: str) -> None:
        state = self._current(actor, process)
        state.loaded, state.failed_loads = True, 0

    def history(self, shards: Sequence[str]) -> list[History]:
        unknown = _ShardState()
        return [self.shards.get(name, unknown).history for name in shards]

    def begin(self, actor: str, process: str, shard: str) -> Pace:
        """Returns the stream's pace so far."""
        self._announce(actor, process, shard, None)
        return self.pace

    def end(self, actor: str, process: str, shard: str, pace: Pace) -> None:
        state = self._current(actor, process)
        state.begun.pop(shard, None)
        state.since = self.clock()
        # A shard that is committed is not begun again.
        ended = self.shards.pop(shard, None)
        # Each finished piece was reported, and there may have been none.
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
        """`Attendance.next_piece`, and the stream's pace so far."""
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
        # Ray gives a shard to another actor only once the process that had it is gone.
        for name, other in self.actors.items():
            if name != actor and shard in other.begun:
                self._lose(other, hung=False)
        state = self._current(actor, process)
        state.begun[shard] = start
        state.since = self.clock()

    def _lose(self, actor: _Actor, hung: bool) -> None:
        """A process died: note it with all that it had begun."""
        for name, start in actor.begun.items():
            state = self._shard(name)
            history = state.history
            if start is not None:
                self._blame(actor, name, state, start, hung)
            elif history.piecewise:
                state.outside += 1
                if state.outside >= _OUTSIDE:
                    self._stop(
                        state,
                        f"the workers of stage {self.name} died {state.outside} times while they"
                        f" read or stored the shard {name}, not on one of its rows; see the"
                        " worker's log",
                    )
            state.history = replace(
                state.history,
                deaths=history.deaths + (not hung),
                hangs=history.hangs + hung,
            )
        actor.begun.clear()

    def _blame(self, actor: _Actor, name: str, state: _ShardState, start: int, hung: bool) -> None:
        """A process died on the piece at `start`: halve it, or set its one row aside."""
        piece = next((one for one in state.history.pieces if one.start == start), None)
        if piece is None or not piece.pending:
            return
        middle = (piece.start + piece.stop) // 2
        if piece.start < middle:
            self._replace(state, piece, [Piece(start, middle), Piece(middle, piece.stop)])
            return
        blamed = replace(piece, deaths=piece.deaths + 1)
        if blamed.deaths >= _ENOUGH:
            blamed = replace(blamed, reason=HUNG if hung else DIED)
            actor.set_aside += 1
        self._replace(state, piece, [blamed])
        if actor.set_aside >= _HOPELESS:
            self._stop(
                state,
                f"a worker of stage {self.name} died on {actor.set_aside} rows in a row, the last"
                f" in the shard {name}, and finished none in between: the rows are not the cause;"
                f" check its machine ({actor.place}) and its log",
            )

    def _finished(self, actor: _Actor, pace: Pace) -> None:
        actor.set_aside = 0
        self.pace = self.pace.slower(pace)

    def _stop(self, state: _ShardState, reason: str) -> None:
        state.history = replace(state.history, stop=reason)

    def _replace(self, state: _ShardState, old: Piece, new: Sequence[Piece]) -> None:
        """Nothing happens where the register was restarted and does not know the piece `old`."""
        replaced: list[Piece] = []
        for piece in state.history.pieces:
            same = (piece.start, piece.stop) == (old.start, old.stop)
            replaced += new if same else [piece]
        state.history = replace(state.history, pieces=tuple(replaced))

    def _shard(self, name: str) -> _ShardState:
        return self.shards.setdefault(name, _ShardState())

    def _current(self, actor: str, process: str) -> _Actor:
        """The actor whose process this is; known anew where the register itself was restarted."""
        state = self.actors.setdefault(actor, _Actor())
        state.process = process
        return state
