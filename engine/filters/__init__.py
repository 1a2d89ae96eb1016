"""Filters: which generated images are not used, and why. To add one, write
`engine/filters/<name>.py` with `<Name>(Filter)`.

A filter looks twice. `measure` reads pixels in a worker, of generated images and of val alike;
`judge` sees all images of a generator at once, with their embeddings, beside the real ones: what is
normal among held-out real images sets the limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from engine.core.spec import Spec


class FilterSpec(Spec):
    name: str


@dataclass(frozen=True)
class Scored:
    """Images and what is known of each, row by row.

    ids, labels: text (n,); the label of a generated image is the one that was asked for. vectors:
    float32 (n, width), by the study's embedder. hashes: perceptual ones, uint64 (n,).
    probabilities: the labeler's, float32 (n, classes), where there is one and it looked.
    measured: what the filter's own `measure` gave, (n,) each; of train nothing.
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
class Judged:
    """drop: bool (n,). columns: what stands in the table of images, (n,) each. limits: what was
    judged by, for people: a number, or one for each class. labels: those that the images are used
    under, if not those asked for. stops: why no image of this generator may be exported; empty:
    they may."""

    drop: np.ndarray
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    limits: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    labels: np.ndarray | None = None
    stops: str = ""


# Fewer images of a class in val do not say what is usual in it.
_ENOUGH = 20


def least_by_class(
    values: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    quantile: float,
    *,
    comparable: bool = True,
) -> dict[str, float]:
    """The value that a share `quantile` of held-out real images stays below, class by class: a rare
    class has a look of its own, and a limit of all together would drop it first.

    values: (n,) of images with `labels` (n,). Of a class with fewer than 20 images the limit is the
    lowest of its own and, where values of classes are `comparable`, of all together; of one without
    images, and without that, nothing is too low.
    """
    whole = float(np.quantile(values, quantile)) if comparable and len(values) else np.inf
    found = {}
    for label in classes:
        held = values[labels == label]
        if len(held) >= _ENOUGH:
            found[label] = float(np.quantile(held, quantile))
        else:
            lowest = min([whole, *held.tolist()])
            found[label] = lowest if np.isfinite(lowest) else -np.inf
    return found


def of_labels(limits: Mapping[str, float], labels: np.ndarray) -> np.ndarray:
    """The limit of each image's class, (n,)."""
    return np.asarray([limits[label] for label in labels], dtype=np.float64)


class Filter:
    version: ClassVar[int]
    Spec: ClassVar[type[FilterSpec]]
    # What is wrong with an image that it drops, as the page says it after a number.
    told: ClassVar[str]
    # Whether it needs a labeler's probabilities.
    needs_labeler: ClassVar[bool] = False
    # Names of the figures that `measure` gives of each image.
    measures: ClassVar[tuple[str, ...]] = ()
    # Fields of the spec that `judge` alone reads: changing them measures nothing anew.
    judging_fields: ClassVar[tuple[str, ...]] = ()
    # Columns with the id of a training image and the distance to it: the page shows the closest.
    pair: ClassVar[tuple[str, str] | None] = None

    def __init__(self, spec: Any, classes: Sequence[str]) -> None:
        self.spec, self.classes = spec, tuple(classes)

    def load(self, device: str) -> None:
        """Get ready to `measure`, once in each worker."""

    def measure(self, pixels: np.ndarray, labels: Sequence[str]) -> Mapping[str, np.ndarray]:
        """`measures` of uint8 (n, height, width, channels), float32 (n,) each."""
        return {}

    def judge(self, made: Scored, train: Scored, val: Scored, kept: np.ndarray) -> Judged:
        """Judge the generated images `made`; `kept` (n,) are those that filters before this one let
        pass."""
        raise NotImplementedError
