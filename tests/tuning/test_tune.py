"""Settings of a study, tried on images with a known answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from engine.cli import run_tune
from engine.comparison.arms import planned_trials
from engine.core.errors import EngineError, StorageError, StudyError
from engine.core.manifest import read_manifest
from engine.core.sealed import unseal
from engine.core.store import Store
from engine.execute import execute
from engine.nets.classification import Training
from engine.plan import named, plan, until
from engine.profile import Profile
from engine.runtime.base import Outcome, Runtime, Try
from engine.runtime.inline import InlineRuntime
from engine.study import Study, apply_sets, validate
from engine.tuning.proposals import Halving, Proposals, Rung, Settings
from engine.tuning.tune import TuningResult, tune, tuned_study
from engine.tuning.variants import StudyVariants
from engine.work.resources import TrialResources

Values = dict[str, Any]
CONFIDENCE = "curate.filters.agreement.confidence"
RATE = "training.learning_rate"


@pytest.fixture
def written(bars_study: Callable[..., Study]) -> Callable[..., Values]:
    """A function that returns the study of bars as written in YAML, with a section `tune`."""

    def make(knobs: Values, arm: str = "more x1", **fields: Any) -> Values:
        values = bars_study().model_dump(mode="json")
        # Null and default values are not written.
        values["request"] = {"ratio": 1, "classes": ["down"], "shard_size": 16}
        return {**values, "tune": {"knobs": knobs, "arm": arm, "seeds": 1, **fields}}

    return make


@pytest.fixture
def tried(store: Store, profile: Profile) -> Callable[[Values], TuningResult]:
    return lambda values: tune(values, store, InlineRuntime(), profile)


def manifests(store: Store, kind: str) -> dict[str, bytes]:
    keys = [key for key in store.listing(f"steps/{kind}") if key.endswith("manifest.json")]
    return {key: store.read(key) for key in keys}


class Watched(InlineRuntime):
    """Records its proposals, and may end after a number of settings."""

    def __init__(self, end_after: int = 99) -> None:
        super().__init__()
        self.end_after, self.leaf, self.halving = end_after, False, None

    def tune(
        self, run: Try, proposals: Proposals, halving: Halving | None, resources: TrialResources,
        leaf: bool, on_end: Callable[[Outcome], None],
    ) -> None:  # fmt: skip
        self.leaf = leaf

        def ends(outcome: Outcome) -> None:
            on_end(outcome)
            if outcome.number == self.end_after:
                raise KeyboardInterrupt

        super().tune(run, proposals, halving, resources, leaf, ends)


def test_best_setting_is_written_as_a_study_that_reuses_its_classifiers(
    written, tried, store: Store, profile: Profile
) -> None:
    # At 1e-8 the classifier learns nothing.
    result = tried(written({RATE: [1e-8, 0.02]}, arm="real", seeds=2))
    assert [row["state"] for row in result.tries] == ["ok"] * 3
    assert [row[RATE] for row in result.tries] == [0.01, 1e-8, 0.02]
    means = [row["mean"] for row in result.tries]
    assert result.best["mean"] == max(means) > means[1]
    assert not store.listing("openings")
    values = yaml.safe_load(result.study)
    assert values["training"]["learning_rate"] == result.best[RATE]
    assert (values["name"], values["tune"]) == ("toy-tuned", {"tried": 3})
    before = manifests(store, "train")
    study = validate(Study, values, "tuned.yaml")
    steps = until(plan(study), "search")
    searched = execute(steps, store, InlineRuntime(), profile)[steps[-1].key]
    assert searched.metrics["arms"]["real"]["mean"] == pytest.approx(result.best["mean"])
    assert before.items() <= manifests(store, "train").items()
    assert searched.provenance["trials"]["found"] >= 2


def test_shared_results_are_computed_once_and_reused(
    written, store: Store, profile: Profile
) -> None:
    runtime = Watched()
    values = written({CONFIDENCE: [0.5, 0.8, 0.99]})
    result = tune(values, store, runtime, profile)
    assert not runtime.leaf
    assert len(manifests(store, "generate")) == len(manifests(store, "ingest")) == 1
    # Including the study itself (0.9).
    assert len(manifests(store, "curate")) == 4
    before = {key: store.read(key) for key in store.listing("")}
    again = tune(values, store, Watched(), profile)
    assert {key: store.read(key) for key in store.listing("")} == before
    assert [row["scores"] for row in again.tries] == [row["scores"] for row in result.tries]


def test_only_missing_results_are_computed_after_a_kill(
    written, store: Store, profile: Profile, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    values = written(
        {RATE: {"low": 1e-4, "high": 0.1, "log": True}}, "real", method="optuna", trials=4
    )
    with pytest.raises(KeyboardInterrupt):
        tune(values, store, Watched(end_after=2), profile)
    kept = manifests(store, "train")
    assert len(kept) == 3
    runtime = Watched()
    result = tune(values, store, runtime, profile)
    assert runtime.leaf
    assert kept.items() <= manifests(store, "train").items()
    assert len(manifests(store, "train")) == 5
    whole = tune(values, Store(str(tmp_path / "whole")), InlineRuntime(), profile)
    assert [row[RATE] for row in whole.tries] == [row[RATE] for row in result.tries]
    assert [row["scores"] for row in whole.tries] == [row["scores"] for row in result.tries]


def test_failed_setting_does_not_end_the_others(written, tried, store: Store) -> None:
    values = written({"request.ratio_by_class.down": [1, 50]}, arm="more by class")
    values["request"] = {"ratio_by_class": {"down": 0.5}, "classes": ["down"], "shard_size": 16}
    result = tried(values)
    assert [row["state"] for row in result.tries] == ["ok", "ok", "failed"]
    assert "request: " in result.tries[2]["error"]
    assert "the folder has 60" in result.tries[2]["error"]
    assert result.best["request.ratio_by_class.down"] in (0.5, 1)


def test_one_knob_changes_the_ratio_of_a_class_group(written, tried, store: Store) -> None:
    values = written({"request.ratio_by_class.rare": [1, 1.5]}, arm="more by class")
    values["request"] = {
        "ratio_by_class": {"rare": 0.5}, "class_groups": {"rare": ["down"]}, "shard_size": 16
    }  # fmt: skip
    values["search"] = {**values["search"], "ratios": [0.5]}
    values["generators"] = {"more": {"name": "traditional"}}
    result = tried(values)
    assert [row["request.ratio_by_class.rare"] for row in result.tries] == [0.5, 1, 1.5]
    assert [row["state"] for row in result.tries] == ["ok"] * 3
    # Each equals the study that names the class directly.
    for row in result.tries:
        ratio = row["request.ratio_by_class.rare"]
        request = {"ratio_by_class": {"down": ratio}, "shard_size": 16}
        study = validate(Study, {**values, "request": request}, "by class")
        (search,) = named(plan(study), "search")
        (trial, *_) = [t.step for t in planned_trials(search) if t.arm.name == "more by class"]
        manifest = read_manifest(store, trial)
        assert manifest is not None
        assert row["scores"] == [manifest.metrics["val"]["macro_f1"]]
    tuned = yaml.safe_load(result.study)["request"]
    best = result.best["request.ratio_by_class.rare"]
    assert (tuned["ratio_by_class"], tuned["class_groups"]) == ({"rare": best}, {"rare": ["down"]})


def test_failing_shared_step_is_tried_once(written, tried, capsys) -> None:
    values = written(
        {"request.ratio_by_class.down": [1, 50], RATE: [0.01, 0.02]}, arm="more by class"
    )
    values["request"] = {"ratio_by_class": {"down": 0.5}, "classes": ["down"], "shard_size": 16}
    result = tried(values)
    assert [row["state"] for row in result.tries] == ["ok", "ok", "ok", "failed", "failed"]
    # It starts once for the two settings that need it.
    assert capsys.readouterr().err.count("request.more         ") == 3


class Full(Store):
    """Storage that rejects everything that curation writes."""

    def put_new(self, key: str, data: bytes | memoryview) -> None:
        self._refuse(key)
        super().put_new(key, data)

    def put_if_absent(self, key: str, data: bytes | memoryview) -> bool:
        self._refuse(key)
        return super().put_if_absent(key, data)

    def _refuse(self, key: str) -> None:
        if key.startswith("steps/curate/"):
            raise StorageError(f"{key}: no space is left")


@pytest.mark.parametrize("rates", [[0.01, 0.02], None], ids=["shared", "tried"])
def test_storage_failure_ends_the_run_and_fails_no_setting(
    written, profile: Profile, rates: list[float] | None
) -> None:
    # Shared steps are computed before any setting is tried.
    knobs = {CONFIDENCE: [0.5, 0.8], **({RATE: rates} if rates else {})}
    with pytest.raises(StorageError, match="no space is left"):
        tune(written(knobs), Full(profile.storage), InlineRuntime(), profile)


def test_error_gives_a_reason_if_all_settings_fail(written, tried) -> None:
    values = written({"request.ratio_by_class.down": [40, 50]}, arm="more by class")
    values["request"] = {"ratio_by_class": {"down": 30}, "classes": ["down"], "shard_size": 16}
    with pytest.raises(EngineError, match=r"none of 3 settings finished: request: "):
        tried(values)


def test_asha_trains_with_few_steps_first(written, store: Store, profile: Profile) -> None:
    values = written(
        {RATE: [0.02, 1e-8, 1e-9]}, "real", scheduler="asha", grace=0.25, reduction_factor=2
    )
    result = tune(values, store, InlineRuntime(), profile)
    states = {row[RATE]: (row["state"], row["steps"]) for row in result.tries}
    assert states[1e-8][0] == states[1e-9][0] == "stopped"
    assert states[1e-8][1] == 3
    assert ("ok", 12) in states.values()
    assert result.best["state"] == "ok"
    # Each budget is a separate training, which a restart reuses.
    specs = [unseal(text)["spec"]["training"] for text in manifests(store, "train").values()]
    assert {spec["steps"] for spec in specs} == {3, 6, 12}


@pytest.mark.parametrize(
    ("knobs", "fields", "why"),
    [
        ({}, {}, r"tune\.knobs: name the fields to try"),
        ({"seed": [1, 2]}, {}, "seed cannot be tuned"),
        ({"search.ratios": [[1], [2]]}, {}, r"search\.ratios cannot be tuned"),
        ({"evaluate.margin": [0.1, 0.2]}, {}, r"evaluate\.margin cannot be tuned"),
        ({"split.val": [0.1, 0.2]}, {}, r"split\.val cannot be tuned"),
        ({"reader.root": ["a", "b"]}, {}, r"reader\.root cannot be tuned"),
        ({"preprocess.size": [8, 16]}, {}, r"preprocess\.size cannot be tuned"),
        ({"training.objective": ["accuracy", "macro_f1"]}, {}, "settings are compared by"),
        ({"training.steps": [5, 9]}, {"scheduler": "asha"}, "ASHA chooses the steps"),
        ({"seed": [1, 2]}, {"scheduler": "asha"}, "ASHA must not compare arms, ratios or seeds"),
        ({"search.ratios": [[1], [2]]}, {"scheduler": "asha"}, "not compare arms, ratios"),
        ({"search.arms": [[], ["mixup"]]}, {"scheduler": "asha"}, "not compare arms, ratios"),
        ({"request": [{"ratio": 1}, {"ratio": 2}]}, {"scheduler": "asha"}, "not compare arms"),
        ({"request.ratio": [1, 2]}, {"scheduler": "asha"}, r"request\.ratio changes the arms"),
        ({"request.balance_to": [9, 20]}, {"scheduler": "asha"}, "ASHA must not compare arms"),
        ({"request.per_class": [9, 20]}, {"scheduler": "asha"}, "ASHA must not compare arms"),
        (
            {"request.ratio_by_class.down": [1, 2]},
            {"scheduler": "asha"},
            "ASHA must not compare arms, ratios or seeds",
        ),
        (
            {"request.class_groups.rare": [["down"], ["across"]]},
            {"scheduler": "asha"},
            "ASHA must not compare arms, ratios or seeds",
        ),
        ({RATE: [0.1, -1]}, {}, r"training\.learning_rate=-1: training\.learning_rate: must be"),
        ({"training.lerning": [1, 2]}, {}, r"training\.lerning: no such field"),
        ({"generators.less.rotate": [1, 2]}, {}, r"generators\.less: must name its plugin"),
        ({"cluster.k": [1, 2]}, {}, r"cluster\.k does not affect the training of arm real"),
        ({RATE: [1e-3, 1e-2]}, {"arm": "mroe x1"}, "no arm 'mroe x1'; choose one of real, "),
        ({RATE: [1e-3, 1e-2]}, {"arm": None}, r"tune\.arm: name the arm to tune; choose "),
        ({RATE: {"low": 1e-3, "high": 0.1}}, {}, r"tune\.knobs\.training\.learning_rate: a grid"),
        ({RATE: [1e-3, 1e-2]}, {"trials": 3}, r"tune\.trials: a grid tries every setting"),
        ({RATE: [1e-3, 1e-2]}, {"seeds": 3}, r"tune\.seeds: 3 is more than search\.seeds \(2\)"),
        ({"training": [{}, {"steps": 2}], RATE: [0.1, 0.2]}, {}, "is a part of training"),
    ],
)
def test_impossible_settings_are_rejected_before_anything_is_computed(
    written, tried, store: Store, knobs: Values, fields: Values, why: str
) -> None:
    with pytest.raises(StudyError, match=why) as raised:
        tried(written(knobs, **{"arm": "real", **fields}))
    assert "\n" not in str(raised.value)
    assert not store.listing("")


def test_rungs_are_trainings_of_the_arm(written, store: Store, profile: Profile) -> None:
    study = validate(Study, written({CONFIDENCE: [0.5, 0.8]}), "study")
    variants = StudyVariants(study.model_dump(mode="json"), study.tune, store, profile)
    (few,), (all_steps,) = variants.classifiers({}, 3), variants.classifiers({})
    assert (few.spec.training.steps, all_steps.spec.training.steps) == (3, 12)
    assert few.inputs["mix"].key == all_steps.inputs["mix"].key


def test_null_is_a_value_that_is_tried_and_kept(written, store: Store, profile: Profile) -> None:
    knobs = {"curate.labeler": [None, {"name": "knn"}], "curate.max_rounds": [1, 2]}
    values = written(knobs)
    values["curate"] = {"filters": ["copies"], "max_rounds": 1}
    study = validate(Study, values, "study")
    variants = StudyVariants(values, study.tune, store, profile)
    tries = [{"curate.labeler": None, "curate.max_rounds": 2}, {"curate.labeler": {"name": "knn"}}]
    assert variants.study(tries[0]).curate.labeler is None
    assert len({variants.classifiers(settings)[0].key for settings in [{}, *tries]}) == 3
    best = {"try": 1, "mean": 0.5, **tries[0]}
    text = tuned_study(variants, study, [best], best)
    again = apply_sets(yaml.safe_load(text), ["curate.max_rounds=3"])
    assert validate(Study, again, "tuned.yaml").curate.labeler is None
    # A plugin of a list is removed; a field that cannot be null is rejected.
    values["curate"] = {"filters": ["copies", {"name": "agreement", "confidence": 0.5}]}
    variants = StudyVariants(values, study.tune, store, profile)
    (left,) = variants.study({"curate.filters.agreement": None}).curate.filters
    assert left.name == "copies"
    for name, place in (
        ("curate.filters.agreement.confidence", r"curate\.filters\.1\.confidence"),
        ("training.steps", r"training\.steps"),
    ):
        with pytest.raises(StudyError, match=rf"{name}=null: {place}.*: must be a valid"):
            variants.study({name: None})


def test_rung_warms_up_over_its_share_of_the_steps(written, store: Store, profile: Profile) -> None:
    values = written({RATE: [0.01, 0.02]}, scheduler="asha")
    values["training"] = {**values["training"], "steps": 12, "lr_warmup_steps": 11}
    variants = StudyVariants(values, validate(Study, values, "study").tune, store, profile)
    rungs = [variants.classifiers({}, steps)[0].spec.training for steps in (1, 6, 12)]
    assert [rung.lr_warmup_steps for rung in rungs] == [0, 5, 11]
    assert [Training.model_validate(rung.model_dump()) for rung in rungs] == rungs
    assert variants.classifiers({}, 12)[0].key == variants.classifiers({})[0].key


def test_stopped_setting_makes_room_for_the_next() -> None:
    computed: list[int] = []

    def run(settings: Settings, runtime: Runtime) -> Iterator[Rung]:
        for steps in (1, 2, 4):
            computed.append(steps)
            yield Rung(steps, settings.get("x", 5) / 10)

    outcomes: list[Outcome] = []
    proposals = Proposals({"x": (1, 9)}, "grid", 2, seed=0)
    halving = Halving(1, 2, 4)
    resources = TrialResources()
    InlineRuntime().tune(run, proposals, halving, resources, True, outcomes.append)
    assert computed == [1, 2, 4, 1, 1, 2, 4]
    assert [outcome.reached for outcome in outcomes] == [(4, 0.5), (1, 0.1), (4, 0.9)]


def test_job_writes_a_study_and_a_table(
    written, store: Store, profile: Profile, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(written({RATE: [0.02, 0.05]}, arm="real")))
    sets = ["--set", "profile.runtime=inline", "--set", f"profile.storage={tmp_path}/runs"]
    assert run_tune([str(path), *sets, "--set", "tune.budget_hours=1"]) == 0
    shown = capsys.readouterr()
    assert "val macro_f1" in shown.out
    assert "best" in shown.out
    pages = tmp_path / "runs" / "pages" / "toy"
    lines = (pages / "tries.csv").read_text().splitlines()
    assert lines[0].startswith(f"try,{RATE},state,mean")
    assert len(lines) == 4
    assert len(json.loads((pages / "tries.json").read_text())["tries"]) == 3
    assert (pages / "tuned.yaml").read_text().startswith("# toy with the best of 3 settings")
    assert run_tune([str(pages / "tuned.yaml"), *sets]) == 2
    assert "tune.knobs: name the fields to try" in capsys.readouterr().err
    # Earlier tries count.
    again = ["--set", f"tune.knobs={{{RATE}: [0.03, 0.04]}}", "--set", "tune.arm=real"]
    assert run_tune([str(pages / "tuned.yaml"), *sets, *again, "--set", "tune.seeds=1"]) == 0
    tuned = tmp_path / "runs" / "pages" / "toy-tuned" / "tuned.yaml"
    assert yaml.safe_load(tuned.read_text())["tune"] == {"tried": 6}


@pytest.mark.parametrize("objective", ["worst_class_recall", "roc_auc", "balanced_accuracy"])
def test_settings_are_compared_by_the_study_s_objective(
    written, tried, store: Store, objective: str
) -> None:
    result = tried(written({RATE: [1e-8, 0.02]}, arm="real", objective=objective))
    # Recomputed from the classifiers' predictions on val.
    for key, text in manifests(store, "train").items():
        manifest = unseal(text)
        (part,) = [part["key"] for part in manifest["parts"]
                   if part["tags"]["file"] == "predictions.parquet"]  # fmt: skip
        (table,) = store.tables([part])
        true = np.asarray(table["label.class"].to_pylist()) == "down"
        down = np.asarray(table["probabilities"].to_pylist())[:, 1]
        expected = {
            "roc_auc": roc_auc_score(true, down),
            "worst_class_recall": min((down > 0.5)[true].mean(), (down <= 0.5)[~true].mean()),
            "balanced_accuracy": ((down > 0.5)[true].mean() + (down <= 0.5)[~true].mean()) / 2,
        }[objective]
        assert any(row["mean"] == pytest.approx(expected) for row in result.tries), key
    assert result.objective == objective
