from __future__ import annotations

from engine.report.generators import ClassProbe, Probe
from engine.report.sections.verdict import verdict, warnings, weak_baselines
from engine.results.images import ClassFunnel
from tests.pages import plain_text
from tests.results import (
    generator_fit,
    labeler_report,
    search_spec,
    study_results,
    toy_study,
    trained,
)


def test_seeds_are_told_of_each_generator_fit() -> None:
    trials = (*(trained("real", stage="search", fit=fit) for fit in range(5)), trained("real"))
    text = plain_text(verdict(study_results(trials=trials, confirm_spec=search_spec(seeds=2))).html)
    assert "6 classifiers trained" in text
    assert "5 chose the ratio and the baseline on validation, and 1 that had no part" in text
    assert "were tested: 2 classifier seeds, the same in all arms" in text
    results = study_results(confirm_spec=search_spec(fits=3, seeds=1))
    text = plain_text(verdict(results).html)
    assert "were tested: 3 new fits of each generator with 1 classifier seed each" in text
    assert "every image counts as independent" in text
    grouped = toy_study(split={"group": "column"})
    assert "counts as independent" not in plain_text(verdict(study_results(grouped)).html)
    reason = toy_study(split={"group": "none", "independent": "one photograph of each person"})
    text = plain_text(verdict(study_results(reason)).html)
    assert "which the study gives: one photograph of each person" in text
    assert "No groups, such as patients" not in text


def text_of(areas: dict[int, float], *curations: dict[str, object]) -> str:
    """The warnings about the fits of a generator. areas: of a probe, by fit."""
    fits = tuple(generator_fit("more", fit, **fields) for fit, fields in enumerate(curations))
    # With augmentation, and with moved copies of real images: the baselines are not weak.
    study = toy_study(training={"crop_padding": 1}, generators={"more": {"name": "traditional"}})
    results = study_results(study, generators={"more": fits})
    probe = Probe(len(fits), True, "pixels", [ClassProbe("down", areas, 50)] if areas else [])
    # In place of the cached property, which reads vectors.
    vars(results)["probes"] = {"more": probe}
    return plain_text(warnings(results).html)


def test_what_is_wrong_with_a_later_fit_is_told_with_its_number() -> None:
    stops = "copies of training images: 3 of 60 images"
    copied = {"filters": [{"name": "copies", "dropped": 3, "limits": {}, "stops": stops}]}
    text = text_of({0: 0.6, 1: 0.97}, {}, copied)
    assert text.startswith("Images of more, fit 1 are easily distinguished from real ones")
    assert f"More, fit 1: {stops}; the study's strict setting stops the export." in text
    # What is true of all fits is told once.
    # Of the kept classes the labeler recognises 95% of the real images, of the other one none.
    funnel = {"b": ClassFunnel(requested=9, generated=9, kept=9, reasons={})}
    val = [[0, 50], [5, 95]]
    seen, more = (
        {"labeler": labeler_report(agreement_kept=kept, confusion_val=val), "funnel": funnel}
        for kept in (0.5, 0.6)
    )
    text = text_of({0: 0.96, 1: 0.97}, seen, more)
    assert "Images of more are easily distinguished" in text
    assert "in most classes (area under the ROC curve 0.96 to 0.97)" in text
    assert "in 50% to 60% of kept images, and the true class in 95% of real images" in text
    assert "curve 1.00)" in text_of({0: 0.997, 1: 1.0}, {}, {})
    assert text_of({}, copied).startswith("More: copies of training images: 3 of 60")
    assert text_of({}, {"warnings": ["something is odd"]}) == "More: something is odd."


def test_weak_baselines_are_named() -> None:
    lacking = weak_baselines(toy_study(generators={"g": {"name": "ddpm"}}))
    assert [what.partition(" (")[0] for what in lacking] == [
        "online augmentation", "an arm with moved copies of real images",
    ]  # fmt: skip
    moved = {"t": {"name": "traditional"}}
    assert weak_baselines(toy_study(training={"horizontal_flip": True}, generators=moved)) == []
