from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from engine.work.stage import Batch, Place, Stage, pipeline


class Add(Stage):
    writes = ("x",)

    def __init__(self, number: int) -> None:
        self.number = number

    def load(self, place: Place) -> None:
        self.place = place

    def __call__(self, batch: Batch) -> Batch:
        return {**batch, "x": [value + self.number for value in batch["x"]]}


class FailOn(Add):
    def __call__(self, batch: Batch) -> Batch:
        if self.number in batch["x"]:
            raise ValueError("bad row")
        return batch


class Meet(Add):
    """Waits until its partner works on another batch, which is possible only if stages overlap."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __call__(self, batch: Batch) -> Batch:
        if batch["x"][0] in (1, 2):
            self.barrier.wait(timeout=30)
        return batch


class Last(Meet):
    def __call__(self, batch: Batch) -> Batch:
        if batch["x"][0] in (0, 1):
            self.barrier.wait(timeout=30)
        return batch


def numbers(count: int) -> list[Batch]:
    return [{"x": [number]} for number in range(count)]


def values(batches: Iterator[Batch]) -> list[Any]:
    return [batch["x"][0] for batch in batches]


def pipeline_threads() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name in ("feed", "Add", "FailOn", "Meet", "Last")
    ]


def test_batches_pass_all_stages_in_order() -> None:
    assert values(pipeline([Add(1), Add(10)], numbers(50))) == list(range(11, 61))
    assert not pipeline_threads()


def test_empty_stages_and_batches_work() -> None:
    assert values(pipeline([], numbers(3))) == [0, 1, 2]
    assert values(pipeline([Add(1)], [])) == []


def test_stages_run_concurrently() -> None:
    barrier = threading.Barrier(2)
    # Batch n+1 is in the first stage while batch n is in the second, or the barrier breaks.
    assert values(pipeline([Meet(barrier), Last(barrier)], numbers(4))) == [0, 1, 2, 3]


def test_stage_error_is_raised_after_earlier_results() -> None:
    batches = pipeline([Add(0), FailOn(5), Add(0)], numbers(1000))
    assert [next(batches)["x"][0] for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="bad row"):
        next(batches)
    assert not pipeline_threads()


def test_source_error_is_raised() -> None:
    def source() -> Iterator[Batch]:
        yield {"x": [1]}
        raise OSError("storage is gone")

    with pytest.raises(OSError, match="storage is gone"):
        values(pipeline([Add(1)], source()))


def test_leaving_early_ends_the_threads_and_stops_reading() -> None:
    read = []

    def source() -> Iterator[Batch]:
        for batch in numbers(10_000):
            read.append(batch)
            yield batch

    batches = pipeline([Add(1), Add(1)], source(), depth=2)
    assert next(batches)["x"] == [2]
    batches.close()  # type: ignore[attr-defined]
    assert not pipeline_threads()
    assert len(read) < 20
