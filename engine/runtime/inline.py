"""A runtime that runs everything in this process: for tests, debugging and very small studies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from engine.core.errors import StorageError, one_line
from engine.core.shards import Shard
from engine.runtime.base import Outcome, Runtime, Trial, Try, Worker
from engine.tuning.proposals import Halving, Proposals, Rung
from engine.work.fit import FitContext
from engine.work.resources import FitResources, StageResources, TrialResources
from engine.work.share import Share, within_process


class InlineRuntime(Runtime):
    """One worker, and no other process except the decoder's sandbox.

    threads: CPU threads of a fit; None: the libraries' default. share: source of arrays that
    several fits read.
    """

    in_process = True

    def __init__(self, threads: int | None = None, share: Share = within_process) -> None:
        self.threads, self.share = threads, share

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        worker.load()
        for start in range(0, len(shards), resources.shards_per_call):
            yield from worker(shards[start : start + resources.shards_per_call])

    def fit(
        self, train: Callable[[FitContext], None], context: FitContext, resources: FitResources
    ) -> None:
        threads = self.threads or context.threads
        with _threads_restored():
            train(replace(context, threads=threads, share=self.share))

    def search(
        self,
        run: Trial,
        names: Sequence[str],
        resources: TrialResources,
        on_end: Callable[[str], None],
    ) -> None:
        # As many threads as on any runtime: sums of floats depend on the number.
        runtime = InlineRuntime(resources.threads, self.share)
        failed: Exception | None = None
        for name in names:
            try:
                run(name, runtime)
            except Exception as error:
                failed = failed or error
                continue
            on_end(name)
        if failed is not None:
            raise failed

    def tune(
        self,
        run: Try,
        proposals: Proposals,
        halving: Halving | None,
        resources: TrialResources,
        leaf: bool,
        on_end: Callable[[Outcome], None],
    ) -> None:
        values: dict[int, list[float]] = {}
        while (asked := proposals.ask()) is not None:
            number, settings = asked
            started = time.monotonic()
            reached: Rung | None = None
            error = ""
            try:
                for rung in run(settings, self):
                    reached = rung
                    before = values.setdefault(rung.steps, [])
                    promoted = halving is None or halving.goes_on(rung.value, before)
                    before.append(rung.value)
                    if not promoted:
                        break
            except StorageError:
                raise  # not the setting's fault
            except Exception as failure:
                reached, error = None, one_line(failure)
            proposals.tell(number, None if error or reached is None else reached.value)
            on_end(Outcome(number, settings, reached, error, time.monotonic() - started))


@contextmanager
def _threads_restored() -> Iterator[None]:
    """Restore the number of torch's threads, which a fit changes. Sums of floats depend on it, and
    later results must not depend on which fits ran before."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
