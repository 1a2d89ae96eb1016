"""Every path of a study may be written with `~` and `$VARIABLES`."""

from __future__ import annotations

import pytest

from engine.core.errors import StudyError
from engine.core.paths import expanded, unset_variable
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


def test_storage_with_a_variable_that_is_not_set_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    for path in ("$NOWHERE/runs", "/mnt/${NOWHERE}/runs"):
        assert unset_variable(path) == "$NOWHERE"
        with pytest.raises(StudyError, match=r"profile: storage: .*\$NOWHERE is not set"):
            Store(path)
    assert unset_variable("s3://bucket/$NOWHERE") is None
