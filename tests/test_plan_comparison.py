"""The planned comparison: its arms with their mixes, curation's inputs, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.comparison.arms import Arm, SearchSpec, opened_arms
from engine.core.errors import StudyError
from engine.core.step import Step
from engine.plan import named, plan
from engine.study import Study

Make = Callable[..., Study]
MOVED = {"t": {"name": "traditional"}}


def labels(study: Study) -> list[str]:
    return [step.label for step in plan(study)]


def arms_of(study: Study) -> dict[str, Arm]:
    (search,) = named(plan(study), "search")
    return {arm.name: arm for arm in search.spec_as(SearchSpec).arms}


def report(study: Study) -> Step:
    return named(plan(study), "report")[0]


def test_arms_without_images_train_on_the_mix_of_all_real_ones(bars_study: Make) -> None:
    study = bars_study(
        search={"ratios": [1], "seeds": 2, "arms": ["oversampled", "mixup", "class_weighted"]},
        reduce={"method": "random", "balance_to": "smallest"},
    )
    arms = arms_of(study)
    assert list(arms) == ["real", "real_double", "oversampled", "mixup", "class_weighted",
                          "reduced", "more x1"]  # fmt: skip
    assert {arms[name].mixes for name in ("real", "real_double", "mixup")} == {("mix.real",)}
    assert arms["oversampled"].mixes == ("mix.oversampled",)
    assert arms["mixup"].training == {"mixup_alpha": 0.2, "cutmix_alpha": 0.0}
    assert [name for name, arm in arms.items() if arm.role != "baseline"] == [
        "real_double", "more x1"
    ]  # fmt: skip
    steps = {step.label: step for step in plan(study)}
    assert steps["mix.reduced"].inputs["reduce"] is steps["reduce"]


def test_the_inputs_of_search_are_the_mixes_of_its_arms(bars_study: Make) -> None:
    study = bars_study(search={"ratios": [1, 2], "seeds": 2, "arms": ["oversampled"]})
    (search,) = named(plan(study), "search")
    mixes = dict.fromkeys(label for arm in arms_of(study).values() for label in arm.mixes)
    assert list(search.inputs) == ["ingest", *mixes]
    assert all(search.inputs[label].label == label for label in mixes)


def test_an_arm_has_a_mix_for_each_generator_fit(bars_study: Make) -> None:
    study = bars_study(search={"ratios": [1], "seeds": 2, "generator_fits": 3})
    steps = {step.label: step for step in plan(study)}
    suffixes = ("", ".fit1", ".fit2")
    assert arms_of(study)["more x1"].mixes == tuple(f"mix.more.x1{fit}" for fit in suffixes)
    for fit in suffixes:
        mix = steps[f"mix.more.x1{fit}"]
        assert mix.inputs["curate.more"] is steps[f"curate.more{fit}"]
        assert steps[f"fidelity.more{fit}"].inputs["curate"] is steps[f"curate.more{fit}"]
    assert len({steps[f"mix.more.x1{fit}"].spec.seed for fit in suffixes}) == 3  # type: ignore[attr-defined]
    page = report(study)
    assert {f"{kind}.more{fit}" for kind in ("curate", "generate") for fit in suffixes} <= {
        *page.inputs
    }


def test_an_unfiltered_twin_has_the_images_of_its_arm_without_filters(bars_study: Make) -> None:
    study = bars_study(
        request={"ratio": 1}, search={"ratios": [1], "seeds": 2, "arms": ["unfiltered"]},
        curate={"max_rounds": 2},
    )  # fmt: skip
    steps, arms = {step.label: step for step in plan(study)}, arms_of(study)
    assert arms["more unfiltered x1"].twin_of == "more x1"
    assert arms["more unfiltered x1"].role == "shown"
    filtered, whole = (steps[f"mix.more.{name}"] for name in ("x1", "unfiltered.x1"))
    assert filtered.inputs["generate.more"] is whole.inputs["generate.more"]
    assert whole.inputs["curate.more"] is steps["curate.more.unfiltered"]
    assert set(whole.inputs["curate.more"].inputs) == {"ingest", "generate"}


def test_combined_generators_have_the_inputs_of_each(bars_study: Make) -> None:
    study = bars_study(
        generators={**MOVED, "d": {"name": "ddpm"}},
        search={"ratios": [1], "seeds": 2, "combine": {"both": ["t", "d"]}},
    )
    arm = arms_of(study)["both x1"]
    assert (arm.generators, arm.role) == (("t", "d"), "compared")
    (mix,) = named(plan(study), "mix.both.x1")
    assert list(mix.inputs) == ["ingest", "curate.t", "generate.t", "curate.d", "generate.d"]


def test_a_ratio_for_each_class_is_an_arm_of_its_own(bars_study: Make) -> None:
    arms = arms_of(bars_study(request={"ratio_by_class": {"down": 2.0}}, generators=MOVED))
    assert arms["t by class"].ratio is None
    assert arms["t by class"].family == arms["t x1"].family == "t"


def test_a_group_of_classes_shares_its_results_with_its_classes_one_by_one(
    bars_study: Make,
) -> None:
    def keys(**request: Any) -> dict[str, str]:
        study = bars_study(
            request={**request, "shard_size": 16}, curate={"filters": []}, generators=MOVED
        )
        return {step.label: step.key for step in plan(study) if step.label != "report"}

    one_by_one = keys(ratio_by_class={"across": 2, "down": 2}, classes=["across", "down"])
    names = {"ratio_by_class": {"both": 2}, "classes": ["both"]}
    assert keys(**names, class_groups={"both": ["across", "down"]}) == one_by_one
    assert keys(**names, class_groups={"both": ["down"]}) != one_by_one
    # A group that nothing names is there for later.
    assert keys(ratio=1, class_groups={"all of them": ["across", "down"]}) == keys(ratio=1)


def test_of_tune_the_number_of_settings_alone_enters_a_key(bars_study: Make) -> None:
    knobs = {"training.learning_rate": [0.1, 0.2]}
    plain = report(bars_study())
    assert report(bars_study(tune={"knobs": knobs, "arm": "real"})).key == plain.key
    tuned_before = report(bars_study(tune={"tried": 7}))
    assert tuned_before.key != plain.key
    assert tuned_before.spec.study.tune.tried == 7  # type: ignore[attr-defined]


def test_fidelity_is_planned_where_images_are_compared(bars_study: Make) -> None:
    planned = labels(bars_study())
    assert planned.index("curate.more") < planned.index("fidelity.more") < planned.index("search")
    assert "embed.fidelity" not in planned
    off = labels(bars_study(fidelity={"enabled": False}))
    assert [label for label in planned if label != "fidelity.more"] == off
    assert "fidelity.more" not in labels(bars_study(classifier=None))
    assert "embed.fidelity" not in labels(bars_study(fidelity={"embedder": "pixels"}))
    finer = plan(bars_study(fidelity={"embedder": {"name": "pixels", "side": 8}}))
    (fidelity,) = named(finer, "fidelity")
    assert fidelity.inputs["embed"] is named(finer, "embed.fidelity")[0]


def test_a_labeler_is_checked_before_anything_is_trained(bars_study: Make) -> None:
    two = {"d": {"name": "ddpm"}, "e": {"name": "ddpm"}}
    planned = labels(bars_study(generators=two))
    assert planned.index("measure.val") < planned.index("finetune.d")
    assert planned.count("train.labeler") == planned.count("measure.val") == 1
    assert not {"train.labeler", "measure.val"} & set(labels(bars_study(generators=MOVED)))


def test_ratios_that_would_share_a_name_are_refused(bars_study: Make) -> None:
    with pytest.raises(StudyError, match=r"^search\.ratios: .* both be named x1; round them"):
        plan(bars_study(search={"ratios": [1.0, 1.0000001], "seeds": 2}))
    asked = {"ratio": 0.33333333, "classes": ["down"]}
    with pytest.raises(StudyError, match=r"of 0\.333333 and 0\.33333333 .* named x0\.333333"):
        plan(bars_study(request=asked, search={"ratios": [0.333333], "seeds": 2}))


@pytest.mark.parametrize(
    ("arm", "fields", "why"),
    [
        ("synthetic_only", {"request": {"ratio": 1, "classes": ["down"]}},
         "needs images of every class"),
        ("synthetic_only", {"generators": MOVED}, "needs a generator that makes new images"),
        ("synthetic_only", {"generators": {}}, "needs a generator that makes new images"),
        ("unfiltered", {"generators": MOVED}, "needs filtered images"),
        ("unfiltered", {"curate": {"filters": []}}, "needs filtered images"),
    ],
)  # fmt: skip
def test_arms_that_cannot_be_made_are_refused(
    bars_study: Make, arm: str, fields: dict[str, Any], why: str
) -> None:
    values = {"request": {"ratio": 1}, "search": {"ratios": [1], "arms": [arm]}, **fields}
    with pytest.raises(StudyError, match=rf"^search\.arms: {arm} {why}"):
        plan(bars_study(**values))


def test_trainings_that_a_classifier_cannot_use_are_refused(bars_study: Make) -> None:
    probe = {"name": "probe", "embedder": {"name": "pixels", "side": 16}, "hidden": 24}
    with pytest.raises(StudyError, match=r"training\.rotate: changes pixels, but a probe"):
        plan(bars_study(classifier=probe, training={"steps": 4, "rotate": 10}))
    # An arm's own training, and the labeler's own classifier, as well.
    mixed = {"ratios": [1], "seeds": 2, "arms": ["cutmix"]}
    with pytest.raises(StudyError, match=r"cutmix"):
        plan(bars_study(classifier=probe, search=mixed))
    labeler = {"name": "classifier", "classifier": probe, "training": {"crop_padding": 2}}
    with pytest.raises(StudyError, match=r"training\.crop_padding: changes pixels, but a probe"):
        plan(bars_study(curate={"labeler": labeler, "max_rounds": 1}))


def test_repeated_real_images_are_a_baseline_for_each_amount(bars_study: Make) -> None:
    study = bars_study(
        generators={"a": MOVED["t"], "b": {"name": "traditional", "rotate": 5}},
        search={
            "ratios": [1, 2],
            "seeds": 2,
            "arms": ["repeated"],
            "combine": {"both": ["a", "b"]},
        },
    )
    arms = arms_of(study)
    repeated = {name: arm for name, arm in arms.items() if arm.family == "repeated"}
    # "both x1" adds as many as "a x2": one arm for one vector of class counts.
    assert list(repeated) == ["repeated x1", "repeated x2", "repeated x4"]
    assert {arm.role for arm in repeated.values()} == {"baseline"}
    assert [arm.ratio for arm in repeated.values()] == [1.0, 2.0, 4.0]
    steps = {step.label: step for step in plan(study)}
    assert list(steps["mix.repeated.x4"].inputs) == ["ingest"]


def test_uses_are_arms_of_one_family(bars_study: Make) -> None:
    study = bars_study(
        search={"ratios": [0.5, 2], "seeds": 2, "use": ["add", "replace", "pretrain"]}
    )
    arms = {name: arm for name, arm in arms_of(study).items() if arm.generators}
    assert list(arms) == [
        "more x0.5", "more x1", "more x2", "more replace x0.5", "more replace x1",
        "more pretrain x0.5", "more pretrain x1", "more pretrain x2",
    ]  # fmt: skip
    assert {arm.family for arm in arms.values()} == {"more"}
    assert arms["more pretrain x2"].training == {"first_share": 0.5}
    (search,) = named(plan(study), "search")
    # Every arm chooses from as many checkpoints as those that pretrain.
    assert search.spec_as(SearchSpec).training.choose_after == 0.5
    plain = named(plan(bars_study()), "search")[0]
    assert plain.spec_as(SearchSpec).training.choose_after == 0.0


def test_replacing_more_images_than_there_are_is_refused(bars_study: Make) -> None:
    with pytest.raises(StudyError, match="replace needs a ratio of at most 1"):
        bars_study(search={"ratios": [2], "seeds": 2, "use": ["replace"]})


def test_a_chosen_arm_is_confirmed_with_twice_the_steps(bars_study: Make) -> None:
    study = bars_study()
    assert not [arm for arm in arms_of(study).values() if arm.double_of]
    (confirm,) = named(plan(study), "confirm")
    doubles = [arm for arm in confirm.spec_as(SearchSpec).arms if arm.double_of]
    assert [(arm.name, arm.budget, arm.role) for arm in doubles] == [
        ("more x1 double", 2.0, "shown"), ("more x2 double", 2.0, "shown"),
    ]  # fmt: skip


def test_real_images_from_elsewhere_are_shown_and_claim_nothing(
    bars_study: Make, tmp_path: Path
) -> None:
    reader = {"name": "imagefolder", "root": str(tmp_path / "good")}
    reserve = {"name": "folder", "reader": reader, "real": True}
    study = bars_study(
        generators={"reserve": reserve},
        search={"ratios": [1], "seeds": 2, "use": ["add", "pretrain"]},
    )
    arms = arms_of(study)
    assert arms["reserve x1"].role == "shown"
    assert "reserve pretrain x1" not in arms
    with pytest.raises(StudyError, match="needs a generator that makes new images"):
        plan(
            bars_study(
                generators={"reserve": reserve}, request={"ratio": 1},
                search={"ratios": [1], "seeds": 2, "arms": ["synthetic_only"]},
            )
        )  # fmt: skip


def test_real_images_from_elsewhere_can_be_a_baseline(bars_study: Make, tmp_path: Path) -> None:
    reader = {"name": "imagefolder", "root": str(tmp_path / "good")}
    reserve = {"name": "folder", "reader": reader, "real": True, "baseline": True}
    study = bars_study(generators={"reserve": reserve}, search={"ratios": [1], "seeds": 2})
    assert arms_of(study)["reserve x1"].role == "baseline"
    with pytest.raises(StudyError, match="only real images can be one; set real: true"):
        bars_study(generators={"reserve": {**reserve, "real": False}})


def test_the_class_shares_of_a_chosen_arm_are_tested_with_real_images(bars_study: Make) -> None:
    study = bars_study(
        generators={"a": {"name": "traditional"}, "more": bars_study().generators["more"]},
        search={"ratios": [0.5, 1, 2], "seeds": 2, "arms": ["repeated"],
                "combine": {"both": ["a", "more"]}},
    )  # fmt: skip
    (confirm,) = named(plan(study), "confirm")

    def opened(*chosen: str) -> set[str]:
        names = {arm.name for arm in opened_arms(confirm, ["real", *chosen])}
        return {name for name in names if name.startswith("repeated")}

    assert opened("repeated x0.5", "more x2") == {"repeated x0.5", "repeated x2"}
    assert opened("repeated x2", "more x2") == {"repeated x2"}
    # Two generators at x1 add as many images as one at x2.
    assert opened("repeated x0.5", "both x1") == {"repeated x0.5", "repeated x2"}
    # Moved copies are a baseline themselves.
    assert opened("repeated x0.5", "a x2") == {"repeated x0.5"}


def test_why_images_are_independent_changes_no_key_but_the_pages(bars_study: Make) -> None:
    def keys(**split: Any) -> dict[str, str]:
        values = bars_study().model_dump(mode="json")
        values["split"] |= {"group": "none", **split}
        return {step.label: step.key for step in plan(Study.model_validate(values))}

    plain, reason = keys(), keys(independent="one photograph of each person")
    assert {label for label in plain if plain[label] != reason[label]} == {"report"}
    with pytest.raises(ValueError, match="gives the reason for group: none"):
        keys(group="column", independent="one photograph of each person")


def test_arms_whose_real_images_differ_have_no_counterpart(bars_study: Make) -> None:
    study = bars_study(
        search={"ratios": [1, 2], "seeds": 2, "arms": ["repeated"], "use": ["add", "pretrain"],
                "combine": {"few": ["reduced", "more"]}},
        reduce={"method": "random", "balance_to": "smallest"},
    )  # fmt: skip
    (confirm,) = named(plan(study), "confirm")
    for chosen in ("more pretrain x2", "few x2"):
        names = {arm.name for arm in opened_arms(confirm, ["real", "repeated x1", chosen])}
        assert {name for name in names if name.startswith("repeated")} == {"repeated x1"}
    with pytest.raises(StudyError, match="repeated"):
        bars_study(generators={"repeated": {"name": "traditional"}})
