"""Lists of plugins changed by name: in files over others, by `--set`, and by knobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import StudyError
from engine.study import apply_sets, load_study

FILTERS: dict[str, Any] = {
    "curate": {"filters": ["agreement", {"name": "realism", "quantile": 0.1}, "copies"]}
}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "curate.filters.agreement.confidence=0.8",
            [{"name": "agreement", "confidence": 0.8}, {"name": "realism", "quantile": 0.1}],
        ),
        (
            "curate.filters.realism.quantile=0.2",
            ["agreement", {"name": "realism", "quantile": 0.2}],
        ),
        ("curate.filters.realism=null", ["agreement"]),
        ("curate.filters={}", ["agreement", {"name": "realism", "quantile": 0.1}]),
    ],
)
def test_list_entry_is_changed_by_its_name(setting: str, expected: list[Any]) -> None:
    made = apply_sets(FILTERS, [setting])
    assert made["curate"]["filters"] == [*expected, "copies"]
    assert FILTERS["curate"]["filters"][0] == "agreement"


def test_list_replaces_a_list() -> None:
    assert apply_sets(FILTERS, ["curate.filters=[copies]"]) == {"curate": {"filters": ["copies"]}}


def test_unknown_name_is_rejected_with_the_field(tmp_path: Path) -> None:
    below = tmp_path / "below.yaml"
    below.write_text(
        "name: toy\nreader: digits\npreprocess: {size: 16}\nsplit: {group: none}\n"
        "curate: {filters: [agreement, copies]}\n"
    )
    above = tmp_path / "above.yaml"
    above.write_text("base: below.yaml\ncurate: {filters: {agreement: {confidence: 0.7}}}\n")
    assert load_study(above).curate.filters[0].model_dump()["confidence"] == 0.7
    with pytest.raises(StudyError, match=r"curate\.filters: must be a valid tuple"):
        load_study(below, ["curate.filters.agrement.confidence=0.8"])
