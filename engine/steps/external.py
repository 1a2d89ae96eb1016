"""External: a test set from elsewhere, such as another hospital or device.

Its images pass the study's preprocessing and are opened with test, once, for the same classifiers.
Nothing is chosen or decided by it. Pictures that are also in the study's own data are left out.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa

from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Manifest
from engine.core.notice import Notice
from engine.core.registry import kind_of
from engine.core.shards import OK, reason_of
from engine.core.step import Step
from engine.core.store import Store
from engine.data.dataset import by_id, remove_duplicates, replace_column, without
from engine.results.data import ExternalResult, IngestResult
from engine.stages.identity import place_of, write_place
from engine.stages.intake import DECODED, decode_records
from engine.stages.records import IntakeSpec
from engine.steps import StepKind
from engine.steps.ingest import fates_table, refuse_many_quarantined, write_splits


class ExternalSpec(IntakeSpec):
    """How the files of an external test set are read."""

    # Two sets may be read alike.
    name: str


class External(StepKind[ExternalSpec]):
    version = 1
    summary = "decode a test set from elsewhere"
    scratch = (DECODED,)

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(ExternalSpec)
        reader = kind_of("readers", spec.reader)(spec.reader)
        records = reader.chosen(spec.task)
        check_labels(records, spec, context.result("ingest", IngestResult).classes)
        intake = decode_records(context, reader, records, spec)
        fate = intake.fate
        refuse_many_quarantined(fate, records, spec)
        digests = by_id(intake.index, rows.FILE_SHA256)
        index = remove_duplicates(
            replace_column(intake.index, rows.SPLIT, ["test"] * intake.index.num_rows),
            spec.tasks, fate, spec.audit.on_contradiction == "drop",
        )  # fmt: skip
        groups = index[rows.GROUP_ID].to_pylist()
        if spec.split.group == "none" or None in groups:
            index = replace_column(index, rows.GROUP_ID, index[rows.IMAGE_ID].to_pylist())
        known = own_pictures(context.store, context.inputs["ingest"])
        pictures = by_id(index, rows.PIXEL_SHA256)
        seen = {image_id: "seen" for image_id, digest in pictures.items() if digest in known}
        fate.update(seen)
        index = without(index, seen)
        if not index.num_rows:
            raise DataError(
                f"evaluate.external.{spec.name}: no image is left; all are unusable, or in the"
                " study's own data"
            )
        parts, counts = write_splits(context, spec, index, intake.keys)
        warnings = [Notice.of("external_seen", images=len(seen))] if seen else []
        if spec.split.group == "column" and None in groups:
            warnings.append(Notice.of("no_groups"))
        context.warn([*reader.warnings(), *warnings])
        write_place(context.store, context.step, place_of(reader))
        table = fates_table(records, fate, index, digests)
        return Output(
            [*parts, context.table("records", table, table="records")], index.num_rows,
            ExternalResult(
                headline=f"{index.num_rows:,} images of {len(counts['test'])} classes",
                warnings=[*reader.warnings(), *warnings], counts=counts["test"],
                set_aside=dict(Counter(reason_of(status) for status in fate.values()
                                       if status != OK)),
                data=dict(reader.fingerprint()),
            ),
        )  # fmt: skip

    def outdated(self, step: Step, manifest: Manifest, store: Store) -> str | None:
        spec = step.spec_as(ExternalSpec)
        try:
            fingerprint = kind_of("readers", spec.reader)(spec.reader).fingerprint()
        except DataError:
            return None  # the originals are gone; the decoded copy remains valid
        if dict(fingerprint) == ExternalResult.of(manifest).data:
            return None
        raise DataError(
            f"{step.label}: the data changed since it was read; restore it, or read it again with"
            f" --discard {step.label}"
        )

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        return [store.join(store.step(step.kind, step.key), DECODED)]


def check_labels(records: pa.Table, spec: ExternalSpec, classes: tuple[str, ...]) -> None:
    """Raise `DataError` for a missing label, and for a class that the study does not have."""
    labels = records[rows.label_column(spec.task)].to_pylist()
    uris = records[rows.URI].to_pylist()
    for uri, label in zip(uris, labels, strict=True):
        if label is None:
            raise DataError(f"evaluate.external.{spec.name}: {uri} has no label")
        if label not in classes:
            raise DataError(
                f"evaluate.external.{spec.name}: {uri} is {label!r}, which is not a class of the"
                f" study ({', '.join(classes)[:200]}); name its classes in the reader's field"
                " `classes`, or rename them"
            )


def own_pictures(store: Store, ingest: Manifest) -> set[str]:
    """The pixel digests of all of the study's own images."""
    keys = [key for split in rows.SPLITS for key in ingest.keys(split=split)]
    tables = store.tables(keys, [rows.PIXEL_SHA256])
    return set(pa.concat_tables(tables)[rows.PIXEL_SHA256].to_pylist())
