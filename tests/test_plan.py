"""The plan of a study: its steps, their inputs, and which keys a change reaches."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from engine.core.errors import StudyError
from engine.core.registry import resolve
from engine.core.step import Step
from engine.plan import named, plan, plan_audit, until
from engine.study import Study, load_study

CONFIGS = Path(__file__).parents[1] / "configs"
DIGITS = CONFIGS / "digits.yaml"


def by_label(study: Study) -> dict[str, Step]:
    return {step.label: step for step in plan(study)}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_study_is_planned_with_inputs_first(path: Path) -> None:
    steps = plan(load_study(path))
    assert [step.kind for step in steps[:4]] == ["ingest", "embed", "cluster", "select"]
    for number, step in enumerate(steps):
        assert set(step.inputs.values()) <= set(steps[:number])
    assert len({step.label for step in steps}) == len(steps)


def test_only_the_key_of_the_page_depends_on_the_name() -> None:
    *steps, page = plan(load_study(DIGITS))
    *others, other_page = plan(load_study(DIGITS, ["name=other"]))
    assert steps == others
    assert page.kind == other_page.kind == "report"
    assert page != other_page


def test_a_change_reaches_the_steps_that_depend_on_it_and_no_others() -> None:
    def changed(setting: str) -> set[str]:
        before, after = (
            {step.label: step.key for step in plan(load_study(DIGITS, sets))}
            for sets in ([], [setting])
        )
        # The page shows the whole study, so every change reaches it.
        assert before.pop("report") != after.pop("report")
        return {label for label in before if before[label] != after[label]}

    rounds = [f"{kind}.ddpm{suffix}" for kind in ("request", "generate", "curate")
              for suffix in ("", ".2", ".3")]  # fmt: skip
    made = {*rounds, "fidelity.ddpm", "mix.ddpm.x1", "mix.ddpm.x4", "search", "confirm",
            "evaluate"}  # fmt: skip
    judged = made - {"request.ddpm", "generate.ddpm"}
    assert changed("curate.filters=[{name: agreement, confidence: 0.5}]") == judged
    assert changed("curate.filters=[agreement, copies, blank]") == judged | {"measure.val"}
    assert changed("training.objective=accuracy") >= {
        "train.labeler",
        "search",
        "confirm",
        "evaluate",
    }
    assert changed("evaluate.margin=0.02") == {"evaluate"}
    assert changed("fidelity.k=3") == {"fidelity.ddpm", "fidelity.traditional"}
    assert changed("search.seeds=4") == {"search", "confirm", "evaluate"}
    assert changed("select.per_cluster=3") == {"select"}
    assert changed("generators.ddpm.num_inference_steps=21") == made
    assert "ingest" not in changed("cluster.k=5")
    assert changed("seed=8") >= {"ingest", "embed", "cluster", "select", "finetune.ddpm"}


def test_until_takes_a_kind_or_a_label() -> None:
    steps = plan(load_study(DIGITS))
    assert [step.label for step in until(steps, "cluster")] == ["ingest", "embed", "cluster"]
    assert until(steps, "generate.ddpm")[-1].label == "generate.ddpm"
    with pytest.raises(StudyError, match="no step 'generat' in this study; there are ingest, "):
        until(steps, "generat")


def test_the_key_of_search_contains_the_version_of_train() -> None:
    (search,) = named(plan(load_study(DIGITS)), "search")
    assert search.code["train"] == resolve("steps", "train").version


def test_each_round_tops_up_what_the_round_before_kept(bars_study: Callable[..., Study]) -> None:
    steps = by_label(bars_study(curate={"max_rounds": 3}))
    assert "curate" not in steps["request.more"].inputs
    assert steps["request.more.2"].inputs["curate"] is steps["curate.more"]
    assert steps["request.more.3"].inputs["curate"] is steps["curate.more.2"]
    assert steps["mix.more.x1"].inputs["curate.more"] is steps["curate.more.3"]
    assert steps["mix.more.x1"].inputs["generate.more"] is steps["generate.more.3"]


def test_without_a_classifier_the_plan_ends_with_one_generation(
    bars_study: Callable[..., Study],
) -> None:
    study = bars_study(classifier=None, search={"seeds": 2, "generator_fits": 3})
    labels = [step.label for step in plan(study)]
    assert labels == ["ingest", "embed", "cluster", "select", "request.more", "generate.more"]


def test_further_fits_have_keys_of_their_own_and_the_first_has_those_of_one(
    bars_study: Callable[..., Study],
) -> None:
    drawn = {"d": {"name": "ddpm"}, "t": {"name": "traditional"}}
    one, three = (
        by_label(bars_study(generators=drawn, search={"seeds": 2, "generator_fits": fits}))
        for fits in (1, 3)
    )
    chain = ("finetune.d", "request.d", "generate.d", "curate.d", "request.t", "generate.t")
    for label in chain:
        assert three[label] == one[label]
        assert len({three[label + fit].key for fit in ("", ".fit1", ".fit2")}) == 3
    assert three["generate.d.fit2"].inputs["finetune"] is three["finetune.d.fit2"]


def test_an_audit_sees_with_the_network_that_the_study_names(
    bars_study: Callable[..., Study],
) -> None:
    clip = {"name": "clip", "model": "some/clip"}
    network = plan_audit(bars_study(embedder="pixels", audit={"embedder": clip}))
    assert network.spec.embedder.name == "clip"  # type: ignore[attr-defined]
    assert plan_audit(bars_study()).spec.embedder.name == "pixels"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("match", "says"),
    [
        ({"among": "test"}, r"match\.x\.among: there is no 'test'; there are train, val, turned"),
        ({"queries": "turned"}, r"match\.x\.queries: images of turned are not embedded"),
    ],
)
def test_sets_to_match_that_are_not_there_are_refused(
    toy_study: Callable[..., Study], tmp_path: Path, match: Any, says: str
) -> None:
    study = toy_study(tmp_path, match={"x": match}, generators={"turned": {"name": "traditional"}})
    with pytest.raises(StudyError, match=says):
        plan(study)


def test_a_reduced_arm_changes_no_key_before_the_search(bars_study: Callable[..., Study]) -> None:
    reduced = {"method": "k_center", "balance_to": "smallest"}
    plain, reducing = by_label(bars_study()), by_label(bars_study(reduce=reduced))
    assert set(reducing) - set(plain) == {"reduce", "mix.reduced"}
    differing = {label for label in plain if plain[label] != reducing[label]}
    assert differing == {"search", "confirm", "evaluate", "report"}


@pytest.mark.skipif(find_spec("umap") is not None, reason="umap-learn is installed")
def test_umap_that_is_not_installed_is_refused(bars_study: Callable[..., Study]) -> None:
    with pytest.raises(StudyError, match=r"^reduce\.method: umap needs umap-learn: pip install"):
        plan(bars_study(reduce={"method": "umap"}))


def test_strict_needs_a_classifier(bars_study: Callable[..., Study]) -> None:
    study = bars_study(classifier=None, curate={"filters": [{"name": "copies", "strict": True}]})
    with pytest.raises(StudyError, match=r"curate.filters: one is strict, and a study without"):
        plan(study)
