"""Images of each class, real and generated, and the generated images closest to training images."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.core import rows
from engine.core.registry import kind_of
from engine.data.arrays import pictures
from engine.report.download import Row
from engine.report.generators import GeneratorFit
from engine.report.page import Section, render
from engine.report.results import StudyResults
from engine.report.tiles import TILES, ClassTiles, tile

# At the top of the page.
FIRST_CLASSES, FIRST_TILES = 3, 6


def first_images(results: StudyResults) -> Section:
    """Real and kept synthetic images of the first few classes that have both."""
    return Section(render("first_images.html", classes=first_screen(results.sheets.classes)))


def images(results: StudyResults) -> Section:
    """Kept and dropped images of each class, and the closest pairs of each generator."""
    closest = {
        name: sorted(
            (pair for fit in fits for pair in closest_pairs(results, fit)),
            key=lambda pair: pair.distance,
        )[:TILES]
        for name, fits in results.generators.items()
    }
    table: list[Row] = [
        {"generator": name, rows.GENERATOR_FIT: pair.fit, "image_id": pair.image_id,
         "class": pair.label, "nearest_training_image": pair.nearest,
         "cosine_distance": pair.distance, "dropped": pair.dropped}
        for name, pairs in closest.items()
        for pair in pairs
    ]  # fmt: skip
    return Section(render("images.html", results=results, closest=closest), {"closest": table})


def first_screen(classes: list[ClassTiles]) -> list[ClassTiles]:
    """The first few classes with real and kept synthetic images, with a few of each."""
    chosen = []
    for of_class in classes:
        makers = [
            replace(maker, kept=maker.kept[:FIRST_TILES])
            for maker in of_class.makers
            if maker.synthetic and maker.kept
        ]
        if makers and of_class.real:
            chosen.append(replace(of_class, real=of_class.real[:FIRST_TILES], makers=makers))
    return chosen[:FIRST_CLASSES]


@dataclass(frozen=True)
class ClosestPair:
    """A generated image and the nearest training image, as ids and as data URLs."""

    fit: int
    label: str
    image_id: str
    nearest: str
    distance: float
    generated: str
    real: str
    dropped: bool


def closest_pairs(results: StudyResults, fit: GeneratorFit) -> list[ClosestPair]:
    """The images of a fit that are closest to training images, if a filter compared them one by
    one."""
    store, pairs = results.store, []
    table = fit.curated_table(store)
    for report in fit.curated.filters:
        columns = kind_of("filters", report).pair
        if columns is None or not table.num_rows:
            continue
        nearest_column, distance = (rows.score_column(report.name, name) for name in columns)
        if nearest_column not in table.column_names:
            continue
        first = table.sort_by(distance).slice(0, TILES)
        ids, nearest = first[rows.IMAGE_ID].to_pylist(), first[nearest_column].to_pylist()
        generated = pictures(store, fit.images, ids)
        train = results.inputs["ingest"].keys(split="train")
        real = pictures(store, train, [image_id for image_id in nearest if image_id])
        pairs += [
            ClosestPair(
                fit.fit, label, image_id, close, far, tile(generated[image_id], results.tile),
                tile(real[close], results.tile), reason == report.name,
            )
            for image_id, close, far, label, reason in zip(
                ids, nearest, first[distance].to_pylist(), first[rows.LABEL_INTENDED].to_pylist(),
                first[rows.REASON].to_pylist(), strict=True,
            )
            if close
        ]  # fmt: skip
    return pairs
