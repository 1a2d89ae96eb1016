"""Images on a page as data URLs, no larger than displayed, and which of them a page shows."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from engine.core import rows
from engine.core.store import Store
from engine.data.arrays import pictures, sampled_images
from engine.report.download import data_url
from engine.report.generators import GeneratorFit

# Images up to this side (px) keep their pixels.
SMALL = 64
TILES = 8  # per row
# With many classes, rows are shorter; a row is a class of a generator.
_FEW_CLASSES, _FEW_TILES = 10, 6
_MOST_CLASSES, _MOST_ROWS = 30, 90


def image_url(picture: Image.Image, form: str, **options: int) -> str:
    """A picture as a data URL. form: PNG or JPEG."""
    target = io.BytesIO()
    picture.save(target, form, **options)
    return data_url(target.getvalue(), f"image/{form.lower()}")


def picture_of(image: np.ndarray) -> Image.Image:
    """An image (uint8 height, width, channels) as a picture."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def tile(image: np.ndarray, side: int) -> str:
    """The data URL of an image (uint8 height, width, channels) displayed at most `side` px wide.

    A small image is a PNG with its own pixels. A larger one is a JPEG of at most twice the side,
    for screens of high resolution: at 224 px, about 4 kB instead of 140.
    """
    picture = picture_of(image)
    if max(picture.size) <= SMALL:
        return image_url(picture, "PNG")
    picture.thumbnail((2 * side, 2 * side), Image.Resampling.LANCZOS)
    return image_url(picture, "JPEG", quality=85)


@dataclass(frozen=True)
class Tile:
    """An image, by id or as a data URL. reason: the filter that dropped it, if any. seen: the class
    that the labeler saw, if that was the reason."""

    image: str
    reason: str
    seen: str


@dataclass(frozen=True)
class MadeTiles:
    """Images of a class by one generator, as data URLs. synthetic: it is compared with the
    baselines."""

    generator: str
    synthetic: bool
    kept: list[str]
    dropped: list[Tile]


@dataclass(frozen=True)
class ClassTiles:
    """Images of a class as data URLs: real ones of train, and those of each generator."""

    label: str
    real: list[str]
    makers: list[MadeTiles]


@dataclass(frozen=True)
class Sheets:
    """The images of some classes, and the number of classes that are left out."""

    classes: list[ClassTiles]
    left_out: int


def sheets(
    store: Store, train: Sequence[str], fits: Sequence[GeneratorFit], task: str, side: int,
    synthetic: Collection[str],
) -> Sheets:  # fmt: skip
    """Real images of each class with the kept and dropped images of every generator.

    If there are many classes, those with the most dropped images are shown. train: keys of the
    parts with the real images. side: px of a tile.
    """
    tables = {fit.name: fit.curated_table(store) for fit in fits}
    chosen, left_out = shown_classes(tables)
    count = TILES if len(chosen) <= _FEW_CLASSES else _FEW_TILES
    real = sampled_images(store, train, task, count)
    classes = {
        label: ClassTiles(label, [tile(image, side) for image in real.get(label, [])], [])
        for label in chosen
    }
    for fit in fits:
        kept, dropped = choose_tiles(tables[fit.name])
        ids = {name for by_class in (kept, dropped) for label in chosen
               for name in (entry.image for entry in by_class.get(label, [])[:count])}  # fmt: skip
        images = pictures(store, fit.images, ids)
        urls = {image_id: tile(image, side) for image_id, image in images.items()}
        for label in chosen:
            if label in kept or label in dropped:
                own = MadeTiles(
                    fit.name, fit.name in synthetic,
                    [urls[entry.image] for entry in kept.get(label, [])[:count]],
                    [replace(entry, image=urls[entry.image])
                     for entry in dropped.get(label, [])[:count]],
                )  # fmt: skip
                classes[label].makers.append(own)
    return Sheets(list(classes.values()), left_out)


def shown_classes(tables: Mapping[str, pa.Table]) -> tuple[list[str], int]:
    """The classes whose images the page shows, and the number of the others.

    tables: of curated images, by generator.
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


def choose_tiles(table: pa.Table) -> tuple[dict[str, list[Tile]], dict[str, list[Tile]]]:
    """A few images by id: kept ones by the class they are used as, dropped ones by the requested
    class."""
    kept: dict[str, list[Tile]] = {}
    dropped: dict[str, list[Tile]] = {}
    for image_id, used, intended, good, reason, seen in zip(
        *(table[name].to_pylist() for name in
          (rows.IMAGE_ID, rows.LABEL, rows.LABEL_INTENDED, rows.KEPT, rows.REASON,
           rows.LABEL_SEEN)),
        strict=True,
    ):  # fmt: skip
        chosen = kept.setdefault(used, []) if good else dropped.setdefault(intended, [])
        if len(chosen) < TILES:
            chosen.append(Tile(image_id, reason, seen if reason == "agreement" else ""))
    return kept, dropped
