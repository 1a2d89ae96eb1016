"""What a runtime is: somewhere to stream shards and to fit models. It receives callables and knows
no step."""

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
    """Picklable; `load` runs once in each actor, then it is called with a few shards at a time.

    name: of the stage. attendance: given by a runtime that replaces processes that died.
    """

    name: str
    attendance: Attendance

    def load(self) -> None: ...

    def __call__(self, tasks: Sequence[Shard]) -> Iterator[dict[str, Any]]: ...


class Trial(Protocol):
    """Picklable; computes the trial of a name on the runtime of its own process, returns
    figures."""

    def __call__(self, name: str, runtime: Runtime) -> dict[str, float]: ...


class Try(Protocol):
    """Picklable; computes what a setting reaches, rung after rung, on the runtime that it is
    given."""

    def __call__(self, settings: Settings, runtime: Runtime) -> Iterator[Rung]: ...


@dataclass(frozen=True)
class Outcome:
    """What became of a setting. reached: None where nothing was. error: why it failed, in a
    line."""

    number: int
    settings: Settings
    reached: Rung | None
    error: str
    seconds: float


class Runtime(Protocol):
    """`stream`, `fit`, `search` and `tune` start what they need; making a runtime costs nothing."""

    # Whether all is done in this process, one thing after the other.
    alone: ClassVar[bool]

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        """Compute all shards, in any order; yields the summary of each that was committed."""
        ...

    def fit(
        self, train: Callable[[FitContext], None], context: FitContext, resources: FitResources
    ) -> None:
        """Run `train` on every worker; a worker that dies is replaced and goes on from the last
        checkpoint."""
        ...

    def search(
        self,
        run: Trial,
        names: Sequence[str],
        resources: TrialResources,
        on_end: Callable[[str], None],
    ) -> None:
        """Run a trial for each name, several at once; `on_end` is told as each ends. One whose
        process dies is tried again. Where one fails the others are run all the same, and then the
        first error is raised."""
        ...

    def tune(
        self,
        run: Try,
        proposals: Proposals,
        halving: Halving | None,
        resources: TrialResources,
        leaf: bool,
        on_end: Callable[[Outcome], None],
    ) -> None:
        """Try settings until none is proposed; `on_end` is told what became of each. One that
        fails ends none of the others; storage that fails ends the run by its `StorageError`, on
        Ray once a setting has had all of its attempts.

        leaf: a setting needs small fits alone, computed where it is tried; else it starts streams
        and fits of its own.
        """
        ...

    def close(self) -> None: ...
