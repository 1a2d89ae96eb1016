"""From generated images to the verdict: curate, mix, train, search, evaluate, on images with a
known answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from PIL import Image

from engine.comparison.arms import Arm, planned_trials
from engine.core import rows
from engine.core.errors import DataError, EngineError, StorageError, StudyError
from engine.core.manifest import Manifest, read_manifest
from engine.core.store import Store
from engine.execute import RunTrial, execute, inspect
from engine.plan import named, plan
from engine.profile import Profile
from engine.results.comparison import EvaluateResult
from engine.runtime.base import Trial
from engine.runtime.inline import InlineRuntime
from engine.settings import Amount
from engine.steps.mix import pool_order, wanted_images
from engine.steps.search import choose, hardly_learnt
from engine.study import Study
from tests.conftest import write_bars
from tests.results import val_mean

Run = Callable[[Study, str], Manifest]


def table(store: Store, manifest: Manifest, name: str) -> pa.Table:
    return pa.concat_tables(store.tables(manifest.keys(table=name)))


def test_study_reaches_its_verdict_and_a_second_run_computes_nothing(
    bars_study, store: Store, profile: Profile
) -> None:
    steps = plan(bars_study())
    manifests = execute(steps, store, InlineRuntime(), profile)
    evaluated = manifests[named(steps, "evaluate")[0].key]
    assert set(evaluated.metrics["arms"]) == {
        "real", "real_double", "oversampled",
        *(name for name in evaluated.metrics["arms"] if name.startswith("more x")),
    }  # fmt: skip
    (contrast,) = evaluated.metrics["contrasts"]
    assert contrast["word"] in ("helps", "harms", "equivalent", "undecided")
    assert "conditional on one generator" in evaluated.metrics["headline"]
    predictions = table(store, evaluated, "predictions")
    assert predictions.num_rows == evaluated.metrics["test"]["images"] * 5 * 2
    # All reported figures come from the table.
    real = predictions.filter(pa.compute.equal(predictions[rows.ARM], "real"))
    guessed = np.asarray(real[rows.PROBABILITIES].to_pylist()).argmax(1)
    right = np.asarray([["across", "down"][g] for g in guessed]) == real["label.class"].to_pylist()
    accuracy = EvaluateResult.of(evaluated).arms["real"].figures["accuracy"]
    assert right.mean() == pytest.approx(accuracy.mean)
    before = store.listing("")
    execute(plan(bars_study()), store, InlineRuntime(), profile)
    assert store.listing("") == before


def test_images_of_another_class_are_dropped_with_their_reason(
    bars_study, run_until: Run, store: Store, tmp_path: Path
) -> None:
    write_bars(tmp_path / "mixed", {"down": 30}, 7000)
    write_bars(tmp_path / "mixed", {"down": 15}, 9000, {"down": "across"})  # 15 of the 30 now lie
    made = bars_study(
        "mixed", search={"ratios": [0.5], "seeds": 2}, curate={"max_rounds": 1},
        training={"steps": 80, "batch_size": 32, "learning_rate": 0.01, "evaluate_every": 20},
    )  # fmt: skip
    curated = run_until(made, "curate")
    funnel = curated.metrics["funnel"]["down"]
    assert (
        funnel["requested"]
        == funnel["generated"]
        == funnel["kept"] + sum(funnel["reasons"].values())
    )
    held = table(store, curated, "curated")
    seen = Counter(
        (seen, reason)
        for seen, reason in zip(
            held[rows.LABEL_SEEN].to_pylist(), held[rows.REASON].to_pylist(), strict=True
        )
    )
    assert seen["across", "agreement"] > 0
    assert seen["down", ""] > 0
    assert held[rows.LABEL].to_pylist() == ["down"] * held.num_rows
    relabelled = run_until(
        bars_study("mixed", search={"ratios": [0.5], "seeds": 2},
              curate={"filters": [{"name": "agreement", "label_from": "labeler"}],
                      "max_rounds": 1},
              training=made.training.model_dump()), "curate",
    )  # fmt: skip
    other = table(store, relabelled, "curated")
    assert other[rows.LABEL].to_pylist() == other[rows.LABEL_SEEN].to_pylist()
    # An image used as another class does not count for this one, so more are generated.
    funnel = relabelled.metrics["funnel"]["down"]
    assert funnel["kept"] == other[rows.LABEL].to_pylist().count("down")
    assert funnel["reasons"] == {"used as across": other.num_rows - funnel["kept"]}


def test_copy_of_a_training_image_is_found(
    bars_study, run_until: Run, store: Store, tmp_path: Path
) -> None:
    ingest = run_until(bars_study(), "ingest")
    train = pa.concat_tables(store.tables(ingest.keys(split="train")))
    downs = [uri for uri in train[rows.URI].to_pylist() if uri.startswith("down")]
    uris = downs[:6]
    write_bars(tmp_path / "copied", {"down": len(downs)}, 5000)  # all of them are requested
    for number, uri in enumerate(uris):
        picture = np.asarray(Image.open(tmp_path / "real" / uri)).astype(int) + 1
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(
            tmp_path / "copied" / "down" / f"{number:04d}.png"
        )
    made = bars_study(
        "copied",
        search={"ratios": [1], "seeds": 2},
        curate={"filters": ["copies"], "max_rounds": 1},
    )
    held = table(store, run_until(made, "curate"), "curated")
    reasons = Counter(held[rows.REASON].to_pylist())
    assert reasons == {"copies": 6, "": held.num_rows - 6}
    copied = held.filter(pc.equal(held[rows.REASON], "copies"))
    originals = train.filter(pc.is_in(train[rows.URI], pa.array(uris)))
    assert set(copied["copies.nearest_id"].to_pylist()) == set(originals[rows.IMAGE_ID].to_pylist())
    assert max(copied["copies.distance"].to_pylist()) < 0.01


def test_too_few_images_never_get_the_name_of_a_larger_ratio(
    bars_study, run_until: Run, tmp_path: Path
) -> None:
    write_bars(tmp_path / "lying", {"down": 60}, 9000, {"down": "across"})
    made = bars_study(
        "lying",
        training={"steps": 80, "batch_size": 32, "learning_rate": 0.01, "evaluate_every": 20},
    )
    with pytest.raises(DataError, match=r"too few images of more were kept .*requested"):
        run_until(made, "search")


def test_mixes_are_nested_and_have_their_stated_share(
    bars_study, store: Store, profile: Profile
) -> None:
    steps = plan(bars_study())
    chosen = [step for step in steps if step.kind == "mix"]
    manifests = execute(steps[: steps.index(chosen[-1]) + 1], store, InlineRuntime(), profile)
    members = {
        step.label: table(store, manifests[step.key], "members").to_pylist() for step in chosen
    }
    train = manifests[named(steps, "ingest")[0].key].metrics["counts"]["train"]
    added = {
        label: [row[rows.IMAGE_ID] for row in held if row[rows.SOURCE] == "more"]
        for label, held in members.items()
    }
    assert [len(added[f"mix.more.x{ratio}"]) for ratio in (1, 2)] == [
        train["down"], 2 * train["down"]
    ]  # fmt: skip
    assert added["mix.more.x2"][: train["down"]] == added["mix.more.x1"]
    assert not added["mix.real"]
    weight = Counter()
    for row in members["mix.oversampled"]:
        weight[row["label.class"]] += row[rows.WEIGHT]
    assert weight["across"] == pytest.approx(weight["down"])


def test_requested_amount_is_an_arm(bars_study, run_until: Run, store: Store) -> None:
    balanced = bars_study(
        request={"balance_to": 40, "classes": ["down"], "shard_size": 16},
        search={"ratios": [1], "seeds": 2},
    )
    steps = plan(balanced)
    arms = {arm.name: arm for arm in named(steps, "search")[0].spec.arms if arm.family == "more"}
    assert {name: arm.ratio for name, arm in arms.items()} == {"more x1": 1.0, "more to 40": None}
    mix = run_until(balanced, "mix.more.to.40")
    real = run_until(balanced, "ingest").metrics["counts"]["train"]["down"]
    assert mix.metrics["added"] == {"more": {"down": 40 - real}}
    assert run_until(balanced, "evaluate").metrics["contrasts"][0]["tries"] == 2
    asked = bars_study(request={"ratio": 1.5, "classes": ["down"]})
    names = [arm.name for arm in named(plan(asked), "search")[0].spec.arms]
    assert names[3:] == ["more x1", "more x1.5", "more x2"]


def test_real_images_alone_never_get_the_name_of_a_ratio(bars_study, run_until: Run) -> None:
    with pytest.raises(DataError, match=r"ratio 0.02 adds no image to 'down'.* raise search.ratio"):
        run_until(bars_study(search={"ratios": [0.02, 1], "seeds": 2}), "search")
    many = bars_study(request={"balance_to": 10, "classes": ["down"]})
    with pytest.raises(DataError, match=r"raise request\.balance_to"):
        run_until(many, "search")


def test_generator_without_filters_replaces_unusable_images(
    bars_study, run_until: Run, tmp_path: Path
) -> None:
    made = bars_study(search={"ratios": [1], "seeds": 2}, curate={"filters": [], "max_rounds": 3})
    black = tmp_path / "good" / "down" / "0003.png"
    black.write_bytes(b"no image at all")
    assert run_until(made, "search").metrics["baseline"]


def test_ratios_round_and_pools_have_their_own_order() -> None:
    half = Amount(ratio=0.5)
    assert wanted_images({"a": 5, "b": 100}, half, "all") == {"a": 2, "b": 50}
    assert wanted_images({"a": 5, "b": 100}, half, ("b",)) == {"b": 50}
    assert wanted_images({"a": 5, "b": 100}, Amount(balance_to=50), "all") == {"a": 45, "b": 0}
    assert wanted_images({"a": 5, "b": 100}, Amount(per_class=7), "all") == {"a": 7, "b": 7}
    names = [f"image {number}" for number in range(50)]
    orders = [sorted(names, key=lambda name: pool_order(seed, name)) for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_ratio_is_chosen_on_val_and_ties_go_to_the_smaller() -> None:
    arms = [
        Arm(name="real", family="real", mixes=("m",)),
        # More steps are not a fair baseline.
        Arm(name="real_double", family="real_double", mixes=("m",), budget=2.0, role="shown"),
        Arm(name="oversampled", family="oversampled", mixes=("m",)),
        Arm(name="g x1", family="g", mixes=("m",), ratio=1.0, role="compared"),
        Arm(name="g x2", family="g", mixes=("m",), ratio=2.0, role="compared"),
    ]
    means = {"real": 0.55, "real_double": 0.9, "oversampled": 0.6, "g x1": 0.7, "g x2": 0.7}
    chosen, baseline = choose(arms, {name: val_mean(mean) for name, mean in means.items()})
    assert chosen == ["real", "real_double", "oversampled", "g x1"]
    assert baseline == "oversampled"


def test_classifiers_without_skill_give_a_warning(bars_study, run_until: Run) -> None:
    columns = {"arm": ["real", "real", "more x1"], "balanced_accuracy": [0.1, 0.12, 0.9]}
    (warning,) = hardly_learnt(columns, 0.1)
    assert warning.code == "hardly_learnt"
    assert warning.fields == pytest.approx({"mean": 0.11, "chance": 0.1})
    assert hardly_learnt({**columns, "balanced_accuracy": [0.6, 0.5, 0.1]}, 0.1) == []
    untrained = bars_study(training={"steps": 1, "batch_size": 4, "learning_rate": 1e-9})
    assert run_until(untrained, "search").metrics["warnings"]


class DiesAfter(InlineRuntime):
    """A runtime whose process ends after a number of trials."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count, self.ran = count, 0

    def search(
        self, run: Trial, names: Sequence[str], resources: Any, on_end: Callable[[str], None]
    ) -> None:
        for name in names:
            if self.ran == self.count:
                raise EngineError("the power went")
            run(name, self)
            self.ran += 1
            on_end(name)


