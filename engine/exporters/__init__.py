"""Exporters: a set of images in a format that other tools open. To add one, write
`engine/exporters/<name>.py` with `<Name>(Exporter)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from engine.core import rows
from engine.core.rows import TaskKind
from engine.core.store import Store

# Columns of each image in addition to its id and label.
FIELDS = (
    rows.SPLIT, rows.SOURCE, rows.GROUP_ID, rows.PROMPT, rows.NEGATIVE_PROMPT, rows.SEED,
    rows.PARENT_ID, rows.STRENGTH, rows.CLUSTER, rows.GENERATOR_KEY, rows.WEIGHT,
)  # fmt: skip
_THREADS = 8
_AHEAD = 256


@dataclass(frozen=True)
class Item:
    """One image: its encoded bytes, a safe file name, and its metadata."""

    data: bytes
    name: str
    extension: str
    image_id: str
    label: str
    # A value for each of `FIELDS` and of the exporter's `labels`; None if it does not apply.
    # Several labels are a list.
    fields: dict[str, Any]

    @property
    def split(self) -> str:
        return str(self.fields[rows.SPLIT])


class Exporter:
    """Writes to an empty folder or prefix. `add` is called once per image, split by split, then
    `close` once."""

    # Columns with the labels of each task, and their kinds, in a study with several labels per
    # image, whose classes are combinations; set before `add`.
    labels: Mapping[str, TaskKind] = {}

    def __init__(self, target: Store, classes: Sequence[str]) -> None:
        self.target, self.classes = target, tuple(classes)
        self._pool = ThreadPoolExecutor(_THREADS)
        self._waiting: list[Future[None]] = []

    def add(self, item: Item) -> None:
        """Write or buffer one image."""
        raise NotImplementedError

    def close(self) -> None:
        """Write all buffered images."""
        self.wait()
        self._pool.shutdown()

    def put(self, key: str, data: bytes) -> None:
        """Write a file on a thread; a later call raises its failure."""
        self._waiting.append(self._pool.submit(self.target.put, key, data))
        if len(self._waiting) >= _AHEAD:
            self.wait()

    def wait(self) -> None:
        """Wait for all writes. Raises the first failure."""
        for future in self._waiting:
            future.result()
        self._waiting.clear()


def metadata(item: Item) -> Iterator[tuple[str, Any]]:
    """Names and values of an image's id, label and fields, without missing ones."""
    yield rows.IMAGE_ID, item.image_id
    yield rows.LABEL, item.label
    for name, value in item.fields.items():
        if value is not None:
            yield name, value
