"""Confirm: replicates that failed are named before test is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest

from engine.comparison.arms import SearchSpec, planned_trials
from engine.context import Context
from engine.core.manifest import Manifest
from engine.core.notice import Notice
from engine.core.step import Step
from engine.core.store import Store
from engine.plan import named, plan
from engine.results.comparison import ConfirmResult, EvaluateResult
from engine.steps.confirm import failed_generators
from engine.study import Study
from tests.results import curated, manifest

# Only what differs from the finished study of bars is computed.
pytestmark = pytest.mark.usefixtures("resumed")

Run = Callable[[Study, str], Manifest]


def test_a_classifier_that_learnt_nothing_is_named_and_still_counts(
    bars_study: Callable[..., Study], run_until: Run, store: Store,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    study = bars_study(
        training={"steps": 1, "batch_size": 4, "learning_rate": 1e-9, "evaluate_every": 1}
    )
    confirmed = ConfirmResult.of(run_until(study, "confirm"))
    assert {failure.replicate for failure in confirmed.failed} == {0, 1}
    assert {failure.reason.code for failure in confirmed.failed} == {"near_chance"}
    assert "replicate 0: its classifier has hardly learnt anything" in capsys.readouterr().err
    assert not store.listing("openings")
    (contrast,) = EvaluateResult.of(run_until(study, "evaluate")).contrasts
    assert contrast.replicates == 2
    assert contrast.without_failed is not None
    assert contrast.without_failed.verdict is None


def test_classifiers_that_learnt_are_not_named(
    bars_study: Callable[..., Study], run_until: Run
) -> None:
    study = bars_study(
        training={"steps": 60, "batch_size": 16, "learning_rate": 0.01, "evaluate_every": 20}
    )
    assert ConfirmResult.of(run_until(study, "confirm")).failed == []


@dataclass
class Manifests:
    """A context in which the generators of some fits learnt nothing."""

    collapsed: set[int]

    def manifest(self, step: Step) -> Manifest:
        reason = Notice.of("covers_nothing", coverage=0.0, floor=10.0, area=1.0)
        warnings = [reason] if step.subject.fit in self.collapsed else []
        result = curated(warnings=[*warnings, Notice.of("no_groups")])
        return manifest("curate", **result.model_dump(mode="json"))


def test_a_generator_that_learnt_nothing_fails_in_its_fit_alone(
    bars_study: Callable[..., Study],
) -> None:
    study = bars_study(search={"ratios": [1], "seeds": 1, "confirm_fits": 5, "generator_fits": 2})
    (confirm,) = named(plan(study), "confirm")
    spec = confirm.spec_as(SearchSpec)
    trials = [trial for trial in planned_trials(confirm) if trial.arm.name in ("real", "more x1")]
    assert {trial.fit for trial in trials} == {2, 3, 4, 5, 6}
    context: Any = Manifests({3, 0})
    failed = failed_generators(cast(Context, context), spec, trials)
    assert [(failure.replicate, failure.arm) for failure in failed] == [(1, "more x1")]
