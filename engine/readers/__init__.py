"""Readers: list images with their labels, groups and splits. A reader decodes nothing.

To add one, write `engine/readers/<name>.py` with a class `<Name>(Reader)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import pyarrow as pa

from engine.core.notice import Notice
from engine.core.rows import TaskKind
from engine.core.spec import Configured, S, Spec


class Bytes(Protocol):
    """The source of encoded images; picklable, opened in each worker."""

    def read(self, uri: str) -> bytes:
        """The encoded image. Raises `engine.data.images.Rejected` if it must not or cannot be
        read."""


class ReaderSpec(Spec):
    name: str


class Reader(Configured[S]):
    """Lists images."""

    version: ClassVar[int]

    def __init__(self, spec: S) -> None:
        self.spec = spec

    def tasks(self) -> Mapping[str, TaskKind]:
        """Names of the tasks, each `single` or `multi`; may read the header of a table."""
        raise NotImplementedError

    def records(self) -> pa.Table:
        """All images in a fixed order, in `rows.records_schema`. Raises `DataError` if the data
        cannot be used."""
        raise NotImplementedError

    def bytes(self) -> Bytes:
        """The source of the encoded images, by uri."""
        raise NotImplementedError

    def warnings(self) -> list[Notice]:
        """Warnings for the user; call after `records`."""
        return []

    def fingerprint(self) -> Mapping[str, str]:
        """Digests of the data that are cheap to compute, such as of the listing and the labels; a
        change after ingest stops the run."""
        raise NotImplementedError


def image_ids(uris: Sequence[str]) -> list[str]:
    """Ids from relative paths, so that an image keeps its id when its folder moves."""
    return [hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()[:24] for uri in uris]
