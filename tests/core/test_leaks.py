"""Planted leaks are found, and pictures that are merely alike are not accused."""

from __future__ import annotations

import io

import imagehash
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageEnhance
from scipy.spatial.distance import cdist

from engine.core import rows
from engine.core.dataset import mend_all
from engine.core.images import Preprocess, pixel_sha256, preprocess
from engine.core.leaks import find_leaks
from engine.embedders.pixels import Pixels, PixelsSpec


def index(entries: list[tuple[str, str, str]], hashes: list[str] | None = None) -> pa.Table:
    """Rows of (split, group, digest of the pixels); ids are a0, a1, …"""
    count = len(entries)
    return pa.table(
        {
            rows.IMAGE_ID: [f"a{number}" for number in range(count)],
            rows.URI: [f"{number}.png" for number in range(count)],
            rows.SPLIT: [split for split, _, _ in entries],
            rows.GROUP_ID: [group for _, group, _ in entries],
            rows.PIXEL_SHA256: [digest for _, _, digest in entries],
            rows.PHASH: hashes or ["0" * 16] * count,
        }
    )


def test_equal_pixels_in_two_splits_are_an_exact_leak() -> None:
    leaks, thresholds = find_leaks(
        index([("train", "g", "x"), ("train", "h", "y"), ("test", "i", "x")]), None, 0.001
    )
    assert [(leak.kind, leak.first, leak.second) for leak in leaks] == [("exact", "a0", "a2")]
    assert (leaks[0].first_uri, leaks[0].first_split, leaks[0].second_split) == (
        "0.png", "train", "test"
    )  # fmt: skip
    assert thresholds == {}


def test_pixels_in_all_three_splits_are_three_leaks() -> None:
    found, _ = find_leaks(
        index([(split, split, "x") for split in ("train", "val", "test")]), None, 0.001
    )
    assert [(leak.first_split, leak.second_split) for leak in found] == [
        ("train", "val"), ("train", "test"), ("val", "test")
    ]  # fmt: skip


def test_a_group_in_two_splits_is_told_once_with_its_name() -> None:
    entries = [("train", "patient 7", f"t{n}") for n in range(5)]
    entries += [("val", "patient 7", f"v{n}") for n in range(5)] + [("val", "patient 8", "z")]
    leaks, _ = find_leaks(index(entries), None, 0.001)
    assert [(leak.kind, leak.detail) for leak in leaks] == [("group", "patient 7")]


def test_a_clean_dataset_has_no_leak() -> None:
    entries = [(("train", "val", "test")[n % 3], f"g{n}", f"x{n}") for n in range(60)]
    assert find_leaks(index(entries), None, 0.001)[0] == []


SPEC = Preprocess(size=64)


def scene(number: int) -> Image.Image:
    coarse = np.random.default_rng([9, number]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)


def encoded_again(image: Image.Image, quality: int) -> Image.Image:
    target = io.BytesIO()
    image.save(target, "JPEG", quality=quality)
    return Image.open(target).convert("RGB")


def table_of(
    pictures: list[Image.Image], splits: list[str], groups: list[str] | None = None
) -> tuple[pa.Table, np.ndarray]:
    groups = groups or [f"g{number}" for number in range(len(pictures))]
    entries = [
        (split, group, pixel_sha256(picture))
        for split, group, picture in zip(splits, groups, pictures, strict=True)
    ]
    embedder = Pixels(PixelsSpec())
    embedder.load("cpu")
    vectors = embedder.embed(np.stack([preprocess(picture, SPEC) for picture in pictures]))
    return index(entries, [str(imagehash.phash(picture)) for picture in pictures]), vectors


