from __future__ import annotations

import base64
import csv
import io

from engine.report.download import CSV, as_csv, data_url, page_file


def test_a_table_is_read_back_and_no_text_of_a_user_is_a_formula() -> None:
    entries = [
        {"class": "=HYPERLINK(1)", "gain": -0.25, "images": 3, "=x": None},
        {"class": 'é, "b"\n', "gain": 1 / 3, "more": True},
    ]
    rows = list(csv.DictReader(io.StringIO(as_csv(entries).decode(), newline="")))
    assert rows[0] == {
        "class": "'=HYPERLINK(1)", "gain": "-0.25", "images": "3", "'=x": "", "more": ""
    }  # fmt: skip
    assert rows[1]["class"] == 'é, "b"\n'
    assert rows[1]["gain"] == "0.333333"
    assert rows[1]["more"] == "True"


def test_a_link_holds_the_table_itself() -> None:
    table = as_csv([{"a": "ü"}])
    assert base64.b64decode(data_url(table, CSV).partition("base64,")[2]) == table


def test_tables_lie_below_the_page() -> None:
    assert [page_file(name) for name in ("report.html", "arms.csv", "p.parquet")] == [
        "report.html", "tables/arms.csv", "tables/p.parquet"
    ]  # fmt: skip
