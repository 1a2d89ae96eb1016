"""A dataset of Hugging Face's `datasets`, by id or by folder.

Needs the extra `huggingface` (pip install datasets). Its own splits are kept; class numbers get
their names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pyarrow as pa

from engine.core import rows
from engine.core.errors import DataError
from engine.core.rows import TaskKind
from engine.data.images import Rejected
from engine.data.source import Source
from engine.readers import Reader, ReaderSpec
from engine.readers._columns import (
    ColumnsSpec,
    bytes_of,
    check_columns,
    class_names,
    tasks_of,
    to_records,
)
from engine.readers.imagefolder import SPLIT_NAMES


class HuggingfaceSpec(ColumnsSpec):
    name: Literal["huggingface"] = "huggingface"
    # The id of a dataset, or a folder.
    path: str
    # One of the dataset's configurations.
    config: str | None = None
    # A commit or a tag; name one, so that the data stay the same.
    revision: str | None = None


class HuggingfaceBytes:
    """Images by `split#row`; opened in each worker, from the cache that the first has filled."""

    def __init__(self, spec: HuggingfaceSpec) -> None:
        self.spec = spec
        self._splits: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "_splits": None}

    def read(self, uri: str) -> bytes:
        if self._splits is None:
            # The image alone: reading a row decodes its other pictures.
            self._splits = {
                name: held.select_columns([self.spec.image])
                for name, held in load(self.spec).items()
            }
        split, _, number = uri.rpartition("#")
        if split not in self._splits or not number.isdigit():
            raise Rejected("missing", uri[:100])
        held = self._splits[split]
        if int(number) >= len(held):
            raise Rejected("missing", uri[:100])
        cell = held[int(number)][self.spec.image]
        if isinstance(cell, dict) and cell.get("bytes") is None and cell.get("path"):
            # A dataset of files: `datasets` names where they lie on this machine.
            return read_file(str(cell["path"]), self.spec.path, uri)
        return bytes_of(cell, uri)


class Huggingface(Reader):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[ReaderSpec]] = HuggingfaceSpec

    def __init__(self, spec: HuggingfaceSpec) -> None:
        self.spec = spec

    def tasks(self) -> Mapping[str, TaskKind]:
        return tasks_of(self.spec)

    def records(self) -> pa.Table:
        spec, splits, tables = self.spec, load(self.spec), []
        tasks = self.tasks()
        for name, held in splits.items():
            check_columns(spec, held.features.arrow_schema, f"{spec.path}, {name}")
            if spec.split is None and len(splits) > 1 and name.lower() not in SPLIT_NAMES:
                raise DataError(
                    f"reader.path: the dataset's split {name!r} is none of train, val and test;"
                    " name a column by split, or another config"
                )
            schema = held.features.arrow_schema
            table = held.select_columns(sorted(set(spec.columns().values()))).data.table
            places = [f"{name}#{row}" for row in range(len(held))]
            if table.num_rows != len(held):  # a selection of rows, by indices
                table = held.flatten_indices().select_columns(table.column_names).data.table
            split = SPLIT_NAMES.get(name.lower())
            # A dataset with one split has not been split.
            given = split if len(splits) > 1 else None
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
    """A file of the dataset's own folder or of the caches. Raises `Rejected` for any other, which
    a hostile row may name."""
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
    """The dataset's splits, images as they are stored. Raises `DataError`."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            "reader: huggingface needs the package datasets; pip install datasets"
        ) from None
    try:
        held = datasets.load_dataset(spec.path, spec.config, revision=spec.revision)
    except Exception as error:  # a hub, an archive, a script: each has errors of its own
        text = " ".join(str(error).split())[:200]
        raise DataError(f"reader.path: {spec.path}: {text}") from None
    found = {}
    for name, split in held.items():
        if isinstance(split.features.get(spec.image), datasets.Image):
            split = split.cast_column(spec.image, datasets.Image(decode=False))
        found[str(name)] = split
    return found
