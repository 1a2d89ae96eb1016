"""The cells of a study with several labels per image: their column, their counts, and the names
that splits and warnings count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

import pyarrow as pa

from engine.core import rows
from engine.core.errors import DataError
from engine.core.labels import CELL, Cells, Labels, cells_of, members, plain_labels
from engine.core.names import natural
from engine.core.rows import TaskKind
from engine.readers import Reader
from engine.results.data import IngestResult, LabelCounts
from engine.settings import Amount, Classes, Request

A = TypeVar("A", bound=Amount)


def read_records(reader: Reader, task: str, cells: Cells | None) -> pa.Table:
    """The reader's records, with a column of cells if the study has them. Raises `DataError`."""
    if cells is None:
        return reader.chosen(task)
    records = reader.chosen(CELL)
    columns = labels_by_task(records, cells)
    for name, labels in columns.items():
        column = rows.label_column(name)
        place = records.schema.get_field_index(column)
        records = records.set_column(place, column, pa.array(labels, records.schema.types[place]))
    try:
        names, _ = cells_of(columns, cells.least)
    except ValueError as error:
        raise DataError(
            f"tasks: two combinations of labels would both be named {str(error)!r}; rename classes"
            " that contain commas or plus signs, or are named like a missing label"
        ) from None
    # An image without any label is unlabelled, and not one of a combination.
    unlabelled = [all(one is None for one in of_image)
                  for of_image in zip(*columns.values(), strict=True)]  # fmt: skip
    values = [None if empty else name for name, empty in zip(names, unlabelled, strict=True)]
    records = records.append_column(rows.label_column(CELL), pa.array(values, pa.string()))
    if reader.spec.unlabelled == "drop":
        reader.excluded += sum(unlabelled)
        records = records.filter(pa.array([not empty for empty in unlabelled]))
    return records


def labels_by_task(table: pa.Table, cells: Cells) -> dict[str, list[Labels]]:
    """The labels of each image by task."""
    return {
        task.name: [plain_labels(value, task.none)
                    for value in table[rows.label_column(task.name)].to_pylist()]
        for task in cells.tasks
    }  # fmt: skip


def names_by_image(table: pa.Table, task: str, cells: Cells | None) -> list[tuple[str, ...]]:
    """The names of each image that a split must have: its class, or its labels in all tasks."""
    if cells is None:
        return [() if name is None else (name,)
                for name in table[rows.label_column(task)].to_pylist()]  # fmt: skip
    columns = labels_by_task(table, cells)
    return [
        members(dict(zip(columns, labels, strict=True)), columns)
        for labels in zip(*columns.values(), strict=True)
    ]


def counts_by_split(index: pa.Table, task: str, cells: Cells | None) -> dict[str, dict[str, int]]:
    """Images by split and name."""
    counts: dict[str, Counter[str]] = {split: Counter() for split in rows.SPLITS}
    for split, names in zip(
        index[rows.SPLIT].to_pylist(), names_by_image(index, task, cells), strict=True
    ):
        counts[split].update(names)
    return {split: dict(sorted(counter.items())) for split, counter in counts.items()}


def label_counts(
    index: pa.Table, kinds: Mapping[str, TaskKind], cells: Cells
) -> dict[str, LabelCounts]:
    """The images of each label of each task, by split."""
    splits = index[rows.SPLIT].to_pylist()
    results = {}
    for name, labels in labels_by_task(index, cells).items():
        counts: dict[str, Counter[str]] = {split: Counter() for split in rows.SPLITS}
        unlabelled = Counter[str]()
        for split, value in zip(splits, labels, strict=True):
            if value is None:
                unlabelled[split] += 1
            else:
                counts[split].update((value,) if isinstance(value, str) else value)
        classes = sorted({label for of_split in counts.values() for label in of_split}, key=natural)
        results[name] = LabelCounts(
            kind=kinds[name],
            counts={split: {label: of_split[label] for label in classes}
                    for split, of_split in counts.items()},
            unlabelled={split: unlabelled[split] for split in rows.SPLITS},
        )  # fmt: skip
    return results


def named_cells(name: str, data: IngestResult) -> list[str]:
    """The classes that a name in a request means: cells with this label, or the class itself."""
    cells = [
        cell
        for cell in (data.targets if data.labels else ())
        for labels in [data.cells[cell]]
        if name in members(labels, labels)
        or any(name == value or (isinstance(value, tuple) and name in value)
               for value in labels.values())
    ]  # fmt: skip
    return cells or ([name] if name in data.train else [])


def classes_of(classes: Classes, data: IngestResult) -> Classes:
    """Target classes with labels replaced by their cells; unknown names stay, for the error."""
    if classes == "all" or not data.labels:
        return classes
    return tuple(
        dict.fromkeys(cell for name in classes for cell in named_cells(name, data) or [name])
    )


def amount_of(amount: A, data: IngestResult) -> A:
    """An amount with labels replaced by their cells; of several ratios of a cell, the largest."""
    if amount.ratio_by_class is None or not data.labels:
        return amount
    ratios: dict[str, float] = {}
    for name, ratio in amount.ratio_by_class.items():
        for cell in named_cells(name, data) or [name]:
            ratios[cell] = max(ratio, ratios.get(cell, 0.0))
    return amount.model_copy(update={"ratio_by_class": ratios})


def request_of(request: Request, data: IngestResult) -> Request:
    """A request with labels replaced by their cells."""
    classes = classes_of(request.classes, data)
    return amount_of(request, data).model_copy(update={"classes": classes})
