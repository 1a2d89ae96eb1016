from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.core import rows
from engine.core.errors import DataError
from engine.core.spec import canonical
from engine.core.store import Store
from engine.readers.imagefolder import Imagefolder, ImagefolderSpec

Folder = Callable[..., Path]


def reader(root: Path, **fields: Any) -> Imagefolder:
    return Imagefolder(ImagefolderSpec(root=str(root), **fields))


def test_folders_are_classes(image_folder: Folder) -> None:
    root = image_folder({"dog": 2, "cat": 1})
    (root / "cat" / "notes.txt").write_text("no image")
    found = reader(root).records()
    assert found.schema == rows.records_schema({"class": "single"})
    assert found[rows.URI].to_pylist() == ["cat/000.png", "dog/000.png", "dog/001.png"]
    assert found["label.class"].to_pylist() == ["cat", "dog", "dog"]
    assert found[rows.SPLIT].to_pylist() == [None] * 3


def test_nested_folders_belong_to_their_class(image_folder: Folder) -> None:
    root = image_folder({"dog": 1, "cat/young": 1})
    assert reader(root).records()["label.class"].to_pylist() == ["cat", "dog"]


@pytest.mark.parametrize("name", ["val", "Validation", "valid", "dev"])
def test_split_folders_are_recognised_by_name(image_folder: Folder, name: str) -> None:
    root = image_folder({f"{split}/{c}": 1 for split in ("train", name, "Test") for c in "ab"})
    found = reader(root).records()
    assert sorted(found[rows.SPLIT].to_pylist()) == ["test"] * 2 + ["train"] * 2 + ["val"] * 2
    assert found["label.class"].to_pylist() == ["a", "b"] * 3


def test_class_named_train_is_a_class_if_the_study_says_so(image_folder: Folder) -> None:
    root = image_folder({"train": 1, "test": 1})
    found = reader(root, splits="none").records()
    assert found["label.class"].to_pylist() == ["test", "train"]
    assert found[rows.SPLIT].null_count == 2


def test_id_does_not_depend_on_the_location_of_the_folder(image_folder: Folder) -> None:
    one, other = image_folder({"a": 2, "b": 1}, "one"), image_folder({"a": 2, "b": 1}, "other")
    ids = reader(one).records()[rows.IMAGE_ID].to_pylist()
    assert ids == reader(other).records()[rows.IMAGE_ID].to_pylist()
    assert len(set(ids)) == 3


def test_groups_come_from_file_names(image_folder: Folder) -> None:
    root = image_folder({"a": 1, "b": 1})
    (root / "a" / "000.png").rename(root / "a" / "p7_left.png")
    (root / "b" / "000.png").rename(root / "b" / "p7_right.png")
    assert reader(root, group_separator="_").records()[rows.GROUP_ID].to_pylist() == ["p7", "p7"]


@pytest.mark.parametrize(
    ("layout", "folders"),
    [
        (["group", "class"], ("p1/0", "p1/1", "p2/1")),
        (["class", "group"], ("0/p1", "1/p1", "1/p2")),
        # Deeper folders are ignored, as without groups.
        (["group", "class"], ("p1/0/deep", "p1/1", "p2/1")),
    ],
)
@pytest.mark.parametrize("split", ["", "train/"])
def test_groups_may_have_folders(
    image_folder: Folder, layout: list[str], folders: tuple[str, ...], split: str
) -> None:
    root = image_folder({split + folder: 1 for folder in folders})
    found = reader(root, layout=layout).records()
    pairs = zip(found["label.class"].to_pylist(), found[rows.GROUP_ID].to_pylist(), strict=True)
    assert sorted(pairs) == [("0", "p1"), ("1", "p1"), ("1", "p2")]
    assert found[rows.SPLIT].to_pylist() == [split.strip("/") or None] * 3
    # A patient without images of a class does not make the class empty.
    if layout[0] == "group":
        (root / split / "p2" / "0").mkdir()
        assert reader(root, layout=layout).records().num_rows == 3


