"""The page of a relabelling: which labels changed, and on whose votes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.report.page import render
from engine.report.tiles import tile
from engine.results.data import RelabelledSplit
from engine.settings_labels import Relabel

_TILE = 112  # maximum side in px
# Pairs of classes in the table of changes.
_PAIRS = 10


@dataclass(frozen=True)
class ChangedLabel:
    """A flagged label. confidence: mean probability of the class that most voters see. seen: the
    class that each voter sees."""

    image_id: str
    uri: str
    split: str
    was: str
    now: str
    changed: bool
    confidence: float
    seen: Mapping[str, str]


def relabelling_page(
    splits: Mapping[str, RelabelledSplit], settings: Relabel, labels: Sequence[ChangedLabel],
    images: Mapping[str, np.ndarray],
) -> str:  # fmt: skip
    """labels: those to show. images: by id, uint8 (height, width, channels)."""
    tiles = {image_id: tile(image, _TILE) for image_id, image in images.items()}
    pairs = {
        name: sorted(
            ((count, was, now) for was, of_class in split.pairs.items()
             for now, count in of_class.items()),
            key=lambda pair: (-pair[0], pair[1:]),
        )[:_PAIRS]
        for name, split in splits.items()
    }  # fmt: skip
    return render(
        "relabelling.html", splits=splits, settings=settings, pairs=pairs, tiles=tiles,
        changed=[label for label in labels if label.changed],
        undecided=[label for label in labels if not label.changed],
    )  # fmt: skip
