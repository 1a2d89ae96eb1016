"""Files in a page: tables as CSV, and data URLs."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence

from engine.core.names import csv_cell

CSV = "text/csv;charset=utf-8"
# A value in a table.
Cell = str | int | float | bool | None
# A row of a table: cells by column.
Row = dict[str, Cell]


def as_csv(entries: Sequence[Mapping[str, Cell]], digits: str = ".6g") -> bytes:
    """Rows as CSV in UTF-8, with the columns of all rows in order of appearance.

    Texts that a spreadsheet would read as formulas are escaped. Floats are written in the format
    `digits`; a missing value is an empty cell.
    """
    columns = list(dict.fromkeys(name for entry in entries for name in entry))
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow([csv_cell(name) for name in columns])
    for entry in entries:
        writer.writerow([_written(entry.get(name), digits) for name in columns])
    return target.getvalue().encode("utf-8", "replace")


def data_url(data: bytes, media: str) -> str:
    """A file as a data URL. media: its type, such as `image/png`."""
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def page_file(file: str) -> str:
    """The path of a file relative to the page; files other than pages are in `tables`."""
    return file if file.endswith(".html") else f"tables/{file}"


def _written(value: Cell, digits: str) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return format(value, digits)
    return csv_cell(value) if isinstance(value, str) else str(value)
