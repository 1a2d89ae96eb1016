"""Stages: transforms of batches of rows, independent of Ray and of storage.

A batch is a dict of equally long columns (lists or arrays). Each stage of a worker runs in its own
thread and passes batches on, so that decoding, the accelerator's work and encoding overlap; the
libraries involved release the GIL.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

Batch = dict[str, Any]
Device = Literal["cpu", "accelerator"]
# What is moved out of the accelerator's memory while idle: nothing, whole networks, or each layer.
Offload = Literal["none", "model", "sequential"]


class Place(NamedTuple):
    """Where a stage runs. batch_size: rows of a micro-batch; the last one of a shard may be
    smaller."""

    device: str
    threads: int
    batch_size: int
    offload: Offload = "none"


class Stage:
    """One transform. `load` runs once in each worker; then the stage is called with batch after
    batch.

    A stage returns its input columns plus `writes`, and keeps the number and order of rows. It
    never raises for a row that it cannot use: it sets a reason in the column `status`, and the
    other rows go on.
    """

    writes: tuple[str, ...]
    device: ClassVar[Device] = "cpu"

    def load(self, place: Place) -> None:
        """Prepare for the calls."""

    def __call__(self, batch: Batch) -> Batch:
        raise NotImplementedError


class _Stop:
    """Ends a queue. error: of the thread that fills it, if it failed."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def pipeline(
    stages: Sequence[Callable[[Batch], Batch]], batches: Iterable[Batch], depth: int = 2,
    ahead: int = 2,
) -> Iterator[Batch]:  # fmt: skip
    """Run `batches` through `stages` in order, one thread per stage.

    depth: batches that may wait before each stage. ahead: finished batches that may wait for the
    caller. An exception in a stage ends the pipeline and is raised here. Closing the iterator early
    ends the threads.
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

    def work(index: int, stage: Callable[[Batch], Batch]) -> None:
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
