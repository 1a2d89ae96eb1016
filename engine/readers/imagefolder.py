"""A folder with one folder of images per class, optionally below split folders.

root/<class>/*.jpg            the study's `split` makes the splits
root/<split>/<class>/*.jpg    train, val (or validation, valid, dev) and test are kept
root/<group>/<class>/*.jpg    with `layout: [group, class]`, for example a folder per patient
root/<class>/<group>/*.jpg    with `layout: [class, group]`
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import ClassVar, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from engine.core import rows
from engine.core.errors import DataError
from engine.core.ledger import Ledger
from engine.core.rows import TaskKind
from engine.core.spec import explained
from engine.data.images import EXTENSIONS, FOREIGN
from engine.data.source import Source, ledger_of
from engine.readers import Reader, ReaderSpec, image_ids

SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip


LISTED = (*EXTENSIONS, *FOREIGN)


class FolderSpec(ReaderSpec):
    later_fields: ClassVar[tuple[str, ...]] = (*ReaderSpec.later_fields, "layout")

    # A local folder (relative to the current one) or a URL such as s3://bucket/folder.
    root: str
    # auto: the folders below the root are splits if all of them have names of splits.
    splits: Literal["auto", "folders", "none"] = "auto"
    # The group is the part of the file name before this separator: with "_", patient_001.png has
    # the group patient.
    group_separator: str | None = Field(default=None, min_length=1)
    # Meaning of the folder levels below the root (or below the split): a class, and optionally a
    # group.
    layout: tuple[Literal["class", "group"], ...] = ("class",)

    @model_validator(mode="after")
    def _possible(self) -> FolderSpec:
        if self.layout.count("class") != 1 or self.layout.count("group") > 1:
            raise explained("layout must be [class], [group, class] or [class, group]")
        if "group" in self.layout and self.group_separator is not None:
            raise explained("the group comes from layout or from group_separator; remove one")
        return self


class ImagefolderSpec(FolderSpec):
    name: Literal["imagefolder"] = "imagefolder"


class Imagefolder(Reader[FolderSpec]):
    version = 2
    Spec: ClassVar[type[ReaderSpec]] = ImagefolderSpec

    def tasks(self) -> Mapping[str, TaskKind]:
        return {"class": "single"}

    def records(self) -> pa.Table:
        source = Source(self.spec.root)
        folders = source.folders()
        with_splits = self.spec.splits == "folders" or (
            self.spec.splits == "auto"
            and bool(folders)
            and all(name.lower() in SPLIT_NAMES for name in folders)
        )
        named = [name for name in folders if name.lower() in SPLIT_NAMES]
        if self.spec.splits == "auto" and named and not with_splits:
            other = next(name for name in folders if name not in named)
            raise DataError(
                f"reader.root: the folder {named[0]!r} is named like a split, but {other!r} is not:"
                " remove folders that are not splits, or set splits: none if all are classes"
            )
        if links := source.linked_folders():
            raise DataError(
                f"reader.root: the folder {links[0]!r} is a link, and links are not followed;"
                " replace it with the real folder"
            )
        roles = [*(["split"] if with_splits else []), *self.spec.layout]
        uris, labels, splits, groups = [], [], [], []
        self._listing = source.listing(self.wanted)
        for uri in self._listing.names:
            if any("\udc80" <= char <= "\udcff" for char in uri):
                raise DataError(f"reader.root: the name {uri!r} is not UTF-8; rename the file")
            parts = PurePosixPath(uri).parts
            if len(parts) <= len(roles):
                place = "".join(f"<{role}>/" for role in roles)
                raise DataError(
                    f"reader.root: {uri} does not fit the layout {place}image; move it into a class"
                    " folder"
                )
            folder_of = dict(zip(roles, parts, strict=False))
            if with_splits and parts[0].lower() not in SPLIT_NAMES:
                raise DataError(
                    f"reader.root: the folder {parts[0]} is not a split; use train, val and test"
                )
            uris.append(uri)
            labels.append(folder_of["class"])
            splits.append(SPLIT_NAMES[parts[0].lower()] if with_splits else None)
            separator = self.spec.group_separator
            groups.append(
                PurePosixPath(uri).stem.split(separator)[0] if separator else folder_of.get("group")
            )
        if not uris:
            raise DataError(
                f"reader.root: no images in {self.spec.root} ({', '.join(sorted(EXTENSIONS))})"
            )
        self._refuse_outer_folder(uris, set(labels), len(roles))
        self._refuse_empty_classes(source, folders, with_splits, set(labels))
        return pa.table(
            [image_ids(uris), uris, labels, splits, groups],
            schema=rows.records_schema(self.tasks()),
        )

    def _refuse_outer_folder(self, uris: list[str], labels: set[str], depth: int) -> None:
        """One class whose images lie in several folders: the root is one level too high, as an
        unpacked archive often is."""
        parts = [PurePosixPath(uri).parts for uri in uris]
        inner = sorted({path[depth] for path in parts if len(path) > depth + 1})
        outer = {path[:depth] for path in parts}
        if len(labels) == len(outer) == 1 and len(inner) > 1:
            only = "/".join(next(iter(outer)))
            raise DataError(
                f"reader.root: all images lie in {only}, whose folders ({', '.join(inner)[:100]})"
                f" look like classes or splits; set reader.root to {self.spec.root.rstrip('/')}/"
                f"{only}"
            )

    def _refuse_empty_classes(
        self, source: Source, folders: list[str], with_splits: bool, labels: set[str]
    ) -> None:
        # A group need not have images of every class.
        if self.spec.layout[0] == "group":
            return
        if with_splits:
            train = [name for name in folders if SPLIT_NAMES.get(name.lower()) == "train"]
            folders = Source(f"{self.spec.root.rstrip('/')}/{train[0]}").folders() if train else []
        empty = [name for name in folders if name not in labels]
        if empty:
            raise DataError(
                f"reader.root: the class {empty[0]!r} has no images; add some or remove its folder"
                + (f" (and {len(empty) - 1} more)" if len(empty) > 1 else "")
            )

    def wanted(self, name: str) -> bool:
        """Whether a file is taken for an image."""
        return PurePosixPath(name).suffix.lower() in LISTED

    def located(self) -> tuple[Source, Sequence[str]]:
        source = Source(self.spec.root)
        return source, source.listing(self.wanted).names

    def ledger(self) -> Ledger:
        return ledger_of(self._listing)

    def bytes(self) -> Source:
        return Source(self.spec.root)

    def fingerprint(self) -> Mapping[str, str]:
        listing = "\n".join(Source(self.spec.root).listing(self.wanted).names)
        return {"listing": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()}
