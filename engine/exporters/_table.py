"""A CSV table of images."""

from __future__ import annotations

import csv
import io

from engine.core import rows
from engine.core.names import csv_cell
from engine.exporters import FIELDS, Item

HEADER = ("path", rows.LABEL, rows.IMAGE_ID, *FIELDS)


class CsvTable:
    """One row per image. Cells that a spreadsheet would read as a formula are marked as text."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        self.writer = csv.writer(self.text)
        self.writer.writerow(HEADER)

    def add(self, path: str, item: Item) -> None:
        values = [path, item.label, item.image_id, *(item.fields.get(name) for name in FIELDS)]
        self.writer.writerow(
            ["" if value is None else csv_cell(value) if isinstance(value, str) else value
             for value in values]
        )  # fmt: skip

    def encoded(self) -> bytes:
        return self.text.getvalue().encode()
