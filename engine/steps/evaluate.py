"""Evaluate: opens test, after every choice, for the chosen arms and the baselines.

Each opening is recorded with the digests of the test images and compared with those of all studies
of the storage: results on a test set that is opened often are no longer independent.

The verdict compares each synthetic family, at the ratio chosen on val, with every opened baseline,
by classifiers that had no part in the choice (`engine.metrics.significance`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa

from engine.comparison.arms import Arm, SearchSpec, Trial, planned_trials
from engine.comparison.figures import AnyFigures
from engine.comparison.joint import joint_result, label_columns
from engine.comparison.on_val import on_val, saturations
from engine.comparison.openings import record_opening
from engine.comparison.pairwise import pairs_of_arms
from engine.comparison.subgroups import part_of, subgroups
from engine.comparison.tasks import figures_of, task_results
from engine.comparison.verdict import DeclaredContrast, add_without_failed, compare
from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import ResumeError
from engine.core.labels import LabelSpace
from engine.core.manifest import Manifest
from engine.core.shards import Shard
from engine.core.spec import Spec, digest
from engine.core.step import Step
from engine.core.store import Store
from engine.data.arrays import matrix_of
from engine.data.dataset import split_index
from engine.data.images import Preprocess
from engine.results.comparison import (
    ConfirmResult,
    Effect,
    EvaluateResult,
    SearchResult,
    TrainResult,
)
from engine.results.data import IngestResult
from engine.settings import ClassifierField
from engine.settings import Evaluate as EvaluateSettings
from engine.stages.classify import (
    MODEL,
    Classify,
    ClassifyByMany,
    changed_weights,
    rows_with_model,
)
from engine.stages.images import DecodeOwn, image_shards
from engine.stages.zero_shot import zero_shot, zero_shot_result
from engine.steps import StepKind
from engine.steps.external import ExternalSpec
from engine.steps.train import PREDICTIONS
from engine.wording import verdict_in_words


class EvaluateSpec(Spec):
    later_fields: ClassVar[tuple[str, ...]] = ("tasks",)

    settings: EvaluateSettings
    classifier: ClassifierField
    preprocess: Preprocess
    task: str
    # Weights of the tasks of a study with several labels per image.
    tasks: dict[str, float] = {}
    objective: str
    seed: int


class Evaluate(StepKind[EvaluateSpec]):
    version = 11
    summary = "open test for the chosen arms and reach the verdict"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(EvaluateSpec)
        confirm = context.step.inputs["confirm"]
        confirm_spec = confirm.spec_as(SearchSpec)
        confirmed = context.result("confirm", ConfirmResult)
        searched = context.result("search", SearchResult)
        trials = [trial for trial in planned_trials(confirm) if trial.step.key in confirmed.trials]
        manifests = read_trials(context, confirmed, [trial.step for trial in trials])
        data = context.result("ingest", IngestResult)
        classes, space = data.classes, data.space(spec.tasks)
        test = split_index(
            context.store, context.inputs["ingest"], spec.task, "test",
            dict.fromkeys([*spec.settings.subgroups, *spec.tasks]),
        )  # fmt: skip
        if spec.settings.zero_shot is not None:
            # A missing model or an unknown word surfaces before test is opened.
            zero_shot(context, spec.settings.zero_shot, classes, space, "val")
        # Not the step's key: a rerun by another version of this code opens nothing new.
        opener = digest([spec, context.inputs["confirm"].digest])
        opened = record_opening(context.store, context.inputs["ingest"], opener)
        probabilities = predict_test(context, spec, classes, space, manifests, "ingest")
        arms = {trial.arm.name: trial.arm for trial in trials}
        figures = figures_of(
            test, spec.task, classes, space, by_arm(trials, probabilities),
            thresholds_by_arm(trials, manifests), confirm_spec.generator_fits, spec.seed,
        )  # fmt: skip
        tables = [
            predictions_table(test, spec.task, trial, probabilities[trial.step.key], space,
                              TrainResult.of(manifests[trial.step.key]).thresholds)
            for trial in trials
        ]  # fmt: skip
        results = {
            name: figures.of(name, arm.family, arm.ratio, arm.role) for name, arm in arms.items()
        }
        planned = declared(confirm_spec.arms, searched, confirmed, arms, untrained(confirm))
        contrasts = add_without_failed(
            compare(figures, planned, spec.objective, spec.settings),
            figures, planned, spec.objective, spec.settings,
            confirmed.failed,
        )  # fmt: skip

        def differences(baseline: str) -> dict[str, Effect]:
            return {name: figures.difference(name, baseline, spec.objective)
                    for name in arms if baseline in arms and name != baseline}  # fmt: skip

        to_real = differences("real")
        budget = to_real.get("real_double")
        choosing = val_figures(context, searched, classes, space, spec.seed)
        tasks = task_results(figures, space, arms, spec.objective, searched.baseline, contrasts)
        verdict = verdict_in_words(contrasts, spec.objective, searched.baseline, budget, tasks)
        return Output(
            [context.table("predictions", pa.concat_tables(tables), table="predictions")],
            test.num_rows,
            EvaluateResult(
                headline=verdict.rstrip("."),
                objective=spec.objective,
                arms=results,
                baseline=searched.baseline,
                contrasts=contrasts,
                to_baseline=differences(searched.baseline),
                to_real=to_real,
                budget=budget,
                budget_of={
                    arm: figures.difference(double, arm, spec.objective)
                    for double, arm in confirmed.doubles.items()
                },
                val=on_val(choosing, spec.objective),
                saturation=saturations(
                    choosing,
                    {
                        arm.name: arm
                        for arm in context.step.inputs["search"].spec_as(SearchSpec).arms
                    },
                    spec.objective,
                    spec.settings.margin,
                ),
                subgroups=subgroups(
                    figures,
                    {
                        name: test[rows.label_column(name)].to_pylist()
                        for name in spec.settings.subgroups
                    },
                    contrasts,
                    spec.objective,
                ),
                external=[
                    part_of(
                        external_figures(context, spec, name, trials, manifests, opener),
                        "test set",
                        name.partition(".")[2],
                        contrasts,
                        spec.objective,
                    )
                    for name, step in context.step.inputs.items()
                    if step.kind == "external"
                ],
                test=opened,
                pairs=pairs_of_arms(figures),
                zero_shot=zero_shot_result(
                    context, spec.settings.zero_shot, spec.task, spec.tasks, data, test
                ),
                tasks=tasks,
                joint=joint_result(
                    test,
                    spec.task,
                    data,
                    space,
                    by_arm(trials, probabilities),
                    thresholds_by_arm(trials, manifests),
                )
                if space
                else None,
            ),
        )

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        own = store.step(step.kind, step.key)
        described = step.spec_as(EvaluateSpec).settings.zero_shot
        return [
            *(store.join(own, name) for name, other in step.inputs.items()
              if other.kind == "external"),
            *(store.join(own, "zero_shot", split) for split in ("val", "test") if described),
        ]  # fmt: skip


def external_figures(
    context: Context, spec: EvaluateSpec, name: str, trials: Sequence[Trial],
    manifests: Mapping[str, Manifest], opener: str,
) -> AnyFigures:  # fmt: skip
    """The figures of the tested classifiers on a test set from elsewhere. Counts as an opening."""
    classes = context.result("ingest", IngestResult).classes
    task = context.step.inputs[name].spec_as(ExternalSpec).task
    record_opening(context.store, context.inputs[name], digest([opener, name]))
    images = split_index(context.store, context.inputs[name], task, "test")
    probabilities = predict_test(context, spec, classes, None, manifests, name)
    return figures_of(
        images, task, classes, None, by_arm(trials, probabilities), {},
        context.step.inputs["confirm"].spec_as(SearchSpec).generator_fits, spec.seed,
    )  # fmt: skip


def by_arm(
    trials: Sequence[Trial], probabilities: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The probabilities of each arm's classifiers, in their order, from those of each trial."""
    of_arm: dict[str, list[np.ndarray]] = {}
    for trial in trials:
        of_arm.setdefault(trial.arm.name, []).append(probabilities[trial.step.key])
    return {name: np.stack(values) for name, values in of_arm.items()}


