from __future__ import annotations

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
from engine.data.images import Rejected
from engine.readers.huggingface import Huggingface, HuggingfaceSpec
from engine.study import Study
from tests.conftest import toy_picture
from tests.readers.pictures import png
from tests.readers.test_parquet import write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def reader(folder: Path, **fields: Any) -> Huggingface:
    return Huggingface(HuggingfaceSpec(path=str(folder), **fields))


def test_splits_and_class_names_of_a_folder_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "d" / "train-0.parquet", [0, 1, 0], features=None)
    write(tmp_path / "d" / "test-0.parquet", [1], first=5, features=None)
    found = reader(tmp_path / "d").records()
    assert found[rows.SPLIT].to_pylist() == ["train"] * 3 + ["test"]
    assert found["label.class"].to_pylist() == ["0", "1", "0", "1"]


def test_dataset_with_one_split_counts_as_unsplit(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.parquet", [0, 1], features=None)
    assert reader(tmp_path / "d").records()[rows.SPLIT].to_pylist() == [None, None]


def test_image_files_and_folder_names_are_read(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "d" / "train" / name).mkdir(parents=True)
        toy_picture(number).save(tmp_path / "d" / "train" / name / "x.png")
    made = reader(tmp_path / "d")
    found = made.records()
    assert sorted(found["label.class"].to_pylist()) == ["cat", "dog"]
    source = pickle.loads(pickle.dumps(made.bytes()))
    pictures = {source.read(uri) for uri in found[rows.URI].to_pylist()}
    assert pictures == {png(0), png(1)}
    with pytest.raises(Rejected):
        source.read("train#9")


def test_unloadable_dataset_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"reader\.path: ") as caught:
        reader(tmp_path / "nowhere").records()
    assert "\n" not in str(caught.value)
    write(tmp_path / "d" / "a.parquet", [0, 1], features=None)
    with pytest.raises(DataError, match="no column 'kind'; it has"):
        reader(tmp_path / "d", labels={"class": "kind"}).records()


def test_study_reads_images_from_a_dataset(
    tmp_path: Path, toy_study: Callable[..., Study], run_until: Callable[..., Manifest]
) -> None:
    write(tmp_path / "in" / "a.parquet", [0, 1] * 10, features=None)
    manifest = run_until(toy_study({"name": "huggingface", "path": str(tmp_path / "in")}), "ingest")
    assert sum(sum(held.values()) for held in manifest.metrics["counts"].values()) == 20


def test_row_with_a_path_elsewhere_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    images = [{"bytes": None, "path": name}
              for name in (str(tmp_path / "secret.png"), "../secret.png", "/dev/zero")]  # fmt: skip
    (tmp_path / "d").mkdir()
    table = pa.table({"image": pa.array(images, rows.IMAGE_TYPE), "label": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "d" / "a.parquet")
    source = reader(tmp_path / "d").bytes()
    for row in range(3):
        with pytest.raises(Rejected, match="path_not_allowed"):
            source.read(f"train#{row}")
