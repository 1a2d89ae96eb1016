"""Readers: what images there are, with their labels, groups and splits. A reader decodes nothing.

To add one, write `engine/readers/<name>.py` with a class `<Name>(Reader)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import pyarrow as pa

from engine.core.rows import TaskKind
from engine.core.spec import Spec


class Bytes(Protocol):
    """Where the bytes of an image come from; picklable, opened in each worker."""

    def read(self, uri: str) -> bytes:
        """The encoded image. Raises `engine.data.images.Rejected` for what must not or cannot be
        read."""
        ...


class ReaderSpec(Spec):
    name: str


class Reader:
    """Lists images."""

    version: ClassVar[int]
    Spec: ClassVar[type[ReaderSpec]]

    def tasks(self) -> Mapping[str, TaskKind]:
        """Names of the labelling tasks and whether each is `single` or `multi`; may read the
        table's head."""
        raise NotImplementedError

    def records(self) -> pa.Table:
        """All images in a fixed order, by `rows.records_schema`. Raises `DataError` on what cannot
        be used."""
        raise NotImplementedError

    def bytes(self) -> Bytes:
        raise NotImplementedError

    def warnings(self) -> list[str]:
        """What a person has to know of the images, once `records` has listed them."""
        return []

    def fingerprint(self) -> Mapping[str, str]:
        """What the data is, beyond the spec, as far as it is cheap to tell: digest of the listing
        and labels."""
        raise NotImplementedError


def image_ids(uris: Sequence[str]) -> list[str]:
    """Ids from relative paths, so that an image keeps its id wherever its folder lies."""
    return [hashlib.sha256(uri.encode("utf-8", "surrogateescape")).hexdigest()[:24] for uri in uris]
