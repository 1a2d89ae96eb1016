from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.core import rows
from engine.core.errors import DataError
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


def test_folders_deeper_down_belong_to_their_class(image_folder: Folder) -> None:
    root = image_folder({"dog": 1, "cat/young": 1})
    assert reader(root).records()["label.class"].to_pylist() == ["cat", "dog"]


@pytest.mark.parametrize("name", ["val", "Validation", "valid", "dev"])
def test_folders_of_splits_are_known_by_their_names(image_folder: Folder, name: str) -> None:
    root = image_folder({f"{split}/{c}": 1 for split in ("train", name, "Test") for c in "ab"})
    found = reader(root).records()
    assert sorted(found[rows.SPLIT].to_pylist()) == ["test"] * 2 + ["train"] * 2 + ["val"] * 2
    assert found["label.class"].to_pylist() == ["a", "b"] * 3


def test_a_class_named_train_is_a_class_where_the_study_says_so(image_folder: Folder) -> None:
    root = image_folder({"train": 1, "test": 1})
    found = reader(root, splits="none").records()
    assert found["label.class"].to_pylist() == ["test", "train"]
    assert found[rows.SPLIT].null_count == 2


def test_an_id_does_not_depend_on_where_the_folder_lies(image_folder: Folder) -> None:
    one, other = image_folder({"a": 2, "b": 1}, "one"), image_folder({"a": 2, "b": 1}, "other")
    ids = reader(one).records()[rows.IMAGE_ID].to_pylist()
    assert ids == reader(other).records()[rows.IMAGE_ID].to_pylist()
    assert len(set(ids)) == 3


def test_groups_come_from_the_names_of_files(image_folder: Folder) -> None:
    root = image_folder({"a": 1, "b": 1})
    (root / "a" / "000.png").rename(root / "a" / "p7_left.png")
    (root / "b" / "000.png").rename(root / "b" / "p7_right.png")
    assert reader(root, group_separator="_").records()[rows.GROUP_ID].to_pylist() == ["p7", "p7"]


def test_the_fingerprint_follows_the_listing(image_folder: Folder) -> None:
    root = image_folder({"a": 2, "b": 1})
    before = reader(root).fingerprint()
    assert reader(root).fingerprint() == before
    (root / "a" / "001.png").unlink()
    assert reader(root).fingerprint() != before


@pytest.mark.parametrize("classes", [("empty",), ("empty", "other")])
def test_an_empty_class_folder_is_an_error(image_folder: Folder, classes: tuple[str, ...]) -> None:
    root = image_folder({"a": 1, "b": 1})
    for name in classes:
        (root / name).mkdir()
    with pytest.raises(DataError, match=r"reader\.root: the class 'empty' has no image"):
        reader(root).records()


def test_an_empty_class_folder_below_train_is_an_error(image_folder: Folder) -> None:
    root = image_folder({"train/a": 1, "test/a": 1})
    (root / "train" / "b").mkdir()
    with pytest.raises(DataError, match="the class 'b' has no image"):
        reader(root).records()


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"reader\.root: no image below"):
        reader(tmp_path).records()


@pytest.mark.parametrize(("splits", "layout"), [("auto", "<class>/"), ("folders", "<split>/")])
def test_an_image_outside_the_layout_is_an_error(
    image_folder: Folder, splits: str, layout: str
) -> None:
    root = image_folder({"a": 1, "b": 1, ".": 1})
    with pytest.raises(DataError, match=rf"lies outside the layout {layout}"):
        reader(root, splits=splits).records()


def test_a_folder_that_is_no_split_is_an_error_where_splits_are_asked_for(
    image_folder: Folder,
) -> None:
    root = image_folder({"train/a": 1, "trian/a": 1})
    with pytest.raises(DataError, match="trian is no name of a split"):
        reader(root, splits="folders").records()


def test_a_name_that_is_no_text_is_an_error_that_shows_it(image_folder: Folder) -> None:
    root = image_folder({"a": 1, "b": 1})
    os.rename(root / "a" / "000.png", os.fsencode(root / "a") + b"/\xff.png")
    with pytest.raises(DataError, match=r"udcff.*rename the file") as caught:
        reader(root).records()
    assert str(caught.value).isprintable()


def test_split_folders_beside_another_folder_are_not_taken_for_classes(
    image_folder: Callable[..., Path],
) -> None:
    root = image_folder({"train/a": 2, "test/a": 2, "unlabelled/x": 2})
    with pytest.raises(DataError, match="'unlabelled' does not"):
        Imagefolder(ImagefolderSpec(root=str(root))).records()


def test_a_class_folder_behind_a_link_is_refused(image_folder: Callable[..., Path]) -> None:
    root = image_folder({"a": 2, "b": 2})
    (root / "c").symlink_to(root / "a")
    with pytest.raises(DataError, match="'c' is a link"):
        Imagefolder(ImagefolderSpec(root=str(root))).records()


def test_documents_beside_images_are_listed_and_not_lost(image_folder: Callable[..., Path]) -> None:
    root = image_folder({"a": 2, "b": 2})
    (root / "a" / "scan.pdf").write_bytes(b"%PDF-1.7")
    uris = Imagefolder(ImagefolderSpec(root=str(root))).records()[rows.URI].to_pylist()
    assert "a/scan.pdf" in uris
