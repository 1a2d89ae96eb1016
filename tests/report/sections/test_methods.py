from __future__ import annotations

from typing import Any

from engine.comparison.arms import Arm
from engine.plan import plan
from engine.report.results import StudyResults
from engine.report.sections.methods import methods, not_known
from engine.results.comparison import OpenedTest
from engine.results.data import IngestResult
from engine.settings import Amount
from engine.study import Study
from tests.pages import plain_text
from tests.results import (
    arm_result,
    contrast,
    evaluate_result,
    ingest_result,
    search_result,
    search_spec,
    study_results,
    toy_study,
    val_mean,
)

AMOUNTS = {"sd to 500": Amount(balance_to=500), "sd +64": Amount(per_class=64)}


def arm(
    name: str, family: str, ratio: float | None, role: str = "compared",
    generators: tuple[str, ...] = ("ddpm",), **fields: Any,
) -> Arm:  # fmt: skip
    return Arm(name=name, family=family, mixes=("mix",), ratio=ratio, role=role,
               generators=generators, **fields)  # fmt: skip


def results(
    study: Study, fits: int, contrasts: int, opened: int = 1, more: tuple[Arm, ...] = (),
    ingest: IngestResult | None = None, tested: tuple[str, ...] = ("real",),
) -> StudyResults:  # fmt: skip
    arms = (
        arm("real", "real", 0.0, "baseline", ()),
        arm("real_double", "real_double", 0.0, "shown", (), budget=2.0),
        arm("ddpm x1", "ddpm", 1.0),
    )
    return study_results(
        study, ingest=ingest or ingest_result("a", "b"), amounts=AMOUNTS,
        search_spec=search_spec(*arms, *more, fits=fits, seeds=2),
        search=search_result(trials=dict.fromkeys("abcd", ""),
                             arms={"real": val_mean(0.5), "ddpm x1": val_mean(0.5)}),
        evaluate=evaluate_result(
            contrasts=[contrast(arm="ddpm x1", replicates=fits)] * contrasts,
            arms={name: arm_result() for name in tested},
            test=OpenedTest(images=50, groups=50, opened=opened),
        ),
    )  # fmt: skip


def test_the_protocol_in_words_says_what_was_done() -> None:
    training = {"steps": 50, "rotate": 5, "label_smoothing": 0.1}
    study = toy_study(training=training)
    text = plain_text(methods(results(study, fits=3, contrasts=2, opened=4)).html)
    for said in (
        "50 training, 50 validation and 50 test images in 2 classes (10 to 40",
        "15% for validation and 20% for test were set apart at random",
        "no groups are recorded", "ddpm (70 optimizer steps) and t (traditional)",
        "ddpm was trained and its images were drawn 3 times; images of t, which is not"
        " trained, were drawn 3 times", "from training images alone",
        "for every arm except real double (2 times as many steps)",
        "better than every baseline (one-sided p below 0.025", "worse than real images",
        "not allowed across splits",
        "at a ratio of 1 per real training image", "3 blocks (16, 32, 64 channels)",
        "Images of ddpm were filtered by",
        "50 optimizer steps", "label smoothing 0.1", "rotate 5", "3 new fits of each generator",
        "by 4 studies in this storage", "adjusted for 2 arms by Holm 1979",
        "within ± 1 point (two", "torch 2",
        "fewer than 5 replicates, as here, 20 effective test groups",
        "synthetic-training",
    ):  # fmt: skip
        assert said in text, said
    grouped = toy_study(split={"group": "column"}, curate={"filters": []})
    given = ingest_result("a", "b").model_copy(update={"carved": []})
    text = plain_text(methods(results(grouped, fits=1, contrasts=1, ingest=given)).html)
    for said in ("the splits are those of the data", "are in one split", "drawn once",
                 "were not filtered",
                 "no online augmentation", "these choices, once,"):  # fmt: skip
        assert said in text, said
    assert "Holm" not in text


