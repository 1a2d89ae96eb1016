from __future__ import annotations

import numpy as np

from engine.report.sections.curation import curation
from tests.pages import plain_text
from tests.results import generator_fit, labeler_report, study_results

CLASSES = tuple(f"class {number:02d}" for number in range(50))


def test_what_the_labeler_sees_of_many_classes_is_told_by_its_pairs() -> None:
    matrix = np.eye(50, dtype=int) * 9
    matrix[3, 7] = 3
    report = labeler_report(confusion=matrix.tolist(), confusion_val=matrix.tolist())
    labeled = generator_fit(labeler=report)
    fits = {"g": (labeled,), "t": (generator_fit("t"),)}
    section = curation(study_results(classes=CLASSES, generators=fits))
    assert section.html.count("Requested and seen") == 1
    assert 'class="matrix"' not in section.html
    assert "class 03 class 07 25%" in plain_text(section.html)
    seen = {(row["asked_for"], row["seen"]): row["images"] for row in section.tables["seen"]}
    assert seen["class 03", "class 07"] == 3
    assert len(seen) == 51
    few = generator_fit(
        labeler=labeler_report(confusion=[[3, 1], [0, 2]], confusion_val=[[3, 1], [0, 2]])
    )
    section = curation(study_results(generators={"g": (few,)}))
    assert section.html.count('class="matrix"') == 1


def test_limits_are_written_as_a_range_over_classes() -> None:
    limits = {"distance": {"a": 0.5, "b": 0.25, "c": None}, "share": 0.1, "none": None}
    report = {"name": "copies", "dropped": 3, "limits": limits, "stops": ""}
    section = curation(study_results(generators={"g": (generator_fit(filters=[report]),)}))
    text = plain_text(section.html)
    assert "distance 0.25 to 0.5 by class, share 0.1, none none" in text
    assert [(row["limit"], row["class"], row["value"]) for row in section.tables["limits"]] == [
        ("distance", "a", 0.5), ("distance", "b", 0.25), ("distance", "c", None),
        ("share", None, 0.1), ("none", None, None),
    ]  # fmt: skip
