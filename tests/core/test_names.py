from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.core.errors import DataError
from engine.core.names import check_class_names, csv_cell, natural, slug


@given(st.text(st.characters(codec="utf-8")))
def test_slug_is_a_safe_file_name(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,48}", slug(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Moderate NPDR", "moderate-npdr"),
        ("../../etc/passwd", "etc-passwd"),
        ("<script>alert(1)</script>", "script-alert-1-script"),
        ("Café Grün", "cafe-grun"),
        ("糖尿病", "x"),
        ("", "x"),
    ],
)
def test_slug_keeps_words(text: str, words: str) -> None:
    assert slug(text).rpartition("-")[0] == words


def test_different_texts_have_different_slugs() -> None:
    texts = ["a b", "a-b", "A b", "a  b", "糖", "尿", "a" * 50, "a" * 51]
    assert len({slug(text) for text in texts}) == len(texts)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cat", "Cat"),
        ("cat", " cat "),
        ("a b", "a  b"),
        ("caf\u00e9", "cafe\u0301"),  # NFC and NFD
        ("stra\u00dfe", "STRASSE"),
        ("\uff41", "a"),  # full width
        ("\ufb01n", "fin"),  # ligature
    ],
)
def test_similar_class_names_are_rejected_and_both_named(one: str, other: str) -> None:
    with pytest.raises(DataError) as caught:
        check_class_names([one, other, "third"], "class")
    assert repr(one) in str(caught.value)
    assert repr(other) in str(caught.value)
    assert "label.class" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "  ", "a" * 201, "a\nb", "a\0b", "\u202egpj.cat", "a\u200bb", "\ud800"]
)
def test_undisplayable_class_names_are_rejected(name: str) -> None:
    with pytest.raises(DataError, match="rename it") as caught:
        check_class_names(["cat", name], "class")
    assert str(caught.value).isprintable()


def test_unusual_class_names_are_accepted() -> None:
    check_class_names(
        ["<script>", "=CMD()", "糖尿病", "مرض", "../x", "a" * 200, "O'Neill; --"], "c"
    )


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx"])
def test_spreadsheet_formula_is_quoted(text: str) -> None:
    assert csv_cell(text) == "'" + text


@pytest.mark.parametrize("text", ["", "a=1", "cat", "1"])
def test_other_cells_are_unchanged(text: str) -> None:
    assert csv_cell(text) == text


def test_numbers_in_names_are_ordered_by_value() -> None:
    names = ["grade 10", "grade 2", "10", "2", "b", "a", "a1b20", "a1b3", "\u00b2"]
    assert sorted(names, key=natural) == [
        "2", "10", "a", "a1b3", "a1b20", "b", "grade 2", "grade 10", "\u00b2"
    ]  # fmt: skip
