"""The augmented set of a study, in a form that other tools open.

What is exported is an arm of the comparison (`ddpm x1`), or a generator's label for the real images
and all of its images that were kept, or `real`. Synthetic images are in the training split alone.
`provenance.json` is written last: a folder without it is not whole.
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
from engine.core import rows
from engine.core.errors import DataError, StudyError
from engine.core.manifest import Manifest
from engine.core.progress import Bar
from engine.core.registry import available, resolve
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.execute import inspect
from engine.exporters import FIELDS, Exporter, Item
from engine.plan import named, plan
from engine.readers import image_ids
from engine.results.data import IngestResult
from engine.results.images import CurateResult
from engine.steps.ingest import IngestSpec
from engine.steps.search import SearchSpec
from engine.steps.train import generated_images
from engine.study import Study

PROVENANCE = "provenance.json"


@dataclass
class Selection:
    """What is exported. train: label and weight of each training image by id, real and synthetic;
    None: all real images, as they are labelled."""

    ingest: Manifest
    task: str
    # By generator, all that it made.
    generated: dict[str, Manifest] = field(default_factory=dict)
    train: dict[str, tuple[str, float]] | None = None
    read: dict[str, str] = field(default_factory=dict)


def export(
    study: Study, store: Store, target: Store, what: str, form: str, splits: Sequence[str]
) -> dict[str, Any]:
    """Write the images; returns what `provenance.json` says. Raises `StudyError` where there is no
    such arm or form, where it is not computed yet, and where the target is not empty."""
    if form not in (forms := available("exporters")):
        raise StudyError(f"--format {form}: there are {', '.join(forms)}")
    splits = list(dict.fromkeys(splits))
    if unknown := [split for split in splits if split not in rows.SPLITS]:
        raise StudyError(f"--splits: {unknown[0]!r} is none of {', '.join(rows.SPLITS)}")
    if target.listing(""):
        raise StudyError(f"--to {target.url}: holds files already; name an empty folder")
    chosen = select(study, store, what)
    ingest = IngestResult.of(chosen.ingest)
    exporter: Exporter = resolve("exporters", form)(target, ingest.classes)
    counts: Counter[tuple[str, str, str]] = Counter()
    total = sum(sum(ingest.counts[split].values()) for split in splits)
    if chosen.train is not None and "train" in splits:
        total += len(chosen.train) - sum(ingest.train.values())
    with Bar("export", total, "images") as bar:
        for item in items(store, chosen, splits):
            exporter.add(item)
            counts[item.split, item.label, str(item.fields[rows.SOURCE])] += 1
            bar.advance(1)
        exporter.close()
    told = provenance(study, what, form, chosen, counts)
    target.put("README.md", read_me(told).encode())
    target.put(PROVENANCE, json.dumps(told, indent=1, ensure_ascii=False).encode())
    return told


def select(study: Study, store: Store, what: str) -> Selection:
    """The images of an arm, of a generator, or the real ones."""
    steps = plan(study)
    first = named(steps, "ingest")[0]
    real = Selection(done(store, first), first.spec_as(IngestSpec).task)
    real.read["ingest"] = real.ingest.digest
    if what == "real":
        return real
    if what in study.generators:
        return _all_kept(steps, store, what, real)
    arms = [arm for step in steps if step.kind == "search"
            for arm in step.spec_as(SearchSpec).arms if arm.budget == 1]  # fmt: skip
    arm = next((arm for arm in arms if arm.name == what), None)
    if arm is None:
        names = ["real", *study.generators, *(arm.name for arm in arms)]
        raise StudyError(f"--arm {what!r}: there are {', '.join(dict.fromkeys(names))}")
    # Of several generator fits the first: an arm's images are a sample of what it stands for.
    step = next(step for step in steps if step.label == arm.mixes[0])
    mix = done(store, step)
    real.read["mix"] = mix.digest
    for label in arm.generators:
        refuse_stopped(label, done(store, step.inputs[f"curate.{label}"]))
        real.generated[label] = done(store, step.inputs[f"generate.{label}"])
        real.read[f"generate.{label}"] = real.generated[label].digest
    labels = _labels(store, mix.keys(table="members"), rows.label_column(real.task))
    weights = _labels(store, mix.keys(table="members"), rows.WEIGHT)
    real.train = {image_id: (label, weights[image_id]) for image_id, label in labels.items()}
    return real


def _labels(store: Store, keys: list[str], column: str) -> dict[str, Any]:
    """A column by image id."""
    found: dict[str, Any] = {}
    for table in store.tables(keys, [rows.IMAGE_ID, column]):
        found |= dict(zip(table[rows.IMAGE_ID].to_pylist(), table[column].to_pylist(), strict=True))
    return found


def _all_kept(steps: list[Step], store: Store, label: str, real: Selection) -> Selection:
    """The real training images and all of a generator's that were kept; of a study without a
    classifier, all."""

    def last(kind: str) -> Manifest | None:
        # Of several fits the first one's.
        rounds = [
            step for step in steps
            if (step.kind, step.subject.name, step.subject.fit) == (kind, label, 0)
            and step.subject.filtered
        ]  # fmt: skip
        return done(store, rounds[-1]) if rounds else None

    column = rows.label_column(real.task)
    generate = last("generate")
    assert generate is not None, "every generator generates"
    real.generated[label] = generate
    real.read[f"generate.{label}"] = generate.digest
    labels = _labels(store, real.ingest.keys(split="train"), column)
    if curated := last("curate"):
        real.read["curate"] = curated.digest
        refuse_stopped(label, curated)
        for table in store.tables(curated.keys(table="curated")):
            held = table.filter(table[rows.KEPT])
            ids, names = held[rows.IMAGE_ID].to_pylist(), held[rows.LABEL].to_pylist()
            labels |= dict(zip(ids, names, strict=True))
    else:
        labels |= _labels(store, generated_images(generate), column)
    real.train = {image_id: (name, 1.0) for image_id, name in labels.items()}
    return real


def refuse_stopped(label: str, curated: Manifest) -> None:
    """Raises `DataError` where a filter says that a generator's images must not go out."""
    for report in CurateResult.of(curated).filters:
        if report.stops:
            raise DataError(
                f"{label} is not exported: {report.stops}, and curate.filters {report.name} says"
                " strict: true; train the generator on more images or for fewer steps, or say"
                " strict: false knowingly"
            )


