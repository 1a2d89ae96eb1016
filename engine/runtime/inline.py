"""The same workers and fits in this process: for tests, debugging and very small studies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engine.core.fit import FitContext
from engine.core.resources import FitResources, StageResources
from engine.core.shards import Shard
from engine.runtime.base import Worker


class InlineRuntime:
    """One worker, no other process but the sandbox of the decoder."""

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        worker.load()
        for start in range(0, len(shards), resources.shards_per_call):
            yield from worker(shards[start : start + resources.shards_per_call])

    def fit(
        self, train: Callable[[FitContext], None], context: FitContext, resources: FitResources
    ) -> None:
        train(context)

    def close(self) -> None:
        return
