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
    width, channels).

    Small images are enlarged by whole numbers, without smoothing, to at least 48 px.
    """
    shown = dict(list(classes.items())[:_MOST_CLASSES])
    columns = max((len(side) for pair in shown.values() for side in pair), default=1)
    side = next(image.shape[0] for pair in shown.values() for half in pair for image in half)
    zoom = max(1, -(-48 // side))
    tile = min(side * zoom, 128)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    label_width = max(int(font.getlength(_shorten(name))) for name in shown) + 2 * _GAP
    half = columns * (tile + _GAP)
    width = _MARGIN * 2 + label_width + 2 * half + 3 * _GAP
    top = _MARGIN + 24
    sheet = Image.new("RGB", (width, top + len(shown) * (tile + _GAP) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    starts = (_MARGIN + label_width, _MARGIN + label_width + half + 3 * _GAP)
    for start, title in zip(starts, ("real", "synthetic"), strict=True):
        draw.text((start, _MARGIN - 4), title, fill=_FAINT, font=small)
    for row, (name, pair) in enumerate(shown.items()):
        y = top + row * (tile + _GAP)
        draw.text((_MARGIN, y + tile / 2), _shorten(name), fill=_INK, font=font, anchor="lm")
        for start, images in zip(starts, pair, strict=True):
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
