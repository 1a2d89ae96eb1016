"""Contact sheets: images of each class side by side, and their positions in a plane."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP, _MARGIN = 6, 18
_INK, _FAINT, _PAPER = "#1d2733", "#6b7787", "#ffffff"
_CHOSEN, _OTHER = "#0b7a75", "#c3cad3"
_MOST_CLASSES = 40
_PLANE = 420  # px

# A name, and images (uint8 height, width, channels) in sections.
Row = tuple[str, *tuple[Sequence[np.ndarray], ...]]


@dataclass(frozen=True)
class Plane:
    """points: (n, 2). chosen: bool (n,)."""

    title: str
    points: np.ndarray
    chosen: np.ndarray


def contact_sheet(
    classes: Mapping[str, tuple[Sequence[np.ndarray], Sequence[np.ndarray]]],
) -> bytes:
    """A PNG with a row for each class: its name, real images, synthetic images (uint8 height,
    width, channels)."""
    first = list(classes.items())[:_MOST_CLASSES]
    return picture_sheet(
        [(name, real, synthetic) for name, (real, synthetic) in first], ("real", "synthetic")
    )


def picture_sheet(rows: Sequence[Row], titles: Sequence[str], most: int = 1_000) -> bytes:
    """A PNG of rows: a name, then its images by section; each section has a title. A new column
    begins after `most` rows.

    Small images are enlarged by whole numbers, without smoothing, to at least 48 px.
    """
    columns = [_pictures(rows[at : at + most], titles) for at in range(0, len(rows), most)]
    size = (sum(column.width for column in columns), columns[0].height)
    sheet, place = Image.new("RGB", size, _PAPER), 0
    for column in columns:
        sheet.paste(column, (place, 0))
        place += column.width
    return _encoded(sheet)


def selection_sheet(planes: Sequence[Plane], rows: Sequence[Row], titles: Sequence[str]) -> bytes:
    """A PNG of planes with the chosen points highlighted, above the rows of a `picture_sheet`."""
    below = _pictures(rows, titles)
    across = max(1, (below.width - _MARGIN) // (_PLANE + _MARGIN))
    lines = -(-len(planes) // across)
    width = max(below.width, min(len(planes), across) * (_PLANE + _MARGIN) + _MARGIN)
    sheet = Image.new("RGB", (width, lines * (_PLANE + _MARGIN) + below.height), _PAPER)
    for number, plane in enumerate(planes):
        down, right = divmod(number, across)
        at = (_MARGIN + right * (_PLANE + _MARGIN), _MARGIN + down * (_PLANE + _MARGIN))
        sheet.paste(_plane(plane), at)
    sheet.paste(below, (0, sheet.height - below.height))
    return _encoded(sheet)


def _pictures(rows: Sequence[Row], titles: Sequence[str]) -> Image.Image:
    counts = [max(len(row[number]) for row in rows) for number in range(1, len(titles) + 1)]
    side = next(image.shape[0] for row in rows for half in row[1:] for image in half)
    zoom = max(1, -(-48 // side))
    tile = min(side * zoom, 128)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    label_width = max(int(font.getlength(_shorten(name))) for name, *_ in rows) + 2 * _GAP
    starts, place = [], _MARGIN + label_width
    for count, title in zip(counts, titles, strict=True):
        starts.append(place)
        place += max(max(count, 1) * (tile + _GAP), int(small.getlength(title)) + _GAP) + 3 * _GAP
    top = _MARGIN + 24
    size = (place - 3 * _GAP + _MARGIN, top + len(rows) * (tile + _GAP) + _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for start, title in zip(starts, titles, strict=True):
        draw.text((start, _MARGIN - 4), title, fill=_FAINT, font=small)
    for number, (name, *sections) in enumerate(rows):
        y = top + number * (tile + _GAP)
        draw.text((_MARGIN, y + tile / 2), _shorten(name), fill=_INK, font=font, anchor="lm")
        for start, images in zip(starts, sections, strict=True):
            for column, image in enumerate(images):
                sheet.paste(_tile(image, tile), (start + column * (tile + _GAP), y))
    for start in starts[1:]:
        line = start - 2 * _GAP
        draw.line((line, _MARGIN, line, sheet.height - _MARGIN), fill="#d5dbe3")
    return sheet


def _plane(plane: Plane) -> Image.Image:
    # Drawn at twice the size and scaled down for smooth dots.
    size, top = 2 * _PLANE, 56
    sheet = Image.new("RGB", (size, size), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 4), plane.title, fill=_INK, font=ImageFont.load_default(30))
    draw.rectangle((0, top, size - 1, size - 1), outline="#d5dbe3", width=2)
    low, span = plane.points.min(0), np.maximum(np.ptp(plane.points, axis=0), 1e-9)
    inside = np.asarray((size, size - top)) - 40
    placed = (plane.points - low) / span * inside + (20, top + 20)
    radius = 3 if len(placed) > 3000 else 5
    for chosen, colour in ((False, _OTHER), (True, _CHOSEN)):
        for x, y in placed[plane.chosen == chosen]:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return sheet.resize((_PLANE, _PLANE), Image.Resampling.LANCZOS)


def _encoded(sheet: Image.Image) -> bytes:
    target = io.BytesIO()
    sheet.save(target, "PNG")
    return target.getvalue()


def _shorten(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _tile(image: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")
    if picture.width == side:
        return picture
    enlarge = picture.width < side
    return picture.resize(
        (side, side), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
    )
