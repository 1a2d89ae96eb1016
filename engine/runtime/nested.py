"""Ray as a trial sees it that starts streams and fits of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import ray

from engine.core.errors import EngineError, StorageError, one_line
from engine.runtime.base import Trial
from engine.runtime.cluster import RayRuntime, ray_error_text
from engine.runtime.inline import InlineRuntime
from engine.work.fit import FitContext
from engine.work.resources import FitResources, TrialResources
from engine.work.share import Share

# What such a trial holds: none of the CPUs, for two that did would wait for each other on a small
# cluster. Ray needs a resource to place a trial by, and every node has so many bytes.
DRIVER = {"memory": 1e6}


class Nested(RayRuntime):
    """Connected already, not its to leave.

    threads: of each worker of a fit; None: as many as it has CPUs.
    """

    def __init__(self, share: Share, threads: int | None = None) -> None:
        super().__init__("auto", None, warn=lambda text: None)
        self._connected = True
        self.share, self.threads = share, threads

    def fit(
        self, train: Callable[[FitContext], None], context: FitContext, resources: FitResources
    ) -> None:
        given = replace(context, share=self.share, threads=self.threads)
        super().fit(train, given, resources)

    def search(
        self,
        run: Trial,
        names: Sequence[str],
        resources: TrialResources,
        on_end: Callable[[str], None],
    ) -> None:
        failed: EngineError | None = None
        for name, result in self._started(run, names, resources):
            try:
                result()
            except Exception as error:
                # The others go on: what they compute is there for the next attempt.
                told = EngineError(f"{name} failed: {one_line(error)}")
                own = ray_error_text(error) or told
                # Storage that fails is no fault of a setting, whatever else fails beside it.
                if failed is None or isinstance(own, StorageError):
                    failed = own
            on_end(name)
        if failed is not None:
            raise failed from None

    def _started(
        self, run: Trial, names: Sequence[str], resources: TrialResources
    ) -> Iterator[tuple[str, Callable[[], object]]]:
        """Trials by name, and what waits for each. Tune within a trial of Tune is none of its
        uses."""
        if resources.workers > 1:
            # One after the other: there are as many trials as this one as may have workers.
            nested = Nested(self.share, resources.threads)
            yield from ((name, partial(run, name, nested)) for name in names)
            return
        share = self.share

        def trial(name: str) -> None:
            run(name, InlineRuntime(resources.threads, share))

        task = ray.remote(trial).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus,
            # Else a task is placed in what its parent holds, which has no CPU.
            scheduling_strategy="DEFAULT", max_retries=resources.max_failures,
        )  # fmt: skip
        running = {task.remote(name): name for name in names}
        while running:
            (ended, *_), _ = ray.wait(list(running))
            yield running.pop(ended), partial(ray.get, ended)

    def close(self) -> None:
        return
