"""Vectors that stay in the store: partial sums by workers, draws in given proportions, selected
rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.context import Context
from engine.core import rows
from engine.core.shards import Shard
from engine.core.step import make_step
from engine.core.store import Store
from engine.metrics.diversity import Directions
from engine.metrics.moments import Moments
from engine.runtime.base import Runtime, Worker
from engine.runtime.cluster import RayRuntime
from engine.runtime.inline import InlineRuntime
from engine.stages.vectors import Embedded, SampledVectors, SetSums, Sums, draw, quotas, room
from engine.steps.fidelity import Fidelity
from engine.work.resources import FitResources, StageResources


def embed_parts(
    store: Store, name: str, vectors: Mapping[str, np.ndarray], per_part: int = 50
) -> Embedded:
    """Vectors of each class, in parts with mixed classes."""
    label_of = {f"{name}-{label}-{number}": label
                for label, held in vectors.items() for number in range(len(held))}  # fmt: skip
    ids = np.asarray(list(label_of), dtype=object)
    whole = np.concatenate(list(vectors.values())).astype(np.float32)
    order = np.random.default_rng(5).permutation(len(ids))
    keys = []
    for start in range(0, len(order), per_part):
        here = order[start : start + per_part]
        table = pa.table(
            {rows.IMAGE_ID: ids[here].tolist(), rows.EMBEDDING: rows.fixed_lists(whole[here])}
        )
        sink = pa.BufferOutputStream()
        # Several row groups in a part: rows are numbered from the start of the part.
        pq.write_table(table, sink, row_group_size=20)
        keys.append(f"{name}/{start}.parquet")
        store.put(keys[-1], memoryview(sink.getvalue()))
    return Embedded.of(store, keys, label_of)


class Counting(InlineRuntime):
    """The runtime of this process, which records what it streams."""

    def __init__(self) -> None:
        super().__init__()
        self.streamed: list[str] = []

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        self.streamed += [shard.name for shard in shards]
        return super().stream(worker, shards, resources)


def context_of(store: Store, runtime: Runtime, **stage: Any) -> Context:
    step = make_step("fidelity", {
        "embedder": {"name": "pixels"}, "sample": 100, "k": 5, "task": "class", "seed": 0,
    })  # fmt: skip
    return Context(
        step=step, inputs={}, store=store, runtime=runtime,
        stage_resources=lambda _: StageResources(**stage), fit_resources=FitResources(),
        device="cpu",
    )  # fmt: skip


@pytest.fixture
def held() -> dict[str, np.ndarray]:
    # Far from zero, where uncentred sums of squares would lose precision.
    random = np.random.default_rng(0)
    return {
        "a": random.standard_normal((230, 6)) + 300,
        "b": random.standard_normal((170, 6)) + 290,
    }


def same_as_at_once(found: Sums, vectors: np.ndarray) -> None:
    moments, directions = Moments.of(vectors), Directions.of(vectors)
    assert (found.moments.n, found.directions.n) == (len(vectors), len(vectors))
    for one, other in (
        (found.moments.mean, moments.mean), (found.moments.scatter, moments.scatter),
        (found.directions.products, directions.products),
    ):  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9 * np.abs(other).max())
    assert found.directions.vendi == pytest.approx(directions.vendi, rel=1e-9)


def check_workers(store: Store, context: Context, held: Mapping[str, np.ndarray]) -> None:
    side = embed_parts(store, "made", held)
    chosen = {
        "0-kept-200": (side, draw(side.labels, {"a": 0.5, "b": 0.5}, 200, 3)),
        "1-kept-90": (side, draw(side.labels, {"b": 1.0}, 90, 3)),
    }
    whole = SetSums(context, chosen, few=0, piece=64)
    for name, (_, taken) in chosen.items():
        vectors = SampledVectors(store, side, [taken]).of(taken)
        same_as_at_once(whole.of(name), vectors)
    scratch = store.join(context.prefix, *Fidelity.scratch)
    parquet = [key for key in store.listing(context.prefix) if key.endswith(".parquet")]
    # Removed when the step is done.
    assert parquet
    assert all(key.startswith(f"{scratch}/") for key in parquet)


def test_worker_sums_equal_one_pass(store: Store, held: dict[str, np.ndarray]) -> None:
    runtime = Counting()
    check_workers(store, context_of(store, runtime, batch_size=2), held)
    assert runtime.streamed == [
        "0-kept-200-0000", "0-kept-200-0001", "0-kept-200-0002", "0-kept-200-0003",
        "1-kept-90-0000", "1-kept-90-0001",
    ]  # fmt: skip


@pytest.mark.ray
def test_actor_sums_equal_one_pass(store: Store, held: dict[str, np.ndarray]) -> None:
    runtime = RayRuntime("local", 2, warn=print)
    check_workers(store, context_of(store, runtime, actors=2, cpus=0.5), held)
    runtime.close()


def test_small_sets_are_summed_in_the_driver(store: Store, held: dict[str, np.ndarray]) -> None:
    runtime = Counting()
    side = embed_parts(store, "made", held)
    taken = draw(side.labels, {"a": 0.5, "b": 0.5}, 200, 3)
    whole = SetSums(context_of(store, runtime), {"x": (side, taken)}, piece=64)
    same_as_at_once(whole.of("x"), SampledVectors(store, side, [taken]).of(taken))
    assert runtime.streamed == []


def test_restart_sums_only_what_is_missing(store: Store, held: dict[str, np.ndarray]) -> None:
    side = embed_parts(store, "made", held)
    chosen = {"x": (side, np.arange(len(side)))}
    SetSums(context_of(store, InlineRuntime()), chosen, few=0, piece=100)
    again = Counting()
    found = SetSums(context_of(store, again), chosen, few=0, piece=100)
    assert again.streamed == []
    same_as_at_once(found.of("x"), SampledVectors(store, side, [np.arange(len(side))]).vectors)
    other = {"x": (side, np.arange(len(side) - 1))}
    SetSums(context_of(store, again), other, few=0, piece=100)
    assert len(again.streamed) == 4  # nothing is reused for other images


def test_rows_are_read_with_their_labels_in_any_order(
    store: Store, held: dict[str, np.ndarray]
) -> None:
    side = embed_parts(store, "made", held)
    assert side.counts == {"a": 230, "b": 170}
    of_b = np.flatnonzero(side.labels == "b")
    some = SampledVectors(store, side, [of_b[:30], of_b[10:60]])
    assert len(some.vectors) == 60
    np.testing.assert_array_equal(some.of(of_b[[59, 0]]), some.vectors[[59, 0]])
    known = {tuple(vector) for vector in held["b"].astype(np.float32).tolist()}
    assert all(tuple(vector) in known for vector in some.vectors.tolist())
    assert Embedded.of(store, [], {}).counts == {}


@pytest.mark.parametrize("n", [1, 7, 20, 100])
def test_mix_of_many_classes_has_the_requested_number_of_images(n: int) -> None:
    shares = {"a": 0.5, "b": 0.31, **{f"c{number}": 0.01 for number in range(19)}}
    found = quotas(shares, n)
    assert sum(found.values()) == n
    assert all(abs(found[label] - n * share) < 1 for label, share in shares.items())
    labels = np.asarray([name for name in shares for _ in range(100)], dtype=object)
    drawn = draw(labels, shares, n, 0)
    assert len(set(drawn.tolist())) == n
    assert {name: found[name] for name in set(labels[drawn])} == {
        name: count for name, count in found.items() if count
    }
    assert room({"a": 30, "b": 40}, {"a": 0.5, "b": 0.5}) == 60
    assert room({"a": 30}, {"a": 0.5, "b": 0.5}) == 0
