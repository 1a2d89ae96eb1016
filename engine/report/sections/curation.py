"""Curation on the page: kept and dropped images, images closest to training images, and filters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.context import Context
from engine.core import rows
from engine.core.registry import kind_of, resolve
from engine.data.arrays import first_images, pictures
from engine.data.dataset import generated_images
from engine.report.sections.evidence import MOST_CLASSES, most_confused, shares
from engine.report.tile import tile
from engine.results.images import CurateResult

TILES = 8  # per row
# At the top of the page.
FIRST_CLASSES, FIRST_TILES = 3, 6
# With many classes, rows are shorter; a row is a class of a generator.
_FEW_CLASSES, _FEW_TILES = 10, 6
_MOST_CLASSES, _MOST_ROWS = 30, 90
Tiles = dict[str, list[tuple[str, str]]]


def sheets(
    context: Context, generators: Sequence[str], task: str, side: int, synthetic: Collection[str]
) -> dict[str, Any]:
    """Real images of each class with the kept and dropped images of every generator.

    If there are many classes, those with the most dropped images are shown. side: px of a tile.
    """
    tables = {name: curated(context, name) for name in generators}
    chosen, left_out = shown_classes(tables)
    count = TILES if len(chosen) <= _FEW_CLASSES else _FEW_TILES
    train = context.inputs["ingest"].keys(split="train")
    real = first_images(context.store, train, task, count)
    classes: dict[str, dict[str, Any]] = {
        label: {"label": label, "real": [tile(one, side) for one in real.get(label, [])],
                "makers": []}
        for label in chosen
    }  # fmt: skip
    for name, table in tables.items():
        kept, dropped = (
            {label: of[label][:count] for label in chosen if label in of}
            for of in choose_tiles(table)
        )
        wanted = {image_id for ids in [*kept.values(), *dropped.values()] for image_id, _ in ids}
        images = pictures(context.store, generated(context, name), wanted)
        for label in chosen:
            if label in kept or label in dropped:
                classes[label]["makers"].append(
                    {
                        "generator": name, "synthetic": name in synthetic,
                        "kept": [tile(images[i], side) for i, _ in kept.get(label, [])],
                        "dropped": [(tile(images[i], side), why)
                                    for i, why in dropped.get(label, [])],
                    }
                )  # fmt: skip
    return {"classes": list(classes.values()), "left_out": left_out}


def first_screen(sheet: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Real and kept synthetic images of the first few classes of `sheets` that have both."""
    rows = []
    for of_class in sheet["classes"]:
        makers = [
            {"generator": maker["generator"], "kept": maker["kept"][:FIRST_TILES]}
            for maker in of_class["makers"]
            if maker["synthetic"] and maker["kept"]
        ]
        if makers and of_class["real"]:
            rows.append(
                {"label": of_class["label"], "real": of_class["real"][:FIRST_TILES],
                 "makers": makers}
            )  # fmt: skip
    return rows[:FIRST_CLASSES]