def done(store: Store, step: Step) -> Manifest:
    """The manifest of a step. Raises `StudyError` where it is not computed, or from other results
    than those that stand."""
    status = inspect(upstream([step]), store)[-1]
    if status.manifest is None or status.state != "done":
        raise StudyError(
            f"{step.label} is not done ({status.why}); run jobs/run_study.py with this study first"
        )
    return status.manifest


def items(store: Store, chosen: Selection, splits: Sequence[str]) -> Iterator[Item]:
    """Every image of the selection, split after split."""
    column = rows.label_column(chosen.task)
    for split in splits:
        for table in store.tables(chosen.ingest.keys(split=split)):
            for row in _rows_of(table):
                label, weight = row[column], None
                if split == "train" and chosen.train is not None:
                    # An arm may leave real images out.
                    if row[rows.IMAGE_ID] not in chosen.train:
                        continue
                    label, weight = chosen.train[row[rows.IMAGE_ID]]
                yield _item(row, label, split, "real", weight)
        if split != "train" or chosen.train is None:
            continue
        for name, generated in chosen.generated.items():
            keys = [part.key for part in generated.parts if "label" in part.tags]
            for table in store.tables(keys):
                for row in _rows_of(table):
                    if row[rows.IMAGE_ID] in chosen.train:
                        label, weight = chosen.train[row[rows.IMAGE_ID]]
                        yield _item(row, label, split, name, weight)


def _rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def _item(
    row: Mapping[str, Any], label: str, split: str, source: str, weight: float | None
) -> Item:
    known = {name: row.get(name) for name in FIELDS}
    known |= {rows.SPLIT: split, rows.SOURCE: source, rows.WEIGHT: weight}
    image_id = row[rows.IMAGE_ID]
    image = row[rows.IMAGE]
    # An id may come from a user's table; what is a file's name never does.
    (name,) = image_ids([image_id])
    extension = PurePosixPath(image["path"]).suffix
    return Item(image["bytes"], name, extension, image_id, label, known)


def provenance(
    study: Study, what: str, form: str, chosen: Selection,
    counts: Mapping[tuple[str, str, str], int],
) -> dict[str, Any]:  # fmt: skip
    by_split: dict[str, dict[str, dict[str, int]]] = {}
    for (split, label, source), count in sorted(counts.items()):
        by_split.setdefault(split, {}).setdefault(label, {})[source] = count
    ingest = IngestResult.of(chosen.ingest)
    return {
        "study": study.model_dump(mode="json"), "arm": what, "format": form,
        "licence": study.licence, "classes": list(ingest.classes),
        "synthetic": "Images whose source is not real were generated by a machine (IPTC"
        " digital source type trainedAlgorithmicMedia); they are no photographs of anything.",
        "images": by_split, "manifests": chosen.read,
        "data": ingest.data,
        "engine": __version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def read_me(told: Mapping[str, Any]) -> str:
    """What a person reads who finds the folder."""
    lines = [f"# {told['study']['name']}: {told['arm']}", "", told["synthetic"], "",
             "| split | class | source | images |", "|---|---|---|---|"]  # fmt: skip
    for split, by_class in told["images"].items():
        for label, by_source in by_class.items():
            shown = label.replace("|", "\\|").replace("<", "&lt;")
            lines += [f"| {split} | {shown} | {source} | {count} |"
                      for source, count in by_source.items()]  # fmt: skip
    lines += [
        "", "Synthetic images stand in train alone. Column `source` says which they are;"
        f" `{PROVENANCE}` has the study, digests of what they were made from, and versions.", "",
        f"Licence: {told['licence'] or 'none was named in the study; that of the originals holds'}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
