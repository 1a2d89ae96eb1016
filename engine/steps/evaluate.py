"""Evaluate: test opens here, after every choice is made, for the chosen arms and the baselines.

The opening is recorded under the digest of the test ids, whatever study did it, and counted over
all studies of the storage: a test set that is opened often is no longer one.

The verdict compares each synthetic family, at the ratio chosen on val, with the strongest family
that is not synthetic, chosen on val too (`engine.metrics.significance`).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from engine.context import Context, Result
from engine.core import rows
from engine.core.arrays import matrix_of
from engine.core.dataset import class_names, split_index
from engine.core.errors import ResumeError
from engine.core.images import Preprocess
from engine.core.manifest import Manifest, Part, read_manifest
from engine.core.registry import resolve
from engine.core.shards import Shard, parquet_rows
from engine.core.spec import Spec, digest
from engine.core.stage import Batch, Device, Place
from engine.core.step import Step
from engine.core.store import Store
from engine.metrics.classification import METRICS, confusion, summary
from engine.metrics.significance import (
    bootstrap,
    confusions_by_group,
    mcnemar,
    paired_t,
    verdicts,
)
from engine.nets.classification import class_numbers
from engine.sections import ClassifierField
from engine.sections import Evaluate as EvaluateSettings
from engine.steps import StepKind
from engine.steps.embed import DecodeOwn, image_shards
from engine.steps.measure import write_parts
from engine.steps.search import Arm, trial_steps

MODEL = "model"


class EvaluateSpec(Spec):
    settings: EvaluateSettings
    classifier: ClassifierField
    preprocess: Preprocess
    task: str
    objective: str
    seed: int


class ClassifyByMany:
    """Stage: like `Classify`, by the model that the column `model` names; shards hold one each."""

    reads: ClassVar[tuple[str, ...]] = ("pixels", MODEL)
    writes: ClassVar[tuple[str, ...]] = (rows.PROBABILITIES,)
    device: ClassVar[Device] = "accelerator"

    def __init__(self, models: Mapping[str, Classify]) -> None:
        self.models = dict(models)

    def load(self, place: Place) -> None:
        self.place = place
        self.loaded = ""

    def __call__(self, batch: Batch) -> Batch:
        name = batch[MODEL][0].as_py()
        if name != self.loaded:
            self.model = self.models[name]
            self.model.load(self.place)
            self.loaded = name
        return self.model(batch)


def rows_with_model(store: Store, task: Mapping[str, Any]) -> pa.Table:
    """The images of a shard, with the model that is to see them."""
    table = parquet_rows(store, task)
    return table.append_column(MODEL, pa.array([task[MODEL]] * table.num_rows, pa.string()))


class Classify:
    """Stage: pixels to class probabilities, by a classifier that a `train` step left."""

    reads: ClassVar[tuple[str, ...]] = ("pixels",)
    writes: ClassVar[tuple[str, ...]] = (rows.PROBABILITIES,)
    device: ClassVar[Device] = "accelerator"

    def __init__(
        self, store: Store, spec: Any, preprocess: Preprocess, classes: Sequence[str],
        weights: Sequence[Part],
    ) -> None:  # fmt: skip
        self.store, self.spec, self.preprocess = store, spec, preprocess
        self.classes, self.weights = tuple(classes), tuple(weights)

    def load(self, place: Place) -> None:
        self.place = place.device
        self.classifier = resolve("classifiers", self.spec.name)(
            self.spec, self.preprocess, self.classes
        )
        with tempfile.TemporaryDirectory() as name:
            folder = write_parts(self.store, self.weights, Path(name))
            self.network = self.classifier.load(folder / "weights").to(place.device)

    def __call__(self, batch: Batch) -> Batch:
        from engine.nets.classification import predict

        return {
            **batch,
            rows.PROBABILITIES: predict(
                self.network, self.classifier.prepare, batch["pixels"], self.place
            ),
        }


class Evaluate(StepKind):
    version: ClassVar[int] = 5
    Spec: ClassVar[type[Spec]] = EvaluateSpec
    summary: ClassVar[str] = "open test for the chosen arms, reach the verdict"

    def run(self, context: Context) -> Result:
        spec = context.step.spec_as(EvaluateSpec)
        search = context.inputs["search"]
        chosen = set(search.metrics["chosen"])
        trials = [
            (arm, number, step)
            for arm, number, step in trial_steps(context.step.inputs["search"])
            if arm.name in chosen
        ]
        manifests = read_trials(context.store, search, [step for _, _, step in trials])
        classes = class_names(context.inputs["ingest"])
        test = split_index(context.store, context.inputs["ingest"], spec.task, "test")
        opened = record_opening(context, test)
        probabilities = predict_test(context, spec, classes, manifests)
        labels = class_numbers(test[rows.label_column(spec.task)].to_pylist(), classes)
        groups = np.asarray(test[rows.GROUP_ID].to_pylist(), dtype=str)
        predicted: dict[str, list[np.ndarray]] = {}
        tables = []
        for arm, number, step in trials:
            predicted.setdefault(arm.name, []).append(probabilities[step.key].argmax(1))
            tables.append(
                predictions_table(test, spec.task, arm, number, context, probabilities[step.key])
            )
        arms = {arm.name: arm for arm, _, _ in trials}
        results = {name: score_arm(labels, found, classes) for name, found in predicted.items()}
        contrasts = compare(spec, arms, predicted, labels, groups, len(classes), search)
        sentence = in_words(contrasts, spec.objective, search.metrics["baseline"])
        budget = budget_effect(results, spec.objective)
        if budget is not None and budget["low"] > 0:
            sentence += " " + budget_in_words(budget, spec.objective)
        return Result(
            [context.table("predictions", pa.concat_tables(tables), table="predictions")],
            len(labels),
            {
                "headline": sentence.rstrip("."),
                "verdict": sentence,
                "objective": spec.objective,
                "arms": {
                    name: {**results[name], "family": arm.family, "ratio": arm.ratio,
                           "synthetic": arm.synthetic}
                    for name, arm in arms.items()
                },
                "baseline": search.metrics["baseline"],
                "contrasts": contrasts,
                "budget": budget,
                "test": {
                    "images": len(labels), "groups": len(np.unique(groups)), "opened": opened,
                },
            },
        )  # fmt: skip


def read_trials(store: Store, search: Manifest, steps: Sequence[Step]) -> dict[str, Manifest]:
    """The trials' manifests by key. Raises `ResumeError` where one is not what search chose by."""
    found = {}
    for step in steps:
        manifest = read_manifest(store, step)
        if manifest is None or manifest.digest != search.metrics["trials"][step.key]:
            raise ResumeError(
                f"evaluate: {step.label} is not the trial that search chose by any more;"
                " run again with --discard search"
            )
        found[step.key] = manifest
    return found


