"""Mix: which images an arm of the comparison trains on.

Real images are all of the train split, those that `reduce` keeps, or none; oversampling draws every
class equally often. For each generator that an arm adds, an amount sets the number of images of
each target class (`ratio: r`: round(r * n), n being all of the class's real training images,
whatever `reduce` keeps of them). Smaller amounts are prefixes of larger ones, class by class, in an
order derived from the images' ids. Too few images stop the run: an arm always contains the amount
in its name.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.comparison.arms import Added, MixSpec
from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import DataError
from engine.data.dataset import by_id, split_index
from engine.nets.training import balanced_weights
from engine.results.comparison import MixResult
from engine.results.data import IngestResult
from engine.results.images import ClassFunnel, CurateResult
from engine.settings import Amount, Classes
from engine.stages.cells import amount_of, classes_of
from engine.stages.folds import folds_of
from engine.steps import StepKind
from engine.steps.request import allocated, target_classes

REAL = "real"


class Mix(StepKind[MixSpec]):
    version = 3
    summary = "assemble the training images of an arm"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(MixSpec)
        index = split_index(context.store, context.inputs["ingest"], spec.task, "train")
        # Counts before `reduce`, as in requests: an amount does not depend on reduction.
        counts = Counter(index[rows.label_column(spec.task)].to_pylist())
        if "reduce" in context.inputs:
            index = index.filter(pc.is_in(index[rows.IMAGE_ID], self._kept(context)))
        if spec.folds:
            folds = folds_of(index, spec.task, spec.folds, spec.seed)
            index = index.filter(pa.array(folds != spec.without_fold))
        labels = index[rows.label_column(spec.task)].to_pylist()
        ids, sources = index[rows.IMAGE_ID].to_pylist(), [REAL] * len(labels)
        if spec.real == "none":
            ids, labels, sources = [], [], []
        real = len(ids)
        data = context.result("ingest", IngestResult)
        classes = classes_of(spec.classes, data)
        targets = data.targets if data.labels else counts
        given = allocated(context.inputs.get("allocate"))
        added: dict[str, dict[str, int]] = {}
        for addition in spec.added:
            amount = amount_of(addition.amount, data).as_allocated(given, targets)
            wanted = wanted_images(targets, amount, classes)
            chosen = self._chosen(context, spec, addition, targets, wanted)
            for label, images in sorted(chosen.items()):
                ids += images
                labels += [label] * len(images)
                sources += [addition.generator] * len(images)
            added[addition.generator] = {
                label: len(images) for label, images in sorted(chosen.items())
            }
        if spec.use == "replace":
            kept = self._not_replaced(spec, ids[:real], labels[:real], added)
            places = [*kept, *range(real, len(ids))]
            ids, labels, sources = (
                [values[place] for place in places] for values in (ids, labels, sources)
            )
            real = len(kept)
        weights = np.ones(len(labels))
        if spec.oversampled:
            weights = balanced_weights(labels, 1.0)
        for amount in spec.repeated:
            amount = amount_of(amount, data).as_allocated(given, targets)
            wanted = wanted_images(targets, amount, classes)
            weights += [wanted.get(label, 0) / counts[label] for label in labels]
        columns = {
            rows.IMAGE_ID: pa.array(ids, pa.string()),
            rows.label_column(spec.task): pa.array(labels, pa.string()),
            rows.SOURCE: pa.array(sources, pa.string()),
            rows.WEIGHT: pa.array(weights, pa.float64()),
            **self._labels(context, spec, ids, labels, sources),
        }
        if spec.use == "pretrain":
            synthetic = np.asarray([source != REAL for source in sources], float)
            columns[rows.FIRST_WEIGHT] = pa.array(synthetic, pa.float64())
            columns[rows.WEIGHT] = pa.array(1 - synthetic, pa.float64())
        members = pa.table(columns)
        amounts = [f"{real:,} real images"] if real else []
        amounts += [f"{sum(by_class.values()):,} of {name}" for name, by_class in added.items()]
        return Output(
            [context.table("members", members, table="members")], len(ids),
            MixResult(headline=" and ".join(amounts), real=real, added=added),
        )  # fmt: skip

    @staticmethod
    def _not_replaced(
        spec: MixSpec, ids: Sequence[str], labels: Sequence[str],
        added: Mapping[str, Mapping[str, int]],
    ) -> list[int]:  # fmt: skip
        """The places of the real images that stay if as many of each class leave as are added."""
        leaving = Counter[str]()
        for by_class in added.values():
            leaving.update(by_class)
        order = sorted(range(len(ids)), key=lambda place: pool_order(spec.seed, ids[place]))
        kept = []
        for place in order:
            if leaving[labels[place]] > 0:
                leaving[labels[place]] -= 1
            else:
                kept.append(place)
        return sorted(kept)

    @staticmethod
    def _labels(
        context: Context, spec: MixSpec, ids: Sequence[str], cells: Sequence[str],
        sources: Sequence[str],
    ) -> dict[str, pa.Array]:  # fmt: skip
        """The labels of each image in the tasks that classifiers learn: its own for a real one,
        those of its cell for a generated one."""
        data = context.result("ingest", IngestResult)
        keys = context.inputs["ingest"].keys(split="train")
        columns = {}
        for task, field in zip(spec.tasks, rows.label_fields(spec.tasks), strict=True):
            tables = context.store.tables(keys, [rows.IMAGE_ID, field.name])
            own = by_id(pa.concat_tables(tables), field.name)
            values = [
                own[image_id] if source == REAL else data.cells[cell][task]
                for image_id, cell, source in zip(ids, cells, sources, strict=True)
            ]
            columns[field.name] = pa.array(values, field.type)
        return columns

    def _kept(self, context: Context) -> pa.Array:
        """Ids of the real images that `reduce` keeps."""
        keys = context.inputs["reduce"].keys(table="reduction")
        table = pa.concat_tables(context.store.tables(keys, [rows.IMAGE_ID, rows.KEPT]))
        return table.filter(table[rows.KEPT])[rows.IMAGE_ID].combine_chunks()

    def _chosen(
        self, context: Context, spec: MixSpec, addition: Added, real: Mapping[str, int],
        wanted: Mapping[str, int],
    ) -> dict[str, list[str]]:  # fmt: skip
        """A generator's images for each target class. Raises `DataError` if there are too few."""
        source, amount = f"curate.{addition.generator}", addition.amount
        tables = context.store.tables(context.inputs[source].keys(table="curated"))
        kept: dict[str, list[str]] = {}
        for table in tables:
            selected = table.filter(table[rows.KEPT])
            for image_id, label in zip(
                selected[rows.IMAGE_ID].to_pylist(), selected[rows.LABEL].to_pylist(), strict=True
            ):
                kept.setdefault(label, []).append(image_id)
        nothing = sorted(name for name, count in wanted.items() if not count)
        if amount.ratio is not None and nothing:
            raise DataError(
                f"{context.step.label}: ratio {amount.ratio:g} adds no image to"
                f" {nothing[0]!r}, which has {real[nothing[0]]}; raise search.ratios or leave the"
                " class out of request.classes"
            )
        if len(nothing) == len(wanted):
            raise DataError(
                f"{context.step.label}: no class has fewer than {amount.balance_to} images, so none"
                " is added; raise request.balance_to"
                if amount.balance_to is not None
                else f"{context.step.label}: request.ratio_by_class rounds to no image of any class"
            )
        short = {
            label: (len(kept.get(label, [])), count)
            for label, count in wanted.items()
            if len(kept.get(label, [])) < count
        }
        if short:
            shortfalls = ", ".join(
                f"{label}: {have} of {count}" for label, (have, count) in short.items()
            )
            raise DataError(
                f"{context.step.label}: too few images of {addition.generator} were kept"
                f" ({shortfalls[:300]});"
                f" {funnel_text(context.result(source, CurateResult).funnel, short)}."
                " Ask for fewer, loosen curate, raise curate.max_rounds, or train the"
                " generator longer"
            )
        return {
            label: sorted(kept[label], key=lambda image_id: pool_order(spec.seed, image_id))[:count]
            for label, count in wanted.items()
            if count
        }


def wanted_images(real: Mapping[str, int], amount: Amount, classes: Classes) -> dict[str, int]:
    """Number of images to add to each target class, from its number of real images."""
    return {name: amount.count(name, real[name]) for name in target_classes(classes, real)}


def pool_order(seed: int, image_id: str) -> bytes:
    """Sort key of an image in its pool: prefixes are nested, whatever the order of generation."""
    return hashlib.sha256(f"{seed} {image_id}".encode()).digest()


def funnel_text(funnel: Mapping[str, ClassFunnel], labels: Collection[str]) -> str:
    """The funnel of these classes in one line."""
    descriptions = []
    for label in labels:
        if (entry := funnel.get(label)) is None:
            descriptions.append(f"{label}: none requested")
            continue
        reasons = ", ".join(f"{count} {why}" for why, count in entry.reasons.items())
        descriptions.append(
            f"{label}: {entry.requested} requested, {entry.generated} generated,"
            f" {entry.kept} kept" + (f" ({reasons})" if reasons else "")
        )
    return "; ".join(descriptions)[:600]
