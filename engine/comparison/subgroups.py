"""The comparison within parts of the test set, such as devices or sexes: a gain on average may be a
loss for some. Descriptive; nothing is chosen or decided by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.comparison.figures import Figures
from engine.core.names import natural
from engine.results.comparison import Contrast, Effect, MeanInterval, Subgroup

# Test images below which a part of the test set has no figures.
LEAST_IMAGES = 20
# Means over all classes, in which a class that a part lacks counts as 0.
_OVER_CLASSES = ("macro_f1",)


def subgroups(
    figures: Figures, columns: Mapping[str, Sequence[str | None]], contrasts: Sequence[Contrast],
    objective: str,
) -> list[Subgroup]:  # fmt: skip
    """The objective of each compared arm, and its differences from the baseline of its verdict and
    from real images, for each value of each column. Images without a value are left out.

    columns: a value for each test image.
    """
    found = []
    for column, values in columns.items():
        for value in sorted({value for value in values if value is not None}, key=natural):
            rows = np.flatnonzero([other == value for other in values])
            found.append(_subgroup(figures, column, value, rows, contrasts, objective))
    return found


def _subgroup(
    figures: Figures, column: str, value: str, rows: np.ndarray, contrasts: Sequence[Contrast],
    objective: str,
) -> Subgroup:  # fmt: skip
    entry = Subgroup(column=column, value=value, images=len(rows))
    own = figures.predictions.of_images(rows)
    enough = len(rows) >= LEAST_IMAGES
    # An area under a curve needs images of two classes.
    if not enough or (objective == "roc_auc" and len(np.unique(own.labels)) < 2):
        return entry
    within, scale = Figures(own, figures.seed), 1.0
    if objective in _OVER_CLASSES:
        scale = len(own.classes) / len(np.unique(own.labels))
    scores, to_baseline, to_real = {}, {}, {}
    for contrast in contrasts:
        if contrast.twin:
            continue
        for arm in dict.fromkeys(("real", contrast.against, contrast.arm)):
            if arm in own.probabilities and arm not in scores:
                scores[arm] = _scaled_mean(within.mean(arm, objective), scale)
        to_baseline[contrast.arm] = _scaled(
            within.difference(contrast.arm, contrast.against, objective), scale
        )
        if "real" in own.probabilities:
            to_real[contrast.arm] = _scaled(
                within.difference(contrast.arm, "real", objective), scale
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
