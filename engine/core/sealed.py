"""Tamper-evident records: JSON text preceded by its own SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_HEAD, _TAIL = b'{"sha256":"', b'","record":'
_DIGITS = 64


def seal(record: Mapping[str, Any], indent: int | None = None) -> bytes:
    """The record as sealed JSON text, with the keys in their order."""
    text = json.dumps(record, indent=indent).encode()
    return _HEAD + hashlib.sha256(text).hexdigest().encode() + _TAIL + text + b"}"


def is_sealed(data: bytes) -> bool:
    """Whether this is a sealed record, intact or damaged. Versions before seals wrote neither
    mark."""
    return data.startswith(_HEAD) or _TAIL in data


def seal_bytes(data: bytes) -> bytes:
    """The bytes preceded by their SHA-256 (32 bytes)."""
    return hashlib.sha256(data).digest() + data


def unseal_bytes(sealed: bytes) -> bytes:
    """The content of sealed bytes. Raises `ValueError` if it does not match its digest."""
    data = sealed[hashlib.sha256().digest_size :]
    if seal_bytes(data) != sealed:
        raise ValueError("its digest does not match")
    return data


def unseal(data: bytes) -> dict[str, Any]:
    """The record in sealed text. Raises `ValueError` if it does not match its digest."""
    text = data[len(_HEAD) + _DIGITS + len(_TAIL) : -1]
    if data != _HEAD + hashlib.sha256(text).hexdigest().encode() + _TAIL + text + b"}":
        raise ValueError("its digest does not match")
    return dict(json.loads(text))
