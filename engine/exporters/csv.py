"""The table `labels.csv` of real and synthetic images, and their files in `images/`. The reader
`csv` reads it back."""

from __future__ import annotations

from collections.abc import Sequence

from engine.core.store import Store
from engine.exporters import Exporter, Item
from engine.exporters._table import CsvTable


class Csv(Exporter):
    def __init__(self, target: Store, classes: Sequence[str]) -> None:
        super().__init__(target, classes)
        self.table = CsvTable()

    def add(self, item: Item) -> None:
        key = self.target.join("images", item.name + item.extension)
        self.put(key, item.data)
        self.table.add(key, item)

    def close(self) -> None:
        self.put("labels.csv", self.table.encoded())
        super().close()
