from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.data.images import Rejected
from engine.readers.parquet import Parquet, ParquetSpec, refuse_large_groups
from engine.study import Study
from tests.readers.pictures import png

MNIST = Path("../shared/data/mnist")
FEATURES = {
    "image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]},
}  # fmt: skip


def write(
    path: Path, labels: list[Any], *, first: int = 0, features: Any = FEATURES,
    row_group_size: int = 3, **columns: Any,
) -> Path:  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + len(labels))
    images = [{"bytes": png(number), "path": f"{number}.png"} for number in numbers]
    table = pa.table(
        {"image": pa.array(images, rows.IMAGE_TYPE), "label": pa.array(labels), **columns}
    )
    if features:
        held = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        table = table.replace_schema_metadata(held)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def read(root: Path, **fields: Any) -> list[dict[str, Any]]:
    reader = Parquet(ParquetSpec(root=str(root), **fields))
    found = reader.records()
    assert found.schema == rows.records_schema(reader.tasks())
    return list(found.to_pylist())


def test_class_numbers_have_names_and_files_have_splits(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.parquet", [0, 1, 0, 1])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [1, -1], first=10)
    found = read(tmp_path)
    assert [(row["label.class"], row[rows.SPLIT]) for row in found] == [
        ("dog", "test"), (None, "test"), ("cat", "train"), ("dog", "train"), ("cat", "train"),
        ("dog", "train"),
    ]  # fmt: skip
    assert len({row[rows.IMAGE_ID] for row in found}) == 6


def test_each_row_gives_its_bytes_in_any_order_and_process(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [0] * 8)
    write(tmp_path / "b.parquet", [1] * 5, first=8)
    reader = Parquet(ParquetSpec(root=str(tmp_path)))
    places = [row[rows.URI] for row in reader.records().to_pylist()]
    source = reader.bytes()
    for number in (0, 7, 3, 12, 1, 8):
        assert source.read(places[number]) == png(number)
    assert pickle.loads(pickle.dumps(source)).read(places[4]) == png(4)


@pytest.mark.parametrize(
    "uri", ["a.parquet#99", "a.parquet#x", "a.parquet", "b.parquet#0", "../a#0"]
)
def test_missing_row_is_rejected_and_costs_no_other(tmp_path: Path, uri: str) -> None:
    write(tmp_path / "a.parquet", [0, 1])
    source = Parquet(ParquetSpec(root=str(tmp_path))).bytes()
    with pytest.raises(Rejected):
        source.read(uri)
    assert source.read("a.parquet#1") == png(1)


def test_row_without_bytes_is_set_aside(tmp_path: Path) -> None:
    images = pa.array([{"bytes": None, "path": "/etc/passwd"}, None], rows.IMAGE_TYPE)
    pq.write_table(pa.table({"image": images, "label": ["a", "b"]}), tmp_path / "a.parquet")
    source = Parquet(ParquetSpec(root=str(tmp_path))).bytes()
    for row in (0, 1):
        with pytest.raises(Rejected, match="holds no bytes"):
            source.read(f"a.parquet#{row}")


def test_columns_may_have_any_name_and_contain_lists(tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet", ["x", "y"], features=None, key=["k1", "k2"], patient=["p", None],
        part=["VALID", ""], signs=pa.array([["a", "b"], None]),
    )  # fmt: skip
    found = read(
        tmp_path, labels={"kind": "label", "signs": "signs"}, multi=["signs"], group="patient",
        split="part", id="key",
    )  # fmt: skip
    assert found == [
        {"image_id": "k1", "uri": "a.parquet#0", "label.kind": "x", "label.signs": ["a", "b"],
         "split": "val", "group_id": "p"},
        {"image_id": "k2", "uri": "a.parquet#1", "label.kind": "y", "label.signs": None,
         "split": None, "group_id": None},
    ]  # fmt: skip


def test_nan_is_a_missing_value_and_whole_numbers_have_no_decimals(tmp_path: Path) -> None:
    nan = float("nan")
    write(
        tmp_path / "data.parquet", [0.0, 1.0, nan, 1.0], features=None,
        patient=pa.array([7.0, nan, 8.0, 8.5]),
    )  # fmt: skip
    found = read(tmp_path, group="patient")
    assert [row["label.class"] for row in found] == ["0", "1", None, "1"]
    assert [row[rows.GROUP_ID] for row in found] == ["7", None, "8", "8.5"]


def test_files_can_be_selected(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [0, 1])
    write(tmp_path / "extra.parquet", [0, 1], first=5)
    with pytest.raises(DataError, match=r"train-0\.parquet names a split, but extra"):
        read(tmp_path)
    assert len(read(tmp_path, files="train-*")) == 2
    with pytest.raises(DataError, match=r"no Parquet file .* matches 'val"):
        read(tmp_path, files="val-*")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"image": "picture"}, r"reader\.image: .* no column 'picture'; it has image, label"),
        ({"labels": {"class": "kind"}}, r"reader\.labels\.class: .* no column 'kind'"),
        ({"group": "patient"}, r"reader\.group"),
        ({"split": "label"}, "is not a split"),
        ({"multi": ["class"]}, "contains no lists; remove the task 'class'"),
    ],
)
def test_missing_columns_are_named(tmp_path: Path, fields: Any, match: str) -> None:
    write(tmp_path / "a.parquet", [0, 1])
    with pytest.raises(DataError, match=match):
        read(tmp_path, **fields)


