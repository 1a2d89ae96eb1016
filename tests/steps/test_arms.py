"""The arms of a comparison: generator fits as replicates, unfiltered twins, combined generators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.compute as pc
import pytest

from engine.core import rows
from engine.core.errors import StudyError
from engine.core.manifest import Manifest, read_manifest
from engine.core.store import Store
from engine.execute import execute
from engine.plan import named, plan
from engine.profile import Profile
from engine.results.comparison import Contrast
from engine.runtime.inline import InlineRuntime
from engine.study import Study
from engine.wording import replicates_in_words
from tests.conftest import write_bars
from tests.steps.test_comparison import table

# Only what differs from the finished study of bars is computed.
pytestmark = pytest.mark.usefixtures("resumed")

Run = Callable[[Study, str], Manifest]


def test_each_generator_fit_is_a_replicate_with_its_own_images_and_classifiers(
    bars_study, store: Store, profile: Profile
) -> None:
    made = bars_study(
        search={
            "ratios": [1, 2], "seeds": 2, "confirm_fits": 3, "arms": ["oversampled", "mixup"],
        },
    )  # fmt: skip
    steps = plan(made)
    manifests = execute(steps, store, InlineRuntime(), profile)
    drawn = []
    for suffix in ("", ".fit1", ".fit2", ".fit3"):
        held = table(store, manifests[named(steps, f"mix.more.x1{suffix}")[0].key], "members")
        real = held.filter(pc.equal(held[rows.SOURCE], "real"))
        parts = store.tables(
            manifests[named(steps, f"request.more{suffix}")[0].key].keys(table="requests")
        )
        uri_of = {row[rows.IMAGE_ID]: row[rows.URI] for part in parts for row in part.to_pylist()}
        drawn.append({uri_of[name] for name in held[rows.IMAGE_ID].to_pylist() if name in uri_of})
        assert len(drawn[-1]) == held.num_rows - real.num_rows > 0
    assert len(set(map(frozenset, drawn))) == 4
    search, confirm = (manifests[named(steps, kind)[0].key] for kind in ("search", "confirm"))
    trials = table(store, search, "trials")
    assert trials.num_rows == 6 * 2
    of_arm = trials.filter(pc.equal(trials[rows.ARM], "more x1"))
    assert of_arm[rows.GENERATOR_FIT].to_pylist() == [0, 0]
    assert of_arm[rows.SEED].to_pylist() == [0, 1]
    # The choice is confirmed by other fits and seeds, of the chosen ratio alone.
    confirming = table(store, confirm, "trials")
    (ratio,) = {name for name in search.metrics["chosen"] if name.startswith("more")}
    assert set(confirming[rows.ARM].to_pylist()) == {*search.metrics["chosen"], f"{ratio} double"}
    of_arm = confirming.filter(pc.equal(confirming[rows.ARM], ratio))
    assert of_arm[rows.GENERATOR_FIT].to_pylist() == [1, 2, 3]
    assert of_arm[rows.SEED].to_pylist() == [2, 3, 4]
    keys = trials["key"].to_pylist() + confirming["key"].to_pylist()
    assert len(set(keys)) == len(keys)
    evaluated = manifests[named(steps, "evaluate")[0].key]
    (contrast,) = evaluated.metrics["contrasts"]
    assert len(contrast["differences"]) == contrast["replicates"] == 3
    assert contrast["obstacle"] == {
        "code": "few_replicates", "fields": {"replicates": 3, "minimum": 5}
    }  # fmt: skip
    # The images of a folder are drawn again, and nothing is trained.
    assert contrast["drawn"]
    assert "3 draws of images, conditional on one generator" in evaluated.metrics["headline"]
    assert replicates_in_words(Contrast.model_validate({**contrast, "drawn": False})) == (
        "3 generator fits"
    )
    assert len(contrast["mcnemar"]) == 3
    predictions = table(store, evaluated, "predictions")
    each = {(row[rows.ARM], row[rows.SEED], row[rows.IMAGE_ID]) for row in predictions.to_pylist()}
    assert len(each) == predictions.num_rows


def test_unfiltered_twins_and_synthetic_only_are_arms(
    bars_study, run_until: Run, store: Store, tmp_path: Path
) -> None:
    write_bars(tmp_path / "lying", {"across": 90, "down": 40}, 7000)
    write_bars(tmp_path / "lying", {"down": 20}, 9000, {"down": "across"})
    made = bars_study(
        "lying", request={"ratio": 1, "shard_size": 16},
        search={"ratios": [1], "seeds": 2, "arms": ["synthetic_only", "unfiltered"]},
        curate={"filters": [{"name": "agreement", "confidence": 0.9}], "max_rounds": 3},
        training={"steps": 80, "batch_size": 32, "learning_rate": 0.01, "evaluate_every": 20},
    )  # fmt: skip
    search = run_until(made, "search").metrics
    assert "more unfiltered x1" not in search["arms"]
    confirm = run_until(made, "confirm").metrics
    assert confirm["twins"] == {"more unfiltered x1": "more x1"}
    assert "more unfiltered x1" in confirm["arms"]
    filtered, whole = (
        run_until(made, f"mix.more.{name}").metrics["added"]["more"]
        for name in ("x1", "unfiltered.x1")
    )
    assert filtered == whole  # compared at equal counts
    steps = plan(made)
    ids = [
        set(table(store, read_manifest(store, named(steps, f"mix.more.{name}")[0]), "members")[
            rows.IMAGE_ID].to_pylist())
        for name in ("x1", "unfiltered.x1")
    ]  # fmt: skip
    assert ids[0] != ids[1]
    alone = run_until(made, "mix.more.only").metrics
    assert alone["real"] == 0
    assert sum(alone["added"]["more"].values()) == run_until(made, "mix.real").rows
    evaluated = run_until(made, "evaluate").metrics
    assert [
        (one["arm"], one["twin"], {pair["against"] for pair in one["baselines"]})
        for one in evaluated["contrasts"]
    ] == [("more x1", False, {"real"}), ("more x1", True, {"more unfiltered x1"})]
    assert "more only" in evaluated["arms"]
    assert search["baseline"] not in ("more only", "more unfiltered x1", "real_double")


def test_combined_generators_are_each_added_at_the_ratio(bars_study, run_until: Run) -> None:
    made = bars_study(
        generators={"t": {"name": "traditional"}, "u": {"name": "traditional", "rotate": 5}},
        reduce={"method": "random", "balance_to": "smallest"},
        search={
            "ratios": [1], "seeds": 2, "combine": {"both": ["t", "u"], "few": ["reduced", "t"]},
        },
    )  # fmt: skip
    train = run_until(made, "ingest").metrics["counts"]["train"]
    both = run_until(made, "mix.both.x1").metrics
    assert both["added"]["t"] == both["added"]["u"] == {"down": train["down"]}
    few = run_until(made, "mix.few.x1").metrics
    assert few["real"] == 2 * min(train.values())
    assert list(few["added"]) == ["t"]
    arms = {arm.name: arm for arm in named(plan(made), "search")[0].spec.arms}
    # Augmented real images are not synthetic, however they are combined.
    assert {arms[name].role for name in ("both x1", "few x1", "t x1")} == {"baseline"}


def test_impossible_combinations_are_rejected_when_the_study_is_read(bars_study) -> None:
    with pytest.raises(StudyError, match="unknown part 'other'; choose from more"):
        bars_study(search={"combine": {"both": ["more", "other"]}})
    with pytest.raises(StudyError, match="both lists an entry twice"):
        bars_study(search={"combine": {"both": ["more", "more"]}})
    two = {"t": {"name": "traditional"}, "u": {"name": "traditional", "rotate": 5}}
    with pytest.raises(StudyError, match=r"search\.combine\.t: the name is already an arm"):
        bars_study(generators=two, search={"combine": {"t": ["t", "u"]}})
    with pytest.raises(StudyError, match="needs at least two classifiers per arm"):
        bars_study(search={"seeds": 1})