def test_images_are_told_as_they_were_made_and_added() -> None:
    more = (
        arm("sd x0.25", "sd", 0.25, generators=("sd",)),
        arm("sd to 500", "sd", None, generators=("sd",)),
        arm("sd +64", "sd", None, generators=("sd",)),
        arm("both x1", "both", 1.0, generators=("ddpm", "sd")),
        arm("ddpm only", "ddpm only", None, "shown"),
        arm("ddpm unfiltered x1", "ddpm unfiltered", 1.0, "shown", twin_of="ddpm x1"),
    )
    made = {
        "ddpm": {"name": "ddpm", "train_steps": 70},
        "sd": {"name": "diffusion", "model": "../models/sd15"},
        "given": {"name": "folder", "reader": {"name": "imagefolder", "root": "/x"}},
    }
    study = toy_study(generators=made, search={"combine": {"both": ["ddpm", "sd"]}},
                   audit={"on_leak": "drop"}, tune={"tried": 12})  # fmt: skip
    text = plain_text(methods(results(study, fits=4, contrasts=0, more=more)).html)
    for said in (
        "ddpm (70 optimizer steps), from training images alone",
        "sd (diffusion), by the pretrained checkpoint sd15 without adaptation",
        "given (folder), from images of a folder",
        "images of sd and given, which are not trained, were drawn 4 times",
        "at ratios of 0.25 and 1 per real training image of the class; or up to 500 training images"
        " of each class; or 64 to each class",
        "As “both”, images of ddpm and sd were added together",
        "on images of ddpm alone, as many", "as many images without filters",
        "across splits removed from the earlier split", "means over 4 generator fits",
        "chosen from 12 tried on validation",
    ):  # fmt: skip
        assert said in text, said
    alone = toy_study(generators={"given": made["given"]})
    text = plain_text(methods(results(alone, fits=4, contrasts=0, more=more)).html)
    assert "training images alone" not in text
    assert "and its images were drawn" not in text
    text = plain_text(not_known(results(alone, fits=1, contrasts=0)).html)
    assert "How much the draw of images matters" in text
    assert "How much the training" not in text


def test_groups_of_classes_are_named_with_their_ratios() -> None:
    study = toy_study(
        request={"ratio_by_class": {"low": 2, "8": 0.5}, "classes": ["low", "8"],
                 "class_groups": {"low": ["3", "5"]}},
    )  # fmt: skip
    own = results(study, fits=1, contrasts=0, more=(arm("ddpm own", "ddpm", None),))
    own.amounts["ddpm own"] = Amount(ratio_by_class={"3": 2, "5": 2, "8": 0.5})  # type: ignore[index]
    text = plain_text(methods(own).html)
    assert "They were added to the classes 3, 5 and 8, at a ratio of 1 per real" in text
    assert "; or at a separate ratio for each class, 2 (3 and 5) and 0.5 (8)." in text


def test_what_is_not_known_is_said() -> None:
    # Twins of what was not chosen were never trained.
    twin = arm("ddpm unfiltered x1", "ddpm unfiltered", 1.0, "shown", twin_of="ddpm")
    text = plain_text(not_known(results(toy_study(), fits=1, contrasts=1, more=(twin,))).html)
    assert "changed copies" not in text
    only_exact = ingest_result("a", "b").model_copy(update={"near_limit": {}})
    searched = results(toy_study(), fits=1, contrasts=1, ingest=only_exact)
    assert "changed copies cross the splits" in plain_text(not_known(searched).html)
    for said in ("were trained once, and all images were drawn once", "no groups are given",
                 "Whether ddpm x1 helps", "How 1 arm would perform"):  # fmt: skip
        assert said in text, said
    grouped = toy_study(split={"group": "column"})
    known = results(grouped, fits=5, contrasts=0, tested=("real", "ddpm x1"))
    text = plain_text(not_known(known).html)
    for said in ("drawn once", "no groups", "helps", "stayed closed"):
        assert said not in text, said


def test_a_study_s_notes_are_told_and_change_the_report_s_key_alone() -> None:
    noted = toy_study(notes=["The scanner changed in May."])
    text = plain_text(not_known(results(noted, fits=1, contrasts=0)).html)
    assert "Note of the study: The scanner changed in May." in text
    keys = [{step.label: step.key for step in plan(study)} for study in (toy_study(), noted)]
    assert {label for label, key in keys[0].items() if keys[1][label] != key} == {"report"}
