"""A notice is a code with figures; what was stored as text is read as such."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from engine.core.notice import Notice
from engine.results.comparison import SearchResult
from engine.results.images import CurateResult, FilterReport
from engine.wording import notice_in_words


def test_stored_notice_is_read_with_its_types() -> None:
    notice = Notice.of("near_train", percent=3.0, low=1.5, high=4.5, farther=99.0, most=2.5)
    stored = notice.model_dump_json()
    assert Notice.model_validate_json(stored) == notice
    assert notice_in_words(Notice.model_validate_json(stored)) == notice_in_words(notice)


def test_unknown_code_is_rejected() -> None:
    with pytest.raises(ValidationError):
        Notice.model_validate({"code": "nothing"})


def test_results_that_were_stored_as_text_are_read() -> None:
    old = {"objective": "macro_f1", "warnings": ["an {old} warning"], "trials": {}, "arms": {},
           "chosen": [], "baseline": "real", "twins": {}}  # fmt: skip
    (warning,) = SearchResult.model_validate(old).warnings
    assert warning.code == "recorded"
    assert notice_in_words(warning) == "an {old} warning"
    report = {"name": "copies", "dropped": 0, "limits": {}, "stops": ""}
    assert FilterReport.model_validate(report).stops is None
    (stopped,) = CurateResult.model_validate(
        {"funnel": {}, "filters": [{**report, "stops": "3 of 60 images are copies"}]}
    ).filters
    assert stopped.stops is not None
    assert notice_in_words(stopped.stops) == "3 of 60 images are copies"
