"""The runtime inside a trial that starts streams and fits of its own on Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from engine.core import interrupts
from engine.core.errors import EngineError, StorageError, one_line
from engine.core.shards import Shard
from engine.runtime import scratch
from engine.runtime.attendance import start_registers
from engine.runtime.base import Runtime, Trial, Worker
from engine.runtime.errors import find_engine_error
from engine.runtime.fit import fit
from engine.runtime.inline import InlineRuntime
from engine.runtime.stream import stream
from engine.work.fit import FitContext
from engine.work.resources import FitResources, StageResources, TrialResources
from engine.work.share import Share

# Resources that such a trial reserves. It reserves no CPU: on a small machine two trials with CPUs
# could wait for each other for ever. Ray needs some resource to place a trial by, and every node
# has this much memory.
DRIVER = {"memory": 1e6}


class Nested(Runtime):
    """The Ray that runs this process, which neither connects nor disconnects. A trial starts no
    tuning of its own.

    threads: CPU threads of each worker of a fit; None: as many as its CPUs.
    """

    def __init__(self, share: Share, threads: int | None = None) -> None:
        self.share, self.threads = share, threads
        self._registers: Any = None

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        if self._registers is None:
            self._registers = start_registers()
        summaries = stream(worker, shards, resources, self._registers)
        yield from interrupts.iterate_off_main_thread(summaries)

    def fit(
        self, train: Callable[[FitContext], None], context: FitContext, resources: FitResources
    ) -> None:
        shared = replace(context, share=self.share, threads=self.threads)
        with scratch.folder(Path(tempfile.gettempdir())) as folder:
            fit(train, shared, resources, str(folder))

    def search(
        self,
        run: Trial,
        names: Sequence[str],
        resources: TrialResources,
        on_end: Callable[[str], None],
    ) -> None:
        failed: EngineError | None = None
        for name, result in self._start_trials(run, names, resources):
            try:
                result()
            except Exception as error:
                # The others continue: their results are there for the next attempt.
                own = find_engine_error(error) or EngineError(f"{name} failed: {one_line(error)}")
                # A storage error comes first, because it is not the setting's fault.
                if failed is None or isinstance(own, StorageError):
                    failed = own
            on_end(name)
        if failed is not None:
            raise failed from None

    def _start_trials(
        self, run: Trial, names: Sequence[str], resources: TrialResources
    ) -> Iterator[tuple[str, Callable[[], object]]]:
        """Each trial's name, with a function that waits for its result. Ray Tune does not support a
        search within a trial, so these are Ray tasks or calls."""
        if resources.workers > 1:
            # One after the other: `drivers` assumes that each trial has the workers of one fit.
            nested = Nested(self.share, resources.threads)
            yield from ((name, partial(run, name, nested)) for name in names)
            return
        share = self.share

        def trial(name: str) -> None:
            run(name, InlineRuntime(resources.threads, share))

        task = ray.remote(trial).options(
            num_cpus=resources.cpus, num_gpus=resources.gpus,
            # By default a task is placed within its parent's resources, which have no CPU.
            scheduling_strategy="DEFAULT", max_retries=resources.max_failures,
        )  # fmt: skip
        running = {task.remote(name): name for name in names}
        while running:
            (ended, *_), _ = ray.wait(list(running))
            yield running.pop(ended), partial(ray.get, ended)
