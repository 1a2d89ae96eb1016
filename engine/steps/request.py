"""Request: a row for every image to generate, before any is generated.

Ids and seeds belong to rows; shards have a fixed membership and are laid out per class and index,
so that a larger request reuses the full shards of a smaller one. The manifest's parts have the
tags `table: requests` (one file per class, a row group for each shard) and `table: shards`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import DataError, StudyError
from engine.core.manifest import Manifest
from engine.core.names import slug
from engine.core.notice import Notice
from engine.core.registry import kind_of
from engine.core.rng import derive_seed
from engine.core.rows import TaskKind
from engine.core.shards import Shard, ids_digest
from engine.core.spec import Spec, digest
from engine.core.step import Step
from engine.core.store import Store
from engine.data.dataset import split_index
from engine.data.images import Preprocess
from engine.generators import Generator, TrainingRows
from engine.generators import Request as Wanted
from engine.results.data import IngestResult
from engine.results.images import AllocateResult, ClassFunnel, CurateResult, RequestResult
from engine.settings import Classes, GeneratorField
from engine.settings import Request as RequestSettings
from engine.settings_labels import MAX_IMAGES
from engine.stages.cells import classes_of, named_cells, request_of
from engine.steps import StepKind
from engine.steps.finetune import read_clusters

# Assumed share of kept images where hardly any were kept.
LEAST_SHARE = 0.1
# Share of images that two draws may have in common without a warning.
_SHARED = 0.5
# Margin over the missing number: the next images may be kept less often than the last.
_MARGIN = 1.25


class RequestSpec(Spec):
    unkeyed_fields: ClassVar[tuple[str, ...]] = ("class_groups",)

    # Groups are expanded, so that naming their classes one by one gives the same images.
    request: RequestSettings
    # The study's groups, for errors: their classes are checked once the data is known.
    class_groups: dict[str, tuple[str, ...]] = {}
    # The largest ratio of the comparison, as a share of each class's real images.
    least_ratio: float = 0.0
    generator: GeneratorField
    # Identity of the generator, its sampling settings and its training, if any.
    generator_key: str
    preprocess: Preprocess
    task: str
    tasks: dict[str, TaskKind]
    seed: int


class Request(StepKind[RequestSpec]):
    version = 1
    summary = "plan every image to generate"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(RequestSpec)
        generator = kind_of("generators", spec.generator)(spec.generator, spec.preprocess)
        train = training_rows(context, spec.task, generator)
        data = context.result("ingest", IngestResult)
        check_groups(spec.class_groups, data)
        counts = needed_images(spec, data, allocated(context.inputs.get("allocate")))
        if "curate" in context.inputs:
            counts = top_up(
                counts, context.result("curate", CurateResult).funnel, generator.available()
            )
        refuse_missing_images(generator, counts)
        requested = {label: count for label, count in counts.items() if count}
        parts, shards, prompts = [], [], set()
        with context.progress(sum(counts.values()), "requests") as bar:
            for label, count in requested.items():
                labels = data.cells.get(label, {})
                table = request_table(spec, generator, label, count, train[label], labels)
                name, size = slug(label), spec.request.shard_size
                part = context.table(
                    f"requests-{name}", table, row_group_size=size, table="requests"
                )
                parts.append(part)
                ids = table[rows.IMAGE_ID].to_pylist()
                prompts |= set(pc.unique(table[rows.PROMPT]).to_pylist()) - {None}
                for number, start in enumerate(range(0, count, size)):
                    shard_ids = ids[start : start + size]
                    address = ids_digest([spec.generator_key, *shard_ids])
                    task = {
                        "part": part.key, "row_group": number,
                        "ids_digest": ids_digest(shard_ids),
                    }  # fmt: skip
                    shard_name = f"{name}-{number:06d}-{address}"
                    shards.append(Shard(shard_name, len(shard_ids), task, {"label": label}))
                bar.advance(count)
        if not shards:
            raise DataError(
                "request: no image is requested: every class already has balance_to images, or"
                " ratio rounds to none; raise request.balance_to or request.ratio"
            )
        table = pa.table({"shard": [shard.to_json() for shard in shards]})
        parts.append(context.table("shards", table, table="shards"))
        warnings = generator.prompt_warnings(sorted(prompts)) if prompts else []
        # The first fit has nothing to overlap with.
        if context.step.subject.fit:
            warnings = [*warnings, *overlaps(generator.available(), requested)]
        context.warn(warnings)
        total = sum(counts.values())
        return Output(
            parts, total,
            RequestResult(
                headline=f"{total:,} images of {len(requested)} classes in {len(shards):,} shards",
                counts=requested,
                outside=dict(generator.external_digests()),
                warnings=warnings,
            ),
        )  # fmt: skip

    def outdated(self, step: Step, manifest: Manifest, store: Store) -> str | None:
        spec = step.spec_as(RequestSpec)
        generator = kind_of("generators", spec.generator)(spec.generator, spec.preprocess)
        if dict(generator.external_digests()) != RequestResult.of(manifest).outside:
            return "external files of the generator changed"
        return None


def allocated(allocate: Manifest | None) -> dict[str, int]:
    """Images by class, if a step allocated them."""
    return {} if allocate is None else AllocateResult.of(allocate).images


def needed_images(
    spec: RequestSpec, data: IngestResult, images: Mapping[str, int] = {}
) -> dict[str, int]:
    """Number of images to keep of each target class; the first round generates as many. images: as
    allocated, if they are."""
    real = data.targets
    request = request_of(spec.request, data).as_allocated(images, real)
    asked = count_per_class(request, real)
    return {name: max(count, round(spec.least_ratio * real[name])) for name, count in asked.items()}


def count_per_class(request: RequestSettings, train: Mapping[str, int]) -> dict[str, int]:
    """Number of images to generate of each target class, from its number of real training images.
    Raises `StudyError`."""
    target_classes(tuple(request.ratio_by_class or ()), train, "request.ratio_by_class")
    counts = {
        name: request.count(name, train[name]) for name in target_classes(request.classes, train)
    }
    if sum(counts.values()) > MAX_IMAGES:
        raise StudyError(
            f"request: {sum(counts.values()):,} images are too many (maximum {MAX_IMAGES:,});"
            " request fewer"
        )
    return counts


def check_groups(groups: Mapping[str, Sequence[str]], data: IngestResult) -> None:
    """Raise `StudyError` if a group has the name of a class, or contains an unknown class."""
    for group, members in groups.items():
        if named_cells(group, data):
            raise StudyError(
                f"request.class_groups: {group!r} is the name of a class; choose another"
            )
        named = classes_of(tuple(members), data)
        target_classes(named, data.targets, f"request.class_groups.{group}")


def target_classes(
    classes: Classes, train: Mapping[str, int], where: str = "request.classes"
) -> list[str]:
    """The classes to generate images for. Raises `StudyError` on an unknown class."""
    if classes == "all":
        return sorted(train)
    unknown = [name for name in classes if name not in train]
    if unknown:
        raise StudyError(
            f"{where}: unknown class {unknown[0]!r}; choose from {', '.join(sorted(train))[:200]}"
        )
    return list(classes)


def top_up(
    needed: Mapping[str, int],
    funnel: Mapping[str, ClassFunnel],
    available: Mapping[str, int] | None,
) -> dict[str, int]:
    """Number of images to request so that `needed` are kept, at the share kept so far plus a
    quarter."""
    counts = {}
    for name, wanted in needed.items():
        requested, kept = (funnel[name].requested, funnel[name].kept) if name in funnel else (0, 0)
        missing = max(0, wanted - kept)
        share = max(kept / max(requested, 1), LEAST_SHARE)
        counts[name] = requested + math.ceil(_MARGIN * missing / share)
        if available is not None:
            counts[name] = max(requested, min(counts[name], available.get(name, 0)))
    return counts


def refuse_missing_images(generator: Generator, counts: Mapping[str, int]) -> None:
    """Raise `DataError` if a generator of existing images has fewer than requested."""
    available = generator.available()
    for label, count in counts.items():
        if available is not None and available.get(label, 0) < count:
            raise DataError(
                f"request: {count:,} images of {label!r} are requested, the folder has"
                f" {available.get(label, 0):,};"
                " lower the request or leave the class out of request.classes"
            )


def training_rows(context: Context, task: str, generator: Generator) -> dict[str, TrainingRows]:
    """The possible parent images of each class, with their clusters."""
    index = split_index(context.store, context.inputs["ingest"], task, "train")
    allowed = None
    if generator.parents() == "representatives":
        table = pa.concat_tables(
            context.store.tables(context.inputs["select"].keys(table="representatives"))
        )
        allowed = set(table[rows.IMAGE_ID].to_pylist())
    cluster_of = read_clusters(context)
    images_of: dict[str, tuple[list[str], list[int]]] = {}
    labels = index[rows.label_column(task)].to_pylist()
    for image_id, label in zip(index[rows.IMAGE_ID].to_pylist(), labels, strict=True):
        ids, clusters = images_of.setdefault(label, ([], []))
        if allowed is None or image_id in allowed:
            ids.append(image_id)
            clusters.append(cluster_of.get(image_id, 0))
    return {label: TrainingRows(*images) for label, images in images_of.items()}


def request_table(
    spec: RequestSpec, generator: Generator, label: str, count: int, train: TrainingRows,
    labels: Mapping[str, str | tuple[str, ...]] = {},
) -> pa.Table:  # fmt: skip
    """The requests of one class, with their ids and seeds. labels: of a cell, by task."""
    wanted = list(generator.plan(label, count, train, spec.seed))
    ids = [request_id(spec.generator_key, entry) for entry in wanted]
    columns: dict[str, Any] = {
        rows.IMAGE_ID: ids,
        rows.label_column(spec.task): [entry.label for entry in wanted],
        rows.INDEX: [entry.index for entry in wanted],
        rows.CLUSTER: [entry.cluster for entry in wanted],
        rows.PROMPT: [entry.prompt for entry in wanted],
        rows.NEGATIVE_PROMPT: [entry.negative_prompt for entry in wanted],
        rows.SEED: [derive_seed(spec.seed, image_id) for image_id in ids],
        rows.PARENT_ID: [entry.parent_id for entry in wanted],
        rows.STRENGTH: [entry.strength for entry in wanted],
        rows.URI: [entry.uri for entry in wanted],
        **{rows.label_column(task): [value] * len(ids) for task, value in labels.items()},
    }
    schema = rows.requests_schema(spec.tasks)
    return pa.table(
        [pa.array(columns.get(field.name, [None] * len(ids)), field.type) for field in schema],
        schema=schema,
    )


def request_id(generator_key: str, wanted: Wanted) -> str:
    """24 hex digits from the fields of a request, except the seed."""
    asked: list[Any] = [
        generator_key, wanted.label, wanted.cluster, wanted.prompt, wanted.negative_prompt,
        wanted.parent_id, wanted.strength, wanted.index,
    ]  # fmt: skip
    if wanted.uri is not None:
        asked.append(wanted.uri)
    return digest(asked, 24)


def overlaps(available: Mapping[str, int] | None, counts: Mapping[str, int]) -> list[Notice]:
    """A warning if draws of existing images have most of them in common: they are hardly
    replicates."""
    if available is None or not counts:
        return []
    # Two draws of n from N have n / N of their images in common, on average.
    label = max(counts, key=lambda name: counts[name] / max(1, available.get(name, 0)))
    shared = counts[label] / max(1, available.get(label, 0))
    if shared <= _SHARED:
        return []
    return [Notice.of("overlapping_draws", label=label, percent=round(100 * shared),
                      images=available.get(label, 0), wanted=counts[label])]  # fmt: skip


def planned_shards(context: Context) -> Iterator[Shard]:
    """The shards that a request step planned, in order."""
    for table in context.store.tables(context.inputs["request"].keys(table="shards")):
        yield from (Shard.from_json(text) for text in table["shard"].to_pylist())
