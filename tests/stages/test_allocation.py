from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.results.images import AllocatedClass
from engine.settings_labels import Allocation
from engine.stages.allocation import allocate, divided, phi_coefficients

COUNTS = {"a, x": 10, "a, y": 50, "b, x": 100}
LABELS = {"a, x": ("a", "x"), "a, y": ("a", "y"), "b, x": ("b", "x")}
F1 = {"a": 0.3, "b": 0.9, "x": 0.55, "y": 0.8}
WORTH = dict.fromkeys(F1, 0.25)


def allocated(phi: dict[tuple[str, str], float], **settings: Any) -> dict[str, AllocatedClass]:
    return allocate(
        Allocation(**{"total": 100, "correlation": 0, "impact": 0, **settings}),
        COUNTS, LABELS, F1, WORTH, phi,
    )  # fmt: skip


def test_tier_is_that_of_the_weakest_label() -> None:
    entries = allocated({})
    assert {name: (entry.f1, entry.tier, entry.weight) for name, entry in entries.items()} == {
        "a, x": (0.3, 0, 3.0), "a, y": (0.3, 0, 3.0), "b, x": (0.55, 1, 2.0)
    }  # fmt: skip
    # Shares of 3 : 3 : 2, rounded by largest remainder.
    assert {name: entry.images for name, entry in entries.items()} == {
        "a, x": 38, "a, y": 37, "b, x": 25
    }  # fmt: skip


def test_class_above_all_tiers_gets_nothing() -> None:
    entries = allocated({}, tiers=[(0.5, 1)])
    assert (entries["b, x"].tier, entries["b, x"].images) == (None, 0)
    assert entries["a, x"].images == entries["a, y"].images == 50


def test_labels_that_occur_together_raise_the_weight() -> None:
    entries = allocated({("a", "x"): 0.4, ("b", "x"): -0.9}, correlation=0.5)
    assert entries["a, x"].weight == pytest.approx(3 * (1 + 0.5 * 0.4))
    # Labels that avoid each other do not lower the weight.
    assert entries["b, x"].weight == 2.0


def test_what_the_objective_lacks_raises_the_weight() -> None:
    entries = allocated({}, impact=1.0)
    # a and x lack 0.7 and 0.45, a and y 0.7 and 0.2, b and x 0.1 and 0.45.
    assert entries["a, x"].impact == 1
    assert entries["a, y"].impact == pytest.approx(0.9 / 1.15)
    assert entries["b, x"].weight == pytest.approx(2 * (1 + 0.55 / 1.15))


def test_inverse_frequency_reads_no_scores() -> None:
    settings = Allocation(total=130, method="inverse_frequency")
    entries = allocate(settings, COUNTS, LABELS, {}, WORTH, {})
    assert {name: entry.images for name, entry in entries.items()} == {
        "a, x": 100, "a, y": 20, "b, x": 10
    }  # fmt: skip
    assert all(entry.f1 is None for entry in entries.values())


def test_no_class_exceeds_the_largest_ratio_and_the_rest_goes_to_others() -> None:
    entries = allocated({}, largest_ratio=1.0)
    assert {name: entry.images for name, entry in entries.items()} == {
        "a, x": 10, "a, y": 50, "b, x": 40
    }  # fmt: skip
    assert sum(entry.images for entry in allocated({}, largest_ratio=0.5).values()) == 80


@given(
    st.integers(0, 500),
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 100)), min_size=1, max_size=8),
)
def test_total_is_divided_completely_within_the_limits(
    total: int, classes: list[tuple[float, int]]
) -> None:
    weights = {str(number): weight for number, (weight, _) in enumerate(classes)}
    limits = {str(number): limit for number, (_, limit) in enumerate(classes)}
    shares = divided(total, weights, limits)
    assert all(0 <= count <= limits[name] for name, count in shares.items())
    possible = sum(limits[name] for name, weight in weights.items() if weight > 0)
    assert sum(shares.values()) == min(total, possible)


def test_phi_is_pearsons_over_images_with_both_labels() -> None:
    random = np.random.default_rng(0)
    targets = (random.random((200, 3)) < 0.4).astype(float)
    targets[:, 1] = np.where(random.random(200) < 0.8, targets[:, 0], targets[:, 1])
    targets[:20, 2] = np.nan
    phi = phi_coefficients(targets, ["a", "b", "c"])
    assert phi["a", "b"] == pytest.approx(np.corrcoef(targets[:, 0], targets[:, 1])[0, 1])
    assert phi["b", "c"] == pytest.approx(np.corrcoef(targets[20:, 1], targets[20:, 2])[0, 1])
    assert phi_coefficients(np.ones((5, 2)), ["a", "b"]) == {("a", "b"): 0.0}
