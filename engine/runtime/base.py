"""The interface of a runtime, which streams shards, fits models and runs trials. It receives
callables and knows no step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from engine.core.shards import Shard
from engine.tuning.proposals import Halving, Proposals, Rung, Settings
from engine.work.attendance import Attendance
from engine.work.fit import FitContext
from engine.work.resources import FitResources, StageResources, TrialResources


class Worker(Protocol):
    """Picklable. `load` runs once in each actor; then the worker is called with a few shards at a
    time and yields a summary of each.

    name: of the stage. attendance: set by a runtime that restarts dead processes.
    """

    name: str
    attendance: Attendance

    def load(self) -> None: ...

    def __call__(self, tasks: Sequence[Shard]) -> Iterator[dict[str, Any]]: ...


class Trial(Protocol):
    """Picklable. Computes the named trial on the runtime of its own process; returns metrics."""

    def __call__(self, name: str, runtime: Runtime) -> dict[str, float]: ...


class Try(Protocol):
    """Picklable. Computes the value of a setting, rung after rung, on the given runtime."""

    def __call__(self, settings: Settings, runtime: Runtime) -> Iterator[Rung]: ...


@dataclass(frozen=True)
class Outcome:
    """The result of trying a setting. reached: the last rung, None if the setting failed. error:
    the reason of a failure in one line, else empty."""

    number: int
    settings: Settings
    reached: Rung | None
    error: str
    seconds: float


class Runtime:
    """`stream`, `fit`, `search` and `tune` start what they need; constructing a runtime is free."""

    # Whether all work runs in this process, one piece after the other.
    in_process: ClassVar[bool] = False

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        """Compute all shards, in any order; yields the summary of each committed shard."""
        raise NotImplementedError

    def fit(
        self, train: Callable[[FitContext], None], context: FitContext, resources: FitResources
    ) -> None:
        """Run `train` on every worker. A worker that dies is replaced and continues from the last
        checkpoint."""
        raise NotImplementedError

    def search(
        self,
        run: Trial,
        names: Sequence[str],
        resources: TrialResources,
        on_end: Callable[[str], None],
    ) -> None:
        """Run a trial for each name, several at once; calls `on_end` with the name of each that
        ends. A trial whose process dies is retried. If one fails, the others still run, and then
        the first error is raised."""
        raise NotImplementedError

    def tune(
        self,
        run: Try,
        proposals: Proposals,
        halving: Halving | None,
        resources: TrialResources,
        leaf: bool,
        on_end: Callable[[Outcome], None],
    ) -> None:
        """Try settings until none is proposed; calls `on_end` with the outcome of each. A setting
        that fails does not affect the others. A `StorageError` ends the run; on Ray only after the
        setting has used all of its attempts.

        leaf: a setting needs only small fits, computed in the trial's process; otherwise it starts
        streams and fits of its own.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release what was started."""
