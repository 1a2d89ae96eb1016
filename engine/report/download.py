"""Tables of a page to be taken away: CSV, as a file and as a link that holds the file."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from engine.core.names import csv_cell


def as_csv(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as CSV in UTF-8; the columns are those of all rows, in the order in which they come.

    No text is a formula to a spreadsheet. Numbers are numbers, a negative one too, with six digits;
    what has no value is an empty cell.
    """
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([csv_cell(name) for name in columns])
    for entry in entries:
        writer.writerow([_cell(entry.get(name)) for name in columns])
    return target.getvalue().encode("utf-8", "replace")


def data_url(table: bytes) -> str:
    """A CSV as a link that needs no network."""
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(table).decode()}"


def beside(file: str) -> str:
    """Where a file of a page lies, from the page: what is no page, below `tables`."""
    return file if file.endswith(".html") else f"tables/{file}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return csv_cell(value) if isinstance(value, str) else str(value)
