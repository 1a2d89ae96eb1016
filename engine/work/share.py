"""Arrays that many fits read: made once, whoever asks first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np

# Images, or what was computed of each, (n, …), and their ids. Nobody writes into a shared array.
Arrays = tuple[np.ndarray, list[str]]
Make = Callable[[], Arrays]


class Share(Protocol):
    """Picklable; finds the arrays of a key, or makes them.

    key: digest of what they are a function of. An error of `make` is raised, and whoever asks next
    makes them.
    """

    def __call__(self, key: str, make: Make) -> Arrays: ...


@dataclass(frozen=True)
class _Wanted:
    key: str
    make: Make = field(compare=False)


@lru_cache(maxsize=6)
def _found(wanted: _Wanted) -> Arrays:
    array, ids = wanted.make()
    # As those are that processes share.
    array.flags.writeable = False
    return array, ids


def within_process(key: str, make: Make) -> Arrays:
    """`Share` for the fits of this process, one after the other; the last six keys are held."""
    return _found(_Wanted(key, make))
