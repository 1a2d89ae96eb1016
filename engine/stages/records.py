"""The reader's records before any image is opened: problems that stop a study, and notices."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core import rows
from engine.core.errors import DataError
from engine.core.labels import Cells
from engine.core.names import check_class_names
from engine.core.notice import Notice
from engine.core.rows import TaskKind
from engine.core.shards import OK, reason_of
from engine.core.spec import Spec
from engine.data.dataset import assign_splits
from engine.data.images import Preprocess
from engine.data.leaks import SeenInTrain
from engine.data.splits import LEAST_IMAGES
from engine.readers import Reader, ReaderSpec
from engine.settings import Audit, ReaderField, Split
from engine.stages.cells import counts_by_split, labels_by_task, names_by_image

# The share of a score that one image may carry without a warning.
_WEIGHT = 0.03
# The share of a picture that cropping may leave out (a quarter of a 4:3 photograph), and the share
# of the pictures that may lose more, without a warning.
_CUT, _CUT_IN = 0.26, 0.01
# Class names in lower case that programs write for a missing value.
_NO_VALUE = ("nan", "na", "n/a", "<na>", "nat", "null")


class IntakeSpec(Spec):
    """How the user's files are read."""

    later_fields: ClassVar[tuple[str, ...]] = ("cells",)

    reader: ReaderField
    task: str
    tasks: dict[str, TaskKind]
    preprocess: Preprocess
    split: Split
    audit: Audit
    seed: int
    # How labels become cells, for a study with several labels per image; `task` is then CELL.
    cells: Cells | None = None


def record_problems(records: pa.Table, spec: IntakeSpec) -> Iterator[str]:
    """Problems of the reader's records that stop a study before any compute, a line each."""
    ids = records[rows.IMAGE_ID].to_pylist()
    uris = records[rows.URI].to_pylist()
    if not ids:
        yield "reader.exclude, reader.classes and reader.unlabelled leave no image; change one"
        return
    if len(set(ids)) < len(ids):
        places: dict[str, list[str]] = defaultdict(list)
        for uri, image_id in zip(uris, ids, strict=True):
            places[image_id].append(uri)
        repeated = {image_id: of for image_id, of in places.items() if len(of) > 1}
        files = [of[0] for of in repeated.values() if len(set(of)) == 1]
        others = [name for name, of in repeated.items() if len(set(of)) > 1]
        if files:
            most = max(len(of) for of in repeated.values() if len(set(of)) == 1)
            yield (
                f"{listed(files)} {'is' if len(files) == 1 else 'are'} listed"
                f" {'twice' if most == 2 else f'up to {most} times'}; keep one entry of each file"
            )
        if others:
            first, second = list(dict.fromkeys(repeated[others[0]]))[:2]
            yield (
                f"the id {others[0]!r} appears {len(repeated[others[0]])} times (first: {first},"
                f" {second}){f', as {len(others) - 1:,} more do' if len(others) > 1 else ''}; make"
                " ids unique"
            )
    without_group = _missing(records[rows.GROUP_ID], uris)
    if spec.split.group == "column" and len(without_group) == len(ids):
        yield (
            f"split.group: {len(ids):,} images have no group; name the reader's group column, or"
            " set split.group to none if all images are independent"
        )
    elif spec.split.group == "column" and without_group:
        yield (
            f"split.group: {len(without_group):,} of {len(ids):,} images have no group"
            f" ({listed(without_group)}); give each one, or leave them out by reader.exclude"
        )
    labels, named_alike = records[rows.label_column(spec.task)], False
    for task in spec.tasks:
        values = records[rows.label_column(task)]
        flat = pc.list_flatten(values) if spec.tasks[task] == "multi" else values
        names = (name for name in pc.unique(flat).to_pylist() if name is not None)
        try:
            check_class_names(names, task)
        except DataError as error:
            named_alike = True
            yield str(error)
    if spec.tasks[spec.task] == "multi":
        yield (
            f"task: {spec.task} has several labels per image; choose a task with one label per"
            " image"
        )
        return
    if labels.null_count and spec.cells is not None:
        yield (
            f"tasks: {labels.null_count:,} of {len(ids):,} images have no label in any task"
            f" ({listed(_missing(labels, uris))}); set reader.unlabelled to drop, or write a"
            " word where no label applies and name it in tasks.<task>.none"
        )
    elif labels.null_count:
        yield (
            f"label.{spec.task}: {labels.null_count:,} of {len(ids):,} images have no label"
            f" ({listed(_missing(labels, uris))}); fill it in, or set reader.unlabelled to"
            " drop"
        )
    if named_alike:
        return  # too few images of a class may be a consequence
    counts = Counter(name for names in names_by_image(records, spec.task, spec.cells)
                     for name in names)  # fmt: skip
    alone = [name for name, kind, classes in classes_by_task(records, spec)
             if kind == "single" and len(classes) < 2]  # fmt: skip
    if alone and spec.cells is not None:
        yield f"tasks.{alone[0]}: there is one class alone; a task needs two, leave it out"
    elif len(counts) < 2:
        only = f"one class alone ({next(iter(counts))!r})" if counts else "no label at all"
        yield f"label.{spec.task}: there is {only}; a study needs two"
    for name, count in sorted(counts.items()):
        if count < 2:
            yield (
                f"label.{spec.task}: the class {name!r} has one image; it cannot be split, add"
                " images or leave it out"
            )
    classes = set(labels.to_pylist()) - {None}
    unknown = sorted(set(spec.split.train_limit) - classes)
    if unknown:
        yield (
            f"split.train_limit: unknown class {unknown[0]!r}; choose from"
            f" {', '.join(sorted(classes))[:200]}"
        )
    if len(counts) >= 2 and min(counts.values()) >= 2:
        yield from split_problems(records, spec)


