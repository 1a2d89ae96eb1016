"""The page of an audit says what it counts, and what it has no room for."""

from __future__ import annotations

from engine.report.audit import Look, page
from engine.results.audit import Finding


def look(findings: list[Finding], distinct: dict[str, dict[str, int]]) -> Look:
    return Look(
        name="toy", images=9, task="class", findings=findings, problems=[], warnings=[],
        near_limit={}, counts={"a": {"train": 5, "val": 2, "test": 2}}, distinct=distinct,
        groups={"by_class": {"a": 9}, "largest": [], "total": 9}, grouped=False, carved=[],
        max_quarantined=0.01, broken_share=0.0, on_leak="fail", agreed=1.0,
        wrong_labels=None, embedder="pixels", size=64,
    )  # fmt: skip


def many(kind: str, count: int) -> list[Finding]:
    return [Finding(kind, str(n), f"{n}.png", "a", "train") for n in range(count)]


def test_a_table_of_all_findings_that_is_cut_says_what_is_left_out() -> None:
    held = {"a": {"train": 5, "val": 2, "test": 2}}
    text = page(look([*many("outlier", 19_990), *many("size", 30)], held))
    assert "The first 20,000 of 20,020 findings as a table" in text
    assert "left out: 20 of “Odd sizes”" in text
    whole = page(look(many("size", 30), held))
    assert "All findings as a table" in whole
    assert "left out" not in whole


def test_a_class_is_thin_where_its_images_are_one_picture() -> None:
    (must,) = look([], {"a": {"train": 1, "val": 2, "test": 2}}).musts
    assert "the class 'a' has 1 image in train, it needs 2" in must


def test_the_judge_of_labels_is_described_although_no_label_is_listed() -> None:
    quiet = look([], {"a": {"train": 5, "val": 2, "test": 2}})
    assert "No label is listed as doubtful" not in page(quiet)
    quiet.agreed, quiet.wrong_labels = 0.83, (2.0, 5.0)
    text = page(quiet)
    assert "agrees with 83% of the labels of a class on average" in text
    assert "about 2 (up to 5) of all labels" in text
    quiet.agreed = 0.4
    text = page(quiet)
    assert "agrees with only 40% of the labels" in text
    assert "up to 5" not in text
    quiet.findings = many("label", 1)
    assert "No label is listed as doubtful" not in page(quiet)
