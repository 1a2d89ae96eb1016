"""Contact sheets: real and synthetic images of each class side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP, _MARGIN = 6, 18
_INK, _FAINT, _PAPER = "#1d2733", "#6b7787", "#ffffff"
_MOST_CLASSES = 40


def contact_sheet(
    classes: Mapping[str, tuple[Sequence[np.ndarray], Sequence[np.ndarray]]],
) -> bytes:
    """A PNG with a row for each class: its name, real images, synthetic images (uint8 height,
    width, channels)."""
    shown = list(classes.items())[:_MOST_CLASSES]
    return paired_sheet(
        [(name, real, synthetic) for name, (real, synthetic) in shown], ("real", "synthetic")
    )


def paired_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray], Sequence[np.ndarray]]], titles: tuple[str, str]
) -> bytes:
    """A PNG of rows: a name, images on the left, images on the right (uint8 height, width,
    channels), each side with its title.

    Small images are enlarged by whole numbers, without smoothing, to at least 48 px.
    """
    counts = [max((len(row[half]) for row in rows), default=1) for half in (1, 2)]
    side = next(image.shape[0] for row in rows for half in row[1:] for image in half)
    zoom = max(1, -(-48 // side))
    tile = min(side * zoom, 128)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    label_width = max(int(font.getlength(_shorten(name))) for name, _, _ in rows) + 2 * _GAP
    left, right = (max(count, 1) * (tile + _GAP) for count in counts)
    left = max(left, int(small.getlength(titles[0])) + _GAP)
    width = _MARGIN * 2 + label_width + left + right + 3 * _GAP
    top = _MARGIN + 24
    sheet = Image.new("RGB", (width, top + len(rows) * (tile + _GAP) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    starts = (_MARGIN + label_width, _MARGIN + label_width + left + 3 * _GAP)
    for start, title in zip(starts, titles, strict=True):
        draw.text((start, _MARGIN - 4), title, fill=_FAINT, font=small)
    for number, (name, *halves) in enumerate(rows):
        y = top + number * (tile + _GAP)
        draw.text((_MARGIN, y + tile / 2), _shorten(name), fill=_INK, font=font, anchor="lm")
        for start, images in zip(starts, halves, strict=True):
            for column, image in enumerate(images):
                sheet.paste(_tile(image, tile), (start + column * (tile + _GAP), y))
    line = starts[1] - 2 * _GAP
    draw.line((line, _MARGIN, line, sheet.height - _MARGIN), fill="#d5dbe3")
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
