"""Ingest: the user's files become one frozen dataset with splits, audited for leaks.

    list       the reader's records; ids, class names and class counts are checked before any
               compute
    decode     each file in a sandbox: hash, perceptual hash, the study's preprocessing and codec
    audit      exact duplicates, contradictory labels, the split, leaks between splits
    write      one set of parts per split, so that a step without access to test never opens it

The manifest's parts bear the tags `split` (images) and `table` (`records`: every record with its
fate; `leaks`: the pairs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import DataError, LeakError
from engine.core.labels import RARE
from engine.core.manifest import Manifest, Part
from engine.core.names import natural
from engine.core.notice import Notice
from engine.core.registry import kind_of
from engine.core.shards import OK, ShardSet, reason_of
from engine.core.step import Step
from engine.core.store import Store
from engine.data.arrays import aligned
from engine.data.dataset import (
    assign_splits,
    by_id,
    limit_train,
    remove_duplicates,
    replace_column,
    resolve_leaks,
)  # fmt: skip
from engine.data.leaks import Leak, NearPair, find_leaks, seen_in_train
from engine.report.download import as_csv
from engine.results.data import IngestResult
from engine.stages.cells import (
    counts_by_split,
    label_counts,
    labels_by_task,
    names_by_image,
    read_records,
)
from engine.stages.confounding import find_confounding
from engine.stages.identity import changed_files, place_of, read_place, write_place
from engine.stages.intake import (
    DECODED,
    EMBEDDED,
    Intake,
    decode_records,
    embed_decoded,
    find_near,
    too_small,
)
from engine.stages.records import (
    IntakeSpec,
    check_records,
    decoding_notices,
    record_notices,
    seen_notices,
    set_aside_notice,
    small_class_notices,
    thin_classes,
)
from engine.steps import StepKind
from engine.wording import notice_in_words

ROW_GROUP = 512
# Size of an image part; the driver keeps one per split in memory.
PART_BYTES = 16 * 2**20


class IngestSpec(IntakeSpec):
    """How the user's files are read, split and checked."""


