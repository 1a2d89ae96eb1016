"""Audit: one page of problems in the data, before any training.

The audit stops nothing and changes nothing. It reports what ingest would refuse, and problems that
ingest cannot detect. Files are read again each time, because a fix may change them in place;
vectors of unchanged images are reused.

Label errors and outliers are searched in train and val only: correcting test labels where a
classifier disagrees would bias the test set towards that classifier.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from engine.context import Context, Output
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.registry import kind_of, name_of
from engine.core.shards import ShardSet
from engine.core.step import Step
from engine.core.store import Store
from engine.readers import Reader, ReaderSpec
from engine.report.audit import Look, page, shown_images
from engine.results.audit import Finding
from engine.results.data import AuditResult
from engine.stages.cells import read_records
from engine.stages.findings import AuditSpec, Findings, counts, group_counts
from engine.stages.intake import DECODED, EMBEDDED, decode_records
from engine.stages.records import decoding_notices, record_notices, record_problems
from engine.steps import StepKind


class Audit(StepKind[AuditSpec]):
    version = 2
    summary = "find problems in the data"
    scratch = (DECODED,)

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(AuditSpec)
        reader = kind_of("readers", spec.reader)(spec.reader)
        records = read_records(reader, spec.task, spec.cells)
        work = Findings(context, spec, list(record_problems(records, spec)), reader.warnings())
        ids = records[rows.IMAGE_ID].to_pylist()
        first = dict(zip(reversed(ids), range(len(ids) - 1, -1, -1), strict=True))
        if len(first) < len(ids):
            records = records.take(sorted(first.values()))
        work.warnings += record_notices(records, reader, spec.task)
        stored = ShardSet(context.store, context.store.join(context.prefix, EMBEDDED))
        earlier = stored.parts()
        with work.timed("decode"):
            intake = decode_records(context, reader, records, spec, replace=True)
        work.warnings += decoding_notices(intake.index, spec.preprocess)
        work.broken(records, intake)
        work.split(intake.index)
        work.equal()
        vectors = work.embedded(intake)
        if vectors is not None:
            work.labels(vectors)
            work.outliers(vectors)
        work.sizes()
        work.small_classes()
        look = look_of(work, len(records), reader)
        wanted = shown_images(look)
        with work.timed("page"):
            look.pictures.update(pictures(context.store, intake.keys, wanted))
            html = page(look).encode()
        parts = [
            context.file("audit", "html", html, file="audit.html"),
            context.table("findings", findings_table(look.findings), table="findings"),
        ]
        # The next audit reuses the vectors, except those of deleted files. Those of an audit that
        # runs at the same time are newer than the start of this one.
        stored.remove(earlier - {part.key for part in work.embedded_in})
        counts = Counter(finding.kind for finding in look.findings)
        context.notes["timings"] = {name: round(value, 1) for name, value in work.seconds.items()}
        return Output(
            parts, len(records),
            AuditResult(
                headline=f"{len(records):,} images, {len(look.findings):,} findings",
                found=dict(sorted(counts.items())), must=look.musts,
                warnings=look.warnings, near_limit=look.near_limit,
            ),
        )  # fmt: skip

    def outdated(self, step: Step, manifest: Manifest, store: Store) -> str | None:
        return "an audit reads the files again each time"

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        own = store.step(step.kind, step.key)
        return [store.join(own, DECODED), store.join(own, EMBEDDED)]


def look_of(work: Findings, records: int, reader: Reader[ReaderSpec]) -> Look:
    """The content of the page."""
    spec = work.spec
    return Look(
        name=spec.name, images=records, task=spec.task, findings=work.findings,
        problems=work.problems, warnings=work.warnings, near_limit=work.near_limit,
        counts=counts(work.label, work.of), distinct=work.distinct(),
        groups=group_counts(work.label, work.groups), grouped=spec.split.group == "column",
        carved=work.carved, max_quarantined=spec.audit.max_quarantined,
        broken_share=work.broken_share, on_leak=spec.audit.on_leak, agreed=work.agreed,
        wrong_labels=work.wrong_labels, embedder=name_of(spec.embedder),
        size=spec.preprocess.size, ledger=reader.ledger(), confounding=work.confounding,
    )  # fmt: skip


def pictures(store: Store, keys: list[str], wanted: set[str]) -> dict[str, bytes]:
    """The encoded bytes of the images in `wanted`, by id."""
    picture_of: dict[str, bytes] = {}
    ids = pa.array(sorted(wanted), pa.string())
    for table in store.tables(keys, [rows.IMAGE_ID, rows.IMAGE]) if wanted else ():
        selected = table.filter(pc.is_in(table[rows.IMAGE_ID], ids))
        encoded = pc.struct_field(selected[rows.IMAGE], "bytes").to_pylist()
        picture_of |= dict(zip(selected[rows.IMAGE_ID].to_pylist(), encoded, strict=True))
    return picture_of


def findings_table(findings: list[Finding]) -> pa.Table:
    """A row for each finding."""
    names = {name: pa.float32() if name == "score" else pa.string()
             for name in Finding.__dataclass_fields__}  # fmt: skip
    return pa.table({name: pa.array([getattr(found, name) for found in findings], kind)
                     for name, kind in names.items()})  # fmt: skip
