"""Shared by readers of tables that contain their images: columns to records."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pydantic import Field, model_validator

from engine.core import rows
from engine.core.errors import DataError
from engine.core.rows import TaskKind
from engine.core.spec import explained
from engine.data.images import MAX_BYTES, Rejected
from engine.data.source import Listing, Source
from engine.readers import ReaderSpec, cell_text, image_ids
from engine.readers.imagefolder import SPLIT_NAMES


class ImageTableSpec(ReaderSpec):
    # Image column: bytes, or Hugging Face's {bytes, path}.
    image: str = "image"
    # Task name: column name.
    labels: dict[str, str] = Field(default={"class": "label"}, min_length=1)
    # Tasks with several labels per image; their columns contain lists.
    multi: tuple[str, ...] = ()
    group: str | None = None
    # Split column; None: the split comes from file names or the dataset's own splits.
    split: str | None = None
    # Column of unique ids; None: ids come from file names and row numbers.
    id: str | None = None

    @model_validator(mode="after")
    def _multi_are_tasks(self) -> ImageTableSpec:
        if unknown := sorted(set(self.multi) - set(self.labels)):
            raise explained(
                "multi names {task}, which is not a task; add it to labels", task=unknown[0]
            )  # fmt: skip
        return self

    def columns(self) -> dict[str, str]:
        """All columns but the image column, by the field that names them."""
        return {f"labels.{task}": name for task, name in self.labels.items()} | {
            field: name for field in ("group", "split", "id") if (name := getattr(self, field))
        }


def check_columns(spec: ImageTableSpec, schema: pa.Schema, where: str) -> None:
    """Raises `DataError` if a column is missing, or contains lists but its task is not in
    `multi`, or the reverse."""
    columns = schema.names
    for field, name in {"image": spec.image, **spec.columns()}.items():
        if name not in columns:
            raise DataError(
                f"reader.{field}: {where} has no column {name!r}; it has {', '.join(columns)[:200]}"
            )

    list_types = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    for task, name in spec.labels.items():
        is_list = any(matches(schema.field(name).type) for matches in list_types)
        if is_list != (task in spec.multi):
            raise DataError(
                f"reader.multi: column {name!r} of {where} contains"
                f" {'lists; add' if is_list else 'no lists; remove'} the task {task!r}"
                f" {'to' if is_list else 'from'} multi"
            )


def tasks_of(spec: ImageTableSpec) -> dict[str, TaskKind]:
    """The tasks of a spec, each `single` or `multi`."""
    return {task: "multi" if task in spec.multi else "single" for task in spec.labels}


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Class names of numeric label columns, by column, from Hugging Face's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: names for name, feature in features.items() if (names := _names(feature))}
    except (KeyError, ValueError, TypeError):
        return {}


def _names(feature: Any) -> list[str] | None:
    if isinstance(feature, list):
        feature = feature[0]
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        feature = feature["feature"]
    return feature.get("names") if feature.get("_type") == "ClassLabel" else None


def to_records(
    spec: ImageTableSpec,
    table: pa.Table,
    tasks: Mapping[str, TaskKind],
    names: Mapping[str, list[str]],
    places: list[str],
    split: str | None,
    where: str,
) -> pa.Table:
    """Records of the rows of one file or split.

    table: all columns but the image column. names: class names by column. places: uris of the rows.
    split: of all rows, where no column gives it.
    """

    def text(column: str, value: Any) -> str | None:
        known = names.get(column)
        if known and isinstance(value, int) and not isinstance(value, bool):
            if not -1 <= value < len(known):
                raise DataError(
                    f"reader: {where}: column {column!r} contains {value}, but class numbers end at"
                    f" {len(known) - 1}"
                )
            return known[value] if value >= 0 else None  # -1 is Hugging Face's "no label"
        return cell_text(value)

    columns: list[Any] = []
    if spec.id:
        ids = [text(spec.id, value) for value in table[spec.id].to_pylist()]
        if None in ids:
            raise DataError(f"reader.id: column {spec.id!r} of {where} has an empty cell; fill it")
        columns.append(ids)
    else:
        columns.append(image_ids(places))
    columns.append(places)
    for task, kind in tasks.items():
        column = spec.labels[task]
        values = table[column].to_pylist()
        if kind == "single":
            columns.append([text(column, value) for value in values])
        else:
            columns.append(
                [None if labels is None else [text(column, label) for label in labels]
                 for labels in values]
            )  # fmt: skip
    if spec.split:
        columns.append([_split_named(spec, value) for value in table[spec.split].to_pylist()])
    else:
        columns.append([split] * table.num_rows)
    if spec.group:
        columns.append([text(spec.group, value) for value in table[spec.group].to_pylist()])
    else:
        columns.append([None] * table.num_rows)
    schema = rows.records_schema(tasks)
    return pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)],
        schema=schema,
    )


def _split_named(spec: ImageTableSpec, value: Any) -> str | None:
    text = cell_text(value)
    if text is None:
        return None
    name = text.lower()
    if name not in SPLIT_NAMES:
        raise DataError(
            f"reader.split: {str(value)[:60]!r} in column {spec.split!r} is not a split; use train,"
            " val or test, or leave the cell empty"
        )
    return SPLIT_NAMES[name]


def files_of(source: Source, wanted: str | None, extension: str) -> Listing:
    """Files with the extension whose paths match the pattern `wanted`; None: all."""
    listing = source.listing(lambda name: PurePosixPath(name).suffix.lower() == extension)
    names = [name for name in listing.names if fnmatch.fnmatch(name, wanted or "*")]
    others = len(listing.names) - len(names)
    skipped = {**listing.skipped, **({"not in reader.files": others} if others else {})}
    return Listing(names, skipped)


def splits_of_files(files: list[str]) -> dict[str, str | None]:
    """The split of each file by its name or folder (`train-00000-of-00002.parquet`, `test/0.tar`).

    Raises `DataError` if only some files name a split.
    """
    split_of: dict[str, str | None] = {}
    for file in files:
        words = [word for part in file.lower().split("/") for word in re.split(r"[-_.]", part)[:1]]
        named = [SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES]
        split_of[file] = named[-1] if named else None
    if None in split_of.values() and len(set(split_of.values())) > 1:
        without = next(file for file, split in split_of.items() if split is None)
        with_split = next(file for file, split in split_of.items() if split is not None)
        raise DataError(
            f"reader.files: {with_split} names a split, but {without} does not: rename {without},"
            " or exclude it by files"
        )
    return split_of


def bytes_of(value: Any, place: str) -> bytes:
    """The encoded image in a cell. Raises `Rejected` if the cell has none."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise Rejected("missing", f"{place[:100]} holds no bytes")
    if len(data) > MAX_BYTES:
        raise Rejected("too_large", f"{len(data):,} bytes")
    return data
