"""What a user is told of listed classes and groups."""

from __future__ import annotations

import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.ledger import Ledger
from engine.readers import Reader, ReaderSpec
from engine.stages.records import record_notices, small_class_notices
from engine.wording import notice_in_words


class Listed(Reader[ReaderSpec]):
    """A reader with nothing but a ledger."""

    def ledger(self) -> Ledger:
        return Ledger(files=5, read=3, skipped={"hidden": 2})


def notices(labels: list[str], groups: list[str | None]) -> list[str]:
    records = pa.table({rows.label_column("class"): labels, rows.GROUP_ID: pa.array(groups)})
    return [
        notice_in_words(notice)
        for notice in record_notices(records, Listed(ReaderSpec(name="listed")), "class")
    ]


def test_skipped_files_are_counted_by_reason() -> None:
    assert notices(["a"], [None]) == ["2 of 5 files were not read: 2 hidden"]


def test_class_named_like_a_missing_value_is_noticed() -> None:
    found = notices(["cat", "NaN", "nan", "None"], [None] * 4)
    assert [text for text in found if "missing value" in text] == [
        "the class 'NaN' (1 images) is named like a missing value; leave these images out if they"
        " have no label",
        "the class 'nan' (1 images) is named like a missing value; leave these images out if they"
        " have no label",
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
    assert "1 pairs of groups differ only in case, spaces or leading zeros" in text


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
