"""Arrays shared by the fits of one process."""

from __future__ import annotations

import uuid

import numpy as np
import pytest

from engine.work.share import Arrays, within_process


class Maker:
    """Makes arrays and counts how often. fails: number of calls that fail first."""

    def __init__(self, fails: int = 0) -> None:
        self.fails, self.made = fails, 0

    def __call__(self) -> Arrays:
        if self.fails:
            self.fails -= 1
            raise OSError("torn")
        self.made += 1
        return np.full((2, 3), self.made), ["a", "b"]


def test_arrays_are_computed_once_per_key() -> None:
    make, key, other = Maker(), uuid.uuid4().hex, uuid.uuid4().hex
    first = within_process(key, make)
    assert within_process(key, make) is first
    assert within_process(other, make)[0][0, 0] == 2
    assert make.made == 2


def test_failed_computation_is_repeated_by_the_next_request() -> None:
    make, key = Maker(fails=1), uuid.uuid4().hex
    with pytest.raises(OSError, match="torn"):
        within_process(key, make)
    assert within_process(key, make)[1] == ["a", "b"]
    assert make.made == 1


def test_least_recently_used_array_is_evicted_first() -> None:
    make, keys = Maker(), [uuid.uuid4().hex for _ in range(7)]
    for key in keys:
        within_process(key, make)
    within_process(keys[-1], make)
    assert make.made == 7
    within_process(keys[0], make)
    assert make.made == 8
