"""A harm to a part of the test set is found, whatever the gain on average."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.comparison.classified import Predictions
from engine.comparison.figures import Figures
from engine.comparison.subgroups import part_of, subgroups
from engine.report.sections.subgroups import losing_arms, part_rows
from engine.results.comparison import Contrast, Subgroup
from tests.results import contrast


def planted() -> tuple[Figures, list[str | None]]:
    """The arm is right more often for device a, and less often for device b and c."""
    random = np.random.default_rng(0)
    labels = np.arange(1200) % 3
    device = np.asarray(["a"] * 900 + ["b"] * 280 + ["c"] * 10 + [""] * 10)
    # Device b has two of the three classes.
    labels[900:1180] %= 2
    shares = {"real": np.full(1200, 0.8), "g x1": np.where(device == "a", 0.9, 0.6)}
    probabilities = {}
    for arm, share in shares.items():
        right = random.random((5, 1200)) < share
        wrong = (labels + 1) % 2
        probabilities[arm] = np.eye(3, dtype=np.float32)[np.where(right, labels, wrong)]
    groups = np.arange(1200).astype(str)
    made = Figures(Predictions(("x", "y", "z"), labels, groups, probabilities, 5), 0)
    return made, [value or None for value in device]


@pytest.fixture(scope="module")
def parts() -> dict[str, Subgroup]:
    figures, devices = planted()
    pairs: list[Contrast] = [contrast(), contrast(twin=True, arm="g x1", against="real")]
    found = subgroups(figures, {"device": devices}, pairs, "macro_f1")
    return {part.value: part for part in found}


def test_each_value_is_a_part_and_missing_ones_are_left_out(parts: dict[str, Subgroup]) -> None:
    assert {value: part.images for value, part in parts.items()} == {"a": 900, "b": 280, "c": 10}


def test_the_part_that_loses_is_named(parts: dict[str, Subgroup]) -> None:
    assert losing_arms(parts["a"], 5) == []
    assert losing_arms(parts["b"], 5) == ["g x1"]
    assert parts["a"].to_real["g x1"].low > 0
    assert losing_arms(parts["b"], 4) == []


def test_images_of_one_patient_are_no_part() -> None:
    figures, devices = planted()
    rows = [place for place, device in enumerate(devices) if device == "b"]
    own = figures.predictions.of_images(np.asarray(rows))
    patient = Figures(replace(own, groups=np.repeat("p", len(rows))), 0)
    part = part_of(patient, "device", "b", [contrast()], "macro_f1")
    assert (part.scores, part.images, part.groups) == ({}, 280, 1.0)


def test_few_images_have_no_figures(parts: dict[str, Subgroup]) -> None:
    assert parts["c"].scores == {}
    assert part_rows(parts["c"]) == []


def test_a_mean_over_classes_is_over_those_that_occur(parts: dict[str, Subgroup]) -> None:
    # 0.8 of two classes; the third would count as 0 and make it 0.53.
    assert parts["b"].scores["real"].mean == pytest.approx(0.8, abs=0.03)
    (row,) = part_rows(parts["b"])
    assert row["to_real"] == pytest.approx(-0.2, abs=0.05)
    assert row["to_real"] == row["to_baseline"]