def test_group_of_folders_stays_in_one_split(
    image_folder: Folder, toy_study, run_until, store: Store
) -> None:
    root = image_folder({f"p{patient}/{name}": 2 for patient in range(12) for name in "01"})
    layout = {"name": "imagefolder", "root": str(root), "layout": ["group", "class"]}
    ingest = run_until(toy_study(layout, split={"group": "column"}), "ingest")
    patients = [
        {
            group for table in store.tables(ingest.keys(split=split))
            for group in table[rows.GROUP_ID].to_pylist()
        }
        for split in ("train", "val", "test")
    ]  # fmt: skip
    assert sum(map(len, patients)) == len(set.union(*patients)) == 12


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"layout": ["group"]}, r"layout must be \[class\]"),
        ({"layout": ["class", "class"]}, r"layout must be \[class\]"),
        ({"layout": ["group", "class"], "group_separator": "_"}, "remove one"),
    ],
)
def test_invalid_layout_is_rejected(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        ImagefolderSpec(root=".", **fields)


def test_default_layout_is_not_part_of_the_key() -> None:
    assert "layout" not in canonical(ImagefolderSpec(root="."))
    assert canonical(ImagefolderSpec(root=".", layout=["group", "class"]))["layout"]


def test_image_without_a_group_is_an_error(image_folder: Folder) -> None:
    root = image_folder({"p1/0": 1, "p2": 1})
    with pytest.raises(DataError, match="does not fit the layout <group>/<class>/image"):
        reader(root, layout=["group", "class"]).records()


def test_fingerprint_follows_the_listing(image_folder: Folder) -> None:
    root = image_folder({"a": 2, "b": 1})
    before = reader(root).fingerprint()
    assert reader(root).fingerprint() == before
    (root / "a" / "001.png").unlink()
    assert reader(root).fingerprint() != before


@pytest.mark.parametrize("classes", [("empty",), ("empty", "other")])
def test_empty_class_folder_is_an_error(image_folder: Folder, classes: tuple[str, ...]) -> None:
    root = image_folder({"a": 1, "b": 1})
    for name in classes:
        (root / name).mkdir()
    with pytest.raises(DataError, match=r"reader\.root: the class 'empty' has no images"):
        reader(root).records()


def test_empty_class_folder_below_train_is_an_error(image_folder: Folder) -> None:
    root = image_folder({"train/a": 1, "test/a": 1})
    (root / "train" / "b").mkdir()
    with pytest.raises(DataError, match="the class 'b' has no images"):
        reader(root).records()


def test_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"reader\.root: no images in"):
        reader(tmp_path).records()


@pytest.mark.parametrize(("splits", "layout"), [("auto", "<class>/"), ("folders", "<split>/")])
def test_image_outside_the_layout_is_an_error(
    image_folder: Folder, splits: str, layout: str
) -> None:
    root = image_folder({"a": 1, "b": 1, ".": 1})
    with pytest.raises(DataError, match=rf"does not fit the layout {layout}"):
        reader(root, splits=splits).records()


def test_non_split_folder_is_an_error_if_splits_are_required(
    image_folder: Folder,
) -> None:
    root = image_folder({"train/a": 1, "trian/a": 1})
    with pytest.raises(DataError, match="the folder trian is not a split"):
        reader(root, splits="folders").records()


def test_undecodable_name_is_an_error_that_shows_it(image_folder: Folder) -> None:
    root = image_folder({"a": 1, "b": 1})
    os.rename(root / "a" / "000.png", os.fsencode(root / "a") + b"/\xff.png")
    with pytest.raises(DataError, match=r"udcff.*rename the file") as caught:
        reader(root).records()
    assert str(caught.value).isprintable()


def test_split_folders_next_to_another_folder_are_not_classes(
    image_folder: Callable[..., Path],
) -> None:
    root = image_folder({"train/a": 2, "test/a": 2, "unlabelled/x": 2})
    with pytest.raises(DataError, match="'unlabelled' is not"):
        Imagefolder(ImagefolderSpec(root=str(root))).records()


def test_class_folder_behind_a_link_is_rejected(image_folder: Callable[..., Path]) -> None:
    root = image_folder({"a": 2, "b": 2})
    (root / "c").symlink_to(root / "a")
    with pytest.raises(DataError, match="'c' is a link"):
        Imagefolder(ImagefolderSpec(root=str(root))).records()


def test_documents_next_to_images_are_listed(image_folder: Callable[..., Path]) -> None:
    root = image_folder({"a": 2, "b": 2})
    (root / "a" / "scan.pdf").write_bytes(b"%PDF-1.7")
    uris = Imagefolder(ImagefolderSpec(root=str(root))).records()[rows.URI].to_pylist()
    assert "a/scan.pdf" in uris


@pytest.mark.parametrize("inner", [("cat", "dog"), ("train", "val", "test")])
def test_root_one_level_too_high_names_the_folder_meant(
    tmp_path: Path, inner: tuple[str, ...]
) -> None:
    for name in inner:
        (tmp_path / "archive" / name).mkdir(parents=True)
        (tmp_path / "archive" / name / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=rf"set reader\.root to {tmp_path}/archive$"):
        Imagefolder(ImagefolderSpec(root=str(tmp_path))).records()
