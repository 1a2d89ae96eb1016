"""Arrays shared by many processes: who makes them, who waits, and when they are dropped."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray

from engine.core.errors import DataError, EngineError
from engine.core.store import Store
from engine.runtime.base import Runtime
from engine.runtime.cluster import RayRuntime
from engine.runtime.share import ArrayCache, sharing
from engine.work.fit import FitContext
from engine.work.resources import FitResources, TrialResources
from engine.work.share import Arrays, Share

FOUR = np.zeros(4, np.uint8)


def array_cache(limit: int = 100, lease: float = 9.0) -> ArrayCache:
    return ArrayCache(limit, lease, put=lambda arrays: arrays)


def test_one_process_computes_and_the_others_wait() -> None:
    async def run() -> None:
        cache = array_cache()
        first = await cache.ask("k")
        assert first.kind == "make"
        waiting = [asyncio.create_task(cache.ask("k")) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert not any(one.done() for one in waiting)
        # Another key does not wait.
        assert (await cache.ask("other")).kind == "make"
        await cache.keep("k", FOUR, ["a"])
        for answer in await asyncio.gather(*waiting):
            assert answer.kind == "stored"
            assert answer.reference == (FOUR, ["a"])
        assert (await cache.ask("k")).kind == "stored"

    asyncio.run(run())


@pytest.mark.parametrize("gives_up", [True, False], ids=["fails", "dies"])
def test_another_process_replaces_a_dead_one(gives_up: bool) -> None:
    async def run() -> None:
        cache = array_cache(lease=9.0 if gives_up else 0.1)
        first = await cache.ask("k")
        waiting = [asyncio.create_task(cache.ask("k")) for _ in range(2)]
        await asyncio.sleep(0.01)
        if gives_up:
            await cache.give_up("k", first.claim)
        done, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=5)
        (second,) = [one.result() for one in done]
        assert second.kind == "make"
        # The first may no longer report on it.
        await cache.give_up("k", first.claim)
        assert cache.claims["k"].name == second.claim
        await cache.keep("k", FOUR, [])
        assert [(await one).kind for one in others] == ["stored"]

    asyncio.run(run())


def test_process_that_reports_keeps_its_place() -> None:
    async def run() -> None:
        cache = array_cache(lease=0.2)
        first = await cache.ask("k")
        waiting = asyncio.create_task(cache.ask("k"))
        for _ in range(8):
            await asyncio.sleep(0.05)
            await cache.renew("k", first.claim)
        assert not waiting.done()
        await cache.keep("k", FOUR, [])
        assert (await waiting).kind == "stored"

    asyncio.run(run())


def test_oversized_arrays_are_evicted_or_private() -> None:
    async def run() -> None:
        cache = array_cache(limit=8)
        for key in ("a", "b"):
            await cache.keep(key, FOUR, [])
        await cache.ask("a")
        await cache.keep("c", FOUR, [])
        assert list(cache.stored) == ["a", "c"]
        assert await cache.shortage() == (0, 0)
        assert (await cache.ask("large")).kind == "make"
        waiting = asyncio.create_task(cache.ask("large"))
        await asyncio.sleep(0.01)
        assert (await cache.keep("large", np.zeros(9, np.uint8), [])).kind == "own"
        assert (await waiting).kind == "own"
        assert await cache.shortage() == (9, 0)
        assert list(cache.stored) == ["a", "c"]
        assert (await cache.ask("b")).kind == "make"
        assert await cache.shortage() == (9, 1)

    asyncio.run(run())


@pytest.fixture(scope="module")
def started() -> Iterator[RayRuntime]:
    ray_runtime = RayRuntime("local", 2, warn=print)
    yield ray_runtime
    ray_runtime.close()


@dataclass(frozen=True)
class Decoding:
    """A fit that needs a large array, and records who made it and what each process saw of it.

    fails, dies: whether the first maker raises, or ends its process.
    """

    store: Store
    name: str
    fails: bool = False
    dies: bool = False
    # Gives the other process time to ask as well.
    waits: bool = False

    def __call__(self, context: FitContext) -> None:
        self.store.put(f"begun/{os.getpid()}", b"")
        array, ids = context.share("key", self.make)
        assert ids == ["a", "b"]
        assert array[-1, -1] == 2_999_999
        seen = f"{os.getpid()} {array.flags.writeable}"
        self.store.put(f"seen/{self.name}", seen.encode())

    def make(self) -> Arrays:
        first = not self.store.exists("torn")
        self.store.put("torn", b"")
        if first and self.dies:
            os._exit(1)
        if first and self.fails:
            raise DataError(f"{self.name}: torn")
        ends = time.monotonic() + 60
        while self.waits and len(self.store.listing("begun")) < 2 and time.monotonic() < ends:
            time.sleep(0.05)
        self.store.put(f"made/{uuid.uuid4().hex}", b"")
        return np.arange(3_000_000, dtype=np.int64).reshape(-1, 3), ["a", "b"]


@dataclass(frozen=True)
class Fits:
    """A trial of one fit."""

    store: Store
    fails: bool = False
    waits: bool = False

    def __call__(self, name: str, runtime: Runtime) -> dict[str, float]:
        context = FitContext(self.store, f"work/{name}", "weights", name, "inputs")
        fit = Decoding(self.store, name, self.fails, waits=self.waits)
        runtime.fit(fit, context, FitResources())
        return {}


def seen(store: Store) -> list[list[str]]:
    """Process, and whether it could write into the array, of each fit."""
    return [store.read(key).decode().split() for key in store.listing("seen")]


@pytest.mark.ray
@pytest.mark.slow
def test_array_of_two_search_processes_is_computed_once(
    started: RayRuntime, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    names = ["one", "two", "three", "four"]
    started.search(Fits(store, waits=True), names, TrialResources(cpus=1), print)
    assert len(store.listing("made")) == 1
    processes, writeable = zip(*seen(store), strict=True)
    assert len(processes) == 4
    assert len(set(processes)) == 2
    assert set(writeable) == {"False"}


@pytest.mark.ray
@pytest.mark.slow
def test_failed_computation_is_taken_over(started: RayRuntime, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(EngineError, match=r"torn$"):
        started.search(Fits(store, fails=True), ["one", "two"], TrialResources(cpus=1), print)
    assert len(store.listing("made")) == len(store.listing("seen")) == 1


def fit_alone(fit: Decoding, share: Share) -> None:
    fit(FitContext(fit.store, "work", "weights", fit.name, "inputs", share=share))


@pytest.mark.ray
@pytest.mark.slow
def test_array_outlives_its_process_and_a_fatal_one_is_taken_over(
    started: RayRuntime, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    started._connect()
    with sharing(print, lease=1.0) as share:
        # A process ends with its task.
        task = ray.remote(num_cpus=1, max_calls=1, max_retries=1)(fit_alone)
        makers = [Decoding(store, name, dies=True) for name in ("one", "two")]
        ray.get([task.remote(one, share) for one in makers])
        ray.get(task.remote(Decoding(store, "late"), share))
    assert len(store.listing("made")) == 1
    assert len({process for process, _ in seen(store)}) == 3


@pytest.mark.ray
@pytest.mark.slow
def test_small_object_store_gives_private_arrays_and_a_warning(
    started: RayRuntime, tmp_path: Path
) -> None:
    store, lines = Store(str(tmp_path)), list[str]()
    started._connect()
    with sharing(lines.append) as share:
        small = replace(share, limit=1000)
        task = ray.remote(num_cpus=1, max_calls=1)(fit_alone)
        ray.get([task.remote(Decoding(store, name), small) for name in ("one", "two")])
    assert len(store.listing("made")) == 2
    assert len({process for process, _ in seen(store)}) == 2
    (line,) = lines
    assert line.startswith("warning: 0.0 GiB of decoded images do not fit into")