def record_opening(context: Context, test: pa.Table) -> int:
    """Note that test was opened, and say how often it has been in this storage.

    A run that goes on after a kill opens it no second time; one for other classifiers does, though
    the study be the same.
    """
    store = context.store
    prefix = store.openings(digest(sorted(test[rows.IMAGE_ID].to_pylist())))
    opener = digest([context.step.key, context.inputs["search"].digest])
    store.put_if_absent(store.join(prefix, f"{opener}.json"), b"{}")
    return len([key for key in store.listing(prefix) if key.endswith(".json")])


def predict_test(
    context: Context,
    spec: EvaluateSpec,
    classes: Sequence[str],
    manifests: Mapping[str, Manifest],
) -> dict[str, np.ndarray]:
    """Probabilities of each model, by its key, on the test images in their order."""
    images = image_shards(context, ("test",))
    shards = [
        Shard(f"{key}-{shard.name}", shard.rows, {**shard.task, MODEL: key}, {MODEL: key})
        for key in manifests
        for shard in images
    ]
    models = {
        key: Classify(context.store, spec.classifier, spec.preprocess, classes, manifest.parts)
        for key, manifest in manifests.items()
    }
    schema = pa.schema(
        [
            pa.field(rows.IMAGE_ID, pa.string()),
            pa.field(rows.PROBABILITIES, pa.list_(pa.float32(), len(classes))),
        ]
    )
    commits = context.compute(
        "classify", shards, rows_of=rows_with_model, stages=[DecodeOwn(), ClassifyByMany(models)],
        schema=schema, replace=True,
        fingerprint={
            "images": context.inputs["ingest"].digest,
            "models": {key: manifest.digest for key, manifest in manifests.items()},
        },
    )  # fmt: skip
    found: dict[str, list[np.ndarray]] = {key: [] for key in manifests}
    for shard, commit in zip(shards, commits, strict=True):
        assert commit.data is not None
        (table,) = context.store.tables([commit.data.key])
        found[shard.tags[MODEL]].append(matrix_of(table, rows.PROBABILITIES))
    return {key: np.concatenate(pieces) for key, pieces in found.items()}


