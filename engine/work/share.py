"""Arrays that many fits read, computed once by the first fit that asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np

# Images, or values computed from them, (n, …), and their ids. Shared arrays are read-only.
Arrays = tuple[np.ndarray, list[str]]
Make = Callable[[], Arrays]


class Share(Protocol):
    """Picklable. Returns the arrays of a key, which the first caller makes.

    key: digest of everything that the arrays are a function of. An error in `make` is raised, and
    the next caller makes them.
    """

    def __call__(self, key: str, make: Make) -> Arrays: ...


@dataclass(frozen=True)
class _Request:
    key: str
    make: Make = field(compare=False)


@lru_cache(maxsize=6)
def _cached(request: _Request) -> Arrays:
    array, ids = request.make()
    # As arrays shared between processes are.
    array.flags.writeable = False
    return array, ids


def within_process(key: str, make: Make) -> Arrays:
    """`Share` for the fits of this process, which run one after the other. Keeps the arrays of the
    last six keys."""
    return _cached(_Request(key, make))
