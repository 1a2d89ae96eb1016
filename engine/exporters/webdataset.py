"""Tar files for each split, in the format of WebDataset: each image has the members `<image>.png`,
`.cls` (class number) and `.json` (metadata). The reader `webdataset` reads them back."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from typing import ClassVar

from engine.core.store import Store
from engine.exporters import Exporter, Item, metadata


class Webdataset(Exporter):
    # Images per tar, and approximate bytes per tar.
    per_tar: ClassVar[int] = 1000
    tar_bytes: ClassVar[int] = 256 * 2**20

    def __init__(self, target: Store, classes: Sequence[str]) -> None:
        super().__init__(target, classes)
        self.split, self.number, self.count = "", 0, 0
        self._begin()

    def _begin(self) -> None:
        self.sink, self.count = io.BytesIO(), 0
        self.tar = tarfile.open(fileobj=self.sink, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, item: Item) -> None:
        if item.split != self.split:
            self._flush()
            self.split, self.number = item.split, 0
        elif self.count == self.per_tar or self.sink.tell() > self.tar_bytes:
            self._flush()
            self.number += 1
        described = json.dumps(dict(metadata(item)), ensure_ascii=False).encode()
        number = str(self.classes.index(item.label)).encode()
        for extension, data in (
            (item.extension, item.data), (".cls", number), (".json", described),
        ):  # fmt: skip
            member = tarfile.TarInfo(item.name + extension)
            member.size = len(data)
            self.tar.addfile(member, io.BytesIO(data))
        self.count += 1

    def _flush(self) -> None:
        self.tar.close()
        if self.count:
            self.put(f"{self.split}-{self.number:06d}.tar", self.sink.getvalue())
            self.wait()
        self._begin()

    def close(self) -> None:
        self._flush()
        super().close()
