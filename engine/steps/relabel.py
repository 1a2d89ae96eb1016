"""Relabel: labels that several classifiers agree to be wrong, and what they agree on instead.

Each voter sees an image without having learnt from its group: classifiers are trained once per fold
of train, without the groups of the fold; labelers on vectors learn from the other folds. Images of
other splits get the mean of all folds. Ingest stays as it is; `revise` writes the data with the new
labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from engine.comparison.openings import record_opening
from engine.context import Context, Output
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.notice import Notice
from engine.core.registry import kind_of
from engine.core.shards import Shard, parquet_rows
from engine.core.spec import Spec, digest
from engine.core.step import Step
from engine.core.store import Store
from engine.data.arrays import aligned, matrix_of, pictures
from engine.data.images import Preprocess
from engine.labelers import Labeler, LabelerSpec
from engine.metrics.consensus import consensus
from engine.nets.classification import class_numbers
from engine.report.relabelling import ChangedLabel, relabelling_page
from engine.results.data import IngestResult, RelabelledSplit, RelabelResult
from engine.settings_labels import Relabel as RelabelSettings
from engine.settings_labels import Voter
from engine.stages.classify import MODEL, Classify, ClassifyByMany, rows_with_model
from engine.stages.folds import folds_of, judged
from engine.stages.images import DecodeOwn, image_shards
from engine.stages.measuring import MeasurePixels, MeasureSpec
from engine.steps import StepKind

# Mean agreement with the labels below which voters are weak.
_WEAK = 0.85
# Images on the page, of each kind.
_SHOWN = 60


class RelabelSpec(Spec):
    settings: RelabelSettings
    task: str
    preprocess: Preprocess
    seed: int


@dataclass(frozen=True)
class SplitImages:
    """The images of a split, n rows: their ids, places, class numbers and folds; -1 outside
    train."""

    name: str
    ids: list[str]
    uris: list[str]
    labels: np.ndarray
    folds: np.ndarray


class Relabel(StepKind[RelabelSpec]):
    version = 1
    summary = "let classifiers vote on the labels"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(RelabelSpec)
        settings, data = spec.settings, context.result("ingest", IngestResult)
        names = ["train", "val", *(["test"] if settings.test_too else [])]
        if settings.test_too:
            opener = digest(["relabel", spec, context.inputs["ingest"].digest])
            record_opening(context.store, context.inputs["ingest"], opener)
        splits = [read_split(context, spec, data, name) for name in names]
        probabilities = {
            name: votes_of(context, spec, data, name, voter, splits)
            for name, voter in settings.voters.items()
        }
        tables, results, changes = [], {}, list[ChangedLabel]()
        classes = np.asarray(data.classes, dtype=object)
        for split in splits:
            votes = {name: of_voter[split.name] for name, of_voter in probabilities.items()}
            agreed = consensus(
                votes, split.labels, settings.votes_needed, settings.most, settings.sure,
                judged(split.labels, split.folds),
            )  # fmt: skip
            seen = {name: classes[values.argmax(1)] for name, values in votes.items()}
            old, new = classes[split.labels], classes[agreed.new]
            tables.append(pa.table({
                rows.IMAGE_ID: split.ids, rows.URI: split.uris, rows.SPLIT: [split.name] * len(old),
                rows.LABEL_WAS: pa.array(old, pa.string()), rows.LABEL: pa.array(new, pa.string()),
                "flagged": agreed.flagged, "changed": agreed.changed,
                "against": agreed.against, rows.CONFIDENCE: agreed.confidence,
                **{f"seen.{name}": pa.array(values, pa.string()) for name, values in seen.items()},
            }))  # fmt: skip
            results[split.name] = RelabelledSplit(
                images=len(old), flagged=int(agreed.flagged.sum()), cut=agreed.cut,
                changed=int(agreed.changed.sum()),
                agreement={name: float((values == old).mean()) for name, values in seen.items()},
                pairs=pairs_of(old[agreed.changed], new[agreed.changed]),
            )  # fmt: skip
            changes += [
                ChangedLabel(
                    split.ids[row],
                    split.uris[row],
                    split.name,
                    old[row],
                    new[row],
                    bool(agreed.changed[row]),
                    float(agreed.confidence[row]),
                    {name: values[row] for name, values in seen.items()},
                )
                for row in np.flatnonzero(agreed.flagged).tolist()
            ]
        listed = chosen_changes(changes)
        keys = [key for name in names for key in context.inputs["ingest"].keys(split=name)]
        images = pictures(context.store, keys, [change.image_id for change in listed])
        html = relabelling_page(results, settings, listed, images)
        for name, result in results.items():
            context.say(
                f"{name}: {result.flagged:,} of {result.images:,} labels flagged,"
                f" {result.changed:,} changed"
            )
        warnings = weak_voters(results)
        context.warn(warnings)
        changed = sum(result.changed for result in results.values())
        total = sum(result.images for result in results.values())
        return Output(
            [
                context.table("votes", pa.concat_tables(tables), table="votes"),
                context.file("relabelling", "html", html.encode(), file="relabelling.html"),
            ],
            total,
            RelabelResult(
                headline=f"{changed:,} of {total:,} labels changed", splits=results,
                warnings=warnings,
            ),
        )  # fmt: skip

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        own, spec = store.step(step.kind, step.key), step.spec_as(RelabelSpec)
        return [
            prefix
            for name in spec.settings.voters
            for prefix in (store.join(own, "labelled", name),
                           *(store.join(own, "labelled", name, split) for split in rows.SPLITS))
        ]  # fmt: skip


def weak_voters(results: Mapping[str, RelabelledSplit]) -> list[Notice]:
    """A warning for the first split with whose labels the voters agree too little."""
    for name, result in results.items():
        agreed = float(np.mean(list(result.agreement.values())))
        if agreed < _WEAK:
            return [Notice.of("weak_voters", split=name, agreed=round(100 * agreed))]
    return []


def pairs_of(old: np.ndarray, new: np.ndarray) -> dict[str, dict[str, int]]:
    """How often each label became each other one."""
    counts: dict[str, dict[str, int]] = {}
    for (before, after), count in sorted(Counter(zip(old, new, strict=True)).items()):
        counts.setdefault(before, {})[after] = count
    return counts


def chosen_changes(changes: list[ChangedLabel]) -> list[ChangedLabel]:
    """The flagged labels on the page: of changed and of undecided ones the surest, in the order of
    their confidence."""
    ordered = sorted(changes, key=lambda change: (-change.confidence, change.image_id))
    changed = [change for change in ordered if change.changed]
    undecided = [change for change in ordered if not change.changed]
    return changed[:_SHOWN] + undecided[:_SHOWN]


def read_split(context: Context, spec: RelabelSpec, data: IngestResult, name: str) -> SplitImages:
    """The images of a split in the order of their parts."""
    column = rows.label_column(spec.task)
    columns = [rows.IMAGE_ID, rows.URI, column, rows.GROUP_ID]
    keys = context.inputs["ingest"].keys(split=name)
    table = pa.concat_tables(context.store.tables(keys, columns))
    folds = np.full(table.num_rows, -1)
    if name == "train":
        folds = folds_of(table, spec.task, spec.settings.folds, spec.seed)
    return SplitImages(
        name, table[rows.IMAGE_ID].to_pylist(), table[rows.URI].to_pylist(),
        class_numbers(table[column].to_pylist(), data.classes), folds,
    )  # fmt: skip


def votes_of(
    context: Context, spec: RelabelSpec, data: IngestResult, name: str, voter: Voter,
    splits: list[SplitImages],
) -> dict[str, np.ndarray]:  # fmt: skip
    """A voter's probabilities (n, classes) for each split, for train those of the model that did
    not learn from the image's fold."""
    if voter.classifier is not None:
        models = {fold: context.inputs[f"vote.{name}.{fold}"]
                  for fold in range(spec.settings.folds)}  # fmt: skip
        return classified(context, spec, data, name, voter, models, splits)
    assert voter.labeler is not None, "a voter is either"
    if kind_of("labelers", voter.labeler).reads == "embedding":
        return by_vectors(context, spec, data, voter.labeler, splits)
    return labelled(context, spec, data, name, voter, splits)


