"""The comparison within parts of the test set, such as devices or sexes, and on test sets from
elsewhere: a gain on average may be a loss for some. Nothing is chosen or decided by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.comparison.figures import AnyFigures, TaskFigures
from engine.core.names import natural
from engine.results.comparison import Contrast, Effect, MeanInterval, Subgroup

# Test images below which a part of the test set has no figures.
LEAST_IMAGES = 20
# Effective groups below which an interval would be one over replicates alone.
LEAST_GROUPS = 5
# Means over all classes, in which a class that a part lacks counts as 0.
_OVER_CLASSES = ("macro_f1",)


def subgroups(
    figures: AnyFigures, columns: Mapping[str, Sequence[str | None]], contrasts: Sequence[Contrast],
    objective: str,
) -> list[Subgroup]:  # fmt: skip
    """The objective of each compared arm, and its differences from the baseline of its verdict and
    from real images, for each value of each column. Images without a value are left out.

    columns: a value for each test image.
    """
    parts = []
    for column, values in columns.items():
        for value in sorted({value for value in values if value is not None}, key=natural):
            rows = np.flatnonzero([other == value for other in values])
            within = figures.of_images(rows)
            parts.append(part_of(within, column, value, contrasts, objective))
    return parts


def part_of(
    figures: AnyFigures, column: str, value: str, contrasts: Sequence[Contrast], objective: str
) -> Subgroup:
    """The comparison on some images, without figures if they are few."""
    own, scale = figures.predictions, 1.0
    groups = own.effective_groups() if len(own.labels) else 0.0
    entry = Subgroup(column=column, value=value, images=len(own.labels), groups=groups)
    # An area under a curve needs images of two classes.
    one_class = own.occurring() < 2
    few = len(own.labels) < LEAST_IMAGES or groups < LEAST_GROUPS
    if few or (objective == "roc_auc" and one_class):
        return entry
    if isinstance(figures, TaskFigures):
        figures = figures.over_occurring(objective in _OVER_CLASSES)
    elif objective in _OVER_CLASSES:
        scale = len(own.classes) / own.occurring()
    scores, to_baseline, to_real = {}, {}, {}
    for contrast in contrasts:
        if contrast.twin:
            continue
        for arm in dict.fromkeys(("real", contrast.against, contrast.arm)):
            if arm in own.probabilities and arm not in scores:
                scores[arm] = _scaled_mean(figures.mean(arm, objective), scale)
        to_baseline[contrast.arm] = _scaled(
            figures.difference(contrast.arm, contrast.against, objective), scale
        )
        if "real" in own.probabilities:
            to_real[contrast.arm] = _scaled(
                figures.difference(contrast.arm, "real", objective), scale
            )
    return entry.model_copy(
        update={"scores": scores, "to_baseline": to_baseline, "to_real": to_real}
    )


def _scaled(effect: Effect, scale: float) -> Effect:
    return Effect(
        estimate=scale * effect.estimate, low=scale * effect.low, high=scale * effect.high
    )


def _scaled_mean(mean: MeanInterval, scale: float) -> MeanInterval:
    ends = (min(1.0, scale * value) for value in (mean.mean, mean.low, mean.high))
    return MeanInterval(**dict(zip(("mean", "low", "high"), ends, strict=True)))
