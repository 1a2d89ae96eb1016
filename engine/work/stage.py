"""Stages: transforms of row batches, without knowledge of Ray or of storage.

A batch is a dict of equally long columns (lists or arrays). Stages of one worker run in a thread
each and hand batches on, so that decoding, the accelerator's work and encoding overlap; the
libraries that do the work release the GIL.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

Batch = dict[str, Any]
Device = Literal["cpu", "accelerator"]
# What leaves the accelerator's memory while it is not computed with: nothing, whole networks, or
# each layer.
Offload = Literal["none", "model", "sequential"]


class Place(NamedTuple):
    """Where a stage runs. batch_size: the planned rows of a micro-batch; the last one of a shard
    may be smaller."""

    device: str
    threads: int
    batch_size: int
    offload: Offload = "none"


@runtime_checkable
class Stage(Protocol):
    """One transform. `load` runs once in each worker, then the stage is called with batch after
    batch.

    A stage reads the columns `reads`, returns all columns that it was given plus `writes`, and
    keeps the number and order of rows. A row that it cannot use gets a reason in the column
    `status` instead of an exception, so that one bad row costs no other.
    """

    @property
    def reads(self) -> tuple[str, ...]: ...

    @property
    def writes(self) -> tuple[str, ...]: ...

    @property
    def device(self) -> Device: ...

    def load(self, place: Place) -> None: ...

    def __call__(self, batch: Batch) -> Batch: ...


class _Stop:
    """Ends a queue; carries the error of the thread before, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def pipeline(
    stages: Sequence[Stage], batches: Iterable[Batch], depth: int = 2, ahead: int = 2
) -> Iterator[Batch]:
    """Run `batches` through `stages` in order, one thread per stage: at most `depth` batches wait
    before each, and `ahead` finished ones for whoever iterates.

    An exception in a stage ends the pipeline and is raised here; leaving the iterator early ends
    its threads.
    """
    depths = [depth] * len(stages) + [ahead]
    queues: list[queue.Queue[Batch | _Stop]] = [queue.Queue(size) for size in depths]
    abandoned = threading.Event()

    def put(target: queue.Queue[Batch | _Stop], item: Batch | _Stop) -> bool:
        while not abandoned.is_set():
            try:
                target.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def feed() -> None:
        try:
            for batch in batches:
                if not put(queues[0], batch):
                    return
            put(queues[0], _Stop())
        except BaseException as error:
            put(queues[0], _Stop(error))

    def work(index: int, stage: Stage) -> None:
        while not abandoned.is_set():
            try:
                item = queues[index].get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(item, _Stop):
                put(queues[index + 1], item)
                return
            try:
                result = stage(item)
            except BaseException as error:
                put(queues[index + 1], _Stop(error))
                return
            if not put(queues[index + 1], result):
                return

    threads = [threading.Thread(target=feed, daemon=True, name="feed")]
    threads += [
        threading.Thread(target=work, args=(index, stage), daemon=True, name=type(stage).__name__)
        for index, stage in enumerate(stages)
    ]
    for thread in threads:
        thread.start()
    try:
        while True:
            item = queues[-1].get()
            if isinstance(item, _Stop):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        abandoned.set()
        for thread in threads:
            thread.join()
