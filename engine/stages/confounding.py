"""Shared by ingest and audit: what tells the classes apart besides the subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from engine.core import rows
from engine.core.notice import Notice
from engine.data.near_duplicates import SIDE
from engine.metrics.confounding import Predicted, even_frame, predicted_classes
from engine.results.audit import NO_LABEL

# Entries of the acquisition, by the name that users read.
_RECORDED = {"format": "format", "mode": "colours and bits", "coding": "JPEG quality",
             "device": "device"}  # fmt: skip

# A second feature is named if its own AUC exceeds this.
_NAMED = 0.55
# A difference of shares that is worth telling.
_MUCH = 0.2


@dataclass(frozen=True)
class Confounding:
    """How well each class of train and val is predicted by how its files were made, and by simple
    figures of appearance, which may be the subject's own."""

    acquisition: list[Predicted]
    appearance: list[Predicted]
    # By class, the value that its files have more often than others, in words; empty if none.
    typical: Mapping[str, str]

    def notices(self) -> list[Notice]:
        """A warning for each class that the acquisition distinguishes, of two classes one."""
        classes = self.acquisition[:1] if len(self.acquisition) == 2 else self.acquisition
        return [
            Notice.of(
                "confounded", name=predicted.label, area=predicted.auc,
                by=" and ".join(
                    what for place, (what, area) in enumerate(predicted.by.items())
                    if place == 0 or (place == 1 and area > _NAMED)
                ) + self.typical.get(predicted.label, ""),
            )
            for predicted in classes
            if predicted.suspicious
        ]  # fmt: skip


def find_confounding(
    index: pa.Table, task: str, thumbnails: np.ndarray, appearance: np.ndarray, seed: int
) -> Confounding:
    """thumbnails, appearance: uint8 (n, SIDE²) and float32 (n, figures) in the order of the
    index. The label's own sources, such as folders and names, are left out."""
    usable = np.asarray(index[rows.SPLIT].to_pylist(), dtype=object) != "test"
    labels = index[rows.label_column(task)].to_pylist()
    usable &= np.asarray([isinstance(label, str) and label != NO_LABEL for label in labels], bool)
    chosen = np.flatnonzero(usable)
    index = index.take(chosen)
    width, height = (
        np.asarray(index[name].to_pylist(), np.float64) for name in (rows.WIDTH, rows.HEIGHT)
    )
    origins = [dict(entries or ()) for entries in index[rows.ACQUISITION].to_pylist()]
    acquisition = {
        "size": np.stack([width, height], 1),
        "aspect ratio": np.log2(width / height),
        "frame": even_frame(thumbnails[chosen].reshape(-1, SIDE, SIDE)),
    }
    for entry, name in _RECORDED.items():
        values = [entries.get(entry, "") for entries in origins]
        numeric = all(value.isdigit() for value in values if value)
        acquisition[name] = (
            np.asarray([int(value or -1) for value in values]) if numeric
            else np.unique(values, return_inverse=True)[1]
        )  # fmt: skip
    names = index[rows.label_column(task)].to_pylist()
    groups = [
        group if group is not None else image_id
        for group, image_id in zip(
            index[rows.GROUP_ID].to_pylist(), index[rows.IMAGE_ID].to_pylist(), strict=True
        )
    ]
    predictions = predicted_classes(acquisition, names, groups, seed)
    written = {"size": [f"{wide:.0f} x {high:.0f}"
                        for wide, high in zip(width, height, strict=True)]}  # fmt: skip
    for entry, name in _RECORDED.items():
        written[name] = [entries.get(entry, "") for entries in origins]
    return Confounding(
        predictions,
        predicted_classes(
            {"mean": appearance[chosen, :3], "contrast": appearance[chosen, 3:]},
            names, groups, seed,
        ),
        {
            predicted.label: _typical(written[best], np.asarray(names) == predicted.label)
            for predicted in predictions
            if (best := next(iter(predicted.by))) in written
        },
    )  # fmt: skip


def _typical(values: Sequence[str], own: np.ndarray) -> str:
    """The value that the files of a class have most often compared with the others, in words; empty
    if none differs much. own: bool (n,)."""
    kinds, number = np.unique(values, return_inverse=True)
    share, elsewhere = (
        np.bincount(number[side], minlength=len(kinds)) / side.sum() for side in (own, ~own)
    )
    place = int((share - elsewhere).argmax())
    if share[place] - elsewhere[place] < _MUCH:
        return ""
    return (
        f": {str(kinds[place]) or 'not recorded'!r} in {100 * share[place]:.0f}% of its files and"
        f" {100 * elsewhere[place]:.0f}% of the others"
    )