class Ingest(StepKind[IngestSpec]):
    version = 6
    summary = "decode, check and split the images, find leaks"
    scratch = (DECODED, EMBEDDED)

    def run(self, context: Context) -> Output:
        try:
            return self._run(context)
        except (DataError, LeakError):
            # The fix may change files in place: they must be decoded again.
            for prefix in self.shard_prefixes(context.store, context.step):
                ShardSet(context.store, prefix).discard()
            raise

    def _run(self, context: Context) -> Output:
        spec = context.step.spec_as(IngestSpec)
        reader = kind_of("readers", spec.reader)(spec.reader)
        records = read_records(reader, spec.task, spec.cells)
        check_records(records, spec)
        intake = decode_records(context, reader, records, spec)
        fate = intake.fate
        refuse_many_quarantined(fate, records, spec)

        # Before duplicates and the like are set aside too.
        unusable = set_aside_notice(records, fate, spec.task, spec.audit.max_quarantined)
        ledger = reader.ledger()
        digests = by_id(intake.index, rows.FILE_SHA256)
        index, leaks, notes = self._audit(context, spec, intake)
        notes["warnings"] += [
            *reader.warnings(), *record_notices(records, reader, spec.task),
            *decoding_notices(intake.index, spec.preprocess), *unusable,
        ]  # fmt: skip
        parts, counts = write_splits(context, spec, index, intake.keys)
        by_name = counts_by_split(index, spec.task, spec.cells)
        for problem in thin_classes(by_name):
            raise DataError(problem)
        by_class = {name: {split: by_name[split].get(name, 0) for split in by_name}
                    for name in by_name["train"]}  # fmt: skip
        notes["warnings"] += small_class_notices(by_class)
        tables = [
            context.table("records", fates_table(records, fate, index, digests), table="records"),
            context.table("leaks", leaks_table(leaks), table="leaks"),
        ]

        quarantined = Counter(reason_of(status) for status in fate.values() if status != OK)
        totals = {split: sum(by_class.values()) for split, by_class in counts.items()}
        context.warn(notes["warnings"])
        headline = ", ".join(f"{totals[split]:,} {split}" for split in rows.SPLITS)
        out = len(fate) - sum(totals.values())
        write_place(context.store, context.step, place_of(reader))
        return Output(
            parts=[*parts, *tables],
            rows=sum(totals.values()),
            result=IngestResult(
                headline=f"{headline}; {out:,} of {len(fate):,} set aside" if out else headline,
                set_aside=dict(sorted(quarantined.items())),
                ledger=ledger,
                data=dict(reader.fingerprint()),
                **of_cells(index, counts, spec),
                **notes,
            ),
        )

    def _audit(
        self, context: Context, spec: IngestSpec, intake: Intake
    ) -> tuple[pa.Table, list[Leak], dict[str, Any]]:
        """Remove duplicates, split, and find leaks; sets the fate of removed images."""
        fate = intake.fate
        index = remove_duplicates(
            intake.index, spec.tasks, fate, spec.audit.on_contradiction == "drop"
        )
        index, carved = assign_splits(
            index, names_by_image(index, spec.task, spec.cells),
            {"val": spec.split.val, "test": spec.split.test},
            spec.split.group == "column", spec.seed,
        )  # fmt: skip
        near, limits, warnings = self._near(context, spec, intake, index)
        leaks = find_leaks(index, near)
        row_of = {image_id: row for row, image_id in enumerate(index[rows.IMAGE_ID].to_pylist())}
        seen = seen_in_train(
            index[rows.PIXEL_SHA256].to_pylist(), index[rows.SPLIT].to_pylist(),
            [(row_of[a], row_of[b]) for a, b, _ in near],
        )  # fmt: skip
        if spec.split.group == "none":
            warnings.append(Notice.of("no_groups"))
        if leaks and spec.audit.on_leak == "fail":
            labels = by_id(index, rows.label_column(spec.task))
            raise LeakError(self._leak_text(context, leaks, labels, seen_notices(seen)))
        warnings += seen_notices(seen, resolved=True)
        if leaks:
            index, leaks = resolve_leaks(index, leaks, near, spec.audit.on_leak, fate)
            warnings.append(
                Notice.of("leaks_resolved", leaks=len(leaks), on_leak=spec.audit.on_leak)
            )
        split = spec.split
        index = limit_train(
            index, spec.task, split.train_limit, spec.seed, fate, split.train_fraction
        )
        return index, leaks, {"warnings": warnings, "carved": carved, "near_limit": limits,
                              "leaks": dict(Counter(leak.kind for leak in leaks))}  # fmt: skip

    def _near(
        self, context: Context, spec: IngestSpec, intake: Intake, index: pa.Table
    ) -> tuple[list[NearPair], dict[str, Any], list[Notice]]:
        """Near duplicates by id, their limits, and warnings."""
        small_side = too_small(index, spec.preprocess)
        padded = spec.preprocess.fit == "pad"
        embedded = embed_decoded(context, spec.audit.embedder, intake, padded)
        keys = [part.key for part in embedded]
        ids = index[rows.IMAGE_ID].to_pylist()
        vectors, pictures, appearance = (
            aligned(context.store, keys, name, ids)
            for name in (rows.EMBEDDING, rows.THUMBNAIL, rows.APPEARANCE)
        )
        near = find_near(
            index, spec.task, vectors, pictures, spec.audit.near_quantile, spec.seed,
            small_side=small_side,
        )  # fmt: skip
        limits = {} if near.limit is None else {
            name: round(value, 6) if value else value
            for name, value in asdict(near.limit).items()
        }  # fmt: skip
        pairs = [(ids[a], ids[b], float(agreement)) for (a, b), agreement in
                 zip(near.pairs.tolist(), near.agreement, strict=True)]  # fmt: skip
        groups, splits = (index[name].to_pylist() for name in (rows.GROUP_ID, rows.SPLIT))
        twins = [a for a, b in near.pairs.tolist()
                 if groups[a] != groups[b] and splits[a] == splits[b] == "train"]  # fmt: skip
        warnings = near.warnings(small_side)
        warnings += find_confounding(index, spec.task, pictures, appearance, spec.seed).notices()
        labels = index[rows.label_column(spec.task)].to_pylist()
        uris = index[rows.URI].to_pylist()
        if two := [(a, b) for a, b in near.pairs.tolist() if labels[a] != labels[b]]:
            a, b = two[0]
            warnings.append(
                Notice.of("near_contradictory", pairs=len(two), first=uris[a], label=labels[a],
                          second=uris[b], other=labels[b])
            )  # fmt: skip
        if twins:
            warnings.append(Notice.of("similar_groups", pairs=len(twins)))
        return pairs, limits, warnings

    def _leak_text(
        self,
        context: Context,
        leaks: Sequence[Leak],
        labels: Mapping[str, str],
        seen: Sequence[Notice],
    ) -> str:
        key = context.store.join(context.prefix, "leaks.csv")
        entries = [
            {
                "kind": leak.kind, "first": leak.first_uri, "first_split": leak.first_split,
                "first_label": labels[leak.first], "second": leak.second_uri,
                "second_split": leak.second_split, "second_label": labels[leak.second],
                "detail": leak.detail,
            }
            for leak in leaks
        ]  # fmt: skip
        context.store.put(key, as_csv(entries))
        kinds = ", ".join(
            f"{count} {kind}" for kind, count in Counter(leak.kind for leak in leaks).items()
        )
        some = "; ".join(
            f"{leak.kind}: {leak.first_uri} ({leak.first_split}) and {leak.second_uri}"
            f" ({leak.second_split})"
            for leak in leaks[:3]
        )
        counted = "".join(f"{notice_in_words(notice)}; " for notice in seen)
        return (
            f"leaks between splits ({kinds}): {counted}{some}; the list is"
            f" {context.store.location(key)}. Fix all of them at once, because a change of the"
            " files may change a drawn split; or set audit.on_leak to drop or move"
        )

    def outdated(self, step: Step, manifest: Manifest, store: Store) -> str | None:
        spec = step.spec_as(IngestSpec)
        try:
            reader = kind_of("readers", spec.reader)(spec.reader)
            fingerprint, place = reader.fingerprint(), place_of(reader)
        except DataError:
            return None  # the originals are gone; the ingested copy remains valid
        if dict(fingerprint) != IngestResult.of(manifest).data:
            raise DataError(
                f"ingest {step.key}: the data changed since it was ingested; restore it, or ingest"
                " it again with --discard ingest (the run then names the images generated from the"
                " old data, which must be discarded too)"
            )
        before = read_place(store, step)
        if place == before:
            return None
        if changed := changed_files(store, manifest, reader):
            raise DataError(
                f"ingest {step.key}: {len(changed):,} of its images have other files now (first:"
                f" {changed[0][:100]} in {place.get('root', 'the data')}; they were ingested from"
                f" {before.get('root', 'elsewhere')}): set another profile.storage for other data,"
                " or ingest it again with --discard ingest"
            )
        write_place(store, step, place)
        return None

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        own = store.step(step.kind, step.key)
        return [store.join(own, DECODED), store.join(own, EMBEDDED)]


