"""What a runtime is: somewhere to stream shards and to fit models. It receives callables and knows
no step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from engine.core.fit import FitContext
from engine.core.resources import FitResources, StageResources, TrialResources
from engine.core.shards import Shard


class Worker(Protocol):
    """Picklable; `load` runs once in each actor, then it is called with a few shards at a time."""

    def load(self) -> None: ...

    def __call__(self, tasks: Sequence[Shard]) -> Iterator[dict[str, Any]]: ...


class Trial(Protocol):
    """Picklable; computes the trial of a name on the runtime of its own process, returns
    figures."""

    def __call__(self, name: str, runtime: Runtime) -> dict[str, float]: ...


class Runtime(Protocol):
    """`stream`, `fit` and `search` start what they need; making a runtime costs nothing."""

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
        process dies is tried again."""
        ...

    def close(self) -> None: ...
