from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.context import Context, Output
from engine.core import rows
from engine.core.manifest import Manifest, Part
from engine.core.step import Step, Subject
from engine.core.store import Store
from engine.data.images import Preprocess, encode
from engine.runtime.inline import InlineRuntime
from engine.settings import Select as SelectSettings
from engine.steps.select import Select, SelectSpec
from engine.study import Study
from engine.work.resources import FitResources, StageResources


def run_select(
    store: Store, clusters: pa.Table, per_cluster: int = 3, *, seed: int = 0,
    vectors: dict[str, list[float]] | None = None, **fields: Any,
) -> Output:  # fmt: skip
    """Run the real step on a hand-written table of clusters, and of vectors by id."""
    settings = SelectSettings(per_cluster=per_cluster, **fields)
    step = Step("select", Subject(), SelectSpec(task="class", settings=settings, seed=seed), {})
    context = Context(
        step=step, inputs={}, store=store, runtime=InlineRuntime(), device="cpu",
        stage_resources=lambda name: StageResources(), fit_resources=FitResources(),
    )  # fmt: skip
    part = context.table("clusters", clusters, table="clusters")
    embedded = context.table(
        "embeddings",
        pa.table(
            {
                rows.IMAGE_ID: list(vectors or {"": []}),
                rows.EMBEDDING: rows.fixed_lists(np.asarray(list((vectors or {"": [0]}).values()))),
            }
        ),
        split="train",
    )

    ids = clusters[rows.IMAGE_ID].to_pylist()
    pixels = encode(np.full((8, 8, 1), 90, np.uint8), Preprocess(size=8, channels="L"))
    images = context.table(
        "images",
        pa.table(
            {
                rows.IMAGE_ID: ids,
                rows.IMAGE: pa.array([{"bytes": pixels, "path": ""}] * len(ids), rows.IMAGE_TYPE),
                rows.URI: [f"=of/{image_id}.png" for image_id in ids],
            }
        ),
        split="train",
    )

    def manifest(kind: str, part: Part) -> Manifest:
        return Manifest(
            kind=kind, key="0", label=kind, spec={}, inputs={}, parts=(part,), rows=part.rows,
            metrics={}, provenance={},
        )  # fmt: skip

    context.inputs = {
        "ingest": manifest("ingest", images), "cluster": manifest("cluster", part),
        "embed": manifest("embed", embedded),
    }  # fmt: skip
    return Select().run(context)


def selected(store: Store, clusters: pa.Table, per_cluster: int = 3, **more: Any) -> pa.Table:
    result = run_select(store, clusters, per_cluster, **more)
    tables: Iterator[pa.Table] = store.tables(
        [entry.key for entry in result.parts if "table" in entry.tags]
    )
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


def test_nearest_of_each_cluster_are_chosen_and_ties_fall_by_id(
    store: Store,
) -> None:
    found = selected(store, clusters(ENTRIES), 2).to_pylist()
    assert [(row[rows.IMAGE_ID], row[rows.RANK]) for row in found] == [
        ("c", 0), ("b", 1), ("e", 0), ("g", 0), ("f", 1)
    ]  # fmt: skip


def test_choice_does_not_depend_on_the_order_of_rows(store: Store) -> None:
    assert selected(store, clusters(ENTRIES[::-1]), 2).equals(selected(store, clusters(ENTRIES), 2))


@pytest.mark.parametrize(("per_cluster", "count"), [(1, 3), (2, 5), (3, 6), (100, 6)])
def test_small_cluster_gives_all_its_images(store: Store, per_cluster: int, count: int) -> None:
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


LINE = {"a": [0.0], "b": [1.0], "c": [1.1], "d": [1.2], "e": [1.4], "f": [9.0]}


def on_a_line(**fields: Any) -> dict[str, Any]:
    """One cluster whose images lie on a line, nearest to its centroid first."""
    order = ["c", "b", "d", "e", "a", "f"]
    table = clusters([(name, "x", 0, 0.1 * place) for place, name in enumerate(order)])
    return {"clusters": table, "vectors": LINE, **fields}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (("nearest",), ["b", "c", "d"]),
        (("spread",), ["a", "c", "f"]),
        (("density",), ["b", "c", "d"]),
        (("nearest", "spread"), ["b", "c", "f"]),
    ],
)
def test_each_method_chooses_its_own(
    store: Store, method: tuple[str, ...], expected: list[str]
) -> None:
    found = selected(store, **on_a_line(method=method)).to_pylist()
    assert sorted(row[rows.IMAGE_ID] for row in found) == expected
    assert {row[rows.METHOD] for row in found} == set(method)


def test_random_choice_depends_on_the_seed(store: Store) -> None:
    found = [
        selected(store, **on_a_line(method=("random",), seed=seed))[rows.IMAGE_ID].to_pylist()
        for seed in (1, 1, 2, 3)
    ]
    assert found[0] == found[1]
    assert len({tuple(chosen) for chosen in found}) > 1


def test_agreeing_methods_choose_no_image_twice(store: Store) -> None:
    found = selected(
        store, **on_a_line(method=("nearest", "density", "spread", "random"), per_cluster=6)
    )
    assert sorted(found[rows.IMAGE_ID].to_pylist()) == list("abcdef")


def test_places_of_a_class_go_to_its_clusters_by_size(store: Store) -> None:
    entries = [(f"{label}{number}{row}", label, number, 0.1 * row)
               for label, number, size in (("a", 0, 8), ("a", 1, 4), ("a", 2, 1), ("b", 0, 2))
               for row in range(size)]  # fmt: skip
    found = selected(store, clusters(entries), per_class=7)
    cells = list(zip(found["label.class"].to_pylist(), found["cluster"].to_pylist(), strict=True))
    counts = {cell: cells.count(cell) for cell in dict.fromkeys(cells)}
    assert counts == {("a", 0): 4, ("a", 1): 2, ("a", 2): 1, ("b", 0): 2}


def test_list_and_image_sheet_are_written(store: Store) -> None:
    result = run_select(store, clusters(ENTRIES), 2)
    of_kind = {part.tags["file"]: part.key for part in result.parts if "file" in part.tags}
    with io.StringIO(store.read(of_kind["list.csv"]).decode(), newline="") as text:
        listed = list(csv.DictReader(text))
    found = selected(store, clusters(ENTRIES), 2)
    assert [entry["image_id"] for entry in listed] == found[rows.IMAGE_ID].to_pylist()
    assert [int(entry["rank"]) for entry in listed] == found[rows.RANK].to_pylist()
    # File names are not evaluated by spreadsheets.
    assert {entry["uri"] for entry in listed} == {
        f"'=of/{entry['image_id']}.png" for entry in listed
    }
    sheet = np.asarray(Image.open(io.BytesIO(store.read(of_kind["sheet.png"]))).convert("L"))
    tiles = len(listed)
    assert (sheet == 90).sum() == pytest.approx(tiles * 48 * 48, rel=0.02)