def classified(
    context: Context, spec: RelabelSpec, data: IngestResult, name: str, voter: Voter,
    models: Mapping[int, Manifest], splits: list[SplitImages],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The votes of a classifier, trained once per fold."""
    stages = {
        str(fold): Classify(
            context.store, voter.classifier, spec.preprocess, data.classes, manifest
        )
        for fold, manifest in models.items()
    }
    images = {split.name: image_shards(context, (split.name,)) for split in splits}
    shards = [
        Shard(f"{name}-{fold}-{shard.name}", shard.rows, {**shard.task, MODEL: str(fold)},
              {MODEL: str(fold), "split": split})
        for fold in models
        for split, of_split in images.items()
        for shard in of_split
    ]  # fmt: skip
    commits = context.compute(
        "classify", shards, rows_of=rows_with_model, stages=[DecodeOwn(), ClassifyByMany(stages)],
        schema=probability_schema(data), replace=True,
        fingerprint={
            "images": context.inputs["ingest"].digest,
            "models": {str(fold): manifest.digest for fold, manifest in models.items()},
        },
        prefix=context.store.join(context.prefix, "labelled", name),
    )  # fmt: skip
    by_fold: dict[str, dict[int, list[np.ndarray]]] = {split.name: {} for split in splits}
    for shard, commit in zip(shards, commits, strict=True):
        assert commit.data is not None
        (table,) = context.store.tables([commit.data.key])
        pieces = by_fold[shard.tags["split"]].setdefault(int(shard.tags[MODEL]), [])
        pieces.append(matrix_of(table, rows.PROBABILITIES))
    votes = {}
    for split in splits:
        every = np.stack([np.concatenate(by_fold[split.name][fold]) for fold in models])
        votes[split.name] = (
            every[split.folds, np.arange(len(split.ids))] if split.name == "train"
            else every.mean(0)
        )  # fmt: skip
    return votes


def by_vectors(
    context: Context, spec: RelabelSpec, data: IngestResult, labeler_spec: Spec,
    splits: list[SplitImages],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The votes of a labeler on the study's vectors, learnt anew for each fold."""
    train = next(split for split in splits if split.name == "train")
    vectors = {
        split.name: aligned(
            context.store, context.inputs["embed"].keys(split=split.name), rows.EMBEDDING, split.ids
        )
        for split in splits
    }

    def learnt(kept: np.ndarray) -> Labeler[LabelerSpec]:
        kind = kind_of("labelers", labeler_spec)
        labeler: Labeler[LabelerSpec] = kind(labeler_spec, spec.preprocess, data.classes)
        labeler.load(None, context.device)
        labeler.learn(vectors["train"][kept], train.labels[kept])
        return labeler

    of_train = np.zeros((len(train.ids), len(data.classes)), np.float32)
    for fold in range(spec.settings.folds):
        within = train.folds == fold
        if within.any():
            of_train[within] = learnt(~within).label(vectors["train"][within])
    whole = learnt(np.ones(len(train.ids), bool))
    return {
        split.name: of_train if split is train else whole.label(vectors[split.name])
        for split in splits
    }


def labelled(
    context: Context, spec: RelabelSpec, data: IngestResult, name: str, voter: Voter,
    splits: list[SplitImages],
) -> dict[str, np.ndarray]:  # fmt: skip
    """The votes of a labeler on pixels that learns nothing from the study."""
    measure = MeasureSpec(task=spec.task, preprocess=spec.preprocess, labeler=voter.labeler)
    votes = {}
    for split in splits:
        commits = context.compute(
            "classify", image_shards(context, (split.name,)), rows_of=parquet_rows,
            stages=[DecodeOwn(), MeasurePixels(context.store, measure, data, None)],
            schema=probability_schema(data), replace=True,
            fingerprint={
                "images": context.inputs["ingest"].digest,
                "labeler": digest(voter),
            },
            prefix=context.store.join(context.prefix, "labelled", name, split.name),
        )  # fmt: skip
        keys = [commit.data.key for commit in commits if commit.data]
        votes[split.name] = matrix_of(
            pa.concat_tables(context.store.tables(keys)), rows.PROBABILITIES
        )
    return votes


def probability_schema(data: IngestResult) -> pa.Schema:
    return pa.schema(
        [
            pa.field(rows.IMAGE_ID, pa.string()),
            pa.field(rows.PROBABILITIES, pa.list_(pa.float32(), len(data.classes))),
        ]
    )
