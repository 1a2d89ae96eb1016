"""A CSV table of images."""

from __future__ import annotations

import csv
import io
from typing import Any

from engine.core import rows
from engine.core.labels import NOTHING
from engine.core.names import csv_cell
from engine.exporters import Item

# Between several labels in a cell, as in the reader's field `multi`.
SEPARATOR = "|"


class CsvTable:
    """One row per image. Cells that a spreadsheet would read as a formula are marked as text."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        self.writer = csv.writer(self.text)
        self.header: tuple[str, ...] = ()

    def add(self, path: str, item: Item) -> None:
        if not self.header:
            self.header = ("path", rows.LABEL, rows.IMAGE_ID, *item.fields)
            self.writer.writerow(self.header)
        values = [path, item.label, item.image_id, *item.fields.values()]
        self.writer.writerow([_cell(value) for value in values])

    def encoded(self) -> bytes:
        return self.text.getvalue().encode()


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        # An empty cell is a missing label.
        value = SEPARATOR.join(value) or NOTHING
    return "" if value is None else csv_cell(value) if isinstance(value, str) else value
