"""Parquet files whose rows contain the images, as Hugging Face's datasets write them.

Class names come from the file's metadata. Splits come from file names
(`train-00000-of-00002.parquet`, `test/0000.parquet`) or from a column.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from engine.core import rows
from engine.core.errors import DataError, StorageError
from engine.core.ledger import Ledger
from engine.core.rows import TaskKind
from engine.data.images import Rejected
from engine.data.source import Reopening, Source, ledger_of
from engine.readers import Reader
from engine.readers._image_tables import (
    ImageTableSpec,
    bytes_of,
    check_columns,
    class_names,
    files_of,
    splits_of_files,
    tasks_of,
    to_records,
)


class ParquetSpec(ImageTableSpec):
    name: Literal["parquet"] = "parquet"
    # A local folder or a URL such as s3://bucket/folder.
    root: str
    # Pattern of files below the root, such as `data/train-*.parquet`; None: all.
    files: str | None = None


_GROUP_BYTES = 2 * 2**30


def refuse_large_groups(metadata: Any, image: str, name: str, most: int = _GROUP_BYTES) -> None:
    """Raises `DataError` if a row group has more than `most` bytes of images: it is read at
    once."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = (group.column(place) for place in range(group.num_columns))
        size = sum(
            column.total_uncompressed_size for column in columns
            if column.path_in_schema.split(".")[0] == image
        )  # fmt: skip
        if size > most:
            raise DataError(
                f"reader.files: {name}: a row group has {size / 2**30:.1f} GiB of images, and row"
                " groups are read at once; rewrite the file with smaller ones (row_group_size=256)"
            )


class ParquetBytes(Reopening):
    """Images by `file#row`; picklable. Keeps one row group in memory, because shards are
    consecutive rows."""

    _file: tuple[str, Any, list[int]] | None = None
    _group: tuple[str, int, pa.ChunkedArray] | None = None

    def __init__(self, source: Source, image: str) -> None:
        self.source, self.image = source, image

    def read(self, uri: str) -> bytes:
        name, _, number = uri.rpartition("#")
        if not number.isdigit():
            raise Rejected("missing", uri[:100])
        row = int(number)
        if self._file is None or self._file[0] != name:
            try:
                file = pq.ParquetFile(self.source.open(name))
            except pa.ArrowException as error:
                raise Rejected("not_decodable", f"{name[:100]}: {str(error)[:100]}") from None
            starts = [0]
            for group in range(file.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            self._file, self._group = (name, file, starts), None
        _, file, starts = self._file
        if row >= starts[-1]:
            raise Rejected("missing", f"{name[:100]} has {starts[-1]} rows")
        group = bisect_right(starts, row) - 1
        if self._group is None or self._group[1] != group:
            try:
                column = file.read_row_group(group, columns=[self.image])[self.image]
            except pa.ArrowException as error:
                raise Rejected("not_decodable", f"{name[:100]}: {str(error)[:100]}") from None
            except OSError as error:
                if self.source.local:  # pyarrow raises OSError for a damaged page
                    raise Rejected("not_decodable", f"{name[:100]}: {str(error)[:100]}") from None
                raise StorageError(f"reader.root: {name[:100]}: {str(error)[:200]}") from error
            self._group = (name, group, column)
        return bytes_of(self._group[2][row - starts[group]].as_py(), uri)


class Parquet(Reader[ParquetSpec]):
    version = 2
    file_per_image = False

    def _files(self) -> list[str]:
        self._listing = files_of(Source(self.spec.root), self.spec.files, ".parquet")
        files = self._listing.names
        if not files:
            raise DataError(
                f"reader.files: no Parquet file in {self.spec.root}"
                + (f" matches {self.spec.files!r}" if self.spec.files else "")
            )
        return files

    def _open(self, name: str) -> Any:
        try:
            return pq.ParquetFile(Source(self.spec.root).open(name))
        except (pa.ArrowException, OSError, Rejected) as error:
            raise DataError(
                f"reader.files: {name} is not a readable Parquet file: {str(error)[:120]}"
            ) from None

    def tasks(self) -> Mapping[str, TaskKind]:
        return tasks_of(self.spec)

    def records(self) -> pa.Table:
        spec, files = self.spec, self._files()
        tasks = self.tasks()
        splits = dict.fromkeys(files) if spec.split else splits_of_files(files)
        tables = []
        for name in files:
            file = self._open(name)
            check_columns(spec, file.schema_arrow, name)
            refuse_large_groups(file.metadata, spec.image, name)
            try:
                table = file.read(columns=sorted(set(spec.columns().values())))
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"reader.files: {name}: {str(error)[:120]}") from None
            places = [f"{name}#{row}" for row in range(table.num_rows)]
            tables.append(
                to_records(
                    spec, table, tasks, class_names(file.schema_arrow), places, splits[name], name
                )
            )
        records = pa.concat_tables(tables).combine_chunks()
        if not records.num_rows:
            raise DataError(f"reader.root: the Parquet files in {spec.root} have no rows")
        return records

    def located(self) -> tuple[Source, Sequence[str]]:
        return Source(self.spec.root), self._files()

    def ledger(self) -> Ledger:
        return ledger_of(self._listing)

    def bytes(self) -> ParquetBytes:
        return ParquetBytes(Source(self.spec.root), self.spec.image)

    def fingerprint(self) -> Mapping[str, str]:
        hasher = hashlib.sha256()
        for name in self._files():
            file = self._open(name)
            chunks = [
                file.metadata.row_group(group).total_byte_size
                for group in range(file.num_row_groups)
            ]
            hasher.update(f"{name} {file.metadata.num_rows} {chunks}\n".encode())
        labels = self.records().drop_columns([rows.IMAGE_ID])
        # The text of one list of all rows, in batches: the whole list would need a hundred times
        # the memory.
        hasher.update(b"[")
        for number, batch in enumerate(labels.to_batches(max_chunksize=1024)):
            text = repr(batch.to_pylist())[1:-1]
            hasher.update((f", {text}" if number else text).encode())
        hasher.update(b"]")
        return {"files": hasher.hexdigest()}
