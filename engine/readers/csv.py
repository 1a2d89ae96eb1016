"""A table (CSV or TSV) with a path and labels for each image, and optionally a group and a split.

Each label column is a task. A column with several labels per image needs a separator.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from typing import Literal

import pyarrow as pa
import pyarrow.csv
from pydantic import Field, model_validator

from engine.core import rows
from engine.core.errors import DataError, brief
from engine.core.rows import TaskKind
from engine.core.spec import explained
from engine.data.images import Rejected
from engine.data.source import Source
from engine.readers import Reader, ReaderSpec, image_ids
from engine.readers.imagefolder import SPLIT_NAMES


class CsvSpec(ReaderSpec):
    name: Literal["csv"] = "csv"
    # Folder of the images; `file` and the paths in it are relative to it.
    root: str
    file: str
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

    @model_validator(mode="after")
    def _multi_are_tasks(self) -> CsvSpec:
        unknown = sorted(set(self.multi) - set(self.labels))
        if unknown:
            raise explained(
                "multi names {task}, which is not a task; add it to labels", task=unknown[0]
            )  # fmt: skip
        return self


class Csv(Reader[CsvSpec]):
    version = 1

    def tasks(self) -> Mapping[str, TaskKind]:
        return {task: "multi" if task in self.spec.multi else "single" for task in self.spec.labels}

    def _text(self) -> bytes:
        try:
            return Source(self.spec.root).read(self.spec.file)
        except Rejected as rejected:
            raise DataError(f"reader.file: {rejected}") from None

    def records(self) -> pa.Table:
        spec = self.spec
        delimiter = spec.delimiter or ("\t" if spec.file.lower().endswith(".tsv") else ",")
        text = self._text()
        try:
            header = next(
                csv.reader(io.StringIO(text.decode("utf-8-sig")), delimiter=delimiter), []
            )
            table = pa.csv.read_csv(
                io.BytesIO(text),
                parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                # All cells are text, so an id 007 stays 007.
                convert_options=pa.csv.ConvertOptions(
                    column_types=dict.fromkeys(header, pa.string()),
                    strings_can_be_null=False,
                    quoted_strings_can_be_null=False,
                ),
            )
        except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"reader.file: {spec.file}: {brief(error)}") from None
        wanted = {
            "path": spec.path,
            **{f"labels.{task}": name for task, name in spec.labels.items()},
        }
        wanted |= {
            field: name for field in ("group", "split", "id") if (name := getattr(spec, field))
        }
        for field, name in wanted.items():
            if name not in table.column_names:
                raise DataError(
                    f"reader.{field}: {spec.file} has no column {name!r}; it has"
                    f" {', '.join(table.column_names)[:200]}"
                )
            if table.column_names.count(name) > 1:
                raise DataError(
                    f"reader.{field}: {spec.file} has several columns {name!r}; rename all but one"
                )
        if not table.num_rows:
            raise DataError(f"reader.file: {spec.file} has no rows; add images")

        def texts(name: str) -> list[str]:
            return [(cell or "").strip() for cell in table[name].cast(pa.string()).to_pylist()]

        uris = texts(spec.path)
        if spec.id and not all(texts(spec.id)):
            raise DataError(
                f"reader.id: column {spec.id!r} of {spec.file} has an empty cell; fill it"
            )
        columns: list[object] = [texts(spec.id) if spec.id else image_ids(uris), uris]
        for task, name in spec.labels.items():
            cells = texts(name)
            if separator := spec.multi.get(task):
                columns.append(
                    [
                        [part.strip() for part in cell.split(separator)] if cell else None
                        for cell in cells
                    ]
                )
            else:
                columns.append([cell or None for cell in cells])
        columns.append(self._splits(texts(spec.split)) if spec.split else [None] * table.num_rows)
        columns.append(
            [cell or None for cell in texts(spec.group)] if spec.group else [None] * table.num_rows
        )
        schema = rows.records_schema(self.tasks())
        return pa.table(
            [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)],
            schema=schema,
        )

    def _splits(self, cells: list[str]) -> list[str | None]:
        unknown = sorted({cell for cell in cells if cell and cell.lower() not in SPLIT_NAMES})
        if unknown:
            raise DataError(
                f"reader.split: {unknown[0][:60]!r} in column {self.spec.split!r} is not a split;"
                " use train, val or test, or leave the cell empty"
            )
        return [SPLIT_NAMES[cell.lower()] if cell else None for cell in cells]

    def bytes(self) -> Source:
        return Source(self.spec.root)

    def fingerprint(self) -> Mapping[str, str]:
        return {"table": hashlib.sha256(self._text()).hexdigest()}
