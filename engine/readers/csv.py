"""Tables (CSV, TSV, or the first sheet of an Excel file) with a path and labels for each image, and
optionally a group and a split.

Each label column is a task. A column with several labels per image needs a separator; a task may
also have one column per label (`onehot`), or be read from words in a text (`keywords`). A row may
describe several images (`views`), such as both eyes of a patient.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from engine.core import rows
from engine.core.errors import DataError
from engine.core.ledger import Ledger
from engine.core.paths import expanded
from engine.core.rows import TaskKind
from engine.data.images import Rejected
from engine.data.source import Listing, Source
from engine.readers import Reader, cell_text, image_ids
from engine.readers._csv_spec import CsvSpec, View
from engine.readers._table_paths import (
    TableBytes,
    is_template,
    nearest_files,
    paths_of,
    template_columns,
)
from engine.readers._table_text import Table, read_table
from engine.readers.imagefolder import LISTED, SPLIT_NAMES

# Cells of a column for one label.
_YES, _NO = ("1", "1.0", "true", "yes", "x"), ("0", "0.0", "false", "no", "")
# Names of a list that are shown in an error.
_SHOWN = 3


class Csv(Reader[CsvSpec]):
    version = 2
    _nearest: Mapping[str, str] = {}

    def tasks(self) -> Mapping[str, TaskKind]:
        spec = self.spec
        kinds: dict[str, TaskKind] = {
            task: "multi" if task in spec.multi else "single" for task in spec.labels
        }
        return {**kinds, **dict.fromkeys(spec.onehot, "multi")}

    def _text(self, name: str) -> bytes:
        """The bytes of a table below the root, or of the one elsewhere."""
        spec = self.spec
        try:
            if spec.table is None:
                return Source(spec.root).read(name)
            path = expanded(name)
            # The user named this very file, so a link to elsewhere is followed.
            folder, name = os.path.split(path if "://" in path else os.path.realpath(path))
            return Source(folder, field="reader.table").read(name)
        except Rejected as rejected:
            if spec.table is not None:
                raise DataError(f"{spec.where}: {rejected}") from None
            raise DataError(f"reader.{'files' if spec.files else 'file'}: {rejected}") from None

    def records(self) -> pa.Table:
        spec = self.spec
        listing = Source(spec.root).listing(lambda name: True)
        parts, self._blank = [], 0
        for split, name in spec.tables:
            where = f"reader.files: {name}" if spec.files else spec.where
            table = read_table(self._text(name), name, where, spec.delimiter, spec.encoding)
            self._blank += table.blank
            self._check_columns(table, name)
            if not table.rows:
                raise DataError(f"{where} has no rows; add images")
            parts += [self._records_of(table, name, view, split, listing)
                      for view in spec.images_of_row]  # fmt: skip
        records = pa.concat_tables(parts).combine_chunks()
        uris = records[rows.URI].to_pylist()
        if spec.split_lists:
            place = records.schema.get_field_index(rows.SPLIT)
            splits = pa.array(self._splits_by_list(uris), pa.string())
            records = records.set_column(place, rows.SPLIT, splits)
        self._account(uris, listing)
        return records

    def _check_columns(self, table: Table, name: str) -> None:
        """Raise `DataError` for a column that is missing or there twice."""
        spec, header = self.spec, table.header
        wanted: list[tuple[str, str]] = []
        for number, view in enumerate(spec.images_of_row):
            field = f"views.{number}.path" if spec.views else "path"
            columns = template_columns(view.path) if is_template(view.path) else [view.path]
            wanted += [(field, column) for column in columns]
            wanted += [(f"views.{number}.labels.{task}", of) for task, of in view.labels.items()]
        in_views = [set(view.labels) for view in spec.views]
        wanted += [(f"labels.{task}", column) for task, column in spec.labels.items()
                   if not in_views or not all(task in of_view for of_view in in_views)]  # fmt: skip
        wanted += [(f"onehot.{task}", column)
                   for task, columns in spec.onehot.items() for column in columns]  # fmt: skip
        wanted += [(field, column) for field in ("group", "split", "id")
                   if (column := getattr(spec, field))]  # fmt: skip
        for field, column in wanted:
            if column not in header:
                others = [mark for mark in ";\t|" if len(header) == 1 and mark in header[0]]
                if others:
                    raise DataError(
                        f"reader.delimiter: the header of {name} has one cell,"
                        f" {header[0][:80]!r}; set reader.delimiter to {others[0]!r}"
                    )
                raise DataError(
                    f"reader.{field}: {name} has no column {column!r}; it has"
                    f" {', '.join(header)[:200]}"
                )
            if header.count(column) > 1:
                raise DataError(
                    f"reader.{field}: {name} has several columns {column!r}; rename all but one"
                )

    def _records_of(
        self, table: Table, name: str, view: View, split: str | None, listing: Listing
    ) -> pa.Table:
        """The images that one view of a table's rows describes."""
        spec, count = self.spec, len(table.rows)

        def texts(column: str) -> list[str | None]:
            return [cell_text(cell) for cell in table.column(column)]

        if is_template(view.path):
            cells = zip(*(texts(column) for column in template_columns(view.path)), strict=True)
            filled = [[cell or "" for cell in row] for row in cells]
            uris = paths_of(view.path, filled, listing.names, "reader.path")
        else:
            uris = [path or "" for path in texts(view.path)]
        if spec.id and None in texts(spec.id):
            raise DataError(f"reader.id: column {spec.id!r} of {name} has an empty cell; fill it")
        columns: list[Any] = [texts(spec.id) if spec.id else image_ids(uris), uris]
        for task in self.tasks():
            if task in spec.onehot:
                columns.append(self._onehot(table, name, task))
                continue
            column = view.labels.get(task, spec.labels[task])
            columns.append(self._labels(task, table.column(column), texts(column)))
        none = [None] * count
        columns.append(self._splits(texts(spec.split)) if spec.split else [split] * count)
        columns.append(texts(spec.group) if spec.group else none)
        schema = rows.records_schema(self.tasks())
        # A row may lack some of its images, such as one of two eyes.
        keep = [bool(uri) or not spec.views for uri in uris]
        records = pa.table(
            [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)],
            schema=schema,
        )
        return records.filter(pa.array(keep))

    def _labels(self, task: str, raw: Sequence[str], cells: Sequence[str | None]) -> list[Any]:
        """The labels of a task's column. raw: as written."""
        spec = self.spec
        if keywords := spec.keywords.get(task):
            fitting = [keywords.labels(cell) for cell in cells]
            if task in spec.multi:
                return [names or None for names in fitting]
            return [names[0] if names else None for names in fitting]
        self.trimmed += [
            written for written, cell in zip(raw, cells, strict=True) if cell and cell != written
        ]
        if separator := spec.multi.get(task):
            return [
                [part.strip() for part in cell.split(separator)] if cell else None for cell in cells
            ]
        return list(cells)

    def _onehot(self, table: Table, name: str, task: str) -> list[list[str] | None]:
        """The labels whose column says that they apply; None if all cells are empty."""
        columns = self.spec.onehot[task]
        of_column = [[cell.strip().lower() for cell in table.column(column)] for column in columns]
        for column, cells in zip(columns, of_column, strict=True):
            if unknown := next((cell for cell in cells if cell not in (*_YES, *_NO)), None):
                raise DataError(
                    f"reader.onehot.{task}: column {column!r} of {name} contains {unknown[:40]!r};"
                    " use 0 and 1"
                )
        return [
            [column for column, cell in zip(columns, cells, strict=True) if cell in _YES]
            if any(cells) else None
            for cells in zip(*of_column, strict=True)
        ]  # fmt: skip

    def _splits_by_list(self, uris: Sequence[str]) -> list[str | None]:
        """The split of each image by the lists of names; without one, train is what is in no
        list."""
        spec = self.spec
        split_of: dict[str, str] = {}
        for split, name in spec.split_lists.items():
            try:
                lines = Source(spec.root).read(name).decode("utf-8-sig").splitlines()
            except (Rejected, UnicodeDecodeError) as error:
                raise DataError(f"reader.split_lists.{split}: {name}: {error}") from None
            for line in filter(None, map(str.strip, lines)):
                if (
                    split_of.setdefault(line, SPLIT_NAMES[split.lower()])
                    != SPLIT_NAMES[split.lower()]
                ):
                    raise DataError(
                        f"reader.split_lists: {line!r} is in two lists; remove it from one"
                    )
        splits = [split_of.get(uri) or split_of.get(PurePosixPath(uri).name) for uri in uris]
        lacking = [uri for uri, split in zip(uris, splits, strict=True) if split is None]
        named_train = any(SPLIT_NAMES[split.lower()] == "train" for split in spec.split_lists)
        if lacking and (named_train or len(lacking) == len(uris)):
            raise DataError(
                f"reader.split_lists: {len(lacking):,} of {len(uris):,} images are in none of the"
                f" lists ({', '.join(lacking[:_SHOWN])}); the lists name files such as"
                f" {next(iter(split_of), 'none')!r}"
            )
        return splits

    def _account(self, uris: list[str], listing: Listing) -> None:
        """Compare the paths of the table with the files below the root."""
        there, named = set(listing.names), set(uris)
        hidden = sum(listing.skipped.values())
        spec = self.spec
        own = [name for _, name in spec.tables]
        if spec.table and "://" not in spec.root + spec.table:
            own = [os.path.relpath(expanded(spec.table), expanded(spec.root))]
        own = [Path(name).as_posix() for name in (*own, *spec.split_lists.values())]
        read = (named | set(own)) & there
        reason_of = {
            name: "not in the table" if PurePosixPath(name).suffix.lower() in LISTED else
            PurePosixPath(name).suffix.lower() or "no extension"
            for name in sorted(there - read, reverse=True)
        }  # fmt: skip
        self._ledger = Ledger(
            files=len(there) + hidden, read=len(read),
            skipped=dict(sorted({**listing.skipped, **Counter(reason_of.values())}.items())),
            first={reason: name for name, reason in reason_of.items()},
            entries={"blank lines": self._blank} if self._blank else {},
        )  # fmt: skip
        self._nearest = nearest_files(named - there, listing.names, self.spec.root)

    def located(self) -> tuple[Source, Sequence[str]]:
        source = Source(self.spec.root)
        named = set(self.records()[rows.URI].to_pylist())
        own = [] if self.spec.table else [name for _, name in self.spec.tables]
        own += self.spec.split_lists.values()
        return source, [*own, *(name for name in source.files(None) if name in named)]

    def ledger(self) -> Ledger:
        return self._ledger

    def _splits(self, cells: list[str | None]) -> list[str | None]:
        unknown = sorted({cell for cell in cells if cell and cell.lower() not in SPLIT_NAMES})
        if unknown:
            raise DataError(
                f"reader.split: {unknown[0][:60]!r} in column {self.spec.split!r} is not a split;"
                " use train, val or test, or leave the cell empty"
            )
        return [SPLIT_NAMES[cell.lower()] if cell else None for cell in cells]

    def bytes(self) -> TableBytes:
        return TableBytes(Source(self.spec.root), self._nearest)

    def fingerprint(self) -> Mapping[str, str]:
        spec = self.spec
        texts = [self._text(name) for _, name in spec.tables]
        texts += [Source(spec.root).read(name) for name in spec.split_lists.values()]
        if any(is_template(view.path) for view in spec.images_of_row):
            # Which files a template means depends on what is there.
            texts.append("\n".join(self.records()[rows.URI].to_pylist()).encode())
        whole = texts[0] if len(texts) == 1 else b"".join(
            hashlib.sha256(text).digest() for text in texts
        )  # fmt: skip
        return {"table": hashlib.sha256(whole).hexdigest()}
