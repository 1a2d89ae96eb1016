from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.core import rows
from engine.core.store import Store
from engine.data.arrays import Stack, grouped_vectors, sampled_images
from engine.data.images import Preprocess, encode


def test_stack_returns_rows_in_the_requested_order():
    arrays = [
        np.arange(6).reshape(3, 2),
        np.empty((0, 2), dtype=int),
        np.arange(10, 14).reshape(2, 2),
    ]
    stack, whole = Stack(arrays), np.concatenate(arrays)
    wanted = np.array([4, 0, 0, 2, 3])
    assert np.array_equal(stack[wanted], whole[wanted])
    assert stack[wanted].dtype == arrays[0].dtype


def test_vectors_are_gathered_by_group(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    random = np.random.default_rng(0)
    vectors = {f"i{number}": random.normal(size=3).astype(np.float32) for number in range(9)}
    keys = []
    for part in range(3):
        ids = [f"i{number}" for number in range(part, 9, 3)]
        table = pa.table(
            {
                rows.IMAGE_ID: ids,
                rows.EMBEDDING: rows.fixed_lists(np.stack([vectors[name] for name in ids])),
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        keys.append(f"part-{part}.parquet")
        store.put(keys[-1], sink.getvalue().to_pybytes())
    group_of = {"i0": "even", "i2": "even", "i4": "even", "i1": "odd", "absent": "odd"}
    found = grouped_vectors(store, keys, group_of)
    assert {name: sorted(ids) for name, (ids, _) in found.items()} == {
        "even": ["i0", "i2", "i4"], "odd": ["i1"],
    }  # fmt: skip
    for ids, held in found.values():
        assert np.array_equal(held, np.stack([vectors[name] for name in ids]))


def test_sample_of_images_is_not_the_first_ones(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    spec = Preprocess(size=8, channels="L")
    pictures = [
        {"bytes": encode(np.full((8, 8, 1), number, np.uint8), spec), "path": f"{number}.png"}
        for number in range(60)
    ]
    sink = pa.BufferOutputStream()
    table = {
        rows.IMAGE_ID: [f"i{number:02d}" for number in range(60)],
        rows.label_column("class"): ["a"] * 40 + ["b"] * 20,
        rows.IMAGE: pa.array(pictures),
    }
    pq.write_table(pa.table(table), sink, row_group_size=7)
    store.put("part.parquet", sink.getvalue().to_pybytes())
    sample = sampled_images(store, ["part.parquet"], "class", 8)
    numbers = {label: [int(image[0, 0, 0]) for image in sample[label]] for label in sample}
    assert len(set(numbers["a"])) == len(set(numbers["b"])) == 8
    assert max(numbers["a"]) < 40 <= min(numbers["b"])
    assert max(numbers["a"]) > 20
    again = sampled_images(store, ["part.parquet"], "class", 8)
    assert all(np.array_equal(a, b) for a, b in zip(sample["a"], again["a"], strict=True))
