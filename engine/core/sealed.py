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


def unseal(data: bytes) -> dict[str, Any]:
    """The record in sealed text. Raises `ValueError` where a bit of it has changed."""
    text = data[len(_HEAD) + _DIGITS + len(_TAIL) : -1]
    if data != _HEAD + hashlib.sha256(text).hexdigest().encode() + _TAIL + text + b"}":
        raise ValueError("its digest does not match")
    return dict(json.loads(text))
