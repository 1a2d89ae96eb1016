"""Arrays that the processes of a search share through Ray's object store.

An object lives no longer than the process that put it there, and trials come and go. So an actor
puts the arrays into the store and keeps them. A process asks the actor for a key, and either reads
the arrays without a copy or is asked to compute them.
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

# Seconds after which a silent maker counts as dead. The first lease is shorter, because a process
# that died while waiting is still given its turn.
_LEASE, _FIRST = 30.0, 5.0


@dataclass(frozen=True)
class Answer:
    """The actor's answer to a request for arrays.

    kind: stored, read them at `reference`; make, the caller makes them under `claim`; own, the
    caller keeps its own, because the object store is too small.
    """

    kind: Literal["stored", "make", "own"]
    reference: Any = None
    claim: str = ""


@dataclass
class _Claim:
    name: str
    ends: float
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class ArrayCache:
    """The actor that keeps the arrays, and knows which process is making which.

    limit: bytes to keep; beyond it the least recently used arrays are dropped. put: stores arrays
    with this process as their owner.
    """

    def __init__(
        self, limit: int, lease: float = _LEASE, put: Callable[[Arrays], Any] = ray.put
    ) -> None:
        self.limit, self.lease, self.put = limit, lease, put
        # Reference and bytes by key, least recently used first.
        self.stored: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self.claims: dict[str, _Claim] = {}
        self.too_large: dict[str, int] = {}
        # Dropped keys, and those of them that were requested again.
        self.dropped: set[str] = set()
        self.made_again: set[str] = set()

    async def ask(self, key: str) -> Answer:
        """Request the arrays of a key. Waits while another process makes them."""
        while True:
            if key in self.stored:
                self.stored.move_to_end(key)
                return Answer("stored", reference=self.stored[key][0])
            if key in self.too_large:
                return Answer("own")
            claim = self.claims.get(key)
            left = claim.ends - time.monotonic() if claim is not None else 0.0
            if claim is None or left <= 0:
                if key in self.dropped:
                    self.made_again.add(key)
                claim = _Claim(uuid.uuid4().hex, time.monotonic() + min(_FIRST, self.lease))
                self.claims[key] = claim
                return Answer("make", claim=claim.name)
            with suppress(TimeoutError):
                await asyncio.wait_for(claim.ended.wait(), left)

    async def renew(self, key: str, claim: str) -> None:
        """The maker is alive."""
        current = self.claims.get(key)
        if current is not None and current.name == claim:
            current.ends = time.monotonic() + self.lease

    async def give_up(self, key: str, claim: str) -> None:
        """The maker failed; the next process may try."""
        current = self.claims.get(key)
        if current is not None and current.name == claim:
            self._end(key)

    async def refuse(self, key: str, size: int) -> None:
        """The object store has no room for so many bytes; every process makes its own arrays."""
        self.too_large[key] = size
        self._end(key)

    async def keep(self, key: str, array: np.ndarray, ids: list[str]) -> Answer:
        """Store arrays; answers as `ask` does."""
        if key not in self.stored:
            if array.nbytes > self.limit:
                await self.refuse(key, array.nbytes)
                return Answer("own")
            while self.stored and array.nbytes + self._size() > self.limit:
                self.dropped.add(self.stored.popitem(last=False)[0])
            self.stored[key] = self.put((array, ids)), array.nbytes
            self._end(key)
        return Answer("stored", reference=self.stored[key][0])

    async def shortage(self) -> tuple[int, int]:
        """Bytes of the largest arrays that did not fit, or 0; and the number of keys that were
        dropped and made again."""
        return max(self.too_large.values(), default=0), len(self.made_again)

    def _end(self, key: str) -> None:
        if (claim := self.claims.pop(key, None)) is not None:
            claim.ended.set()

    def _size(self) -> int:
        return sum(size for _, size in self.stored.values())


@dataclass(frozen=True)
class ObjectStoreShare:
    """`engine.work.share.Share` across processes. If Ray fails, a process makes its own arrays.

    cache: a handle of the actor `ArrayCache`. limit: bytes that one array may have.
    """

    cache: Any
    limit: int
    lease: float = _LEASE

    def __call__(self, key: str, make: Make) -> Arrays:
        # The next trial in the same process need not ask the actor.
        return within_process(key, lambda: self._find(key, make))

    def _find(self, key: str, make: Make) -> Arrays:
        try:
            # In a thread: while a task's main thread waits for Ray, Ray lends out its CPUs, and too
            # many tasks would train at once.
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(_answer, self.cache.ask.remote(key)).result()
            if answer.kind == "stored":
                return _read(answer)
        except RayError:
            return make()
        if answer.kind == "own":
            return make()
        try:
            with self._alive(key, answer.claim):
                array, ids = make()
        except BaseException:
            self.cache.give_up.remote(key, answer.claim)
            raise
        if array.nbytes > self.limit:
            self.cache.refuse.remote(key, array.nbytes)
            return array, ids
        try:
            # asarray: pickle would copy each byte of a memory-mapped file through the heap.
            reply = _answer(self.cache.keep.remote(key, np.asarray(array), ids))
            return _read(reply) if reply.kind == "stored" else (array, ids)
        except ObjectStoreFullError:
            self.cache.refuse.remote(key, array.nbytes)
        except RayError:
            self.cache.give_up.remote(key, answer.claim)
        return array, ids

    @contextmanager
    def _alive(self, key: str, claim: str) -> Iterator[None]:
        """In the block, renew the claim of this process."""
        ended = threading.Event()

        def renew() -> None:
            self.cache.renew.remote(key, claim)
            while not ended.wait(self.lease / 6):
                self.cache.renew.remote(key, claim)

        renewer = threading.Thread(target=renew, daemon=True, name="share")
        renewer.start()
        try:
            yield
        finally:
            ended.set()
            renewer.join()


def _answer(reference: Any) -> Answer:
    answer: Any = ray.get(reference)
    assert isinstance(answer, Answer)
    return answer


def _read(answer: Answer) -> Arrays:
    arrays: Arrays = ray.get(answer.reference)
    return arrays


@contextmanager
def sharing(warn: Callable[[str], None], lease: float = _LEASE) -> Iterator[ObjectStoreShare]:
    """A share for the trials that are started in the block."""
    nodes: list[dict[str, Any]] = ray.nodes()
    living = [node["Resources"] for node in nodes if node["Alive"]]
    capacity = int(min(resources.get("object_store_memory", 0.0) for resources in living))
    # Half of it, because while arrays are being stored they exist twice.
    limit = capacity // 2
    # Waiting calls must not block the call that they wait for.
    actor = ray.remote(ArrayCache).options(num_cpus=0, max_concurrency=100_000)
    cache: Any = actor.remote(limit, lease)
    try:
        yield ObjectStoreShare(cache, limit, lease)
    finally:
        # After an interrupt, Ray may be gone.
        if not interrupts.received():
            with suppress(Exception):
                _report(cache, capacity, warn)
            with suppress(Exception):
                ray.kill(cache)


def _report(cache: Any, capacity: int, warn: Callable[[str], None]) -> None:
    """Warn if the object store was too small. Also after a failed search, because this may be the
    cause."""
    size, again = ray.get(cache.shortage.remote(), timeout=5)
    if size:
        warn(
            f"warning: {size / 2**30:.1f} GiB of decoded images do not fit into Ray's object store"
            f" ({capacity / 2**30:.1f} GiB), so each trial's process kept its own copy; give Ray"
            " more object store memory, or run fewer trials at once"
        )
    elif again:
        warn(
            f"warning: Ray's object store ({capacity / 2**30:.1f} GiB) cannot keep all decoded"
            f" images, so {again} sets were decoded again; give Ray more object store memory"
        )
