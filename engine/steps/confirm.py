"""Confirm: the chosen arms and the baselines once more, with generators and classifiers that had no
part in the choice.

A fit that is lucky on val is often lucky on test as well, so a choice that is tested with the
classifiers that made it is biased: in simulation, six ratios against `real` gain 3.8 points that
are not there. Twins of the chosen arms, with as many unfiltered images, are trained here alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from engine.comparison.arms import SearchSpec, Trial, opened_arms, planned_trials
from engine.context import Context, Output
from engine.core.manifest import Manifest
from engine.core.notice import Notice
from engine.core.step import Step
from engine.core.store import Store
from engine.results.comparison import (
    ConfirmResult,
    FailedReplicate,
    SearchResult,
    TrainResult,
)
from engine.results.data import IngestResult
from engine.results.images import CurateResult
from engine.stages.classify import changed_weights, external_digests
from engine.steps import StepKind
from engine.steps.search import means_on_val, near_chance, trial_columns
from engine.wording import notice_in_words

# A generator with one of these learnt nothing (`engine.metrics.usefulness`).
_COLLAPSED = ("covers_nothing", "one_picture", "shows_no_class")


class Confirm(StepKind[SearchSpec]):
    version = 3
    summary = "train the chosen arms anew, to test the choice"
    runs = ("train",)

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(SearchSpec)
        chosen = context.result("search", SearchResult).chosen
        twins = {arm.name: arm.twin_of for arm in spec.arms if arm.twin_of in chosen}
        opened = {arm.name for arm in opened_arms(context.step, chosen)}
        trials = [trial for trial in planned_trials(context.step) if trial.arm.name in opened]
        manifests = context.trials([trial.step for trial in trials])
        columns = trial_columns(spec, trials, manifests)
        chance = context.result("ingest", IngestResult).chance(spec.tasks)
        failed = failed_trainings(spec, trials, manifests, chance)
        failed += failed_generators(context, spec, trials)
        for failure in failed:
            context.say(
                f"warning: {failure.arm}, replicate {failure.replicate}:"
                f" {notice_in_words(failure.reason)}"
            )
        arms = means_on_val(spec, trials, manifests)
        return Output(
            [context.table("trials", pa.table(columns), table="trials")], len(trials),
            ConfirmResult(
                headline=f"{len(trials)} trials of {len(arms)} arms",
                outside=external_digests(spec),
                trials={key: manifest.digest for key, manifest in manifests.items()},
                arms=arms, twins={twin: str(of) for twin, of in twins.items()},
                doubles={
                    arm.name: arm.double_of for arm in spec.arms
                    if arm.double_of is not None and arm.double_of in chosen
                },
                failed=failed,
            ),
        )  # fmt: skip

    def trials(self, step: Step) -> list[Step]:
        return [trial.step for trial in planned_trials(step)]

    def outdated(self, step: Step, manifest: Manifest, store: Store) -> str | None:
        # As for the search: the trials are not inputs.
        return changed_weights(step.spec_as(SearchSpec), ConfirmResult.of(manifest).outside)


def failed_trainings(
    spec: SearchSpec, trials: Sequence[Trial], manifests: Mapping[str, Manifest], chance: float
) -> list[FailedReplicate]:
    """The replicates with a classifier near chance on val."""
    failed = []
    for trial in trials:
        score = TrainResult.of(manifests[trial.step.key]).val.figures["balanced_accuracy"]
        if near_chance(score, chance):
            reason = Notice.of("near_chance", mean=score, chance=chance)
            place = replicate_of(spec, trial)
            failed.append(FailedReplicate(replicate=place, arm=trial.arm.name, reason=reason))
    return failed


def failed_generators(
    context: Context, spec: SearchSpec, trials: Sequence[Trial]
) -> list[FailedReplicate]:
    """The replicates whose generator learnt nothing, by its images and val."""
    failed: dict[tuple[int, str], FailedReplicate] = {}
    for trial in trials:
        mix, place = trial.step.inputs["mix"], replicate_of(spec, trial)
        for step in mix.inputs.values():
            manifest = context.manifest(step) if step.kind == "curate" else None
            if manifest is None or (place, trial.arm.name) in failed:
                continue
            reason = next((notice for notice in CurateResult.of(manifest).warnings
                           if notice.code in _COLLAPSED), None)  # fmt: skip
            if reason is not None:
                failed[place, trial.arm.name] = FailedReplicate(
                    replicate=place, arm=trial.arm.name, reason=reason
                )
    return list(failed.values())


def replicate_of(spec: SearchSpec, trial: Trial) -> int:
    """The place of a trial's replicate: its generator fit or, with a single one, its seed."""
    if spec.generator_fits > 1:
        return trial.fit - spec.first_fit
    return trial.number - spec.first_seed
