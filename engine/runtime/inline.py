"""The same workers and fits in this process: for tests, debugging and very small studies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from engine.core.fit import FitContext
from engine.core.resources import FitResources, StageResources, TrialResources
from engine.core.shards import Shard
from engine.runtime.base import Trial, Worker


class InlineRuntime:
    """One worker, no other process but the sandbox of the decoder.

    threads: of a fit; None: as many as its libraries take.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        worker.load()
        for start in range(0, len(shards), resources.shards_per_call):
            yield from worker(shards[start : start + resources.shards_per_call])

    def fit(
        self, train: Callable[[FitContext], None], context: FitContext, resources: FitResources
    ) -> None:
        train(replace(context, threads=self.threads) if self.threads else context)

    def search(
        self,
        run: Trial,
        names: Sequence[str],
        resources: TrialResources,
        on_end: Callable[[str], None],
    ) -> None:
        # As many threads as elsewhere: sums of floats depend on it.
        alone = InlineRuntime(resources.threads)
        for name in names:
            run(name, alone)
            on_end(name)

    def close(self) -> None:
        return
