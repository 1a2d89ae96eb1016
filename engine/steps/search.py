"""Search: every arm with every generator fit and every seed, each a `train` step in a trial of its
own.

A trial with a manifest is not run again, so a restart costs only the missing trials. Choices use
val: the ratio of each family with the best mean objective, and the strongest non-synthetic family
as baseline. The choice is confirmed by other classifiers (`engine.steps.confirm`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from engine.comparison.arms import (
    Arm,
    SearchSpec,
    Trial,
    optimizer_steps,
    planned_trials,
    replicates,
)
from engine.context import Context, Output
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.notice import Notice
from engine.core.step import Step
from engine.core.store import Store
from engine.results.comparison import SearchResult, TrainResult, ValMean
from engine.results.data import IngestResult
from engine.stages.classify import changed_weights, external_digests
from engine.steps import StepKind


class Search(StepKind[SearchSpec]):
    version = 6
    summary = "train every arm with every seed, then choose on val"
    runs = ("train",)

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(SearchSpec)
        trials = choosing_trials(context.step)
        manifests = context.trials([trial.step for trial in trials])

        arms = means_on_val(spec, trials, manifests)
        chosen, baseline = choose([arm for arm in spec.arms if arm.name in arms], arms)
        columns = trial_columns(spec, trials, manifests)
        chance = context.result("ingest", IngestResult).chance(spec.tasks)
        warnings = hardly_learnt(columns, chance)
        context.warn(warnings)
        best = max(chosen, key=lambda name: arms[name].mean)
        return Output(
            [context.table("trials", pa.table(columns), table="trials")], len(trials),
            SearchResult(
                headline=f"{len(trials)} trials; best on val: {best}, {spec.training.objective}"
                f" {arms[best].mean:.3f}",
                objective=spec.training.objective,
                warnings=warnings, outside=external_digests(spec),
                trials={key: manifest.digest for key, manifest in manifests.items()},
                arms=arms, chosen=chosen, baseline=baseline,
            ),
        )  # fmt: skip

    def trials(self, step: Step) -> list[Step]:
        return [trial.step for trial in choosing_trials(step)]

    def outdated(self, step: Step, manifest: Manifest, store: Store) -> str | None:
        # The trials are not inputs, so the search checks what makes them out of date.
        return changed_weights(step.spec_as(SearchSpec), SearchResult.of(manifest).outside)


def choosing_trials(search: Step) -> list[Trial]:
    """The trials that the choice is made by: all but those of arms that accompany a chosen one."""
    return [trial for trial in planned_trials(search) if trial.arm.follows is None]


def trial_columns(
    spec: SearchSpec, trials: Sequence[Trial], manifests: Mapping[str, Manifest]
) -> dict[str, list[Any]]:
    """The table of trials: the settings of each and its figures on val."""
    entries = []
    for trial in trials:
        manifest, arm = manifests[trial.step.key], trial.arm
        result = TrainResult.of(manifest)
        entries.append(
            {
                rows.ARM: arm.name, "family": arm.family, rows.RATIO: arm.ratio, "role": arm.role,
                rows.GENERATOR_FIT: trial.fit, rows.SEED: trial.number, "key": trial.step.key,
                "steps": optimizer_steps(spec, arm), "best_step": result.best_step,
                "images": manifest.rows,
                **result.val.figures,
            }
        )  # fmt: skip
    return {name: [entry[name] for entry in entries] for name in entries[0]}


def hardly_learnt(columns: Mapping[str, Sequence[Any]], chance: float) -> list[Notice]:
    """A warning if the classifiers on real images are near chance: no arm is informative then.
    chance: the balanced accuracy of a guess."""
    scores = [
        score for arm, score in zip(columns[rows.ARM], columns["balanced_accuracy"], strict=True)
        if arm == "real"
    ]  # fmt: skip
    mean = float(np.mean(scores))
    if not near_chance(mean, chance):
        return []
    return [Notice.of("hardly_learnt", mean=mean, chance=chance)]


def near_chance(score: float, chance: float) -> bool:
    """Whether a balanced accuracy shows less than a tenth of what there is to learn."""
    return score <= chance + 0.1 * (1 - chance)


def means_on_val(
    spec: SearchSpec, trials: Sequence[Trial], manifests: Mapping[str, Manifest]
) -> dict[str, ValMean]:
    """The objective of each arm's replicates on val."""
    values_of: dict[str, list[float]] = {trial.arm.name: [] for trial in trials}
    for trial in trials:
        val = TrainResult.of(manifests[trial.step.key]).val
        values_of[trial.arm.name].append(val.figures[spec.training.objective])
    return {
        name: mean_and_sd(replicates(np.asarray(values), spec.generator_fits))
        for name, values in values_of.items()
    }


def mean_and_sd(values: Sequence[float] | np.ndarray) -> ValMean:
    return ValMean(mean=float(np.mean(values)), sd=float(np.std(values, ddof=1)))


def choose(arms: Sequence[Arm], scores: Mapping[str, ValMean]) -> tuple[list[str], str]:
    """The arm of each family with the best mean on val (ties: the first, with the smaller ratio),
    and the strongest baseline among them."""
    chosen: dict[str, Arm] = {}
    for arm in arms:
        best = chosen.get(arm.family)
        if best is None or scores[arm.name].mean > scores[best.name].mean:
            chosen[arm.family] = arm
    # Arms with more steps are not baselines: they show whether the budget limits all arms.
    baselines = [arm for arm in chosen.values() if arm.role == "baseline"]
    strongest = max(baselines, key=lambda arm: scores[arm.name].mean)
    return [arm.name for arm in chosen.values()], strongest.name
