"""Parquet files for each split. Hugging Face's `datasets` opens them with pictures and class names:
`load_dataset("parquet", data_dir=…)`, or the folder itself."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from engine.core import rows
from engine.core.rows import TaskKind
from engine.core.store import Store
from engine.exporters import FIELDS, Exporter, Item

_ROW_GROUP = 256
_TYPES = {
    rows.SEED: pa.int64(), rows.STRENGTH: pa.float32(), rows.CLUSTER: pa.int32(),
    rows.WEIGHT: pa.float64(),
}  # fmt: skip


class Parquet(Exporter):
    # Bytes of images per file, approximately.
    file_bytes: ClassVar[int] = 256 * 2**20

    def __init__(self, target: Store, classes: Sequence[str]) -> None:
        super().__init__(target, classes)
        self.buffer: list[Item] = []
        self.bytes = self.number = 0

    def add(self, item: Item) -> None:
        if self.buffer and item.split != self.buffer[0].split:
            self._flush()
            self.number = 0
        elif self.bytes >= self.file_bytes:
            self._flush()
            self.number += 1
        self.buffer.append(item)
        self.bytes += len(item.data)

    def _flush(self) -> None:
        key = f"data/{self.buffer[0].split}-{self.number:05d}.parquet"
        self.put(key, encoded(self.buffer, self.classes, self.labels))
        self.wait()
        self.buffer, self.bytes = [], 0

    def close(self) -> None:
        if self.buffer:
            self._flush()
        super().close()


def encoded(
    items: list[Item], classes: tuple[str, ...], labels: Mapping[str, TaskKind] = {}
) -> bytes:
    """A Parquet file of images; classes are numbers, and the metadata has their names. labels:
    columns with the labels of several tasks, as text."""
    columns = {
        rows.IMAGE: pa.array(
            [{"bytes": item.data, "path": item.name + item.extension} for item in items],
            rows.IMAGE_TYPE,
        ),
        rows.LABEL: pa.array([classes.index(item.label) for item in items], pa.int64()),
        rows.IMAGE_ID: pa.array([item.image_id for item in items], pa.string()),
    }
    for name in FIELDS:
        columns[name] = pa.array(
            [item.fields.get(name) for item in items], _TYPES.get(name, pa.string())
        )
    for name, kind in labels.items():
        columns[name] = pa.array(
            [item.fields.get(name) for item in items],
            pa.string() if kind == "single" else pa.list_(pa.string()),
        )
    features: dict[str, Any] = {rows.IMAGE: {"_type": "Image"},
                rows.LABEL: {"_type": "ClassLabel", "names": list(classes)}}  # fmt: skip
    names = {"int64": "int64", "int32": "int32", "float": "float32", "double": "float64"}
    for name, column in columns.items():
        if name not in features:
            plain = {"_type": "Value", "dtype": names.get(str(column.type), "string")}
            several = pa.types.is_list(column.type)
            features[name] = {"_type": "Sequence", "feature": plain} if several else plain
    described = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table(columns).replace_schema_metadata(described)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP)
    return sink.getvalue()
