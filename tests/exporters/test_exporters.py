"""A study's images, exported in every format and opened by the tools they are meant for."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.core import rows
from engine.core.errors import StudyError
from engine.core.manifest import Manifest
from engine.core.registry import resolve
from engine.core.sealed import seal, unseal
from engine.core.store import Store
from engine.export import export
from engine.exporters import Exporter, Item
from engine.exporters.imagefolder import folder_of
from engine.exporters.parquet import Parquet
from engine.exporters.webdataset import Webdataset
from engine.plan import plan
from engine.study import Study

CLASSES = {"a": 20, "=b/<i>": 12}


@pytest.fixture
def made(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study],
    run_until: Callable[[Study, str], Manifest], tmp_path: Path,
) -> Study:  # fmt: skip
    """A study with generated images: rotated and flipped images of two classes, one of which has a
    name that is not a valid file name."""
    folder = image_folder({"a": 20, "b": 12})
    table = [("path", "label")] + [
        (f"{name}/{number:03d}.png", {"a": "a", "b": "=b/<i>"}[name])
        for name, count in (("a", 20), ("b", 12)) for number in range(count)
    ]  # fmt: skip
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    study = toy_study(
        {"name": "csv", "root": str(folder), "file": "labels.csv"},
        generators={"turned": {"name": "traditional"}}, request={"ratio": 0.5},
        licence="CC0-1.0",
    )  # fmt: skip
    run_until(study, "generate")
    return study


def write(
    study: Study, store: Store, folder: Path, form: str, what: str = "turned",
    splits: tuple[str, ...] = rows.SPLITS,
) -> dict[str, Any]:  # fmt: skip
    return export(study, store, Store(str(folder)), what, form, splits)


def counted(told: dict[str, Any]) -> dict[tuple[str, str, str], int]:
    return {
        (split, label, source): count
        for split, by_class in told["images"].items()
        for label, by_source in by_class.items()
        for source, count in by_source.items()
    }


def test_every_format_has_the_same_images(made: Study, store: Store, tmp_path: Path) -> None:
    told = {
        form: counted(write(made, store, tmp_path / form, form))
        for form in ("imagefolder", "csv", "parquet", "webdataset")
    }
    first = told["csv"]
    assert all(found == first for found in told.values())
    real = sum(count for (_, _, source), count in first.items() if source == "real")
    assert real == 32
    synthetic = {key: count for key, count in first.items() if key[2] == "turned"}
    assert {split for split, _, _ in synthetic} == {"train"}
    for label in CLASSES:
        assert synthetic["train", label, "turned"] == round(0.5 * first["train", label, "real"])


def test_csv_reader_reads_an_export(
    made: Study, store: Store, tmp_path: Path, toy_study: Callable[..., Study],
    run_until: Callable[[Study, str], Manifest],
) -> None:  # fmt: skip
    told = counted(write(made, store, tmp_path / "out", "csv"))
    text = (tmp_path / "out" / "labels.csv").read_text()
    table = list(csv.DictReader(io.StringIO(text)))
    assert len(table) == sum(told.values())
    # A cell that a spreadsheet would evaluate is marked as text.
    assert {row["label"] for row in table} == {"a", "'=b/<i>"}
    for row in table:
        assert Image.open(tmp_path / "out" / row["path"]).size == (16, 16)
    again = toy_study({"name": "csv", "root": str(tmp_path / "out"), "file": "labels.csv",
                       "split": "split"}, audit={"on_leak": "drop"})  # fmt: skip
    counts = run_until(again, "ingest").metrics["counts"]
    assert sum(counts["test"].values()) == sum(
        count for (split, _, _), count in told.items() if split == "test"
    )


def test_folders_have_safe_names_and_contain_their_class(
    made: Study, store: Store, tmp_path: Path
) -> None:
    told = counted(write(made, store, tmp_path / "out", "imagefolder"))
    strange = folder_of("=b/<i>")
    assert "/" not in strange
    assert "<" not in strange
    found = Counter(
        (path.parent.parent.name, path.parent.name) for path in (tmp_path / "out").rglob("*.png")
    )
    for split in rows.SPLITS:
        for label, folder in (("a", "a"), ("=b/<i>", strange)):
            wanted = sum(
                count for (s, name, _), count in told.items() if (s, name) == (split, label)
            )
            assert found[split, folder] == wanted


@pytest.mark.parametrize("name", ["con", "LPT1", "..", "a/b", "x ", "é", "a" * 80, "=x", ".git"])
def test_unsafe_folder_names_become_a_slug(name: str) -> None:
    assert folder_of(name) != name
    assert folder_of("t-shirt") == "t-shirt"


def test_datasets_opens_parquet_with_images_and_class_names(
    made: Study, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    told = counted(write(made, store, tmp_path / "out", "parquet"))
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    names = {"train": "train", "validation": "val", "test": "test"}  # as `datasets` names splits
    found: Counter[tuple[str, str, str]] = Counter()
    for split, images in loaded.items():
        assert images.features["label"].names == sorted(CLASSES)
        for row in images:
            label = images.features["label"].int2str(row["label"])
            found[names[split], label, row["source"]] += 1
    assert found == told
    train = loaded["train"]
    assert train[0]["image"].size == (16, 16)
    parents = [row["parent_id"] for row in train if row["source"] == "turned"]
    assert parents
    assert all(parents)


def test_webdataset_reader_reads_an_export(made: Study, store: Store, tmp_path: Path) -> None:
    told = counted(write(made, store, tmp_path / "out", "webdataset"))
    kind = resolve("readers", "webdataset")
    spec = kind.Spec(root=str(tmp_path / "out"), class_names=sorted(CLASSES))
    records = kind(spec).records().to_pylist()
    found = Counter((row["split"], row["label.class"]) for row in records)
    wanted: Counter[tuple[str, str]] = Counter()
    for (split, label, _), count in told.items():
        wanted[split, label] += count
    assert found == wanted
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        described = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".json")]
        sources = {json.loads(file.read())["source"] for file in described if file}
    assert sources == {"real", "turned"}


class SmallTars(Webdataset):
    per_tar = 3


class SmallFiles(Parquet):
    file_bytes = 30


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (SmallTars, ["test-000000.tar", "train-000000.tar", "train-000001.tar"]),
        (SmallFiles, ["test-00000.parquet", "train-00000.parquet", "train-00001.parquet"]),
    ],
)
def test_long_exports_are_split_into_files(
    tmp_path: Path, kind: type[Exporter], names: list[str]
) -> None:
    exporter = kind(Store(str(tmp_path)), ("a",))
    for number, split in enumerate(["train"] * 5 + ["test"]):
        exporter.add(Item(b"0123456789", f"n{number}", ".png", f"i{number}", "a", {"split": split}))
    exporter.close()
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == names


def test_images_go_to_s3(made: Study, store: Store, s3_endpoint: str) -> None:
    target = Store("s3://bucket/exported")
    told = export(made, store, target, "turned", "csv", ["train"])
    written = [key for key in target.listing("images") if key.endswith(".png")]
    assert len(written) == sum(counted(told).values())
    with pytest.raises(StudyError, match="is not empty"):
        export(made, store, target, "turned", "csv", ["train"])


def test_provenance_is_exported_with_the_images(made: Study, store: Store, tmp_path: Path) -> None:
    write(made, store, tmp_path / "out", "csv")
    told = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert told["licence"] == "CC0-1.0"
    assert set(told["manifests"]) == {"ingest", "generate.turned"}
    assert told["study"]["generators"]["turned"]["name"] == "traditional"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trainedAlgorithmicMedia" in card
    assert "Licence: CC0-1.0" in card
    assert "<i>" not in card


def test_export_of_real_images_in_some_splits(made: Study, store: Store, tmp_path: Path) -> None:
    told = counted(write(made, store, tmp_path / "out", "csv", "real", ("val", "test")))
    assert {split for split, _, _ in told} == {"val", "test"}
    assert {source for _, _, source in told} == {"real"}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"form": "zip"}, "--format zip: unknown format; choose from csv, "),
        ({"what": "ddpm x1"}, "--arm 'ddpm x1': unknown arm; choose from real, turned"),
        ({"splits": ("train", "dev")}, "--splits: unknown split 'dev'; choose from train, val"),
    ],
)
def test_unknown_format_arm_or_split_is_rejected(
    made: Study, store: Store, tmp_path: Path, fields: Any, match: str
) -> None:
    with pytest.raises(StudyError, match=match):
        write(made, store, tmp_path / "out", **{"form": "csv", **fields})


def test_folder_with_files_is_rejected(made: Study, store: Store, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(StudyError, match="is not empty; name an empty folder"):
        write(made, store, tmp_path / "out", "csv")


def test_error_names_a_step_that_is_not_computed(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], store: Store, tmp_path: Path
) -> None:
    study = toy_study(image_folder({"a": 6, "b": 6}))
    with pytest.raises(
        StudyError, match=r"ingest is not done \(not computed yet\); run jobs/run_study\.py"
    ):
        write(study, store, tmp_path / "out", "csv", "real")


def test_outdated_results_are_not_exported(made: Study, store: Store, tmp_path: Path) -> None:
    """Images generated from an outdated ingest may show images that are in test now."""
    ingest = next(step for step in plan(made) if step.kind == "ingest")
    key = store.manifest("ingest", ingest.key)
    manifest = unseal(store.read(key))
    manifest["metrics"]["counts"]["train"]["a"] += 1
    store.put(key, seal(manifest))
    with pytest.raises(StudyError, match=r"generate\.turned is not done"):
        write(made, store, tmp_path / "out", "csv")
