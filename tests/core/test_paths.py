"""Every path of a study may be written with `~` and `$VARIABLES`."""

from __future__ import annotations

import pytest

from engine.core.paths import expanded
from engine.core.store import Store


def test_home_and_variables_are_replaced_and_urls_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("DATA", "/mnt/data")
    assert expanded("~/x") == "/home/a/x"
    assert expanded("$DATA/x") == "/mnt/data/x"
    assert expanded("s3://bucket/$DATA") == "s3://bucket/$DATA"


def test_storage_may_be_written_with_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("RUNS", str(tmp_path))
    assert Store("$RUNS/one").url == str(tmp_path / "one")
