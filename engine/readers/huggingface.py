"""A dataset of Hugging Face's `datasets`, by id or by folder.

Its own splits are kept, and class numbers get their names. Needs the extra `huggingface`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

from engine.core import rows
from engine.core.errors import DataError, brief
from engine.core.rows import TaskKind
from engine.data.images import Rejected
from engine.data.source import Reopening, Source
from engine.readers import Reader
from engine.readers._image_tables import (
    ImageTableSpec,
    bytes_of,
    check_columns,
    class_names,
    tasks_of,
    to_records,
)
from engine.readers.imagefolder import SPLIT_NAMES


class HuggingfaceSpec(ImageTableSpec):
    name: Literal["huggingface"] = "huggingface"
    # Dataset id, or a folder.
    path: str
    # Configuration of the dataset.
    config: str | None = None
    # Commit or tag; set it to keep the data fixed.
    revision: str | None = None


class HuggingfaceBytes(Reopening):
    """Images by `split#row`; opened in each worker from the local cache."""

    _splits: dict[str, Any] | None = None

    def __init__(self, spec: HuggingfaceSpec) -> None:
        self.spec = spec

    def read(self, uri: str) -> bytes:
        if self._splits is None:
            # Only the image column: reading a row would decode other image columns too.
            self._splits = {
                name: split.select_columns([self.spec.image])
                for name, split in load(self.spec).items()
            }
        name, _, number = uri.rpartition("#")
        if name not in self._splits or not number.isdigit():
            raise Rejected("missing", uri[:100])
        dataset = self._splits[name]
        if int(number) >= len(dataset):
            raise Rejected("missing", uri[:100])
        cell = dataset[int(number)][self.spec.image]
        if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
            # A dataset of files: `datasets` gives their paths on this machine.
            return read_file(str(cell["path"]), self.spec.path, uri)
        return bytes_of(cell, uri)


class Huggingface(Reader[HuggingfaceSpec]):
    version = 2
    file_per_image = False

    def tasks(self) -> Mapping[str, TaskKind]:
        return tasks_of(self.spec)

    def records(self) -> pa.Table:
        spec, splits, tables = self.spec, load(self.spec), []
        tasks = self.tasks()
        for name, dataset in splits.items():
            schema = dataset.features.arrow_schema
            check_columns(spec, schema, f"{spec.path}, {name}")
            if spec.split is None and len(splits) > 1 and name.lower() not in SPLIT_NAMES:
                raise DataError(
                    f"reader.path: the dataset's split {name!r} is not train, val or test; set"
                    " split to a column, or choose another config"
                )
            table = dataset.select_columns(sorted(set(spec.columns().values()))).data.table
            places = [f"{name}#{row}" for row in range(len(dataset))]
            if table.num_rows != len(dataset):  # the dataset is a selection of rows, by indices
                table = dataset.flatten_indices().select_columns(table.column_names).data.table
            # A single split means that the dataset is not split.
            given = SPLIT_NAMES.get(name.lower()) if len(splits) > 1 else None
            tables.append(
                to_records(spec, table, tasks, class_names(schema), places, given, spec.path)
            )
        return pa.concat_tables(tables).combine_chunks()

    def bytes(self) -> HuggingfaceBytes:
        return HuggingfaceBytes(self.spec)

    def fingerprint(self) -> Mapping[str, str]:
        listed = self.records().drop_columns([rows.IMAGE_ID])
        return {"records": hashlib.sha256(repr(listed.to_pylist()).encode()).hexdigest()}


def read_file(path: str, dataset: str, uri: str) -> bytes:
    """A file in the dataset's folder or in the caches.

    Raises `Rejected` for other paths, which a hostile row may contain.
    """
    import datasets

    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE)
    for folder in (dataset, *map(str, caches)):
        if not os.path.isdir(folder):
            continue
        root, real = os.path.realpath(folder), os.path.realpath(path)
        if os.path.isabs(path) and os.path.commonpath([real, root]) == root:
            return Source(root).read(os.path.relpath(real, root))
    raise Rejected("path_not_allowed", f"{uri[:60]}: {path[:100]}")


def load(spec: HuggingfaceSpec) -> dict[str, Any]:
    """The dataset's splits, with undecoded images. Raises `DataError`."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            "reader: huggingface needs the package datasets; run pip install datasets"
        ) from None
    try:
        loaded = datasets.load_dataset(spec.path, spec.config, revision=spec.revision)
    except Exception as error:  # hubs, archives and scripts each raise their own errors
        raise DataError(f"reader.path: {spec.path}: {brief(error)}") from None
    splits = {}
    for name, split in loaded.items():
        if isinstance(split.features.get(spec.image), datasets.Image):
            split = split.cast_column(spec.image, datasets.Image(decode=False))
        splits[str(name)] = split
    return splits