def predictions_table(
    test: pa.Table, task: str, arm: Arm, number: int, context: Context, probabilities: np.ndarray
) -> pa.Table:
    """One row for each test image and classifier: what every figure of the report comes from."""
    count = len(probabilities)
    return pa.table(
        {
            rows.IMAGE_ID: test[rows.IMAGE_ID],
            rows.GROUP_ID: test[rows.GROUP_ID],
            rows.SPLIT: pa.array(["test"] * count),
            rows.ARM: pa.array([arm.name] * count),
            rows.GENERATOR: pa.array([arm.family if arm.synthetic else None] * count, pa.string()),
            rows.GENERATOR_FIT: pa.array([0 if arm.synthetic else None] * count, pa.int32()),
            rows.POOL: pa.array([0 if arm.synthetic else None] * count, pa.int32()),
            rows.RATIO: pa.array([arm.ratio] * count, pa.float64()),
            rows.SEED: pa.array([number] * count, pa.int64()),
            rows.label_column(task): test[rows.label_column(task)],
            rows.PROBABILITIES: rows.fixed_lists(probabilities),
        }
    )


def score_arm(
    labels: np.ndarray, predicted: Sequence[np.ndarray], classes: Sequence[str]
) -> dict[str, Any]:
    """Figures of an arm: of each seed, their means with intervals, and those of each class."""
    matrices = np.stack([confusion(labels, found, len(classes)) for found in predicted])
    figures: dict[str, Any] = {}
    for name, metric in METRICS.items():
        values = metric(matrices)
        interval = paired_t(values)
        figures[name] = {
            "seeds": values.tolist(), "mean": interval.estimate,
            "low": interval.low, "high": interval.high,
        }  # fmt: skip
    whole = summary(matrices.sum(0), classes)
    return {**figures, "per_class": whole["per_class"], "confusion": whole["confusion"]}


def compare(
    spec: EvaluateSpec,
    arms: Mapping[str, Arm],
    predicted: Mapping[str, Sequence[np.ndarray]],
    labels: np.ndarray,
    groups: np.ndarray,
    classes: int,
    search: Manifest,
) -> list[dict[str, Any]]:
    """Each synthetic arm against the strongest baseline: effect, intervals, verdict."""
    baseline = search.metrics["baseline"]
    metric = METRICS[spec.objective]
    names = [name for name, arm in arms.items() if arm.synthetic]
    whole, by_group = {}, {}
    for name in {*names, baseline, "real"}:
        whole[name] = np.stack([confusion(labels, found, classes) for found in predicted[name]])
        by_group[name] = [
            confusions_by_group(labels, found, groups, classes) for found in predicted[name]
        ]
    judged = []
    for name in names:
        differences = (metric(whole[name]) - metric(whole[baseline])).tolist()
        resampled = bootstrap(
            by_group[name], by_group[baseline], metric, spec.settings.bootstrap_draws, spec.seed
        )
        judged.append((differences, resampled))
    found = verdicts(judged, spec.settings.margin)
    # A family that chose among more settings on val had more tries.
    tries = Counter(arm["family"] for arm in search.spec["arms"])
    contrasts = []
    for name, (differences, _), verdict in zip(names, judged, found, strict=True):
        contrast: dict[str, Any] = {
            "arm": name, "against": baseline, "ratio": arms[name].ratio,
            "differences": differences, **verdict.as_dict(),
            "grouped": verdict.groups < len(labels),
            "tries": tries[arms[name].family], "tries_against": tries[arms[baseline].family],
            "mcnemar": [
                mcnemar(labels, one, other)
                for one, other in zip(predicted[name], predicted[baseline], strict=True)
            ],
            "recall_gain": class_gains(whole[name], whole[baseline]),
            "recall_gain_to_real": class_gains(whole[name], whole["real"]),
            "generator_fits": 1,
        }  # fmt: skip
        contrasts.append({**contrast, "settle": what_would_settle(contrast)})
    return contrasts