def test_only_unfinished_trials_run_again_after_a_kill(
    bars_study, store: Store, profile: Profile, tmp_path: Path
) -> None:
    steps = plan(bars_study())
    (search,) = named(steps, "search")
    until = steps[: steps.index(search) + 1]
    with pytest.raises(EngineError, match="the power went"):
        execute(until, store, DiesAfter(5), profile)
    rest = DiesAfter(99)
    manifest = execute(until, store, rest, profile)[search.key]
    assert manifest.provenance["trials"] == {"found": 5, "made": 5}
    assert rest.ran == 5
    whole = Store(str(tmp_path / "undisturbed"))
    undisturbed = execute(until, whole, InlineRuntime(), profile)[search.key]
    assert table(store, manifest, "trials").equals(table(whole, undisturbed, "trials"))


def test_trial_finished_by_another_attempt_is_kept(
    bars_study, store: Store, profile: Profile
) -> None:
    steps = plan(bars_study())
    execute(steps[: steps.index(named(steps, "search")[0]) + 1], store, InlineRuntime(), profile)
    trial = planned_trials(named(steps, "search")[0])[0].step
    inputs = {needed.key: read_manifest(store, needed) for needed in trial.inputs.values()}
    before = read_manifest(store, trial)
    figures = RunTrial({trial.key: trial}, inputs, store, profile)(trial.key, InlineRuntime())
    assert read_manifest(store, trial) == before
    assert figures["macro_f1"] == before.metrics["val"]["macro_f1"]


