"""Allocate: how many images each class or combination of labels gets, and why, before any is
generated.

Scores are those of one classifier on val, trained on real images alone. Test is not read.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from engine.comparison.tasks import targets_of
from engine.context import Context, Output
from engine.core.errors import DataError
from engine.core.labels import LabelSpace, members
from engine.core.spec import Spec
from engine.data.dataset import split_index
from engine.results.comparison import TrainResult
from engine.results.data import IngestResult
from engine.results.images import AllocatedClass, AllocateResult
from engine.settings import Classes
from engine.settings_labels import Allocation
from engine.stages.allocation import allocate, phi_coefficients
from engine.stages.cells import classes_of
from engine.steps import StepKind
from engine.steps.request import target_classes

# Classes that are printed.
_SHOWN = 12


class AllocateSpec(Spec):
    settings: Allocation
    classes: Classes
    task: str
    # Weights of the tasks of a study with several labels per image.
    tasks: dict[str, float] = {}


class Allocate(StepKind[AllocateSpec]):
    version = 1
    summary = "decide how many images each class gets"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(AllocateSpec)
        data = context.result("ingest", IngestResult)
        space = data.space(spec.tasks)
        targets = target_classes(classes_of(spec.classes, data), data.targets)
        counts = {name: data.targets[name] for name in targets}
        labels = {name: labels_of(name, data, space) for name in counts}
        f1: dict[str, float] = {}
        if "train" in context.inputs:
            scores = context.result("train", TrainResult).val.per_class
            f1 = {name: scores[name].f1 for name in scores}
        allocated = allocate(
            spec.settings,
            counts,
            labels,
            f1,
            worth_of(data, space),
            correlations(context, spec, space) if space and f1 else {},
        )
        total = sum(entry.images for entry in allocated.values())
        if not total:
            raise DataError(
                "request.allocate: no class gets an image: all are above the last tier; raise the"
                " limits of tiers"
            )
        show(context, allocated)
        columns = ["name", *AllocatedClass.model_fields]
        rows = [{"name": name, **dict(entry)} for name, entry in allocated.items()]
        table = pa.table({column: [row[column] for row in rows] for column in columns})
        served = sum(entry.images > 0 for entry in allocated.values())
        return Output(
            [context.table("allocation", table, table="allocation")], len(rows),
            AllocateResult(
                headline=f"{total:,} images for {served} of {len(allocated)} classes",
                classes=allocated,
            ),
        )  # fmt: skip


def labels_of(name: str, data: IngestResult, space: LabelSpace | None) -> tuple[str, ...]:
    """The labels that a class consists of, as classifiers name them: the class itself, or those of
    a cell."""
    if space is None:
        return (name,)
    own = members(data.cells[name], space.tasks)
    if len(space.tasks) > 1:
        return own
    (labels,) = data.cells[name].values()
    return (labels,) if isinstance(labels, str) else tuple(labels)


def worth_of(data: IngestResult, space: LabelSpace | None) -> dict[str, float]:
    """The weight of each label in the objective, if it is a mean over labels."""
    if space is None:
        return dict.fromkeys(data.classes, 1 / len(data.classes))
    shares = [space.shares[task] / len(of_task.classes)
              for task, of_task in space.tasks.items() for _ in of_task.classes]  # fmt: skip
    return dict(zip(space.outputs, shares, strict=True))


def correlations(
    context: Context, spec: AllocateSpec, space: LabelSpace
) -> dict[tuple[str, str], float]:
    """The correlation of each pair of labels over train."""
    ingest = context.inputs["ingest"]
    train = split_index(context.store, ingest, spec.task, "train", spec.tasks)
    return phi_coefficients(targets_of(train, space), space.outputs)


def show(context: Context, allocated: Mapping[str, AllocatedClass]) -> None:
    """Print who gets what and why."""
    entries = sorted(allocated.items(), key=lambda entry: -entry[1].images)
    for name, entry in entries[:_SHOWN]:
        why = "" if entry.f1 is None else f", F1 of its weakest label {entry.f1:.2f} on val"
        context.say(f"{name}: {entry.images:,} images ({entry.real:,} real{why})")
    if len(entries) > _SHOWN:
        context.say(f"{len(entries) - _SHOWN} more classes are on the page")
