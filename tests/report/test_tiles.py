from __future__ import annotations

import base64
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from engine.core import rows
from engine.core.manifest import Manifest, write_part
from engine.core.shards import image_column
from engine.core.store import Store
from engine.data.images import Preprocess, encode
from engine.report.generators import GeneratorFit
from engine.report.tiles import TILES, sheets, shown_classes, tile
from tests.conftest import toy_picture

CLASSES = [f"class {number:02d}" for number in range(50)]
GENERATORS = ("one", "two", "three")


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_picture_keeps_its_pixels(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, channels), dtype=np.uint8)
    url = tile(pixels, 52)
    assert url.startswith("data:image/png")
    assert np.array_equal(np.asarray(opened(url)).reshape(pixels.shape), pixels)


def test_a_large_picture_is_no_larger_than_a_fine_screen_shows() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    url = tile(pixels, 52)
    assert url.startswith("data:image/jpeg")
    assert opened(url).size == (104, 104)
    assert len(url) < 10_000
    # One that lies between is not enlarged, and the longer side is what counts.
    assert opened(tile(pixels[:80, :80], 52)).size == (80, 80)
    assert opened(tile(pixels[:50], 52)).size == (104, 23)


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


def put(store: Store, kind: str, table: pa.Table, /, **tags: str) -> Manifest:
    """The manifest of a step with one table."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=64)
    part = write_part(store, "parts", kind, "parquet", sink.getvalue(), tags=tags)
    return Manifest(
        kind=kind, key="k", label=kind, spec={}, inputs={}, rows=0, metrics={}, provenance={},
        parts=(part,),
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
    every = [(label, number) for label in CLASSES for number in range(TILES)]
    ids, labels = [f"{label} {n}" for label, n in every], [label for label, _ in every]
    ingest = put(store, "ingest", pictures(ids, labels, 224), split="train")
    counts, fits = dict.fromkeys(CLASSES, TILES), []
    for name in GENERATORS:
        table = curated_table(counts, counts, name)
        generated = pictures(table[rows.IMAGE_ID].to_pylist(), table[rows.LABEL].to_pylist(), 224)
        fits.append(
            GeneratorFit(name, 0, put(store, "curate", table, table="curated"),
                         put(store, "generate", generated, label="all"))
        )  # fmt: skip
    found = sheets(store, ingest.keys(split="train"), fits, "class", 52, GENERATORS)
    urls = []
    for of_class in found.classes:
        # Real ones once, whatever the number of generators.
        assert [maker.generator for maker in of_class.makers] == list(GENERATORS)
        urls += of_class.real
        for maker in of_class.makers:
            assert maker.kept
            assert all(maker.synthetic for maker in of_class.makers)
            urls += [*maker.kept, *(dropped.image for dropped in maker.dropped)]
    assert all(url.startswith("data:image/jpeg") for url in urls)
    assert sum(map(len, urls)) < 11_000_000  # of 15 MB that a page may have
    assert len(found.classes) == 30
    assert found.left_out == 20


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
