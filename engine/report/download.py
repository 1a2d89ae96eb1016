"""Downloadable tables of a page: CSV as a file, and as a link that contains the file."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from engine.core.names import csv_cell


def as_csv(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV in UTF-8, with the columns of all rows in order of appearance.

    Texts that a spreadsheet would read as formulas are escaped. Floats have six digits; a missing
    value is an empty cell.
    """
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([csv_cell(name) for name in columns])
    for entry in entries:
        writer.writerow([_cell(entry.get(name)) for name in columns])
    return target.getvalue().encode("utf-8", "replace")


def data_url(table: bytes) -> str:
    """A CSV as a data URL."""
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(table).decode()}"


def beside(file: str) -> str:
    """The path of a file relative to the page; files other than pages are in `tables`."""
    return file if file.endswith(".html") else f"tables/{file}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return csv_cell(value) if isinstance(value, str) else str(value)
