"""`<split>/<class>/<image>`, the layout that torchvision, Keras and Hugging Face open, and
`metadata.csv` with the metadata of each image."""

from __future__ import annotations

import re
from collections.abc import Sequence

from engine.core.names import slug
from engine.core.store import Store
from engine.exporters import Exporter, Item
from engine.exporters._table import CsvTable


class Imagefolder(Exporter):
    def __init__(self, target: Store, classes: Sequence[str]) -> None:
        super().__init__(target, classes)
        self.table = CsvTable()
        self.folders = {name: folder_of(name) for name in classes}

    def add(self, item: Item) -> None:
        key = self.target.join(item.split, self.folders[item.label], item.name + item.extension)
        self.put(key, item.data)
        self.table.add(key, item)

    def close(self) -> None:
        self.put("metadata.csv", self.table.encoded())
        super().close()


def folder_of(name: str) -> str:
    """The class name where it is a safe folder name on every system, else a slug of it."""
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _-]{0,60}(?<! )", name)
    reserved = name.lower() in ("con", "prn", "aux", "nul") or re.fullmatch(
        r"(com|lpt)\d", name.lower()
    )
    return name if plain and not reserved else slug(name)