def thresholds_by_arm(
    trials: Sequence[Trial], manifests: Mapping[str, Manifest]
) -> dict[str, np.ndarray]:
    """The thresholds of each arm's classifiers (classifiers, outputs); no outputs for a class per
    image."""
    of_arm: dict[str, list[list[float]]] = {}
    for trial in trials:
        limits = TrainResult.of(manifests[trial.step.key]).thresholds
        of_arm.setdefault(trial.arm.name, []).append(limits)
    return {name: np.asarray(limits) for name, limits in of_arm.items()}


def val_figures(
    context: Context, search: SearchResult, classes: Sequence[str], space: LabelSpace | None,
    seed: int,
) -> AnyFigures:  # fmt: skip
    """The figures on val of the classifiers that chose."""
    step = context.step.inputs["search"]
    trials = [trial for trial in planned_trials(step) if trial.step.key in search.trials]
    tables, manifests = {}, {}
    for trial in trials:
        manifest = context.manifest(trial.step)
        if manifest is None or manifest.digest != search.trials[trial.step.key]:
            raise ResumeError(
                f"evaluate: {trial.step.label} is not the trial that search used: it changed since;"
                " run again with --discard search"
            )
        manifests[trial.step.key] = manifest
        (tables[trial.step.key],) = context.store.tables(manifest.keys(file=PREDICTIONS))
    spec = step.spec_as(SearchSpec)
    probabilities = {key: matrix_of(table, rows.PROBABILITIES) for key, table in tables.items()}
    return figures_of(
        tables[trials[0].step.key], spec.task, classes, space, by_arm(trials, probabilities),
        thresholds_by_arm(trials, manifests), spec.generator_fits, seed,
    )  # fmt: skip


def untrained(search: Step) -> set[str]:
    """Arms with generators that the study does not train: their fits differ only by the draw."""
    names = set()
    for arm in search.spec_as(SearchSpec).arms:
        steps = [
            step for mix in arm.mixes for step in search.inputs[mix].inputs.values()
            if step.kind == "generate"
        ]  # fmt: skip
        if steps and not any("finetune" in step.inputs for step in steps):
            names.add(arm.name)
    return names