def test_invalid_files_and_class_numbers_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"a\.parquet is not a readable Parquet file"):
        read(tmp_path)
    write(tmp_path / "a.parquet", [0, 7])
    with pytest.raises(DataError, match="column 'label' contains 7, but class numbers end at 1"):
        read(tmp_path)


def test_fingerprint_follows_images_and_labels(tmp_path: Path) -> None:
    def fingerprint() -> dict[str, str]:
        return dict(Parquet(ParquetSpec(root=str(tmp_path))).fingerprint())

    write(tmp_path / "a.parquet", [0, 1, 0])
    before = fingerprint()
    assert fingerprint() == before
    write(tmp_path / "a.parquet", [0, 1, 1])
    relabelled = fingerprint()
    write(tmp_path / "a.parquet", [0, 1, 0], first=7)
    assert len({before["files"], relabelled["files"], fingerprint()["files"]}) == 3


def test_study_reads_images_from_parquet(
    tmp_path: Path, toy_study: Callable[..., Study], run_until: Callable[..., Manifest],
    store: Store,
) -> None:  # fmt: skip
    write(tmp_path / "in" / "a.parquet", [0, 1] * 10)
    reader = {"name": "parquet", "root": str(tmp_path / "in")}
    manifest = run_until(toy_study(reader), "ingest")
    table = pa.concat_tables(store.tables(manifest.keys(split="train")))
    assert sum(sum(held.values()) for held in manifest.metrics["counts"].values()) == 20
    assert set(table["label.class"].to_pylist()) == {"cat", "dog"}
    assert set(table[rows.WIDTH].to_pylist()) == {24}


def test_parquet_is_read_from_s3(tmp_path: Path, s3_endpoint: str) -> None:
    import boto3

    write(tmp_path / "a.parquet", [0, 1] * 4)
    boto3.client("s3").upload_file(str(tmp_path / "a.parquet"), "bucket", "in/train-0.parquet")
    reader = Parquet(ParquetSpec(root="s3://bucket/in"))
    records = reader.records()
    assert records[rows.SPLIT].to_pylist() == ["train"] * 8
    assert reader.bytes().read(records[rows.URI][5].as_py()) == png(5)


@pytest.mark.skipif(not MNIST.is_dir(), reason="../shared/data/mnist is not here")
def test_70_000_digits_are_listed_with_their_splits() -> None:
    reader = Parquet(ParquetSpec(root=str(MNIST)))
    records = reader.records()
    splits = records[rows.SPLIT].to_pylist()
    assert (splits.count("train"), splits.count("test")) == (60_000, 10_000)
    assert set(records["label.class"].to_pylist()) == set("0123456789")
    assert reader.bytes().read("train.parquet#59999").startswith(b"\x89PNG")


def test_damaged_page_costs_only_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [0, 1] * 6)
    whole = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 40 + whole[start + 40 :])
    source = Parquet(ParquetSpec(root=str(tmp_path))).bytes()
    with pytest.raises(Rejected):
        source.read("a.parquet#1")
    assert source.read("a.parquet#11") == png(11)


def test_rows_read_at_once_are_bounded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [0, 1] * 6)
    metadata = pq.ParquetFile(path).metadata
    refuse_large_groups(metadata, "image", "a")
    with pytest.raises(DataError, match="smaller ones"):
        refuse_large_groups(metadata, "image", "a", most=100)


def test_planning_opens_no_file(tmp_path: Path) -> None:
    tmp_path.joinpath("in").mkdir()
    reader = Parquet(ParquetSpec(root=str(tmp_path / "in"), multi=["class"]))
    (tmp_path / "in").rmdir()
    assert reader.tasks() == {"class": "multi"}