def classes_by_task(
    records: pa.Table, spec: IntakeSpec
) -> Iterator[tuple[str, TaskKind, set[str]]]:
    """The labels of each task of a study with several labels per image."""
    if spec.cells is None:
        return
    for name, labels in labels_by_task(records, spec.cells).items():
        values = {one for value in labels if value is not None
                  for one in ((value,) if isinstance(value, str) else value)}  # fmt: skip
        yield name, spec.tasks[name], values


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _missing(column: pa.ChunkedArray, uris: Sequence[str]) -> list[str]:
    """The uris of the rows without a value."""
    return [uri for uri, null in zip(uris, column.is_null().to_pylist(), strict=True) if null]


def split_problems(records: pa.Table, spec: IntakeSpec) -> Iterator[str]:
    """Classes that cannot have images in every split, by the table alone: removing duplicates and
    broken files only makes it worse."""
    labels = records[rows.label_column(spec.task)]
    grouped = spec.split.group == "column"
    if labels.null_count or (grouped and records[rows.GROUP_ID].null_count):
        return  # reported already
    names_of = names_by_image(records, spec.task, spec.cells)
    index, carved = assign_splits(
        records, names_of, {"val": spec.split.val, "test": spec.split.test}, grouped, spec.seed
    )
    counts = counts_by_split(index, spec.task, spec.cells)
    problems = list(thin_classes(counts))
    if problems and grouped and carved:
        groups: dict[str, set[str]] = defaultdict(set)
        for names, group in zip(names_of, index[rows.GROUP_ID].to_pylist(), strict=True):
            for name in names:
                groups[name].add(group)
        needed = 1 + len(carved)
        few = [name for name in sorted(groups) if len(groups[name]) < needed]
        problems = [
            f"the class {name!r} has images in {len(groups[name])} groups, but {needed} splits need"
            " one each: add groups, or leave the class out"
            for name in few
        ] or problems
    yield from problems[:1]


