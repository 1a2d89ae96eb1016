"""Tar files in the format of WebDataset: members with the same key (`0001.jpg`, `0001.cls`,
`0001.json`) describe one image.

Images are read from the tars by offset; nothing is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from engine.core import rows
from engine.core.errors import DataError
from engine.core.ledger import Ledger
from engine.core.rows import TaskKind
from engine.data.images import EXTENSIONS, FOREIGN, MAX_BYTES, Rejected
from engine.data.source import Reopening, Source, ledger_of, not_data
from engine.readers import Reader, ReaderSpec, cell_text, image_ids
from engine.readers._image_tables import files_of, splits_of_files

_MOST_TEXT = 2**20


class WebdatasetSpec(ReaderSpec):
    name: Literal["webdataset"] = "webdataset"
    # A local folder or a URL such as s3://bucket/folder.
    root: str
    # Pattern of tars below the root, such as `train-*.tar`; None: all.
    files: str | None = None
    # Task name: extension of the member with its label (`cls`, `label.txt`), or a field of a JSON
    # member (`json:label`).
    labels: dict[str, str] = Field(default={"class": "cls"}, min_length=1)
    # Class names, if members contain class numbers.
    class_names: tuple[str, ...] = ()
    # Member or field of the group, written as for labels.
    group: str | None = None


class TarBytes(Reopening):
    """Images by `tar#offset+size#name`; picklable. Keeps one tar open."""

    _open: tuple[str, Any] | None = None

    def __init__(self, source: Source) -> None:
        self.source = source

    def read(self, uri: str) -> bytes:
        name, place, _ = (*uri.split("#", 2), "", "")[:3]
        offset, _, size = place.partition("+")
        if not (offset.isdigit() and size.isdigit()):
            raise Rejected("missing", uri[:100])
        if int(size) > MAX_BYTES:
            raise Rejected("too_large", f"{int(size):,} bytes")
        if self._open is None or self._open[0] != name:
            self._open = (name, self.source.open(name))
        file = self._open[1]
        file.seek(int(offset))
        data = file.read(int(size))
        if len(data) < int(size):
            raise Rejected("missing", f"{name[:100]} ends before it")
        return bytes(data)


class Webdataset(Reader[WebdatasetSpec]):
    version = 2
    file_per_image = False

    def _files(self) -> list[str]:
        source = Source(self.spec.root)
        self._listing = files_of(source, self.spec.files, ".tar")
        files = self._listing.names
        if odd := next((name for name in files if "#" in name or not name.isprintable()), None):
            raise DataError(
                f"reader.files: the name {odd!r} contains # or unprintable characters; rename it"
            )
        if not files:
            packed = next(iter(source.files((".tgz", ".gz", ".zst", ".bz2"))), None)
            raise DataError(
                f"reader.files: no tar in {self.spec.root}"
                + (f" matches {self.spec.files!r}" if self.spec.files else "")
                + (f"; {packed} is compressed, decompress it to .tar" if packed else "")
            )
        return files

    def tasks(self) -> Mapping[str, TaskKind]:
        return dict.fromkeys(self.spec.labels, "single")

    def records(self) -> pa.Table:
        spec, files = self.spec, self._files()
        source, splits = Source(spec.root), splits_of_files(files)
        columns: dict[str, list[Any]] = {
            name: [] for name in rows.records_schema(self.tasks()).names
        }
        self._others = Counter[str]()
        for name in files:
            for place, texts in samples(source, name, self._wanted(), self._others):
                columns[rows.IMAGE_ID].append(place)
                columns[rows.URI].append(place)
                for task, where in spec.labels.items():
                    label = self._label(text_at(texts, where), place)
                    columns[rows.label_column(task)].append(label)
                columns[rows.SPLIT].append(splits[name])
                columns[rows.GROUP_ID].append(text_at(texts, spec.group) if spec.group else None)
        if not columns[rows.URI]:
            dotted = [one for one in self._others if one.lower().endswith(tuple(EXTENSIONS))]
            hint = (
                ""
                if not dotted
                else (
                    f" (a name ends at its first dot, so {dotted[0]!r} is not an image: replace"
                    " other dots in the names)"
                )
            )
            raise DataError(f"reader.root: the tars in {spec.root} contain no images{hint}")
        columns[rows.IMAGE_ID] = image_ids(columns[rows.URI])
        return pa.table(columns, schema=rows.records_schema(self.tasks()))

    def _wanted(self) -> set[str]:
        """Extensions of the members with labels and groups."""
        wanted = [*self.spec.labels.values(), *([self.spec.group] if self.spec.group else [])]
        return {where.partition(":")[0] for where in wanted}

    def _label(self, text: str | None, place: str) -> str | None:
        names = self.spec.class_names
        if text is None or not names:
            return text
        if not text.isdigit() or int(text) >= len(names):
            raise DataError(
                f"reader.class_names: {place} has the class {text[:60]!r}, not a number below"
                f" {len(names)}"
            )
        return names[int(text)]

    def located(self) -> tuple[Source, Sequence[str]]:
        return Source(self.spec.root), self._files()

    def ledger(self) -> Ledger:
        return ledger_of(self._listing, self._others)

    def bytes(self) -> TarBytes:
        return TarBytes(Source(self.spec.root))

    def fingerprint(self) -> Mapping[str, str]:
        listed = self.records()
        return {"records": hashlib.sha256(repr(listed.to_pylist()).encode()).hexdigest()}


def samples(
    source: Source, name: str, wanted: set[str], others: Counter[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """For each image of a tar its uri, and the texts of the members with its key and a wanted
    extension. Skips links, devices and folders. Counts all other members in `others`, by
    extension."""
    key: str | None = None
    place: str | None = None
    texts: dict[str, str] = {}
    try:
        with source.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                path = PurePosixPath(member.name)
                if reason := not_data(str(path)):
                    others[reason] += 1
                    continue
                path.name.encode()  # raises if the name is not valid UTF-8
                stem, _, extension = path.name.partition(".")
                member_key = f"{path.parent}/{stem}"
                if member_key != key:
                    if place is not None:
                        yield place, texts
                    key, place, texts = member_key, None, {}
                if f".{extension.lower()}" in (*EXTENSIONS, *FOREIGN):
                    if place is not None:
                        raise DataError(
                            f"reader.files: {name}: {member.name} is a second image with the same"
                            " key; rename it"
                        )
                    place = f"{name}#{member.offset_data}+{member.size}#{path.name}"
                elif extension in wanted:
                    texts[extension] = _text(tar, member, name)
                else:
                    others[f".{extension}" if extension else "no extension"] += 1
            if place is not None:
                yield place, texts
            # tarfile takes damage and truncation for the end of the archive.
            file.seek(tar.offset)
            left = 0
            while rest := file.read(2**20):
                left += len(rest)
                if rest.count(0) < len(rest):
                    raise tarfile.ReadError(f"no valid member at byte {tar.offset:,}")
            if left < tarfile.BLOCKSIZE:
                raise tarfile.ReadError("truncated")
    except (
        tarfile.TarError, EOFError, ValueError, RecursionError, Rejected,
    ) as error:  # fmt: skip
        raise DataError(f"reader.files: {name} is not a complete tar: {str(error)[:120]}") from None


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> str:
    if member.size > _MOST_TEXT:
        raise DataError(
            f"reader.files: {name}: {member.name} has {member.size:,} bytes of text, more"
            f" than {_MOST_TEXT:,}"
        )
    file = tar.extractfile(member)
    assert file is not None, "a regular file has content"
    return file.read().decode().strip()


def text_at(texts: Mapping[str, str], where: str) -> str | None:
    """A label or a group: the text of a member (`cls`), or of a field of one (`json:label`)."""
    extension, _, field = where.partition(":")
    text = texts.get(extension)
    if text is None or not field:
        return cell_text(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"reader.labels: {where}: not valid JSON: {str(error)[:100]}") from None
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return cell_text(value)
