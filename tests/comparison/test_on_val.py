"""The objective of all arms on val, and the ratio beyond which more images add nothing."""

from __future__ import annotations

import numpy as np
import pytest

from engine.comparison.arms import Arm
from engine.comparison.classified import Predictions
from engine.comparison.figures import Figures
from engine.comparison.on_val import on_val, saturations


def arm(family: str, ratio: float, **fields: str) -> Arm:
    name = f"{family} x{ratio:g}" if ratio else family
    return Arm(name=name, family=family, mixes=(name,), ratio=ratio, **fields)


def figures(shares: dict[str, float], fits: int = 1, images: int = 4000) -> Figures:
    """Two classifiers per arm that are right for a share of the images."""
    labels = np.arange(images) % 2
    order = np.random.default_rng(0).permutation(images)
    probabilities = {}
    for name, share in shares.items():
        of_seeds = []
        for shift in (0.0, 0.02):
            right = np.empty(images, bool)
            right[order] = np.arange(images) < (share + shift) * images
            of_seeds.append(np.eye(2, dtype=np.float32)[np.where(right, labels, 1 - labels)])
        probabilities[name] = np.stack(of_seeds)
    groups = np.arange(images).astype(str)
    return Figures(Predictions(("a", "b"), labels, groups, probabilities, fits), 0)


ARMS = [
    arm("real", 0.0), arm("g", 1.0, role="compared"), arm("g", 2.0, role="compared"),
    arm("g unfiltered", 1.0, role="shown"),
]  # fmt: skip
SHARES = dict(zip([arm.name for arm in ARMS], [0.5, 0.7, 0.705, 0.9], strict=True))


def test_saturation_uses_the_replicates_of_each_family() -> None:
    arms = {arm.name: arm for arm in ARMS}
    found = saturations(figures(SHARES), arms, "accuracy", 0.02)
    assert list(found) == ["g"]
    assert (found["g"].ratio, found["g"].low, found["g"].high) == (1.0, 1.0, 1.0)
    assert saturations(figures(SHARES, fits=2), arms, "accuracy", 0.001)["g"].ratio == 2.0


def test_few_images_leave_the_saturation_open() -> None:
    arms = {arm.name: arm for arm in ARMS}
    shares = {**SHARES, "g x1": 0.56, "g x2": 0.6}
    found = saturations(figures(shares, images=40), arms, "accuracy", 0.01)["g"]
    assert found.low < found.high


def test_every_arm_has_an_interval_on_val() -> None:
    found = on_val(figures(SHARES, images=100), "accuracy")
    assert list(found) == list(SHARES)
    assert found["real"].mean == pytest.approx(0.51)
    # Two seeds that agree; the error of 100 images is 0.05.
    assert found["real"].high - found["real"].low > 0.15
