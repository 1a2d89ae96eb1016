"""Pictures of curation on a page: how many, and how many bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.core import rows
from engine.core.manifest import Manifest, write_part
from engine.core.shards import image_column
from engine.core.store import Store
from engine.data.images import Preprocess, encode
from engine.report.sections.curation import (
    FIRST_CLASSES,
    FIRST_TILES,
    TILES,
    first_screen,
    labels_seen,
    sheets,
    shown_classes,
)
from tests.conftest import toy_picture
from tests.results import curated, labeler_report

CLASSES = [f"class {number:02d}" for number in range(50)]
GENERATORS = ("one", "two", "three")


def curated_table(kept: dict[str, int], dropped: dict[str, int], name: str = "") -> pa.Table:
    held = [(label, number, good) for of, good in ((kept, True), (dropped, False))
            for label, count in of.items() for number in range(count)]  # fmt: skip
    labels = [label for label, _, _ in held]
    return pa.table(
        {
            rows.IMAGE_ID: [f"{name} {label} {number} {good}" for label, number, good in held],
            rows.LABEL: labels, rows.LABEL_INTENDED: labels, rows.LABEL_SEEN: labels,
            rows.KEPT: [good for _, _, good in held],
            rows.REASON: ["" if good else "copies" for _, _, good in held],
        }
    )  # fmt: skip


@dataclass
class Page:
    """What the pictures of a page are read from."""

    store: Store
    inputs: dict[str, Manifest]

    def put(self, name: str, held: pa.Table, **tags: str) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(held, sink, row_group_size=64)
        file = f"{name}-{tags}".replace(" ", "")
        part = write_part(self.store, "parts", file, "parquet", sink.getvalue(), tags=tags)
        self.inputs[name] = Manifest(
            kind=name.split(".")[0], key="k", label=name, spec={}, inputs={}, rows=0, metrics={},
            provenance={}, parts=(*(self.inputs[name].parts if name in self.inputs else ()), part),
        )  # fmt: skip


def pictures(ids: list[str], labels: list[str], size: int) -> pa.Table:
    data = encode(np.asarray(toy_picture(1, size)), Preprocess(size=size, codec="jpeg"))
    return pa.table(
        {
            rows.IMAGE_ID: ids, rows.IMAGE: image_column([data] * len(ids), ids, ".jpg"),
            rows.label_column("class"): labels,
        }
    )  # fmt: skip


def test_a_page_of_many_classes_and_generators_stays_small(store: Store) -> None:
    page = Page(store, {})
    every = [(label, number) for label in CLASSES for number in range(TILES)]
    ids, labels = [f"{label} {n}" for label, n in every], [label for label, _ in every]
    page.put("ingest", pictures(ids, labels, 224), split="train")
    counts = dict.fromkeys(CLASSES, TILES)
    for name in GENERATORS:
        table = curated_table(counts, counts, name)
        page.put(f"curate.{name}", table, table="curated")
        made = pictures(table[rows.IMAGE_ID].to_pylist(), table[rows.LABEL].to_pylist(), 224)
        page.put(f"generate.{name}", made, label="all")
    found = sheets(page, GENERATORS, "class", 52, GENERATORS)  # type: ignore[arg-type]
    urls = []
    for one in found["classes"]:
        # Real ones once, whatever the number of generators.
        assert [maker["generator"] for maker in one["makers"]] == list(GENERATORS)
        urls += one["real"]
        for maker in one["makers"]:
            assert maker["kept"]
            urls += [*maker["kept"], *(url for url, _ in maker["dropped"])]
    assert sum(map(len, urls)) < 11_000_000  # of 15 MB that a page may have
    assert len(found["classes"]) == 30
    assert found["left_out"] == 20


def test_of_many_classes_those_are_shown_of_which_most_was_dropped() -> None:
    kept = dict.fromkeys(CLASSES, 2)
    one = curated_table(kept, {"class 40": 3, "class 41": 1})
    two = curated_table(kept, {"class 49": 5})
    shown, left_out = shown_classes({"one": one, "two": two})
    assert shown == [*CLASSES[:27], "class 40", "class 41", "class 49"]
    assert left_out == 20
    # With more generators there are fewer classes; of few classes all are there.
    assert len(shown_classes(dict.fromkeys(map(str, range(9)), one))[0]) == 10
    assert shown_classes({"one": curated_table({"b": 1}, {"a": 1})}) == (["a", "b"], 0)


def test_what_the_labeler_sees_of_many_classes_is_told_by_its_pairs() -> None:
    matrix = np.eye(50, dtype=int) * 9
    matrix[3, 7] = 3
    many = labels_seen(
        {"g": curated(labeler=labeler_report(confusion=matrix.tolist())), "t": curated()}, CLASSES
    )
    assert list(many) == ["g"]
    assert many["g"]["cells"] == []
    (pair,) = many["g"]["pairs"]
    assert (pair["true"], pair["predicted"], pair["count"]) == ("class 03", "class 07", 3)
    few = {"g": curated(labeler=labeler_report(confusion=[[3, 1], [0, 2]]))}
    assert len(labels_seen(few, ["a", "b"])["g"]["cells"]) == 2


def test_the_top_of_the_page_has_classes_with_both_kinds_of_images() -> None:
    def of_class(label: str, kept: int, synthetic: bool = True) -> dict[str, object]:
        maker = {"generator": "g", "synthetic": synthetic, "kept": ["k"] * kept, "dropped": []}
        return {"label": label, "real": ["r"] * 8, "makers": [maker]}

    classes = [of_class("none", 0), of_class("moved", 8, synthetic=False)]
    classes += [of_class(str(number), 8) for number in range(9)]
    rows = first_screen({"classes": classes})
    assert [row["label"] for row in rows] == ["0", "1", "2"][:FIRST_CLASSES]
    assert {len(row["real"]) for row in rows} == {FIRST_TILES}
    assert [maker["kept"] for maker in rows[0]["makers"]] == [["k"] * FIRST_TILES]
