"""Encoded images for tests of readers."""

from __future__ import annotations

import io

from tests.conftest import toy_picture


def png(number: int) -> bytes:
    target = io.BytesIO()
    toy_picture(number).save(target, "PNG")
    return target.getvalue()