def shown_classes(tables: Mapping[str, pa.Table]) -> tuple[list[str], int]:
    """The classes whose images the page shows, and the number of the others.

    tables: from `curated`, by generator.
    """
    dropped: Counter[str] = Counter()
    for table in tables.values():
        dropped.update(dict.fromkeys(table[rows.LABEL_INTENDED].to_pylist(), 0))
        dropped.update(dict.fromkeys(table.filter(table[rows.KEPT])[rows.LABEL].to_pylist(), 0))
        dropped.update(table.filter(pc.invert(table[rows.KEPT]))[rows.LABEL_INTENDED].to_pylist())
    most = min(_MOST_CLASSES, max(1, _MOST_ROWS // max(1, len(tables))))
    # A sort keeps the order of equals: by name.
    worst = sorted(sorted(dropped), key=lambda label: -dropped[label])
    return sorted(worst[:most]), len(worst[most:])


def choose_tiles(table: pa.Table) -> tuple[Tiles, Tiles]:
    """Ids (and reasons) of a few images: kept ones by the class they are used as, dropped ones by
    the requested class."""
    kept: Tiles = {}
    dropped: Tiles = {}
    for image_id, used, intended, good, reason, seen in zip(
        *(table[name].to_pylist() for name in
          (rows.IMAGE_ID, rows.LABEL, rows.LABEL_INTENDED, rows.KEPT, rows.REASON,
           rows.LABEL_SEEN)),
        strict=True,
    ):  # fmt: skip
        tiles = kept.setdefault(used, []) if good else dropped.setdefault(intended, [])
        if len(tiles) < TILES:
            tiles.append((image_id, f"seen as {seen}" if reason == "agreement" else reason))
    return kept, dropped


def closest(context: Context, generators: Sequence[str], side: int) -> list[dict[str, Any]]:
    """For each generator whose images were compared with train one by one, the closest images with
    their training images."""
    sheets = []
    train = context.inputs["ingest"].keys(split="train")
    for name in generators:
        table = curated(context, name)
        for report in context.result(f"curate.{name}", CurateResult).filters:
            pair = kind_of("filters", report).pair
            if pair is None or not table.num_rows:
                continue
            nearest_column, distance = (rows.score_column(report.name, column) for column in pair)
            if nearest_column not in table.column_names:
                continue
            nearest = table.sort_by(distance).slice(0, TILES)
            ids, others = nearest[rows.IMAGE_ID].to_pylist(), nearest[nearest_column].to_pylist()
            synthetic = pictures(context.store, generated(context, name), ids)
            real = pictures(context.store, train, [i for i in others if i])
            sheets.append(
                {
                    "generator": name,
                    "pairs": [
                        {
                            "made": tile(synthetic[image_id], side),
                            "image_id": image_id, "nearest": of,
                            "real": tile(real[of], side), "distance": far, "label": label,
                            "dropped": reason == report.name,
                        }
                        for image_id, of, far, label, reason in zip(
                            ids, others, nearest[distance].to_pylist(),
                            nearest[rows.LABEL_INTENDED].to_pylist(),
                            nearest[rows.REASON].to_pylist(), strict=True,
                        )
                        if of
                    ],
                }
            )  # fmt: skip
    return sheets


def words(curated: Mapping[str, CurateResult]) -> dict[str, str]:
    """Each reason for dropping an image, in words."""
    names = {report.name for result in curated.values() for report in result.filters}
    reasons = {name: str(resolve("filters", name).drop_reason) for name in sorted(names)}
    return {"embedding": "without an embedding", **reasons}


def limit_in_words(limit: float | Mapping[str, float | None] | None) -> str:
    """A limit, or the range of the limits of the classes."""
    every = limit.values() if isinstance(limit, Mapping) else [limit]
    values = [value for value in every if value is not None]
    if not values:
        return "none"
    low, high = format(min(values), ".3g"), format(max(values), ".3g")
    return low if low == high else f"{low} to {high} by class"


def filter_rows(curated: Mapping[str, CurateResult]) -> dict[str, list[dict[str, Any]]]:
    """For each generator, the images that every filter dropped and its limits."""
    by_generator = {}
    for name, result in curated.items():
        by_generator[name] = [
            {
                "name": report.name, "dropped": report.dropped,
                "drop_reason": kind_of("filters", report).drop_reason,
                "limits": ", ".join(
                    f"{key} {limit_in_words(value)}" for key, value in report.limits.items()
                ),
            }
            for report in result.filters
        ]  # fmt: skip
    return by_generator


def labels_seen(
    curated: Mapping[str, CurateResult], classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each labeled generator, the requested against the seen classes: the whole matrix for few
    classes, the most frequently confused pairs for many."""
    by_generator = {}
    for name, result in curated.items():
        if result.labeler is not None:
            matrix = np.asarray(result.labeler.confusion)
            few = len(classes) <= MOST_CLASSES
            by_generator[name] = {"cells": shares(matrix) if few else [],
                           "pairs": [] if few else most_confused(matrix, classes)}  # fmt: skip
    return by_generator


def curated(context: Context, name: str) -> pa.Table:
    """Every image of a generator, kept or not."""
    keys = context.inputs[f"curate.{name}"].keys(table="curated")
    return pa.concat_tables(context.store.tables(keys))


def generated(context: Context, name: str) -> list[str]:
    """Keys of the parts with a generator's images."""
    return generated_images(context.inputs[f"generate.{name}"])
