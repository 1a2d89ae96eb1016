"""Ingest: the user's files become one frozen dataset with splits, audited for leaks.

    list       the reader's records; ids, class names and class counts are checked before any
               compute
    decode     each file in a sandbox: hash, perceptual hash, the study's preprocessing and codec
    audit      exact duplicates, contradictory labels, the split, leaks between splits
    write      one set of parts per split, so that a step that may not see test opens no file of it

The manifest's parts bear the tags `split` (images) and `table` (`records`: every record with its
fate; `leaks`: pairs found).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.context import Context, Result
from engine.core import rows
from engine.core.arrays import empty_vectors, release, vectors_of
from engine.core.dataset import (
    assign_splits,
    limit_train,
    mend_all,
    remove_duplicates,
    replace_column,
)  # fmt: skip
from engine.core.errors import DataError, LeakError
from engine.core.images import Preprocess, Rejected, extension
from engine.core.leaks import Leak, find_leaks
from engine.core.manifest import Manifest, Part
from engine.core.names import check_class_names, csv_cell
from engine.core.registry import resolve
from engine.core.rows import TaskKind
from engine.core.sandbox import Sandbox
from engine.core.shards import OK, Shard, ShardSet, ids_digest, image_column, parquet_rows
from engine.core.spec import Spec
from engine.core.stage import Batch, Device, Place
from engine.core.step import Step
from engine.core.store import Store
from engine.readers import Bytes
from engine.readers import image_ids as image_names
from engine.sections import Audit, ReaderField, Split
from engine.steps import StepKind
from engine.steps.embed import EmbedImages

SHARD_ROWS = 256
ROW_GROUP = 512
# A part of the images of a split; the driver holds one of each split.
PART_BYTES = 16 * 2**20
# At or below this side, perceptual hashes of different pictures collide so often that near
# duplicates only warn.
SMALL_SIDE = 32


class IngestSpec(Spec):
    reader: ReaderField
    task: str
    tasks: dict[str, TaskKind]
    preprocess: Preprocess
    split: Split
    audit: Audit
    seed: int


class Decode:
    """Stage: bytes of the user to preprocessed, encoded images, by way of a sandbox."""

    reads: ClassVar[tuple[str, ...]] = (rows.IMAGE_ID, rows.URI)
    writes: ClassVar[tuple[str, ...]] = (
        rows.IMAGE, rows.WIDTH, rows.HEIGHT, rows.SOURCE, rows.PIXEL_SHA256, rows.PHASH,
        rows.STATUS,
    )  # fmt: skip
    device: ClassVar[Device] = "cpu"

    def __init__(
        self, source: Bytes, preprocess: Preprocess, timeout: float, check_extension: bool
    ) -> None:
        self.source, self.preprocess = source, preprocess
        self.timeout, self.check_extension = timeout, check_extension

    def load(self, place: Place) -> None:
        self.sandbox = Sandbox(
            self.preprocess, timeout=self.timeout, check_extension=self.check_extension
        )

    def __call__(self, batch: Batch) -> Batch:
        ids, uris = batch[rows.IMAGE_ID].to_pylist(), batch[rows.URI].to_pylist()
        # An id may come from a user's table; what is offered as a file's name never does.
        names = image_names(ids)
        decoded: list[Any] = []
        status = []
        for uri in uris:
            try:
                decoded.append(self.sandbox.decode(self.source.read(uri), uri))
                status.append(OK)
            except Rejected as rejected:
                decoded.append(None)
                status.append(rejected.reason)

        def values(name: str) -> list[Any]:
            return [None if item is None else getattr(item, name) for item in decoded]

        return {
            **batch,
            rows.IMAGE: image_column(values("encoded"), names, extension(self.preprocess)),
            rows.WIDTH: values("width"),
            rows.HEIGHT: values("height"),
            rows.SOURCE: ["real"] * len(ids),
            rows.PIXEL_SHA256: values("pixel_sha256"),
            rows.PHASH: values("phash"),
            rows.STATUS: status,
        }


class Ingest(StepKind):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[Spec]] = IngestSpec
    summary: ClassVar[str] = "decode and check the images, split them, look for leaks"

    def run(self, context: Context) -> Result:
        try:
            return self._run(context)
        except (DataError, LeakError):
            # The remedy changes files, perhaps in place, or the study: read them again then.
            for prefix in self.shard_prefixes(context.store, context.step):
                ShardSet(context.store, prefix).discard()
            raise

    def _run(self, context: Context) -> Result:
        spec = context.step.spec_as(IngestSpec)
        reader = resolve("readers", spec.reader.name)(spec.reader)
        records = reader.records()
        check_records(records, spec)
        shards, records_part = plan_shards(context, records)
        commits = context.compute(
            "decode",
            shards,
            rows_of=parquet_rows,
            stages=[
                Decode(
                    reader.bytes(), spec.preprocess, spec.audit.decode_timeout,
                    spec.audit.wrong_extension == "quarantine",
                )
            ],
            schema=rows.images_schema(spec.tasks),
            fingerprint={"data": dict(reader.fingerprint()), "code": dict(context.step.code)},
            prefix=decoded_prefix(context.store, context.step),
        )  # fmt: skip
        fate = dict(
            zip(
                (i for c in commits for i in c.image_id),
                (s for c in commits for s in c.status),
                strict=True,
            )
        )
        refuse_many_quarantined(fate, records, spec)

        decoded_keys = [commit.data.key for commit in commits if commit.data]
        del commits  # a digest for each image, which nobody asks for any more
        index = read_index(context.store, decoded_keys, spec)
        index, leaks, notes = self._audit(context, spec, index, fate, decoded_keys)
        notes["warnings"] += reader.warnings()
        parts, counts = write_splits(context, spec, index, decoded_keys)
        refuse_thin_classes(counts, spec)
        tables = [
            context.table("records", fates_table(records, fate, index), table="records"),
            context.table("leaks", leaks_table(leaks), table="leaks"),
        ]
        ShardSet(context.store, decoded_prefix(context.store, context.step)).discard()
        for key in [*decoded_keys, records_part.key]:
            context.store.delete(key)

        quarantined = Counter(status for status in fate.values() if status != OK)
        totals = {split: sum(by_class.values()) for split, by_class in counts.items()}
        for warning in notes["warnings"]:
            context.say(f"warning: {warning}")
        headline = ", ".join(f"{totals[split]:,} {split}" for split in rows.SPLITS)
        out = len(fate) - sum(totals.values())
        return Result(
            parts=[*parts, *tables],
            rows=sum(totals.values()),
            metrics={
                "headline": f"{headline}; {out:,} of {len(fate):,} set aside" if out else headline,
                "counts": counts,
                "set_aside": dict(sorted(quarantined.items())),
                "data": dict(reader.fingerprint()),
                **notes,
            },
        )

    def _audit(
        self,
        context: Context,
        spec: IngestSpec,
        index: pa.Table,
        fate: dict[str, str],
        decoded_keys: list[str],
    ) -> tuple[pa.Table, list[Leak], dict[str, Any]]:
        """Remove duplicates, split, look for leaks; sets the fate of what is removed."""
        index = remove_duplicates(index, spec.tasks, fate)
        index, carved = assign_splits(
            index, spec.task, {"val": spec.split.val, "test": spec.split.test},
            spec.split.group == "column", spec.seed,
        )  # fmt: skip
        warnings = []
        vectors = None
        if spec.preprocess.size > SMALL_SIDE:
            vectors = self._embed(context, spec, index, decoded_keys)
        leaks, thresholds = find_leaks(index, vectors, spec.audit.near_quantile)
        if spec.preprocess.size <= SMALL_SIDE:
            warnings.append(
                f"at {spec.preprocess.size} px near duplicates between splits cannot be told from"
                " alike pictures;"
                " only exact ones were looked for"
            )
        if spec.split.group == "none":
            warnings.append("no groups are given: every image counts as independent of the others")
        if leaks and spec.audit.on_leak == "fail":
            raise LeakError(self._leak_text(context, leaks))
        if thresholds.get("twins"):
            warnings.append(
                f"{thresholds['twins']} training images have a near duplicate in another group of"
                " train: the groups may be wrong"
            )
        if leaks:
            index, leaks = mend_all(index, vectors, leaks, thresholds, spec.audit.on_leak, fate)
            warnings.append(
                f"{len(leaks)} leaks between splits: on_leak: {spec.audit.on_leak} was applied"
            )
        index = limit_train(index, spec.task, spec.split.train_limit, spec.seed, fate)
        return index, leaks, {"warnings": warnings, "carved": carved, "near_thresholds": thresholds,
                              "leaks": dict(Counter(leak.kind for leak in leaks))}  # fmt: skip

    def _embed(
        self, context: Context, spec: IngestSpec, index: pa.Table, decoded_keys: list[str]
    ) -> np.ndarray:
        """Embeddings of all images of the index, in its order."""
        prefix = context.store.join(context.prefix, "audit")
        stages, schema = EmbedImages.stages(spec.audit.embedder, hashes=False)
        shards = []
        for key in decoded_keys:
            with context.store.parquet(key) as file:
                ids = file.read(columns=[rows.IMAGE_ID])[rows.IMAGE_ID].to_pylist()
            # The parts of a decode shard are one row group each.
            task = {"part": key, "row_group": 0, "ids_digest": ids_digest(ids)}
            shards.append(Shard(f"audit-{task['ids_digest']}", len(ids), task, {}))
        commits = context.compute(
            "embed", shards, rows_of=parquet_rows, stages=stages, schema=schema, prefix=prefix,
            fingerprint={"embedder": spec.audit.embedder.model_dump()}, replace=True,
        )  # fmt: skip
        keys = [commit.data.key for commit in commits if commit.data]
        found: np.ndarray | None = None
        ids = index[rows.IMAGE_ID].combine_chunks()
        for table in context.store.tables(keys):
            matrix = vectors_of(table)
            if found is None:
                found = empty_vectors(len(ids), matrix.shape[1])
                found[:] = np.nan
            place = pc.index_in(table[rows.IMAGE_ID], ids).combine_chunks()
            here = np.asarray(place.is_valid())
            found[np.asarray(place.drop_null())] = matrix[here]
            release(found)
        assert found is not None
        return found

    def _leak_text(self, context: Context, leaks: Sequence[Leak]) -> str:
        key = context.store.join(context.prefix, "leaks.csv")
        lines = ["kind,first,first_split,second,second_split,detail"]
        for leak in leaks:
            cells = (
                leak.kind,
                leak.first_uri,
                leak.first_split,
                leak.second_uri,
                leak.second_split,
                leak.detail,
            )
            lines.append(",".join('"' + csv_cell(cell).replace('"', '""') + '"' for cell in cells))
        context.store.put(key, "\n".join(lines).encode())
        kinds = ", ".join(
            f"{count} {kind}" for kind, count in Counter(leak.kind for leak in leaks).items()
        )
        some = "; ".join(
            f"{leak.kind}: {leak.first_uri} ({leak.first_split}) and {leak.second_uri}"
            f" ({leak.second_split})"
            for leak in leaks[:3]
        )
        return (
            f"leaks between splits ({kinds}): {some}; the list is {context.store.location(key)}."
            " Mend the data, or say audit.on_leak: drop or move"
        )

    def outdated(self, step: Step, manifest: Manifest) -> str | None:
        spec = step.spec_as(IngestSpec)
        try:
            found = resolve("readers", spec.reader.name)(spec.reader).fingerprint()
        except DataError:
            return None  # the originals have gone; what was taken in stands
        if dict(found) != manifest.metrics["data"]:
            raise DataError(
                f"ingest {step.key}: the data changed since it was taken in and split; bring it"
                " back, or take it in"
                " anew with --discard ingest; images that were made from the old data then have to"
                " be thrown away by name, and the run will say so"
            )
        return None

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        return [decoded_prefix(store, step), store.join(store.step(step.kind, step.key), "audit")]


def decoded_prefix(store: Store, step: Step) -> str:
    return store.join(store.step(step.kind, step.key), "decoded")


def check_records(records: pa.Table, spec: IngestSpec) -> None:
    """Refuse what no compute can mend. Raises `DataError`."""
    ids = records[rows.IMAGE_ID].to_pylist()
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0]
        places = [
            uri for uri, i in zip(records[rows.URI].to_pylist(), ids, strict=True) if i == twice[0]
        ]
        raise DataError(
            f"the id {twice[0]!r} stands {twice[1]} times (first: {places[0]}, {places[1]}); ids"
            " must be unique"
        )
    if spec.split.group == "column" and records[rows.GROUP_ID].null_count:
        raise DataError(
            f"split.group: {records[rows.GROUP_ID].null_count:,} images have no group; name the"
            " reader's group column,"
            " or say split.group: none if every image is independent of the others"
        )
    labels = records[rows.label_column(spec.task)]
    if spec.tasks[spec.task] == "multi":
        raise DataError(
            f"task: {spec.task} has several labels per image; studies with one label per image"
            " run today"
        )
    if labels.null_count:
        raise DataError(
            f"label.{spec.task}: {labels.null_count:,} images have no label; fill it in or leave"
            " them out"
        )
    for task in spec.tasks:
        values = records[rows.label_column(task)]
        flat = pc.list_flatten(values) if spec.tasks[task] == "multi" else values
        check_class_names((name for name in pc.unique(flat).to_pylist() if name is not None), task)
    counts = Counter(labels.to_pylist())
    if len(counts) < 2:
        raise DataError(
            f"label.{spec.task}: there is one class alone ({next(iter(counts))!r}); a study needs"
            " two"
        )
    name, least = min(counts.items(), key=lambda item: item[1])
    if least < 2:
        raise DataError(
            f"label.{spec.task}: the class {name!r} has one image; it cannot be split, add images"
            " or leave it out"
        )
    unknown = sorted(set(spec.split.train_limit) - set(counts))
    if unknown:
        raise DataError(
            f"split.train_limit: there is no class {unknown[0]!r}; there are"
            f" {', '.join(sorted(counts))[:200]}"
        )


def plan_shards(context: Context, records: pa.Table) -> tuple[list[Shard], Part]:
    """Write the records and cut them into shards of fixed membership."""
    part = context.table("records-to-decode", records, row_group_size=SHARD_ROWS)
    ids = records[rows.IMAGE_ID].to_pylist()
    shards = []
    for number, start in enumerate(range(0, len(ids), SHARD_ROWS)):
        held = ids[start : start + SHARD_ROWS]
        task = {"part": part.key, "row_group": number, "ids_digest": ids_digest(held)}
        shards.append(Shard(f"{number:06d}-{task['ids_digest'][:8]}", len(held), task, {}))
    return shards, part


def refuse_many_quarantined(fate: Mapping[str, str], records: pa.Table, spec: IngestSpec) -> None:
    bad = {image_id: status for image_id, status in fate.items() if status != OK}
    if len(bad) <= spec.audit.max_quarantined * len(fate):
        return
    uris = dict(zip(records[rows.IMAGE_ID].to_pylist(), records[rows.URI].to_pylist(), strict=True))
    kinds = ", ".join(f"{count} {reason}" for reason, count in Counter(bad.values()).most_common())
    some = "; ".join(
        f"{uris[image_id][:80]}: {reason}" for image_id, reason in list(bad.items())[:3]
    )
    raise DataError(
        f"{len(bad):,} of {len(fate):,} files cannot be used ({kinds}): {some}."
        f" Mend or remove them, or raise audit.max_quarantined (now {spec.audit.max_quarantined:g})"
    )


def read_index(store: Store, keys: list[str], spec: IngestSpec) -> pa.Table:
    """All decoded images without their pixels."""
    columns = [name for name in rows.images_schema(spec.tasks).names if name != rows.IMAGE]
    return pa.concat_tables(store.tables(keys, columns)).combine_chunks()


def write_splits(
    context: Context, spec: IngestSpec, index: pa.Table, decoded_keys: list[str]
) -> tuple[list[Part], dict[str, dict[str, int]]]:
    """Write the images of each split; one pass over the decoded data, memory bounded by one
    part."""
    schema = rows.images_schema(spec.tasks)
    fates = {
        image_id: (split, group)
        for image_id, split, group in zip(
            index[rows.IMAGE_ID].to_pylist(),
            index[rows.SPLIT].to_pylist(),
            index[rows.GROUP_ID].to_pylist(),
            strict=True,
        )
    }
    pending: dict[str, list[pa.Table]] = {split: [] for split in rows.SPLITS}
    counts: dict[str, Counter[str]] = {split: Counter() for split in rows.SPLITS}
    parts: list[Part] = []

    def flush(split: str) -> None:
        if pending[split]:
            table = pa.concat_tables(pending[split])
            name = f"{split}-{sum(part.tags['split'] == split for part in parts):05d}"
            parts.append(context.table(name, table, row_group_size=ROW_GROUP, split=split))
            pending[split] = []

    for table in context.store.tables(decoded_keys):
        found = [fates.get(image_id) for image_id in table[rows.IMAGE_ID].to_pylist()]
        for split in rows.SPLITS:
            mask = [entry is not None and entry[0] == split for entry in found]
            if not any(mask):
                continue
            held = table.filter(pa.array(mask))
            held = replace_column(held, rows.SPLIT, [split] * held.num_rows)
            held = replace_column(
                held, rows.GROUP_ID, [entry[1] for entry in found if entry and entry[0] == split]
            )
            counts[split].update(held[rows.label_column(spec.task)].to_pylist())
            pending[split].append(held.cast(schema))
            if sum(piece.nbytes for piece in pending[split]) > PART_BYTES:
                flush(split)
    for split in rows.SPLITS:
        flush(split)
    return parts, {split: dict(sorted(counter.items())) for split, counter in counts.items()}


def refuse_thin_classes(counts: Mapping[str, Mapping[str, int]], spec: IngestSpec) -> None:
    classes = sorted({name for by_class in counts.values() for name in by_class})
    for split in rows.SPLITS:
        for name in classes:
            found, needed = counts[split].get(name, 0), 2 if split == "train" else 1
            if found < needed:
                raise DataError(
                    f"the class {name!r} has {found} images in {split}, it needs {needed}: add"
                    " images,"
                    " leave the class out, or change the split"
                )


def fates_table(records: pa.Table, fate: Mapping[str, str], index: pa.Table) -> pa.Table:
    """Every record that the reader listed, with its split or the reason why it is not used."""
    split = dict(zip(index[rows.IMAGE_ID].to_pylist(), index[rows.SPLIT].to_pylist(), strict=True))
    ids = records[rows.IMAGE_ID].to_pylist()
    records = replace_column(records, rows.SPLIT, [split.get(image_id) for image_id in ids])
    return records.append_column(
        rows.STATUS, pa.array([fate[image_id] for image_id in ids], pa.string())
    )


def leaks_table(leaks: Sequence[Leak]) -> pa.Table:
    names = ("kind", "first", "first_split", "second", "second_split", "detail")
    return pa.table(
        {name: pa.array([getattr(leak, name) for leak in leaks], pa.string()) for name in names}
    )
