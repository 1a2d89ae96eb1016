"""Export of the augmented set of a study, in a format that other tools open.

An export contains an arm of the comparison (`ddpm x1`), or the real images and all kept images of
one generator (its label), or the real images (`real`). Synthetic images are in the training split
only. `provenance.json` is written last: an export without it is incomplete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from engine import __version__
from engine.comparison.arms import SearchSpec
from engine.core import rows
from engine.core.errors import DataError, StudyError
from engine.core.manifest import Manifest
from engine.core.progress import Bar
from engine.core.registry import available, resolve
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.data.dataset import by_id, generated_images
from engine.execute import inspect
from engine.exporters import FIELDS, Exporter, Item
from engine.plan import data_set, plan
from engine.plan_labels import labelling_of
from engine.readers import image_ids
from engine.results.data import IngestResult
from engine.results.images import CurateResult
from engine.study import Study
from engine.wording import notice_in_words

PROVENANCE = "provenance.json"


@dataclass
class Selection:
    """The images to export.

    generated: manifests of all generated images, by generator. train: label and weight of each
    training image by id, real and synthetic; None: all real images with their own labels. digests:
    of the manifests that were read, by step.
    """

    ingest: Manifest
    task: str
    generated: dict[str, Manifest] = field(default_factory=dict)
    train: dict[str, tuple[str, float]] | None = None
    digests: dict[str, str] = field(default_factory=dict)


def export(
    study: Study, store: Store, target: Store, what: str, form: str, splits: Sequence[str]
) -> dict[str, Any]:
    """Write the images; returns the contents of `provenance.json`.

    Raises `StudyError` if the arm or the format is unknown, the arm is not computed yet, or the
    target is not empty.
    """
    if form not in (formats := available("exporters")):
        raise StudyError(f"--format {form}: unknown format; choose from {', '.join(formats)}")
    splits = list(dict.fromkeys(splits))
    if unknown := [split for split in splits if split not in rows.SPLITS]:
        known = ", ".join(rows.SPLITS)
        raise StudyError(f"--splits: unknown split {unknown[0]!r}; choose from {known}")
    if target.listing(""):
        raise StudyError(f"--to {target.url}: is not empty; name an empty folder")
    chosen = select(study, store, what)
    ingest = IngestResult.of(chosen.ingest)
    exporter: Exporter = resolve("exporters", form)(target, ingest.classes)
    exporter.labels = {rows.label_column(name): counts.kind
                       for name, counts in ingest.labels.items()}  # fmt: skip
    counts: Counter[tuple[str, str, str]] = Counter()
    total = sum(sum(ingest.counts[split].values()) for split in splits)
    if chosen.train is not None and "train" in splits:
        total += len(chosen.train) - sum(ingest.train.values())
    with Bar("export", total, "images") as bar:
        for item in items(store, chosen, splits, ingest):
            exporter.add(item)
            counts[item.split, item.label, str(item.fields[rows.SOURCE])] += 1
            bar.advance(1)
        exporter.close()
    record = provenance(study, what, form, chosen, counts)
    target.put("README.md", read_me(record).encode())
    target.put(PROVENANCE, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return record


def select(study: Study, store: Store, what: str) -> Selection:
    """The images of an arm, of a generator, or the real images."""
    steps = plan(study)
    first = data_set(steps)
    chosen = Selection(done(store, first), labelling_of(study).task)
    chosen.digests["ingest"] = chosen.ingest.digest
    if what == "real":
        return chosen
    if what in study.generators:
        return _all_kept(steps, store, what, chosen)
    arms = [arm for step in steps if step.kind == "search"
            for arm in step.spec_as(SearchSpec).arms if arm.budget == 1]  # fmt: skip
    arm = next((arm for arm in arms if arm.name == what), None)
    if arm is None:
        names = ["real", *study.generators, *(arm.name for arm in arms)]
        known = ", ".join(dict.fromkeys(names))
        raise StudyError(f"--arm {what!r}: unknown arm; choose from {known}")
    # With several generator fits, the first is exported as a sample of the arm.
    step = next(step for step in steps if step.label == arm.mixes[0])
    mix = done(store, step)
    chosen.digests["mix"] = mix.digest
    for label in arm.generators:
        refuse_stopped(label, done(store, step.inputs[f"curate.{label}"]))
        chosen.generated[label] = done(store, step.inputs[f"generate.{label}"])
        chosen.digests[f"generate.{label}"] = chosen.generated[label].digest
    labels = _by_id(store, mix.keys(table="members"), rows.label_column(chosen.task))
    weights = _by_id(store, mix.keys(table="members"), rows.WEIGHT)
    chosen.train = {image_id: (label, weights[image_id]) for image_id, label in labels.items()}
    return chosen


def _by_id(store: Store, keys: list[str], column: str) -> dict[str, Any]:
    """The values of a column by image id."""
    values: dict[str, Any] = {}
    for table in store.tables(keys, [rows.IMAGE_ID, column]):
        values |= by_id(table, column)
    return values


def _all_kept(steps: list[Step], store: Store, label: str, chosen: Selection) -> Selection:
    """The real training images and all kept images of a generator; in a study without a classifier,
    all of its images."""

    def last(kind: str) -> Manifest | None:
        # Without a suffix for the fit: the steps of the first fit.
        rounds = [
            step for step in steps
            if (step.kind, step.subject.name, step.subject.fit) == (kind, label, 0)
            and step.subject.filtered
        ]  # fmt: skip
        return done(store, rounds[-1]) if rounds else None

    column = rows.label_column(chosen.task)
    generate = last("generate")
    assert generate is not None, "every generator generates"
    chosen.generated[label] = generate
    chosen.digests[f"generate.{label}"] = generate.digest
    labels = _by_id(store, chosen.ingest.keys(split="train"), column)
    if curated := last("curate"):
        chosen.digests["curate"] = curated.digest
        refuse_stopped(label, curated)
        for table in store.tables(curated.keys(table="curated")):
            kept = table.filter(table[rows.KEPT])
            ids, names = kept[rows.IMAGE_ID].to_pylist(), kept[rows.LABEL].to_pylist()
            labels |= dict(zip(ids, names, strict=True))
    else:
        labels |= _by_id(store, generated_images(generate), column)
    chosen.train = {image_id: (name, 1.0) for image_id, name in labels.items()}
    return chosen


def refuse_stopped(label: str, curated: Manifest) -> None:
    """Raises `DataError` if a filter forbids the export of a generator's images."""
    for report in CurateResult.of(curated).filters:
        if report.stops:
            raise DataError(
                f"{label} is not exported: {notice_in_words(report.stops)}, and curate.filters"
                f" {report.name} has strict: true; train the generator on more images or for fewer"
                " steps, or accept the copies with strict: false"
            )