TRAIN = [scene(number) for number in range(150)]
COPIES = {
    "jpeg_again": encoded_again(TRAIN[3], 60),
    "smaller": TRAIN[4].resize((70, 70), Image.Resampling.LANCZOS),
    "brighter": ImageEnhance.Brightness(TRAIN[5]).enhance(1.1),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("split", ["val", "test"])
def test_a_planted_copy_is_found_and_it_alone(name: str, split: str) -> None:
    clean = [scene(1000 + number) for number in range(50)]
    table, vectors = table_of(
        [*TRAIN, *clean, COPIES[name]], ["train"] * 150 + [split] * 50 + [split]
    )
    leaks, thresholds = find_leaks(table, vectors, 0.001)
    number = {"jpeg_again": 3, "smaller": 4, "brighter": 5}[name]
    assert [(leak.kind, leak.first, leak.second) for leak in leaks] == [
        ("near", f"a{number}", "a200")
    ]
    assert thresholds["hash_bits"] > 0
    assert 0 < thresholds["embedding_distance"] < 1


def test_different_pictures_are_not_accused() -> None:
    pictures = [scene(number) for number in range(400)]
    splits = ["train"] * 250 + ["val"] * 50 + ["test"] * 100
    assert find_leaks(*table_of(pictures, splits), 0.001)[0] == []


def test_alike_pictures_of_one_patient_in_train_do_not_set_the_threshold() -> None:
    # Bursts within a group say nothing about different pictures; the copy must still be found.
    bursts = [encoded_again(scene(number // 2), 95 - number % 2) for number in range(150)]
    groups = [f"p{number // 2}" for number in range(150)] + ["other"]
    table, vectors = table_of(
        [*bursts, encoded_again(bursts[8], 50)], ["train"] * 150 + ["test"], groups
    )
    leaks, _ = find_leaks(table, vectors, 0.001)
    assert {leak.kind for leak in leaks} == {"near"}
    assert {leak.second for leak in leaks} == {"a150"}
    assert "a8" in {leak.first for leak in leaks}


def test_one_signal_alone_is_no_near_duplicate() -> None:
    table, vectors = table_of([*TRAIN, COPIES["jpeg_again"]], ["train"] * 150 + ["test"])
    far_hashes = table[rows.PHASH].to_pylist()
    far_hashes[150] = f"{~int(far_hashes[3], 16) % 2**64:016x}"
    place = table.schema.get_field_index(rows.PHASH)
    assert find_leaks(table.set_column(place, rows.PHASH, [far_hashes]), vectors, 0.001)[0] == []
    far_vectors = vectors.copy()
    far_vectors[150] = -vectors[3]
    assert find_leaks(table, far_vectors, 0.001)[0] == []


def test_a_pair_that_is_exact_is_not_told_again_as_near() -> None:
    table, vectors = table_of([*TRAIN, TRAIN[0]], ["train"] * 150 + ["test"])
    assert [leak.kind for leak in find_leaks(table, vectors, 0.001)[0]] == ["exact"]


def test_images_without_a_vector_are_left_out() -> None:
    table, vectors = table_of([*TRAIN, COPIES["smaller"]], ["train"] * 150 + ["test"])
    vectors[150] = np.nan
    vectors[7] = 0
    assert find_leaks(table, vectors, 0.001)[0] == []


def test_a_twin_in_train_does_not_switch_the_look_for_near_duplicates_off() -> None:
    twin = encoded_again(TRAIN[20], 70)
    table, vectors = table_of([*TRAIN, twin, COPIES["jpeg_again"]], ["train"] * 151 + ["test"])
    leaks, thresholds = find_leaks(table, vectors, 0.001)
    assert [(leak.first, leak.second) for leak in leaks] == [("a3", "a151")]
    assert thresholds["twins"] == 2


def test_thresholds_of_an_earlier_look_are_used_as_they_are() -> None:
    table, vectors = table_of([*TRAIN, COPIES["jpeg_again"]], ["train"] * 150 + ["test"])
    strict = {"hash_bits": 0, "embedding_distance": 0.0, "twins": 0}
    assert find_leaks(table, vectors, 0.001, strict)[0] == []


@pytest.mark.parametrize("how", ["drop", "move"])
def test_mending_goes_on_until_no_leak_is_left(how: str) -> None:
    # More near copies of one test image, in a burst of one patient, than one look sees.
    burst = [encoded_again(scene(1000), 60 + number) for number in range(25)]
    pictures = [*TRAIN, *burst, scene(1000)]
    groups = [f"g{number}" for number in range(150)] + ["burst"] * 25 + ["other"]
    table, vectors = table_of(pictures, ["train"] * 175 + ["test"], groups)
    leaks, thresholds = find_leaks(table, vectors, 0.001)
    assert 0 < len(leaks) < 25
    fate: dict[str, str] = {}
    mended, _ = mend_all(table, vectors, leaks, thresholds, how, fate)
    kept = np.isin(table[rows.IMAGE_ID].to_pylist(), mended[rows.IMAGE_ID].to_pylist())
    assert find_leaks(mended, vectors[kept], 0.001, thresholds)[0] == []
    gone = {f"a{number}" for number in range(150, 175)}
    if how == "drop":
        assert {image_id for image_id, why in fate.items() if why == "leak"} == gone
    else:
        splits = dict(
            zip(*(mended[name].to_pylist() for name in (rows.IMAGE_ID, rows.SPLIT)), strict=True)
        )
        assert {splits[image_id] for image_id in gone} == {"test"}


def test_near_duplicates_are_those_of_a_plain_search_over_all_pairs() -> None:
    random = np.random.default_rng(4)
    pictures = [scene(number) for number in range(90)]
    splits = ["train"] * 60 + ["val"] * 15 + ["test"] * 15
    # Some of val and test are train's in another light, more or less.
    for number in range(60, 90, 2):
        factor = float(random.uniform(0.7, 1.3))
        pictures[number] = encoded_again(
            ImageEnhance.Contrast(pictures[number - 60]).enhance(factor),
            int(random.integers(5, 90)),
        )
    table, vectors = table_of(pictures, splits)
    found, limits = find_leaks(table, vectors, 0.02)
    distance = cdist(vectors, vectors, "cosine")
    hashes = [imagehash.hex_to_hash(value) for value in table[rows.PHASH].to_pylist()]
    expected = {
        (f"a{one}", f"a{other}")
        for one in range(90)
        for other in range(one + 1, 90)
        if splits[one] != splits[other]
        and distance[one, other] <= limits["embedding_distance"]
        and hashes[one] - hashes[other] <= limits["hash_bits"]
    }
    assert {(leak.first, leak.second) for leak in found if leak.kind == "near"} == expected
    assert 3 < len(expected) < 45