def class_gains(one: np.ndarray, other: np.ndarray) -> list[dict[str, float]]:
    """Difference of recall of each class: mean over seeds, with its paired t interval.

    one, other: confusion matrices (seeds, classes, classes).
    """
    from engine.metrics.classification import recall

    differences = recall(one) - recall(other)
    found = []
    for values in differences.T:
        interval = paired_t(values)
        found.append({"mean": interval.estimate, "low": interval.low, "high": interval.high})
    return found


def budget_effect(results: Mapping[str, Any], objective: str) -> dict[str, float] | None:
    """What twice the steps do to real images: by how much the budget limits every arm."""
    if not {"real", "real_double"} <= set(results):
        return None
    both = (np.asarray(results[name][objective]["seeds"]) for name in ("real_double", "real"))
    interval = paired_t(np.subtract(*both))
    return {"estimate": interval.estimate, "low": interval.low, "high": interval.high}


def budget_in_words(budget: Mapping[str, float], objective: str) -> str:
    return (
        f"Beware: real images alone gain {100 * budget['estimate']:.1f} points of {objective} from"
        " twice the steps, so that the budget limits every arm; raise training.steps."
    )


def in_words(contrasts: Sequence[Mapping[str, Any]], objective: str, baseline: str) -> str:
    """The verdict in a sentence for each contrast."""
    if not contrasts:
        return f"no synthetic arm was compared; the strongest baseline on val is {baseline}"
    return " ".join(one_in_words(contrast, objective) for contrast in contrasts)


def one_in_words(contrast: Mapping[str, Any], objective: str) -> str:
    effect, margin = contrast["effect"], contrast["margin"]
    name, against = contrast["arm"], contrast["against"]
    shown = (
        f"{objective} {100 * effect['estimate']:+.1f} points against {against}, 95% interval"
        f" {100 * contrast['low']:+.1f} to {100 * contrast['high']:+.1f}"
    )
    count = contrast["replicates"]
    condition = f"{count} classifier seeds, conditional on one generator"
    if contrast["word"] in ("helps", "harms"):
        return f"{name} {contrast['word']}: {shown} ({condition})."
    if contrast["word"] == "equivalent":
        return f"{name} makes no difference beyond ±{100 * margin:g} points: {shown} ({condition})."
    return f"{name} is undecided: {shown} ({condition}; {contrast['settle']})."


def what_would_settle(contrast: Mapping[str, Any]) -> str:
    """Of an undecided contrast: what there is too little of."""
    if contrast["obstacle"]:
        return str(contrast["obstacle"])
    points = f"{100 * contrast['margin']:g}"
    groups, seeds = contrast["groups_needed"], contrast["replicates_needed"]
    needed = []
    if groups > contrast["groups"]:
        unit = "test groups" if contrast["grouped"] else "test images"
        needed.append(f"about {groups:,} {unit} (here {contrast['groups']:,})")
    if seeds is None or seeds > contrast["replicates"]:
        count = "more than 1,000" if seeds is None else f"about {seeds:,}"
        needed.append(f"{count} seeds (here {contrast['replicates']})")
    unit = "point" if points == "1" else "points"
    what = "at least " + " and ".join(needed) if needed else "no more than there is here"
    return f"to find a difference of {points} {unit}, the study's margin, takes {what}"