def done(store: Store, step: Step) -> Manifest:
    """The manifest of a step. Raises `StudyError` if the step is not computed or is out of
    date."""
    status = inspect(upstream([step]), store)[-1]
    if status.manifest is None or status.state != "done":
        raise StudyError(
            f"{step.label} is not done ({status.why}); run jobs/run_study.py with this study first"
        )
    return status.manifest


def items(
    store: Store, chosen: Selection, splits: Sequence[str], data: IngestResult
) -> Iterator[Item]:
    """All images of the selection, split by split."""
    column = rows.label_column(chosen.task)
    for split in splits:
        for table in store.tables(chosen.ingest.keys(split=split)):
            for row in _rows_of(table):
                label, weight = row[column], None
                if split == "train" and chosen.train is not None:
                    # An arm may omit real images.
                    if row[rows.IMAGE_ID] not in chosen.train:
                        continue
                    label, weight = chosen.train[row[rows.IMAGE_ID]]
                yield _item(row, label, split, "real", weight, data)
        if split != "train" or chosen.train is None:
            continue
        for name, generated in chosen.generated.items():
            keys = [part.key for part in generated.parts if "label" in part.tags]
            for table in store.tables(keys):
                for row in _rows_of(table):
                    if row[rows.IMAGE_ID] in chosen.train:
                        label, weight = chosen.train[row[rows.IMAGE_ID]]
                        yield _item(row, label, split, name, weight, data)


def _rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def _item(
    row: Mapping[str, Any], label: str, split: str, source: str, weight: float | None,
    data: IngestResult,
) -> Item:  # fmt: skip
    fields = {name: row.get(name) for name in FIELDS}
    # A generated image has the labels of the combination that it is used as.
    labels = row if source == "real" else {
        rows.label_column(task): list(value) if isinstance(value, tuple) else value
        for task, value in data.cells.get(label, {}).items()
    }  # fmt: skip
    fields |= {name: labels.get(name) for name in map(rows.label_column, data.labels)}
    fields |= {rows.SPLIT: split, rows.SOURCE: source, rows.WEIGHT: weight}
    image_id = row[rows.IMAGE_ID]
    image = row[rows.IMAGE]
    # An id may come from a user's table, so it is hashed before it names a file.
    (name,) = image_ids([image_id])
    extension = PurePosixPath(image["path"]).suffix
    return Item(image["bytes"], name, extension, image_id, label, fields)


def provenance(
    study: Study, what: str, form: str, chosen: Selection,
    counts: Mapping[tuple[str, str, str], int],
) -> dict[str, Any]:  # fmt: skip
    """The contents of `provenance.json`. counts: images by split, class and source."""
    by_split: dict[str, dict[str, dict[str, int]]] = {}
    for (split, label, source), count in sorted(counts.items()):
        by_split.setdefault(split, {}).setdefault(label, {})[source] = count
    ingest = IngestResult.of(chosen.ingest)
    return {
        "study": study.model_dump(mode="json"), "arm": what, "format": form,
        "licence": study.licence, "classes": list(ingest.classes),
        "synthetic": "Images whose source is not real were generated by a machine (IPTC"
        " digital source type trainedAlgorithmicMedia); they are not photographs.",
        "images": by_split, "manifests": chosen.digests,
        "data": ingest.data,
        "engine": __version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def read_me(record: Mapping[str, Any]) -> str:
    """The README of an export, from its provenance."""
    lines = [f"# {record['study']['name']}: {record['arm']}", "", record["synthetic"], "",
             "| split | class | source | images |", "|---|---|---|---|"]  # fmt: skip
    for split, by_class in record["images"].items():
        for label, by_source in by_class.items():
            escaped = label.replace("|", "\\|").replace("<", "&lt;")
            lines += [f"| {split} | {escaped} | {source} | {count} |"
                      for source, count in by_source.items()]  # fmt: skip
    lines += [
        "", "Only the train split contains synthetic images. The column `source` tells them from"
        f" real ones; `{PROVENANCE}` has the study, the digests of its results, and the versions.",
        "",
        f"Licence: {record['licence'] or 'none given in the study; that of the originals applies'}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
