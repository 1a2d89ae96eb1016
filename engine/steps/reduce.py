"""Reduce: which training images of the dominant classes are kept.

Classes with many images are reduced to representative ones (`engine.vectors.choose`; for t-SNE and
UMAP, `engine.vectors.plane`). The part `table: reduction`
has a row for each training image: whether it is kept and, where the method places images in a
plane, its position. `file: sheet.png` shows the planes, some kept images, and some dropped ones
with the nearest kept image.

Images without an embedding (pictures of one colour) cannot be compared and are dropped first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import DataError, StudyError
from engine.core.rng import derive_seed, generator
from engine.core.spec import Spec
from engine.data.arrays import grouped_vectors, pictures
from engine.data.dataset import split_index
from engine.report.sheet import Plane, selection_sheet
from engine.results.data import ReducedClass, ReduceResult
from engine.settings import Reduce as ReduceSettings
from engine.steps import StepKind
from engine.steps.finetune import read_clusters
from engine.vectors.choose import cover, k_center, stratified
from engine.vectors.kmeans import assign
from engine.vectors.plane import place

_SHOWN = 8
_SHOWN_CLASSES = 12
# Dropped images whose distance to the nearest kept one is measured.
_MEASURED = 5_000


class ReduceSpec(Spec):
    settings: ReduceSettings
    task: str
    seed: int


class Reduce(StepKind[ReduceSpec]):
    version = 1
    summary = "choose the images to keep of dominant classes"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(ReduceSpec)
        column = rows.label_column(spec.task)
        index = split_index(context.store, context.inputs["ingest"], spec.task, "train")
        ids, labels = index[rows.IMAGE_ID].to_pylist(), index[column].to_pylist()
        names, sizes = np.unique(labels, return_counts=True)
        counts = dict(zip(names.tolist(), sizes.tolist(), strict=True))
        wanted = kept_counts(spec.settings, counts)
        grouped = grouped_vectors(
            context.store, context.inputs["embed"].keys(split="train"),
            {image_id: label for image_id, label in zip(ids, labels, strict=True)
             if label in wanted},
        )  # fmt: skip
        strata = read_clusters(context)

        kept = {image_id for image_id, label in zip(ids, labels, strict=True)
                if label not in wanted}  # fmt: skip
        points: dict[str, Sequence[float]] = {}
        figures: dict[str, ReducedClass] = {}
        planes: list[Plane] = []
        examples: dict[str, list[list[str]]] = {}
        with context.progress(sum(counts[name] for name in wanted), "images") as bar:
            for name, count in wanted.items():
                members, vectors = grouped.get(name, ([], np.empty((0, 1), np.float32)))
                if len(members) < count:
                    raise DataError(
                        f"reduce: {count} images of {name!r} are to be kept, but only"
                        f" {len(members)} have an embedding; keep fewer or leave the class out of"
                        " reduce.classes"
                    )
                seed = derive_seed(spec.seed, "reduce", name)
                chosen, placed = choose(
                    spec.settings, vectors, count, np.asarray([strata.get(i) for i in members]),
                    seed,
                )  # fmt: skip
                kept |= {members[row] for row in chosen}
                dropped = np.setdiff1d(np.arange(len(members)), chosen)
                measured = generator(seed, "dropped").permutation(dropped)[:_MEASURED]
                nearest, squared = assign(vectors[measured], vectors[chosen])
                # From dropped images to the nearest kept one: how well those cover the class.
                distance = np.sqrt(squared) if len(squared) else np.zeros(1)
                figures[name] = ReducedClass(
                    images=counts[name], kept=count,
                    mean_distance=float(distance.mean()), farthest=float(distance.max()),
                )  # fmt: skip
                if placed is not None:
                    points |= dict(zip(members, placed.tolist(), strict=True))
                    title = f"{name}: {count:,} of {counts[name]:,} kept"
                    planes.append(Plane(title, placed, np.isin(np.arange(len(members)), chosen)))
                some = generator(seed, "shown").permutation(chosen)
                examples[name] = [
                    [members[row] for row in image_rows[:_SHOWN]]
                    for image_rows in (some, measured, chosen[nearest])
                ]
                bar.advance(counts[name])
        places = [points.get(image_id, (None, None)) for image_id in ids]
        table = pa.table(
            {
                rows.IMAGE_ID: pa.array(ids, pa.string()),
                column: pa.array(labels, pa.string()),
                rows.KEPT: pa.array([image_id in kept for image_id in ids], pa.bool_()),
                rows.X: pa.array([x for x, _ in places], pa.float32()),
                rows.Y: pa.array([y for _, y in places], pa.float32()),
            }
        )
        return Output(
            [
                context.table("reduction", table, table="reduction"),
                context.file(
                    "sheet", "png", draw_sheet(context, planes, examples), file="sheet.png"
                ),
            ],
            len(ids),
            ReduceResult(
                headline=f"{sum(wanted.values()):,} of"
                f" {sum(counts[name] for name in wanted):,} images of"
                f" {', '.join(wanted)[:200]} are kept",
                classes=figures,
            ),
        )  # fmt: skip


def kept_counts(settings: ReduceSettings, counts: Mapping[str, int]) -> dict[str, int]:
    """Number of images to keep of each reduced class, at least 2. Raises `StudyError` on an unknown
    class, and `DataError` if no class has more images than are kept."""
    median = int(np.median(list(counts.values())))
    target = {"median": median, "smallest": min(counts.values())}.get(
        str(settings.balance_to), settings.balance_to
    )
    if settings.classes == "auto":
        names = [name for name in sorted(counts) if settings.share is None or counts[name] > median]
    else:
        names = list(settings.classes)
        if unknown := [name for name in names if name not in counts]:
            raise StudyError(
                f"reduce.classes: unknown class {unknown[0]!r}; choose from"
                f" {', '.join(sorted(counts))[:200]}"
            )
    wanted = {
        name: int(target) if settings.share is None else round(settings.share * counts[name])
        for name in names
    }
    reduced = {name: max(2, kept) for name, kept in wanted.items() if max(2, kept) < counts[name]}
    if not reduced:
        most = max(names or counts, key=lambda name: counts[name])
        raise DataError(
            f"reduce: no class has more images than are kept ({most!r} has {counts[most]}); lower"
            " reduce.balance_to or reduce.share"
        )
    return reduced


def choose(
    settings: ReduceSettings, vectors: np.ndarray, count: int, strata: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """`count` rows of a class's embeddings (n, width), int64, and the positions of all in the
    plane, float32 (n, 2), or None if the method has no plane."""
    random = generator(seed, "choose")
    if settings.method == "random":
        return np.sort(random.choice(len(vectors), count, replace=False)), None
    if settings.method == "stratified":
        return stratified(strata, count, random), None
    if settings.method == "k_center":
        return k_center(vectors, count), None
    points = place(
        vectors, settings.method, seed, perplexity=settings.perplexity,
        neighbours=settings.n_neighbors, sample=settings.sample,
    )  # fmt: skip
    return cover(points, count, seed), points


def draw_sheet(
    context: Context, planes: Sequence[Plane], examples: Mapping[str, Sequence[Sequence[str]]]
) -> bytes:
    """The planes of the first classes; for each, kept images, dropped images, and the nearest kept
    image of each dropped one."""
    selected = dict(list(examples.items())[:_SHOWN_CLASSES])
    images = pictures(
        context.store, context.inputs["ingest"].keys(split="train"),
        {image_id for sections in selected.values() for ids in sections for image_id in ids},
    )  # fmt: skip
    return selection_sheet(
        planes[:_SHOWN_CLASSES],
        [
            (name, *([images[image_id] for image_id in ids] for ids in sections))
            for name, sections in selected.items()
        ],
        ("kept", "dropped", "the nearest kept of each"),
    )
