"""What a runtime is: somewhere to stream shards and to fit models. It receives callables and knows
no step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from engine.core.fit import FitContext
from engine.core.resources import FitResources, StageResources
from engine.core.shards import Shard


class Worker(Protocol):
    """Picklable; `load` runs once in each actor, then it is called with a few shards at a time."""

    def load(self) -> None: ...

    def __call__(self, tasks: Sequence[Shard]) -> Iterator[dict[str, Any]]: ...


class Runtime(Protocol):
    """`stream` and `fit` start what they need; making a runtime costs nothing."""

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

    def close(self) -> None: ...
