"""Stores of both kinds: every test that takes `store` runs on local disk and on S3 (moto, in this
process)."""

from __future__ import annotations

import uuid

import pytest

from engine.core.store import Store


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    request.getfixturevalue("s3_endpoint")
    return Store(f"s3://bucket/{uuid.uuid4().hex[:8]}")
