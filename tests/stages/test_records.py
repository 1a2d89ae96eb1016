"""What a user is told of listed classes and groups."""

from __future__ import annotations

import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.ledger import Ledger
from engine.core.shards import OK
from engine.data.images import Preprocess
from engine.readers import Reader, ReaderSpec
from engine.stages.records import (
    decoding_notices,
    listed,
    record_notices,
    set_aside_notice,
    small_class_notices,
)
from engine.wording import notice_in_words


class Listed(Reader[ReaderSpec]):
    """A reader with nothing but a ledger."""

    def ledger(self) -> Ledger:
        return Ledger(files=5, read=3, skipped={".txt": 1, "hidden": 1}, first={".txt": "a.txt"})


def notices(labels: list[str], groups: list[str | None]) -> list[str]:
    records = pa.table({rows.label_column("class"): labels, rows.GROUP_ID: pa.array(groups)})
    return [
        notice_in_words(notice)
        for notice in record_notices(records, Listed(ReaderSpec(name="listed")), "class")
    ]


def test_skipped_files_are_counted_by_reason() -> None:
    assert notices(["a"], [None]) == ["files that were not read: 2 of 5: 1 .txt (a.txt), 1 hidden"]


def test_class_named_like_a_missing_value_is_noticed() -> None:
    found = notices(["cat", "NaN", "nan", "None"], [None] * 4)
    assert [text for text in found if "missing value" in text] == [
        f"the class {name!r} is named like a missing value (images: 1); leave these images out if"
        " they have no label"
        for name in ("NaN", "nan")
    ]


@pytest.mark.parametrize(("first", "second"), [("1", "1.0"), ("01", "1.00"), ("0", "00.0")])
def test_decimals_and_zeros_do_not_make_another_number(first: str, second: str) -> None:
    (_, text) = notices([first, second, "10"], [None] * 3)
    assert "are the same number" in text


def test_classes_that_are_the_same_number_are_noticed() -> None:
    (_, text) = notices(["007", "7", "70"], [None] * 3)
    assert "'007' and '7' are the same number" in text


@pytest.mark.parametrize(("first", "second"), [("p07", "P07"), ("007", "7"), ("a b", "a  b")])
def test_groups_that_differ_in_writing_alone_are_noticed(first: str, second: str) -> None:
    (_, text) = notices(["x"] * 3, sorted([first, second, "other"]))
    assert "pairs of groups that differ only in case, spaces or leading zeros: 1 (first: " in text


def test_ledger_that_does_not_sum_up_is_refused() -> None:
    with pytest.raises(ValueError, match="5 files, but 3 read"):
        Ledger(files=5, read=3, skipped={"hidden": 1})


def test_class_of_which_one_image_weighs_much_is_noticed() -> None:
    counts = {
        "common": {"train": 50, "val": 20, "test": 20},
        "rare": {"train": 5, "val": 20, "test": 1},
        "few": {"train": 5, "val": 20, "test": 10},
    }
    (notice,) = small_class_notices(counts)
    # One of three classes, one image: a third of the score. For `few` it is 1 / 30.
    assert notice.fields == {
        "split": "test", "name": "rare", "images": 1, "classes": 2, "percent": 33
    }  # fmt: skip
    assert "test has only 1 of 'rare': a single image decides 33% of a score" in notice_in_words(
        notice
    )
    assert small_class_notices({"a": {"val": 20, "test": 40}, "b": {"val": 20, "test": 40}}) == []


HOW = pa.map_(pa.string(), pa.string())


def cut(sizes: list[tuple[int, int]], fit: str, turned: str = "") -> list[str]:
    index = pa.table(
        {
            rows.URI: [f"{number}.png" for number in range(len(sizes))],
            rows.WIDTH: [width for width, _ in sizes],
            rows.HEIGHT: [height for _, height in sizes],
            rows.FRAMES: [1] * len(sizes),
            rows.BITS: pa.array([None] * len(sizes), pa.int32()),
            rows.ACQUISITION: pa.array([[("turned", turned)] if turned else []] * len(sizes), HOW),
        }
    )
    return [
        notice_in_words(notice)
        for notice in decoding_notices(index, Preprocess(size=64, fit=fit))
    ]  # fmt: skip


def test_crop_that_leaves_out_the_ends_of_pages_is_noticed() -> None:
    pages = [(64, 64), (400, 300), (210, 297), (297, 210)]
    (text,) = cut(pages, "crop")
    assert "2 of 4 pictures lose more than 26% of their area (first: 2.png)" in text
    assert cut(pages, "pad") == []
    # One in a hundred may be an odd one.
    assert cut([(64, 64)] * 99 + [(210, 297)], "crop") == []
    assert cut([], "crop") == []


def test_pictures_that_exif_turns_are_noticed() -> None:
    (text,) = cut([(64, 64), (64, 64)], "crop", turned="6")
    assert text.startswith("pictures that their EXIF orientation turns: 2 (first: 0.png)")
    assert cut([(64, 64)], "crop") == []


def test_images_that_cannot_be_used_are_named_with_the_class_that_loses_most() -> None:
    records = pa.table({
        rows.IMAGE_ID: [str(number) for number in range(102)],
        rows.URI: [f"{number}.png" for number in range(102)],
        rows.label_column("class"): ["rare"] * 2 + ["common"] * 100,
    })  # fmt: skip
    fate = dict.fromkeys(records[rows.IMAGE_ID].to_pylist(), OK)
    assert set_aside_notice(records, fate, "class", 0.01) == []
    fate |= {"1": "missing: 1.png", "7": "empty"}
    (notice,) = set_aside_notice(records, fate, "class", 0.01)
    assert notice_in_words(notice) == (
        "images that cannot be used: 2 of 102 (1 missing, 1 empty; first: 1.png); among them 1 of 2"
        " of 'rare'; jobs/audit.py lists them"
    )


def test_files_are_listed_up_to_three() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
