"""Records that show whether they have changed: JSON with the SHA-256 of its own text in front."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_HEAD, _TAIL = b'{"sha256":"', b'","record":'
_DIGITS = 64


def seal(record: Mapping[str, Any], indent: int | None = None) -> bytes:
    """The record as sealed JSON text; the order of its keys is kept."""
    text = json.dumps(record, indent=indent).encode()
    return _HEAD + hashlib.sha256(text).hexdigest().encode() + _TAIL + text + b"}"


def is_sealed(data: bytes) -> bool:
    """Whether this is a sealed record, damaged or not: versions before seals wrote neither mark."""
    return data.startswith(_HEAD) or _TAIL in data


def seal_bytes(data: bytes) -> bytes:
    """Any bytes with their SHA-256 (32 bytes) in front."""
    return hashlib.sha256(data).digest() + data


def unseal_bytes(sealed: bytes) -> bytes:
    """The bytes in sealed ones. Raises `ValueError` where a bit of them has changed."""
    data = sealed[hashlib.sha256().digest_size :]
    if seal_bytes(data) != sealed:
        raise ValueError("its digest does not match")
    return data


def unseal(data: bytes) -> dict[str, Any]:
    """The record in sealed text. Raises `ValueError` where a bit of it has changed."""
    text = data[len(_HEAD) + _DIGITS + len(_TAIL) : -1]
    if data != _HEAD + hashlib.sha256(text).hexdigest().encode() + _TAIL + text + b"}":
        raise ValueError("its digest does not match")
    return dict(json.loads(text))