def test_failed_trial_is_named(bars_study, run_until: Run, store: Store) -> None:
    mixed = run_until(bars_study(), "mix.oversampled")
    (members,) = mixed.keys(table="members")
    store.put(members, b"not what was written here")
    with pytest.raises(StorageError, match=r"^train\.oversampled\.0: .* run again with --discard"):
        run_until(bars_study(), "search")


def test_fit_leaves_only_its_weights(bars_study, run_until: Run, store: Store) -> None:
    run_until(bars_study(), "search")
    assert not store.listing("work")


def test_changed_pool_retrains_only_its_own_arms(
    bars_study, store: Store, profile: Profile, tmp_path: Path
) -> None:
    steps = plan(bars_study())
    until = steps[: steps.index(named(steps, "search")[0]) + 1]
    execute(until, store, InlineRuntime(), profile)
    (tmp_path / "good" / "down" / "00000.png").write_bytes(
        (tmp_path / "good" / "down" / "0059.png").read_bytes()
    )
    (tmp_path / "good" / "down" / "0059.png").unlink()
    states = {status.step.label: status.state for status in inspect(until, store)}
    assert states["mix.real"] == "done"
    assert states["request.more"] == "out of date"
    again = DiesAfter(99)
    execute(until, store, again, profile)
    assert again.ran == 4  # two ratios with two seeds


def test_generator_cannot_have_the_name_of_an_arm(bars_study) -> None:
    with pytest.raises(StudyError, match="the name is already an arm"):
        bars_study(generators={"oversampled": {"name": "traditional"}})
