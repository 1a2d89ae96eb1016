"""Readers: list images with their labels, groups and splits. A reader decodes nothing.

To add one, write `engine/readers/<name>.py` with a class `<Name>(Reader)`.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa
from typing_extensions import TypeVar

from engine.core import rows
from engine.core.errors import DataError
from engine.core.ledger import Ledger
from engine.core.notice import Notice
from engine.core.rows import TaskKind
from engine.core.spec import ClassName, Configured, Spec
from engine.data.source import Source


class Bytes(Protocol):
    """The source of encoded images; picklable, opened in each worker."""

    def read(self, uri: str) -> bytes:
        """The encoded image. Raises `engine.data.images.Rejected` if it must not or cannot be
        read."""


class ReaderSpec(Spec):
    later_fields: ClassVar[tuple[str, ...]] = ("exclude", "classes", "rename", "unlabelled")

    name: str
    # Images to leave out: paths, or patterns such as `*/duplicates/*`.
    exclude: tuple[str, ...] = ()
    # The classes of the study's task to use; empty: all.
    classes: tuple[ClassName, ...] = ()
    # Classes of the study's task that are to be called by another name, which may be another
    # class's: both become one.
    rename: dict[ClassName, ClassName] = {}
    # keep: an image without a label stops the study. drop: it is left out.
    unlabelled: Literal["keep", "drop"] = "keep"


R = TypeVar("R", bound=ReaderSpec, default=Any)


class Reader(Configured[R]):
    """Lists images."""

    version: ClassVar[int]
    # Whether each image is a file of its own.
    file_per_image: ClassVar[bool] = True

    def __init__(self, spec: R) -> None:
        self.spec = spec
        # Images that `chosen` left out.
        self.excluded = 0
        # Labels that had spaces around them, as they were written.
        self.trimmed: list[str] = []

    def tasks(self) -> Mapping[str, TaskKind]:
        """Names of the tasks, each `single` or `multi`; may read the header of a table."""
        raise NotImplementedError

    def records(self) -> pa.Table:
        """All images in a fixed order, in `rows.records_schema`. Raises `DataError` if the data
        cannot be used."""
        raise NotImplementedError

    def chosen(self, task: str) -> pa.Table:
        """The records without those that the spec leaves out. Raises `DataError` if a pattern or a
        class matches nothing."""
        records, spec = self.records(), self.spec
        keep = np.ones(records.num_rows, bool)
        uris = records[rows.URI].to_pylist()
        for pattern in spec.exclude:
            matches = [uri == pattern or fnmatch.fnmatchcase(uri, pattern) for uri in uris]
            if not any(matches):
                raise DataError(
                    f"reader.exclude: {pattern!r} matches no image{_meant(pattern, uris)}"
                )
            keep &= ~np.asarray(matches)
        if spec.rename:
            records = _renamed(records, task, spec.rename)
        if spec.classes:
            labels = records[rows.label_column(task)].to_pylist()
            if unknown := sorted(set(spec.classes) - {str(label) for label in labels}):
                known = ", ".join(sorted({label for label in labels if isinstance(label, str)}))
                raise DataError(
                    f"reader.classes: unknown class {unknown[0]!r}; choose from {known[:200]}"
                )
            keep &= np.asarray([label in spec.classes for label in labels])
        if spec.unlabelled == "drop" and rows.label_column(task) in records.column_names:
            keep &= ~np.asarray(records[rows.label_column(task)].is_null())
        self.excluded = int((~keep).sum())
        return records.filter(pa.array(keep))

    def bytes(self) -> Bytes:
        """The source of the encoded images, by uri."""
        raise NotImplementedError

    def warnings(self) -> list[Notice]:
        """Warnings for the user; call after `records`."""
        return []

    def located(self) -> tuple[Source, Sequence[str]] | None:
        """The files that the records and images come from, by path below the source; None if there
        are none."""
        return None

    def ledger(self) -> Ledger | None:
        """Every file below the root, and what became of it; None where there are no files. Call
        after `records`."""
        return None

    def fingerprint(self) -> Mapping[str, str]:
        """Digests of the data that are cheap to compute, such as of the listing and the labels; a
        change after ingest stops the run."""
        raise NotImplementedError


def _renamed(records: pa.Table, task: str, names: Mapping[str, str]) -> pa.Table:
    """The records with other names of classes. Raises `DataError` for a name that is not there."""
    column = rows.label_column(task)
    if not pa.types.is_string(records[column].type):
        raise DataError(f"reader.rename: {task} has several labels per image; rename in the data")
    labels = records[column].to_pylist()
    if unknown := sorted(set(names) - {label for label in labels if isinstance(label, str)}):
        known = ", ".join(sorted({label for label in labels if isinstance(label, str)}))
        raise DataError(f"reader.rename: unknown class {unknown[0]!r}; choose from {known[:200]}")
    values = pa.array([names.get(label, label) for label in labels], pa.string())
    return records.set_column(records.schema.get_field_index(column), column, values)


def _meant(pattern: str, uris: Sequence[str]) -> str:
    """What to change in a pattern that matches nothing."""
    folded = [uri for uri in uris if fnmatch.fnmatchcase(uri.casefold(), pattern.casefold())]
    if folded:
        return f", but {folded[0]!r} differs only in case; write it as it is"
    deeper = [uri for uri in uris if fnmatch.fnmatchcase(uri, f"*/{pattern}")]
    if deeper:
        return f"; paths begin below root: '*/{pattern}' matches {len(deeper):,}"
    return f"; remove it, or write a path such as {uris[0]!r}" if uris else "; remove it"


def cell_text(value: Any) -> str | None:
    """The text of a cell with a label, a group or a split; None if the value is missing: null, NaN,
    or empty. Text stays as it is, also "NA".

    Whole numbers have no decimals: a column of numbers with missing ones is stored as floats.
    """
    if value is None or value != value:  # NaN differs from itself
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def image_ids(uris: Sequence[str]) -> list[str]:
    """Ids from relative paths, so that an image keeps its id when its folder moves."""
    return [hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()[:24] for uri in uris]