def of_cells(
    index: pa.Table, counts: dict[str, dict[str, int]], spec: IngestSpec
) -> dict[str, Any]:
    """The result's fields on cells; every split then counts every cell."""
    if spec.cells is None:
        return {"counts": counts}
    names = sorted({name for of_split in counts.values() for name in of_split})
    every = index[rows.label_column(spec.task)].to_pylist()
    labels = zip(*labels_by_task(index, spec.cells).values(), strict=True)
    tasks = [task.name for task in spec.cells.tasks]
    known = {name: dict(zip(tasks, of_image, strict=True))
             for name, of_image in zip(every, labels, strict=True)
             if name != RARE and None not in of_image}  # fmt: skip
    if not known:
        raise DataError(
            f"tasks: no combination of labels has {spec.cells.least} images, so none can be"
            " generated; lower rare_below, or choose fewer tasks"
        )
    return {
        "counts": {split: {name: of_split.get(name, 0) for name in names}
                   for split, of_split in counts.items()},
        "labels": label_counts(index, spec.tasks, spec.cells),
        "cells": {name: known[name] for name in sorted(known, key=natural)},
    }  # fmt: skip


def refuse_many_quarantined(fate: Mapping[str, str], records: pa.Table, spec: IntakeSpec) -> None:
    bad = {image_id: status for image_id, status in fate.items() if status != OK}
    if len(bad) <= spec.audit.max_quarantined * len(fate):
        return
    uris = by_id(records, rows.URI)
    reasons = Counter(map(reason_of, bad.values()))
    kinds = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    some = "; ".join(
        f"{uris[image_id][:80]}: {reason}" for image_id, reason in list(bad.items())[:3]
    )
    if len(bad) > 3:
        some += f"; and {len(bad) - 3} more, which jobs/audit.py lists"
    raise DataError(
        f"{len(bad):,} of {len(fate):,} files cannot be used ({kinds}): {some}."
        f" Fix them, leave them out with reader.exclude, or raise audit.max_quarantined (now"
        f" {spec.audit.max_quarantined:g})"
    )


