"""Arrays that the processes of a search share through Ray's object store.

An object of Ray's lives no longer than the process that put it there, and trials come and go. So an
actor holds the arrays and puts them there itself: a process asks it for a key, and either reads
what is held, without a copy, or is the one to make it.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import ObjectStoreFullError, RayError

from engine.core import interrupts
from engine.work.share import Arrays, Make, within_process

# Seconds after which a maker that has not been heard of counts as dead; the first time sooner, for
# one that died while it waited is given its turn all the same.
_LEASE, _FIRST = 30.0, 5.0


@dataclass(frozen=True)
class Answer:
    """held: where the arrays are. make: the asker is to make them, and `claim` names its claim.
    own: it keeps its own, for the store is too small for them."""

    kind: Literal["held", "make", "own"]
    held: Any = None
    claim: str = ""


@dataclass
class _Claim:
    name: str
    ends: float
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class ArrayHolder:
    """The actor: which arrays there are, and who is making which.

    most: bytes to hold, beyond which those go that were asked for longest ago. put: into the object
    store, in the name of this process.
    """

    def __init__(
        self, most: int, lease: float = _LEASE, put: Callable[[Arrays], Any] = ray.put
    ) -> None:
        self.most, self.lease, self.put = most, lease, put
        self.held: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self.claims: dict[str, _Claim] = {}
        self.too_large: dict[str, int] = {}
        # Keys that had to go, and those of them that were asked for again.
        self.gone: set[str] = set()
        self.made_again: set[str] = set()

    async def ask(self, key: str) -> Answer:
        """Waits while another process makes the arrays."""
        while True:
            if key in self.held:
                self.held.move_to_end(key)
                return Answer("held", held=self.held[key][0])
            if key in self.too_large:
                return Answer("own")
            claim = self.claims.get(key)
            left = claim.ends - time.monotonic() if claim is not None else 0.0
            if claim is None or left <= 0:
                if key in self.gone:
                    self.made_again.add(key)
                made = _Claim(uuid.uuid4().hex, time.monotonic() + min(_FIRST, self.lease))
                self.claims[key] = made
                return Answer("make", claim=made.name)
            with suppress(TimeoutError):
                await asyncio.wait_for(claim.ended.wait(), left)

    async def renew(self, key: str, claim: str) -> None:
        """The maker lives."""
        found = self.claims.get(key)
        if found is not None and found.name == claim:
            found.ends = time.monotonic() + self.lease

    async def give_up(self, key: str, claim: str) -> None:
        """The maker could not make them: the next may try."""
        found = self.claims.get(key)
        if found is not None and found.name == claim:
            self._end(key)

    async def refuse(self, key: str, size: int) -> None:
        """The store has no room for so many bytes: let everyone make their own."""
        self.too_large[key] = size
        self._end(key)

    async def keep(self, key: str, array: np.ndarray, ids: list[str]) -> Answer:
        """Hold what was made; answers as `ask` does."""
        if key not in self.held:
            if array.nbytes > self.most:
                await self.refuse(key, array.nbytes)
                return Answer("own")
            while self.held and array.nbytes + self._size() > self.most:
                self.gone.add(self.held.popitem(last=False)[0])
            self.held[key] = self.put((array, ids)), array.nbytes
            self._end(key)
        return Answer("held", held=self.held[key][0])

    async def lacked(self) -> tuple[int, int]:
        """Bytes of the largest arrays that it had no room for, or 0; and how many had to go and
        were made again."""
        return max(self.too_large.values(), default=0), len(self.made_again)

    def _end(self, key: str) -> None:
        if (claim := self.claims.pop(key, None)) is not None:
            claim.ended.set()

    def _size(self) -> int:
        return sum(size for _, size in self.held.values())


@dataclass(frozen=True)
class ObjectStoreShare:
    """`engine.work.share.Share` for all processes that have it. Where Ray fails it, a process makes
    its own arrays."""

    holder: Any
    most: int
    lease: float = _LEASE

    def __call__(self, key: str, make: Make) -> Arrays:
        # A trial after this one in the same process need not even ask.
        return within_process(key, lambda: self._find(key, make))

    def _find(self, key: str, make: Make) -> Arrays:
        try:
            # Of a task whose main thread waits for Ray, Ray lends the CPUs to others, and more
            # would train at once than there is room for.
            with ThreadPoolExecutor(1) as aside:
                answer: Answer = aside.submit(ray.get, self.holder.ask.remote(key)).result()
            if answer.kind == "held":
                return _read(answer)
        except RayError:
            return make()
        if answer.kind == "own":
            return make()
        try:
            with self._alive(key, answer.claim):
                array, ids = make()
        except BaseException:
            self.holder.give_up.remote(key, answer.claim)
            raise
        if array.nbytes > self.most:
            self.holder.refuse.remote(key, array.nbytes)
            return array, ids
        try:
            # Of a mapped file, pickle would copy each byte through the heap.
            kept = ray.get(self.holder.keep.remote(key, np.asarray(array), ids))
            return _read(kept) if kept.kind == "held" else (array, ids)
        except ObjectStoreFullError:
            self.holder.refuse.remote(key, array.nbytes)
        except RayError:
            self.holder.give_up.remote(key, answer.claim)
        return array, ids

    @contextmanager
    def _alive(self, key: str, claim: str) -> Iterator[None]:
        """Meanwhile, tell the holder that this process is at work."""
        ended = threading.Event()

        def tell() -> None:
            self.holder.renew.remote(key, claim)
            while not ended.wait(self.lease / 6):
                self.holder.renew.remote(key, claim)

        teller = threading.Thread(target=tell, daemon=True, name="share")
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()


def _read(answer: Answer) -> Arrays:
    found: Arrays = ray.get(answer.held)
    return found


@contextmanager
def sharing(warn: Callable[[str], None], lease: float = _LEASE) -> Iterator[ObjectStoreShare]:
    """A share for the trials that are started meanwhile."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = int(min(node.get("object_store_memory", 0.0) for node in nodes))
    # Half of it: while arrays are kept, they lie there twice.
    most = there // 2
    # Those that wait must not keep out the one that they wait for.
    actor = ray.remote(ArrayHolder).options(num_cpus=0, max_concurrency=100_000)
    holder = actor.remote(most, lease)
    try:
        yield ObjectStoreShare(holder, most, lease)
    finally:
        # An interrupted search has no Ray to ask.
        if not interrupts.received():
            with suppress(Exception):
                _report(holder, there, warn)
            with suppress(Exception):
                ray.kill(holder)


def _report(holder: Any, there: int, warn: Callable[[str], None]) -> None:
    """Warn of an object store that was too small; of a search that fails too, for this may be
    why."""
    size, again = ray.get(holder.lacked.remote(), timeout=5)
    if size:
        warn(
            f"warning: {size / 2**30:.1f} GiB of decoded images are too many for Ray's"
            f" object store ({there / 2**30:.1f} GiB), so that each trial's process held"
            " its own; give Ray more object store memory, or let fewer trials run at once"
        )
    elif again:
        warn(
            f"warning: Ray's object store ({there / 2**30:.1f} GiB) has no room for all"
            f" decoded images, so that {again} of the sets were decoded again; give Ray"
            " more object store memory"
        )