def declared(
    planned: Sequence[Arm], search: SearchResult, confirm: ConfirmResult,
    arms: Mapping[str, Arm], untrained: Collection[str] = (),
) -> list[DeclaredContrast]:  # fmt: skip
    """The contrasts of the study: each synthetic family, at its chosen ratio, against every opened
    baseline, and against its unfiltered twin."""
    # A family with more settings had more tries on val; what accompanies a chosen arm had none.
    of_family = Counter(arm.family for arm in planned)
    tries = {name: of_family[arm.family] if name in search.chosen else 1
             for name, arm in arms.items()}  # fmt: skip
    baselines = tuple(name for name, arm in arms.items() if arm.role == "baseline")
    contrasts = [
        DeclaredContrast(
            name, baselines, search.baseline, "real", tries, name in untrained, arm.ratio
        )
        for name, arm in arms.items()
        if arm.role == "compared"
    ]
    # The arm's ratio is the best of several; its twin takes that ratio without a choice.
    return contrasts + [
        DeclaredContrast(of, (twin,), twin, twin, {**tries, twin: 1}, of in untrained,
                         arms[of].ratio, twin=True)
        for twin, of in confirm.twins.items()
    ]  # fmt: skip


def read_trials(
    context: Context, confirm: ConfirmResult, steps: Sequence[Step]
) -> dict[str, Manifest]:
    """The trials' manifests by key. Raises `ResumeError` if a trial changed since the confirmation,
    or was trained from other weights."""
    manifests = {}
    for step in steps:
        manifest = context.manifest(step)
        if manifest is None or manifest.digest != confirm.trials[step.key]:
            raise ResumeError(
                f"evaluate: {step.label} is not the trial that confirm used: it changed since;"
                " run again with --discard confirm"
            )
        # The weights may have changed during the trials.
        if why := changed_weights(step.spec, TrainResult.of(manifest).outside):
            raise ResumeError(f"evaluate: {step.label}: {why}; run again with --discard confirm")
        manifests[step.key] = manifest
    return manifests


def predict_test(
    context: Context,
    spec: EvaluateSpec,
    classes: Sequence[str],
    space: LabelSpace | None,
    manifests: Mapping[str, Manifest],
    source: str,
) -> dict[str, np.ndarray]:
    """Probabilities of each model on the test images of an input, in their order, by the
    model's key."""
    images = image_shards(context, ("test",), source)
    shards = [
        Shard(f"{key}-{shard.name}", shard.rows, {**shard.task, MODEL: key}, {MODEL: key})
        for key in manifests
        for shard in images
    ]
    models = {
        key: Classify(context.store, spec.classifier, spec.preprocess, classes, manifest, space)
        for key, manifest in manifests.items()
    }
    outputs = len(space.outputs if space else classes)
    schema = pa.schema(
        [
            pa.field(rows.IMAGE_ID, pa.string()),
            pa.field(rows.PROBABILITIES, pa.list_(pa.float32(), outputs)),
        ]
    )
    commits = context.compute(
        "classify", shards, rows_of=rows_with_model, stages=[DecodeOwn(), ClassifyByMany(models)],
        schema=schema, replace=True,
        fingerprint={
            "images": context.inputs[source].digest,
            "models": {key: manifest.digest for key, manifest in manifests.items()},
        },
        prefix=None if source == "ingest" else context.store.join(context.prefix, source),
    )  # fmt: skip
    pieces_of: dict[str, list[np.ndarray]] = {key: [] for key in manifests}
    for shard, commit in zip(shards, commits, strict=True):
        assert commit.data is not None
        (table,) = context.store.tables([commit.data.key])
        pieces_of[shard.tags[MODEL]].append(matrix_of(table, rows.PROBABILITIES))
    return {key: np.concatenate(pieces) for key, pieces in pieces_of.items()}


def predictions_table(
    test: pa.Table, task: str, trial: Trial, probabilities: np.ndarray,
    space: LabelSpace | None = None, thresholds: Sequence[float] = (),
) -> pa.Table:  # fmt: skip
    """A row for each test image and classifier: the source of every figure of the report."""
    arm, count = trial.arm, len(probabilities)
    synthetic = bool(arm.generators)
    return pa.table(
        {
            rows.IMAGE_ID: test[rows.IMAGE_ID],
            rows.GROUP_ID: test[rows.GROUP_ID],
            rows.SPLIT: pa.array(["test"] * count),
            rows.ARM: pa.array([arm.name] * count),
            rows.GENERATOR: pa.array([arm.family if synthetic else None] * count, pa.string()),
            rows.GENERATOR_FIT: pa.array([trial.fit if synthetic else None] * count, pa.int32()),
            rows.POOL: pa.array([trial.fit if synthetic else None] * count, pa.int32()),
            rows.RATIO: pa.array([arm.ratio] * count, pa.float64()),
            rows.SEED: pa.array([trial.number] * count, pa.int64()),
            **label_columns(test, task, probabilities, space, thresholds),
        }
    )
