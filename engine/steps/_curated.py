"""What the page shows of curation: pictures kept and dropped, those closest to training images, and
what filters asked."""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from engine.context import Context
from engine.core import rows
from engine.core.arrays import pictures
from engine.core.images import Preprocess, encode
from engine.core.registry import resolve
from engine.steps.generate import first_images

TILES = 8
Tiles = dict[str, list[tuple[str, str]]]


def sheets(
    context: Context, generators: Sequence[str], task: str, preprocess: Preprocess,
    synthetic: Collection[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Real images of each target class beside kept and dropped ones of each generator."""
    train = context.inputs["ingest"].keys(split="train")
    real = first_images(context.store, train, task, TILES)
    found, shown = [], partial(tile, preprocess=preprocess)
    for name in generators:
        kept, dropped = choose_tiles(curated(context, name))
        wanted = {image_id for ids in [*kept.values(), *dropped.values()] for image_id, _ in ids}
        images = pictures(context.store, generated(context, name), wanted)
        classes = [
            {
                "label": label,
                "real": [shown(image) for image in real.get(label, [])],
                "kept": [shown(images[i]) for i, _ in kept.get(label, [])],
                "dropped": [(shown(images[i]), why) for i, why in dropped.get(label, [])],
            }
            for label in sorted({*kept, *dropped})
        ]
        found.append({"generator": name, "synthetic": name in synthetic, "classes": classes})
    return found


def choose_tiles(table: pa.Table) -> tuple[Tiles, Tiles]:
    """Ids (and reasons) of a few images: kept ones by the class that they are used as, dropped ones
    by the class that was asked for."""
    kept: Tiles = {}
    dropped: Tiles = {}
    for image_id, used, intended, good, reason, seen in zip(
        *(table[name].to_pylist() for name in
          (rows.IMAGE_ID, rows.LABEL, rows.LABEL_INTENDED, rows.KEPT, rows.REASON,
           rows.LABEL_SEEN)),
        strict=True,
    ):  # fmt: skip
        held = kept.setdefault(used, []) if good else dropped.setdefault(intended, [])
        if len(held) < TILES:
            held.append((image_id, f"seen as {seen}" if reason == "agreement" else reason))
    return kept, dropped


def closest(
    context: Context, generators: Sequence[str], preprocess: Preprocess
) -> list[dict[str, Any]]:
    """Of each generator whose images were held against train one by one: those that came closest,
    each beside the training image."""
    found = []
    train = context.inputs["ingest"].keys(split="train")
    for name in generators:
        table = curated(context, name)
        for told in context.inputs[f"curate.{name}"].metrics.get("filters", ()):
            pair = resolve("filters", told["name"]).pair
            if pair is None or not table.num_rows:
                continue
            other, distance = (rows.score_column(told["name"], column) for column in pair)
            if other not in table.column_names:
                continue
            nearest = table.sort_by(distance).slice(0, TILES)
            ids, others = nearest[rows.IMAGE_ID].to_pylist(), nearest[other].to_pylist()
            made = pictures(context.store, generated(context, name), ids)
            real = pictures(context.store, train, [i for i in others if i])
            found.append(
                {
                    "generator": name,
                    "pairs": [
                        {
                            "made": tile(made[image_id], preprocess),
                            "real": tile(real[of], preprocess), "distance": far, "label": label,
                            "dropped": reason == told["name"],
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
    return found


def words(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What each reason for dropping an image means."""
    names = {told["name"] for held in metrics.values() for told in held.get("filters", ())}
    found = {name: str(resolve("filters", name).told) for name in sorted(names)}
    return {"embedding": "without an embedding", **found}


def limit_in_words(limit: float | Mapping[str, float | None] | None) -> str:
    """A limit, or the range of those of the classes."""
    every = limit.values() if isinstance(limit, Mapping) else [limit]
    values = [value for value in every if value is not None]
    if not values:
        return "none"
    low, high = format(min(values), ".3g"), format(max(values), ".3g")
    return low if low == high else f"{low} to {high} by class"


def filters_told(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of each generator, what every filter dropped and the limits that it judged by."""
    found = {}
    for name, held in metrics.items():
        entries = []
        for told in held.get("filters", ()):
            entries.append(
                {
                    "name": told["name"], "dropped": told["dropped"],
                    "told": resolve("filters", told["name"]).told,
                    "limits": ", ".join(
                        f"{key} {limit_in_words(value)}" for key, value in told["limits"].items()
                    ),
                }
            )  # fmt: skip
        found[name] = entries
    return found


def curated(context: Context, name: str) -> pa.Table:
    """Every image of a generator, kept or not."""
    keys = context.inputs[f"curate.{name}"].keys(table="curated")
    return pa.concat_tables(context.store.tables(keys))


def generated(context: Context, name: str) -> list[str]:
    """Keys of the parts that hold a generator's pictures."""
    parts = context.inputs[f"generate.{name}"].parts
    return [part.key for part in parts if "label" in part.tags]


def tile(image: np.ndarray, preprocess: Preprocess) -> str:
    """An image as a data URL, at most as large as it is shown."""
    data = encode(image, preprocess.model_copy(update={"codec": "png"}))
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
