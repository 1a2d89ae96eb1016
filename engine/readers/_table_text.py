"""The text of a table: CSV and TSV by one parser for header and rows, so that an id 007 stays 007,
and the first sheet of an Excel file."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from engine.core.errors import DataError, StudyError, brief


@dataclass(frozen=True)
class Table:
    """Header and rows, all cells as text, without the `blank` empty lines."""

    header: list[str]
    rows: list[list[str]]
    blank: int = 0

    def column(self, name: str) -> list[str]:
        place = self.header.index(name)
        return [row[place] for row in self.rows]


def read_table(data: bytes, name: str, where: str, delimiter: str | None, encoding: str) -> Table:
    """Raises `DataError` with the line of what is wrong. name: of the file, whose extension says
    what it is. where: as errors name it. delimiter: None: a tab for .tsv, else a comma."""
    if name.lower().endswith(".xlsx"):
        table = _from_excel(data, where)
    else:
        table = _from_text(
            data, where, delimiter or ("\t" if name.lower().endswith(".tsv") else ","), encoding
        )
    if not table.header:
        raise DataError(f"{where} is empty; it needs a header and rows")
    return table


def _from_text(data: bytes, where: str, delimiter: str, encoding: str) -> Table:
    try:
        text = data.decode(encoding.replace("utf-8", "utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{where}, line {line}: not {encoding.upper()}; save the table as UTF-8, or set"
            " reader.encoding (Excel in Western Europe and America writes cp1252)"
        ) from None
    rows: list[list[str]] = []
    header: list[str] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    blank, before = 0, 0
    try:
        for cells in reader:
            line, before = before + 1, reader.line_num
            if not any(cells):
                blank += 1
                continue
            if not header:
                header = [name.strip() for name in cells]
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where}, line {line}: {len(cells)} cells, but the header has {len(header)};"
                    f" quote cells that contain {delimiter!r}"
                )
            # A quote that opens a cell by mistake makes one cell of all lines up to the next.
            inner = [row for cell in cells for row in cell.splitlines()[1:]]
            if any(row.count(delimiter) >= len(header) - 1 for row in inner if row):
                raise DataError(
                    f'{where}, lines {line} to {before} are one row: a quote (") in line {line}'
                    " opens a cell and the next one ends it; remove or double it"
                )
            if [cell.strip() for cell in cells] == header:
                raise DataError(f"{where}, line {line}: the header again; remove this line")
            rows.append(cells)
    except csv.Error as error:
        raise DataError(
            f"{where}, line {before + 1}: {error} (a quote that does not belong there?); remove or"
            " double it"
        ) from None
    return Table(header, rows, blank)


def _from_excel(data: bytes, where: str) -> Table:
    """The first sheet. Raises `StudyError` without openpyxl."""
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise StudyError(
            f"{where}: reading Excel files needs openpyxl: pip install"
            ' "synthetic-training-engine[xlsx]", or save the table as CSV'
        ) from None
    try:
        book = load_workbook(io.BytesIO(data), read_only=True, data_only=True)
        lines = [[_cell(value) for value in row] for row in book.worksheets[0].iter_rows(
            values_only=True
        )]  # fmt: skip
    except Exception as error:  # openpyxl raises those of zipfile and of XML parsers
        raise DataError(f"{where}: is not a readable Excel file: {brief(error)}") from None
    filled = [line for line in lines if any(line)]
    if not filled:
        return Table([], [])
    header = [name.strip() for name in filled[0]]
    # Excel keeps formatted cells to the right of a table.
    width = max(place + 1 for place, name in enumerate(header) if name)
    return Table(header[:width], [line[:width] for line in filled[1:]], len(lines) - len(filled))


def _cell(value: Any) -> str:
    """A cell as text; whole numbers have no decimals."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)
