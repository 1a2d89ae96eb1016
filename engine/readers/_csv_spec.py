"""The settings of the reader `csv`."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from engine.core.spec import ClassName, Spec, explained
from engine.readers import ReaderSpec
from engine.readers.imagefolder import SPLIT_NAMES

Encoding = Literal[
    "utf-8", "utf-16", "cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "latin-1", "cp932",
    "cp949", "cp950", "gb18030",
]  # fmt: skip


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class View(Spec):
    """One of several images of a row: its column or template of paths, and columns of labels that
    differ from the reader's."""

    path: str
    labels: dict[str, str] = {}


class Keywords(Spec):
    """Classes from words in a text, such as a column of diagnoses. patterns: regular expressions by
    class, in the order in which they are tried; case does not matter. otherwise: the class of a
    text that none fits; None: it has no label."""

    patterns: Annotated[dict[ClassName, str], Field(min_length=1)]
    otherwise: ClassName | None = None

    @model_validator(mode="after")
    def _are_patterns(self) -> Keywords:
        for name, pattern in self.patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise explained(
                    "patterns.{name}: {pattern} is not a regular expression: {error}",
                    name=name, pattern=repr(pattern[:60]), error=str(error),
                ) from None  # fmt: skip
        return self

    def labels(self, text: str | None) -> list[str]:
        """All classes whose pattern fits the text, in their order."""
        if text is None:
            return []
        fitting = [name for name, pattern in self.patterns.items()
                   if re.search(pattern, text, re.IGNORECASE)]  # fmt: skip
        return fitting or ([self.otherwise] if self.otherwise is not None else [])


class CsvSpec(ReaderSpec):
    name: Literal["csv"] = "csv"
    unkeyed_fields: ClassVar[tuple[str, ...]] = ("table",)
    later_fields: ClassVar[tuple[str, ...]] = (
        *ReaderSpec.later_fields, "encoding", "files", "split_lists", "views", "onehot", "keywords",
    )  # fmt: skip

    # Folder of the images; `file` and the paths in it are relative to it.
    root: str
    file: str | None = None
    # A table elsewhere, such as next to a folder that must not be written to; replaces `file`.
    table: str | None = Field(default=None, min_length=1)
    # Several tables below root with the same columns, by split; replaces `file`.
    files: dict[str, Annotated[tuple[str, ...], BeforeValidator(_as_list)]] = {}
    # Column of paths; or a template of paths with names of columns, such as images_*/{id}.png.
    path: str = "path"
    # Several images per row; replaces `path`.
    views: tuple[View, ...] = ()
    # Task name: column name.
    labels: dict[str, str] = {"class": "label"}
    # Tasks with several labels per image. Task name: separator in the cell (`A|B`).
    multi: dict[str, str] = {}
    # Tasks with several labels per image. Task name: a column for each label, of 0 and 1.
    onehot: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = {}
    # Tasks whose column is a text that names the class.
    keywords: dict[str, Keywords] = {}
    group: str | None = None
    split: str | None = None
    # Text files below root with a path or file name per line, by split.
    split_lists: dict[str, str] = {}
    # Column of unique ids; None: ids come from paths.
    id: str | None = None
    # None: a tab for .tsv, else a comma.
    delimiter: str | None = Field(default=None, pattern=r"^[\t -~]$")
    # Of the table's text; older versions of Excel write that of their country.
    encoding: Encoding = "utf-8"

    @model_validator(mode="before")
    @classmethod
    def _labels_by_column(cls, values: Any) -> Any:
        """With columns for each label, there need not be a column `label`."""
        if isinstance(values, dict) and values.get("onehot") and "labels" not in values:
            return {**values, "labels": {}}
        return values

    @model_validator(mode="after")
    def _one_table(self) -> CsvSpec:
        given = [self.file is not None, self.table is not None, bool(self.files)]
        if sum(given) != 1:
            raise explained(
                "needs either file (a table below root), table (a table elsewhere) or files (a"
                " table for each split)"
            )
        for field in ("files", "split_lists"):
            for split in getattr(self, field):
                if split.lower() not in SPLIT_NAMES:
                    raise explained(
                        "{field}: {split} is not a split; use train, val or test",
                        field=field, split=repr(split),
                    )  # fmt: skip
        if (self.split and (self.files or self.split_lists)) or (self.files and self.split_lists):
            raise explained("split, files and split_lists exclude each other; keep one")
        if self.id and len(self.views) > 1:
            raise explained("id names rows, and views gives a row several images; remove id")
        return self

    @model_validator(mode="after")
    def _tasks_are_known(self) -> CsvSpec:
        if not self.labels and not self.onehot:
            raise explained("needs a task: set labels or onehot")
        if both := sorted(set(self.labels) & set(self.onehot)):
            raise explained("onehot: {task} is in labels too; remove it there", task=both[0])
        for field in ("multi", "keywords"):
            if unknown := sorted(set(getattr(self, field)) - set(self.labels)):
                raise explained(
                    "{field} names {task}, which is not a task; add it to labels",
                    field=field, task=unknown[0],
                )  # fmt: skip
        for view in self.views:
            if unknown := sorted(set(view.labels) - set(self.labels)):
                raise explained(
                    "views: {task} is not a task; add it to labels", task=repr(unknown[0])
                )
        return self

    @property
    def table_name(self) -> str:
        return self.file or str(self.table)

    @property
    def where(self) -> str:
        """The table as errors name it."""
        return f"reader.{'table' if self.file is None else 'file'}: {self.table_name}"

    @property
    def tables(self) -> list[tuple[str | None, str]]:
        """The split and the name of each table."""
        if not self.files:
            return [(None, self.table_name)]
        return [(SPLIT_NAMES[split.lower()], name)
                for split, names in self.files.items() for name in names]  # fmt: skip

    @property
    def images_of_row(self) -> tuple[View, ...]:
        return self.views or (View(path=self.path),)