def write_splits(
    context: Context, spec: IntakeSpec, index: pa.Table, decoded_keys: list[str]
) -> tuple[list[Part], dict[str, dict[str, int]]]:
    """Write the images of each split; one pass over the decoded data, memory bounded by one
    part."""
    schema = rows.images_schema(spec.tasks)
    split_of, group_of = by_id(index, rows.SPLIT), by_id(index, rows.GROUP_ID)
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
        ids = table[rows.IMAGE_ID].to_pylist()
        for split in rows.SPLITS:
            mask = [split_of.get(image_id) == split for image_id in ids]
            if not any(mask):
                continue
            selected = table.filter(pa.array(mask))
            selected = replace_column(selected, rows.SPLIT, [split] * selected.num_rows)
            groups = [group_of[image_id] for image_id in selected[rows.IMAGE_ID].to_pylist()]
            selected = replace_column(selected, rows.GROUP_ID, groups)
            counts[split].update(selected[rows.label_column(spec.task)].to_pylist())
            pending[split].append(selected.select(schema.names).cast(schema))
            if sum(piece.nbytes for piece in pending[split]) > PART_BYTES:
                flush(split)
    for split in rows.SPLITS:
        flush(split)
    return parts, {split: dict(sorted(counter.items())) for split, counter in counts.items()}


def fates_table(
    records: pa.Table, fate: Mapping[str, str], index: pa.Table, digests: Mapping[str, str]
) -> pa.Table:
    """Every record that the reader listed, with its split or the reason why it is not used, and the
    digest of its file."""
    split = by_id(index, rows.SPLIT)
    ids = records[rows.IMAGE_ID].to_pylist()
    records = replace_column(records, rows.SPLIT, [split.get(image_id) for image_id in ids])
    for name, value_of in ((rows.STATUS, fate), (rows.FILE_SHA256, digests)):
        values = pa.array([value_of.get(image_id) for image_id in ids], pa.string())
        records = records.append_column(name, values)
    return records


def leaks_table(leaks: Sequence[Leak]) -> pa.Table:
    names = ("kind", "first", "first_split", "second", "second_split", "detail")
    return pa.table(
        {name: pa.array([getattr(leak, name) for leak in leaks], pa.string()) for name in names}
    )
