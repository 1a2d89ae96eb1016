from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.context import Context
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.resources import FitResources, StageResources
from engine.core.step import Step
from engine.core.store import Store
from engine.runtime.inline import InlineRuntime
from engine.steps.select import Select, SelectSpec
from engine.study import Study


def selected(store: Store, clusters: pa.Table, per_cluster: int) -> pa.Table:
    """Run the real step on a hand-written table of clusters."""
    step = Step("select", "select", SelectSpec(task="class", per_cluster=per_cluster), {})
    context = Context(
        step=step, inputs={}, store=store, runtime=InlineRuntime(), device="cpu",
        stage_resources=lambda name: StageResources(), fit_resources=FitResources(),
    )  # fmt: skip
    part = context.table("clusters", clusters, table="clusters")
    context.inputs = {
        "cluster": Manifest(
            kind="cluster", key="0", label="cluster", spec={}, inputs={}, parts=(part,),
            rows=clusters.num_rows, metrics={}, provenance={},
        )
    }  # fmt: skip
    result = Select().run(context)
    tables: Iterator[pa.Table] = store.tables([entry.key for entry in result.parts])
    found = pa.concat_tables(tables)
    assert result.rows == found.num_rows
    return found


def clusters(entries: list[tuple[str, str, int, float]]) -> pa.Table:
    ids, labels, numbers, distances = zip(*entries, strict=True)
    return pa.table(
        [list(ids), list(labels), pa.array(numbers, pa.int32()), pa.array(distances, pa.float32())],
        names=[rows.IMAGE_ID, "label.class", rows.CLUSTER, rows.DISTANCE],
    )


ENTRIES = [
    ("d", "a", 0, 0.5),
    ("c", "a", 0, 0.1),
    ("b", "a", 0, 0.5),
    ("e", "a", 1, 0.9),
    ("f", "b", 0, 0.3),
    ("g", "b", 0, 0.2),
]


def test_the_nearest_of_each_cluster_of_each_class_are_chosen_and_ties_fall_by_id(
    store: Store,
) -> None:
    found = selected(store, clusters(ENTRIES), 2).to_pylist()
    assert [(row[rows.IMAGE_ID], row[rows.RANK]) for row in found] == [
        ("c", 0), ("b", 1), ("e", 0), ("g", 0), ("f", 1)
    ]  # fmt: skip


def test_the_choice_does_not_depend_on_the_order_of_rows(store: Store) -> None:
    assert selected(store, clusters(ENTRIES[::-1]), 2).equals(selected(store, clusters(ENTRIES), 2))


@pytest.mark.parametrize(("per_cluster", "count"), [(1, 3), (2, 5), (3, 6), (100, 6)])
def test_a_small_cluster_gives_what_it_has(store: Store, per_cluster: int, count: int) -> None:
    assert selected(store, clusters(ENTRIES), per_cluster).num_rows == count


def test_representatives_of_a_real_study_are_training_images(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Any, store: Store
) -> None:
    study = toy_study(image_folder({"a": 20, "b": 20}), cluster={"k": 2}, select={"per_cluster": 1})
    manifest = run_until(study, "select")
    found = pa.concat_tables(store.tables(manifest.keys(table="representatives")))
    assert found.num_rows == 4
    assert set(found[rows.RANK].to_pylist()) == {0}
    train = pa.concat_tables(store.tables(run_until(study, "ingest").keys(split="train")))
    assert set(found[rows.IMAGE_ID].to_pylist()) <= set(train[rows.IMAGE_ID].to_pylist())
