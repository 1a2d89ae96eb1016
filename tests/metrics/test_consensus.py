from __future__ import annotations

import numpy as np
import pytest

from engine.metrics.consensus import consensus


def voter(*seen: int, sure: float = 0.9) -> np.ndarray:
    """Probabilities of three classes for images in which a class is seen."""
    values = np.full((len(seen), 3), (1 - sure) / 2)
    values[np.arange(len(seen)), seen] = sure
    return values


LABELS = np.asarray([0, 0, 0, 0, 0])
VOTERS = {"a": voter(0, 1, 1, 1, 1), "b": voter(0, 0, 1, 1, 2), "c": voter(0, 0, 0, 1, 0)}


def test_label_is_flagged_if_enough_voters_see_another_class() -> None:
    votes = consensus(VOTERS, LABELS, needed=2, most=1.0, sure=0.0)
    assert votes.against.tolist() == [0, 1, 2, 3, 2]
    assert votes.flagged.tolist() == [False, False, True, True, True]


def test_label_changes_only_to_a_class_that_enough_voters_see() -> None:
    votes = consensus(VOTERS, LABELS, needed=2, most=1.0, sure=0.0)
    # Of the last image two voters see two other classes.
    assert votes.changed.tolist() == [False, False, True, True, False]
    assert votes.new.tolist() == [0, 0, 1, 1, 0]


def test_unsure_voters_change_nothing() -> None:
    votes = consensus(VOTERS, LABELS, needed=2, most=1.0, sure=0.7)
    assert votes.flagged.tolist() == [False, False, True, True, True]
    assert votes.changed.tolist() == [False, False, False, True, False]
    assert votes.confidence[2] == pytest.approx((0.9 + 0.9 + 0.05) / 3)


def test_cap_keeps_the_least_likely_labels_and_counts_the_rest() -> None:
    votes = consensus(VOTERS, LABELS, needed=2, most=0.2, sure=0.0)
    assert votes.flagged.tolist() == [False, False, False, True, False]
    assert votes.cut == 2
    assert consensus(VOTERS, LABELS, needed=2, most=0.1, sure=0.0).flagged.sum() == 0


def test_labels_that_voters_cannot_judge_stay() -> None:
    judged = np.asarray([True, True, False, True, True])
    votes = consensus(VOTERS, LABELS, needed=2, most=1.0, sure=0.0, judged=judged)
    assert votes.flagged.tolist() == [False, False, False, True, True]
    assert votes.new.tolist() == [0, 0, 0, 1, 0]