def thin_classes(counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """A problem for each class with too few images in a split."""
    classes = sorted({name for by_class in counts.values() for name in by_class})
    for split, needed in LEAST_IMAGES.items():
        for name in classes:
            count = counts[split].get(name, 0)
            if count < needed:
                images = "1 image" if count == 1 else f"{count} images"
                yield (
                    f"the class {name!r} has {images} in {split}, it needs {needed}:"
                    " add images, leave the class out, or change the split"
                )


def small_class_notices(counts: Mapping[str, Mapping[str, int]]) -> list[Notice]:
    """For val and test, the class of which one image weighs most in a score that weighs classes
    equally, if that is more than a few percent. counts: images by class and split."""
    notices = []
    for split in ("val", "test"):
        images = {name: by_split.get(split, 0) for name, by_split in counts.items()}
        images = {name: count for name, count in images.items() if count}
        # Of n images in one of k classes, each is 1 / (k n) of the score.
        small = [name for name in images if 1 / (len(images) * images[name]) > _WEIGHT]
        if not small:
            continue
        name = min(small, key=lambda name: (images[name], name))
        notices.append(
            Notice.of(
                "small_class", split=split, name=name, images=images[name], classes=len(small),
                percent=round(100 / (len(images) * images[name])),
            )
        )  # fmt: skip
    return notices


def seen_notices(seen: Mapping[str, SeenInTrain], *, resolved: bool = False) -> list[Notice]:
    """Pictures of val and test that are in train too. resolved: they were, until now."""
    notices = []
    for split, counts in seen.items():
        in_train = counts.equal + counts.near
        if in_train and resolved:
            notices.append(
                Notice.of("seen_before", split=split, seen=in_train, pictures=counts.pictures,
                          equal=counts.equal, near=counts.near)
            )  # fmt: skip
        elif in_train:
            notices.append(
                Notice.of("seen_in_train", split=split, seen=in_train, pictures=counts.pictures,
                          equal=counts.equal, near=counts.near)
            )  # fmt: skip
    return notices


def record_notices(records: pa.Table, reader: Reader[ReaderSpec], task: str) -> list[Notice]:
    """What a user should know of the listed files, classes and groups."""
    notices, ledger = [], reader.ledger()
    if reader.excluded:
        notices.append(Notice.of("excluded", images=reader.excluded))
    if reader.trimmed:
        notices.append(
            Notice.of("names_trimmed", images=len(reader.trimmed), first=reader.trimmed[0])
        )
    if ledger is not None and ledger.not_read:
        reasons = ", ".join(
            f"{count:,} {reason}" + (f" ({ledger.first[reason]})" if reason in ledger.first else "")
            for reason, count in ledger.skipped.items()
        )
        notices.append(
            Notice.of("files_skipped", skipped=ledger.not_read, files=ledger.files, reasons=reasons)
        )
    labels = records[rows.label_column(task)]
    if pa.types.is_string(labels.type):
        counts = Counter(label for label in labels.to_pylist() if label is not None)
        notices += [
            Notice.of("no_value_names", name=name, images=count)
            for name, count in sorted(counts.items())
            if name.casefold() in _NO_VALUE
        ]
        notices += [
            Notice.of("zeros_differ", first=first, second=second)
            for first, second in _same_when(sorted(counts), _as_number)
        ]
    groups = sorted({group for group in records[rows.GROUP_ID].to_pylist() if group is not None})
    if pairs := _same_when(groups, lambda name: _as_number(" ".join(name.casefold().split()))):
        first, second = pairs[0]
        notices.append(Notice.of("groups_differ", pairs=len(pairs), first=first, second=second))
    return notices


def _same_when(names: Iterable[str], form: Callable[[str], str]) -> list[tuple[str, str]]:
    """Pairs of different names with the same form, each name with the first of that form."""
    first: dict[str, str] = {}
    pairs = ((first.setdefault(form(name), name), name) for name in names)
    return [(one, name) for one, name in pairs if one != name]


def _as_number(name: str) -> str:
    """The value of a name that is a number, so that 1, 01 and 1.0 are equal; else the name."""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", name):
        return name
    whole, _, decimals = name.partition(".")
    return ".".join(filter(None, [whole.lstrip("0") or "0", decimals.rstrip("0")]))


def decoding_notices(index: pa.Table, preprocess: Preprocess) -> list[Notice]:
    """What decoding loses or changes: frames after the first, bits, the ends of long pictures, and
    how they are turned."""
    several = index.filter(pc.greater(index[rows.FRAMES], 1))[rows.URI].to_pylist()
    frames = [Notice.of("frames_unused", files=len(several), first=several[0])] if several else []
    cut = _cut_notice(index) if preprocess.fit == "crop" else []
    return frames + _bits_notice(index) + _turned_notice(index) + cut


def _turned_notice(index: pa.Table) -> list[Notice]:
    """A notice of the pictures that EXIF turns: viewers that do not, and labels drawn on them,
    differ."""
    turned = [
        uri
        for uri, how in zip(
            index[rows.URI].to_pylist(), index[rows.ACQUISITION].to_pylist(), strict=True
        )
        if "turned" in dict(how or ())
    ]
    return [Notice.of("turned", images=len(turned), first=turned[0])] if turned else []


def _cut_notice(index: pa.Table) -> list[Notice]:
    """A notice if the central square leaves out much of more than a few pictures."""
    sides = np.asarray([index[rows.WIDTH].to_pylist(), index[rows.HEIGHT].to_pylist()], float)
    if not sides.size:
        return []
    lost = np.flatnonzero(1 - sides.min(0) / sides.max(0) > _CUT)
    if len(lost) <= _CUT_IN * index.num_rows:
        return []
    return [
        Notice.of(
            "cut_away", images=len(lost), all=index.num_rows, percent=round(100 * _CUT),
            first=index[rows.URI][int(lost[0])].as_py(),
        )
    ]  # fmt: skip


def _bits_notice(index: pa.Table) -> list[Notice]:
    """A notice if all 16-bit pictures leave upper bits unused."""
    bits = index[rows.BITS].drop_null()
    used = pc.max(bits).as_py() if len(bits) else 16
    if used >= 16:
        return []
    most = 2**used - 1
    return [Notice.of("bits_unused", images=len(bits), bits=used, top=most >> 8, most=most)]


def set_aside_notice(
    records: pa.Table, fate: Mapping[str, str], task: str, most: float
) -> list[Notice]:
    """A notice of the images that cannot be used, with the classes that lose more than the share
    `most` of theirs."""
    ids = records[rows.IMAGE_ID].to_pylist()
    bad = [row for row, image_id in enumerate(ids) if fate[image_id] != OK]
    if not bad:
        return []
    labels = records[rows.label_column(task)].to_pylist()
    every, lost = Counter(labels), Counter(labels[row] for row in bad)
    hit = [f"{count:,} of {every[name]:,} of {name!r}" for name, count in lost.most_common()
           if count > most * every[name]]  # fmt: skip
    reasons = Counter(reason_of(fate[ids[row]]) for row in bad)
    return [
        Notice.of(
            "set_aside", images=len(bad), all=len(ids), first=records[rows.URI][bad[0]].as_py(),
            reasons=", ".join(f"{count:,} {why}" for why, count in reasons.most_common()),
            classes=f"; among them {listed(hit)}" if hit else "",
        )
    ]  # fmt: skip


def check_records(records: pa.Table, spec: IntakeSpec) -> None:
    """Raise `DataError` on the first problem."""
    for problem in record_problems(records, spec):
        raise DataError(problem)
