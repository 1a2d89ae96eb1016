"""A table (CSV or TSV) with a path and labels for each image, and optionally a group and a split.

Each label column is a task. A column with several labels per image needs a separator.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from engine.core import rows
from engine.core.errors import DataError
from engine.core.ledger import Ledger
from engine.core.paths import expanded
from engine.core.rows import TaskKind
from engine.core.spec import explained
from engine.data.images import Rejected
from engine.data.source import Source
from engine.readers import Reader, ReaderSpec, cell_text, image_ids
from engine.readers.imagefolder import LISTED, SPLIT_NAMES

Encoding = Literal[
    "utf-8", "utf-16", "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "latin-1", "cp932",
    "cp949", "cp950", "gb18030",
]  # fmt: skip


class CsvSpec(ReaderSpec):
    name: Literal["csv"] = "csv"
    unkeyed_fields: ClassVar[tuple[str, ...]] = ("table",)
    later_fields: ClassVar[tuple[str, ...]] = (*ReaderSpec.later_fields, "encoding")

    # Folder of the images; `file` and the paths in it are relative to it.
    root: str
    file: str | None = None
    # A table elsewhere, such as next to a folder that must not be written to; replaces `file`.
    table: str | None = Field(default=None, min_length=1)
    path: str = "path"
    # Task name: column name.
    labels: dict[str, str] = Field(default={"class": "label"}, min_length=1)
    # Tasks with several labels per image. Task name: separator in the cell (`A|B`).
    multi: dict[str, str] = {}
    group: str | None = None
    split: str | None = None
    # Column of unique ids; None: ids come from paths.
    id: str | None = None
    # None: a tab for .tsv, else a comma.
    delimiter: str | None = Field(default=None, pattern=r"^[\t -~]$")
    # Of the table's text; older versions of Excel write that of their country.
    encoding: Encoding = "utf-8"

    @model_validator(mode="after")
    def _one_table(self) -> CsvSpec:
        if (self.file is None) == (self.table is None):
            raise explained("needs either file (a table below root) or table (a table elsewhere)")
        return self

    @property
    def table_name(self) -> str:
        return self.file or str(self.table)

    @property
    def where(self) -> str:
        """The table as errors name it."""
        return f"reader.{'table' if self.file is None else 'file'}: {self.table_name}"

    @model_validator(mode="after")
    def _multi_are_tasks(self) -> CsvSpec:
        unknown = sorted(set(self.multi) - set(self.labels))
        if unknown:
            raise explained(
                "multi names {task}, which is not a task; add it to labels", task=unknown[0]
            )  # fmt: skip
        return self


class TableBytes:
    """Files below the root; a path that does not exist is refused with the nearest one that does.
    Picklable."""

    def __init__(self, source: Source, nearest: Mapping[str, str]) -> None:
        self.source, self.nearest = source, nearest

    def read(self, uri: str) -> bytes:
        if uri in self.nearest:
            raise Rejected("missing", self.nearest[uri])
        return self.source.read(uri)


def nearest_files(paths: Iterable[str], names: Sequence[str], root: str) -> dict[str, str]:
    """For each path that is written differently from an existing file: what to change. names: the
    existing files. root: of both."""
    folder = os.path.realpath(expanded(root)) if "://" not in root else root.rstrip("/")
    by_form: dict[str, str] = {}
    by_stem: dict[str, str] = {}
    for name in names:
        by_form.setdefault(_folded(name), name)
        by_stem.setdefault(_folded(os.path.splitext(name)[0]), name)
        by_stem.setdefault(_folded(PurePosixPath(name).stem), name)
    hints = {}
    for path in filter(None, paths):
        plain = path.replace("\\", "/")
        inside = plain.removeprefix(folder).lstrip("/") if plain.startswith(folder) else plain
        inside = inside.removeprefix("./")
        nearest = by_form.get(_folded(inside)) or by_stem.get(_folded(os.path.splitext(inside)[0]))
        if nearest is None:
            continue
        if "\\" in path:
            how = "write / for \\"
        elif inside != plain:
            how = "write it relative to reader.root"
        elif nearest == inside:
            how = "write it without ./"
        elif unicodedata.normalize("NFC", nearest) == unicodedata.normalize("NFC", inside):
            how = "the names differ in their Unicode normal form (NFC or NFD)"
        elif nearest.casefold() == inside.casefold():
            how = "the names differ in case"
        else:
            how = "folder or extension differ"
        hints[path] = f"there is {nearest[:120]}: {how}"
    return hints


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class Csv(Reader[CsvSpec]):
    version = 2
    _nearest: Mapping[str, str] = {}

    def tasks(self) -> Mapping[str, TaskKind]:
        return {task: "multi" if task in self.spec.multi else "single" for task in self.spec.labels}

    def _text(self) -> bytes:
        spec = self.spec
        try:
            if spec.file is not None:
                return Source(spec.root).read(spec.file)
            path = expanded(str(spec.table))
            # The user named this very file, so a link to elsewhere is followed.
            folder, name = os.path.split(path if "://" in path else os.path.realpath(path))
            return Source(folder, field="reader.table").read(name)
        except Rejected as rejected:
            field = spec.where if spec.file is None else "reader.file"
            raise DataError(f"{field}: {rejected}") from None

    def records(self) -> pa.Table:
        spec = self.spec
        header, table = self._table()
        wanted = {
            "path": spec.path,
            **{f"labels.{task}": name for task, name in spec.labels.items()},
        }
        wanted |= {
            field: name for field in ("group", "split", "id") if (name := getattr(spec, field))
        }
        for field, name in wanted.items():
            if name not in header:
                others = [mark for mark in ";\t|" if len(header) == 1 and mark in header[0]]
                if others:
                    raise DataError(
                        f"reader.delimiter: the header of {spec.table_name} has one cell,"
                        f" {header[0][:80]!r}; set reader.delimiter to {others[0]!r}"
                    )
                raise DataError(
                    f"reader.{field}: {spec.table_name} has no column {name!r}; it has"
                    f" {', '.join(header)[:200]}"
                )
            if header.count(name) > 1:
                raise DataError(
                    f"reader.{field}: {spec.table_name} has several columns {name!r}; rename all"
                    " but one"
                )
        if not table:
            raise DataError(f"{spec.where} has no rows; add images")

        def texts(name: str) -> list[str | None]:
            column = header.index(name)
            return [cell_text(cells[column]) for cells in table]

        uris = [path or "" for path in texts(spec.path)]
        if spec.id and None in texts(spec.id):
            raise DataError(
                f"reader.id: column {spec.id!r} of {spec.table_name} has an empty cell; fill it"
            )
        columns: list[object] = [texts(spec.id) if spec.id else image_ids(uris), uris]
        for task, name in spec.labels.items():
            cells = texts(name)
            raw = [row[header.index(name)] for row in table]
            self.trimmed += [
                one for one, cell in zip(raw, cells, strict=True) if cell and cell != one
            ]
            if separator := spec.multi.get(task):
                columns.append(
                    [
                        [part.strip() for part in cell.split(separator)] if cell else None
                        for cell in cells
                    ]
                )
            else:
                columns.append(cells)
        none = [None] * len(table)
        columns.append(self._splits(texts(spec.split)) if spec.split else none)
        columns.append(texts(spec.group) if spec.group else none)
        self._account(uris)
        schema = rows.records_schema(self.tasks())
        return pa.table(
            [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)],
            schema=schema,
        )

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows, all cells as text, without blank lines. One parser reads both, so that
        an id 007 stays 007."""
        spec = self.spec
        delimiter = spec.delimiter or ("\t" if spec.table_name.lower().endswith(".tsv") else ",")
        try:
            text = self._text().decode(spec.encoding.replace("utf-8", "utf-8-sig"))
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise DataError(
                f"{spec.where}, line {line}: not {spec.encoding.upper()}; save the table as UTF-8,"
                " or set reader.encoding (Excel in Western Europe and America writes cp1252)"
            ) from None
        table: list[list[str]] = []
        header: list[str] = []
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        self._blank, before = 0, 0
        try:
            for cells in reader:
                line, before = before + 1, reader.line_num
                if not any(cells):
                    self._blank += 1
                    continue
                if not header:
                    header = [name.strip() for name in cells]
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{spec.where}, line {line}: {len(cells)} cells, but the header"
                        f" has {len(header)}; quote cells that contain {delimiter!r}"
                    )
                # A quote that opens a cell by mistake makes one cell of all lines up to the next.
                inner = [row for cell in cells for row in cell.splitlines()[1:]]
                if any(row.count(delimiter) >= len(header) - 1 for row in inner if row):
                    raise DataError(
                        f"{spec.where}, lines {line} to {before} are one row: a quote"
                        f' (") in line {line} opens a cell and the next one ends it; remove or'
                        " double it"
                    )
                if [cell.strip() for cell in cells] == header:
                    raise DataError(
                        f"{spec.where}, line {line}: the header again; remove this line"
                    )
                table.append(cells)
        except csv.Error as error:
            raise DataError(
                f"{spec.where}, line {before + 1}: {error} (a quote that does not"
                " belong there?); remove or double it"
            ) from None
        if not header:
            raise DataError(f"{spec.where} is empty; it needs a header and rows")
        return header, table

    def _account(self, uris: list[str]) -> None:
        """Compare the paths of the table with the files below the root."""
        listing = Source(self.spec.root).listing(lambda name: True)
        there, named = set(listing.names), set(uris)
        hidden = sum(listing.skipped.values())
        own = self.spec.file or ""
        if self.spec.table and "://" not in self.spec.root + self.spec.table:
            own = os.path.relpath(expanded(self.spec.table), expanded(self.spec.root))
        read = (named | {Path(own).as_posix()}) & there
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
        table = [self.spec.file] if self.spec.file else []
        return source, [*table, *(name for name in source.files(None) if name in named)]

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
        return {"table": hashlib.sha256(self._text()).hexdigest()}
