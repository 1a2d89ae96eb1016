"""Filters: which generated images are dropped, and why. To add one, write
`engine/filters/<name>.py` with `<Name>(Filter)`.

A filter has two passes. `measure` reads the pixels of generated images and of val in a worker.
`judge` gets all images of a generator with their embeddings, together with the real ones; held-out
real images (val) set the limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from engine.core.labels import Labels
from engine.core.notice import Notice
from engine.core.spec import Configured, S, Spec


class FilterSpec(Spec):
    name: str


@dataclass(frozen=True)
class Scores:
    """Images with their embeddings and scores, row by row.

    ids, labels: text (n,); the label of a generated image is the requested one. vectors: float32
    (n, width), from the study's embedder. hashes: perceptual hashes, uint64 (n,). probabilities:
    the labeler's, float32 (n, classes), or None. measured: results of the filter's `measure`, (n,)
    each; empty for train.
    """

    ids: np.ndarray
    labels: np.ndarray
    vectors: np.ndarray
    hashes: np.ndarray
    probabilities: np.ndarray | None = None
    measured: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Judgement:
    """The result of a filter.

    drop: bool (n,). columns: scores for the table of images, (n,) each. limits: the limits for the
    page, each a number or one per class. labels: labels (n,) that replace the requested ones.
    stops: why the images of this generator must not be exported.
    """

    drop: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    limits: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    labels: np.ndarray | None = None
    stops: Notice | None = None


# With fewer images of a class in val, a quantile of the class is unreliable.
_ENOUGH = 20


def class_limits(
    values: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    quantile: float,
    *,
    comparable: bool = True,
) -> dict[str, float]:
    """The `quantile` of held-out real images for each class. A common limit would drop rare classes
    first, whose images look different.

    values: (n,) of images with `labels` (n,). comparable: whether values of different classes can
    be compared. A class with fewer than 20 images gets its lowest value or, if comparable and
    lower, the quantile of all classes; without either, the limit is -inf.
    """
    overall = float(np.quantile(values, quantile)) if comparable and len(values) else np.inf
    limits = {}
    for label in classes:
        own = values[labels == label]
        if len(own) >= _ENOUGH:
            limits[label] = float(np.quantile(own, quantile))
        else:
            lowest = min([overall, *own.tolist()])
            limits[label] = lowest if np.isfinite(lowest) else -np.inf
    return limits


def image_limits(limits: Mapping[str, float], labels: np.ndarray) -> np.ndarray:
    """The limit of each image's class, (n,)."""
    return np.asarray([limits[label] for label in labels], dtype=np.float64)


class Filter(Configured[S]):
    """Drops generated images."""

    version: ClassVar[int]
    # What is wrong with dropped images; follows their number on the page.
    drop_reason: ClassVar[str]
    # Whether it needs a labeler's probabilities.
    needs_labeler: ClassVar[bool] = False
    # Names of the values that `measure` returns.
    measures: ClassVar[tuple[str, ...]] = ()
    # Fields of the spec that only `judge` reads; changing them does not repeat `measure`.
    judging_fields: ClassVar[tuple[str, ...]] = ()
    # Columns with the id of a training image and its distance; the page shows the closest pairs.
    pair: ClassVar[tuple[str, str] | None] = None

    def __init__(self, spec: S, classes: Sequence[str]) -> None:
        self.spec, self.classes = spec, tuple(classes)
        # The labels of each class by task, if classes are combinations of labels.
        self.cells: Mapping[str, Mapping[str, Labels]] = {}

    def load(self, device: str) -> None:
        """Prepare for `measure`; called once in each worker."""

    def measure(self, pixels: np.ndarray, labels: Sequence[str]) -> Mapping[str, np.ndarray]:
        """The values named by `measures`, float32 (n,) each, of pixels uint8 (n, height, width,
        channels)."""
        return {}

    def judge(self, generated: Scores, train: Scores, val: Scores, kept: np.ndarray) -> Judgement:
        """Judge the images `generated`; `kept` (n,) marks those that earlier filters kept."""
        raise NotImplementedError
