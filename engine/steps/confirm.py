"""Confirm: the chosen arms and the baselines once more, with generators and classifiers that had no
part in the choice.

A fit that is lucky on val is often lucky on test as well, so a choice that is tested with the
classifiers that made it is biased: in simulation, six ratios against `real` gain 3.8 points that
are not there. Twins of the chosen arms, with as many unfiltered images, are trained here alone.
"""

from __future__ import annotations

import pyarrow as pa

from engine.comparison.arms import SearchSpec, planned_trials
from engine.context import Context, Output
from engine.core.manifest import Manifest
from engine.core.step import Step
from engine.core.store import Store
from engine.results.comparison import ConfirmResult, SearchResult
from engine.stages.classify import changed_weights, external_digests
from engine.steps import StepKind
from engine.steps.search import means_on_val, trial_columns


class Confirm(StepKind[SearchSpec]):
    version = 1
    summary = "train the chosen arms anew, to test the choice"
    runs = ("train",)

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(SearchSpec)
        chosen = context.result("search", SearchResult).chosen
        twins = {arm.name: arm.twin_of for arm in spec.arms if arm.twin_of in chosen}
        trials = [
            trial for trial in planned_trials(context.step)
            if trial.arm.name in chosen or trial.arm.name in twins
        ]  # fmt: skip
        manifests = context.trials([trial.step for trial in trials])
        columns = trial_columns(spec, trials, manifests)
        arms = means_on_val(spec, trials, manifests)
        return Output(
            [context.table("trials", pa.table(columns), table="trials")], len(trials),
            ConfirmResult(
                headline=f"{len(trials)} trials of {len(arms)} arms",
                outside=external_digests(spec),
                trials={key: manifest.digest for key, manifest in manifests.items()},
                arms=arms, twins={twin: str(of) for twin, of in twins.items()},
            ),
        )  # fmt: skip

    def trials(self, step: Step) -> list[Step]:
        return [trial.step for trial in planned_trials(step)]

    def outdated(self, step: Step, manifest: Manifest, store: Store) -> str | None:
        # As for the search: the trials are not inputs.
        return changed_weights(step.spec_as(SearchSpec), ConfirmResult.of(manifest).outside)
