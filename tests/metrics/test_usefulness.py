"""A generator that learnt nothing differs from a poor one that learnt something."""

from __future__ import annotations

import numpy as np

from engine.core.notice import Notice
from engine.metrics.usefulness import usefulness
from engine.results.images import Usefulness


def vectors(count: int, spread: float, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng([count, int(10 * spread), int(10 * shift)])
    return (shift + spread * random.normal(size=(count, 6))).astype(np.float32)


LABELS = np.asarray(["a", "b"] * 100, dtype=object)


def codes(signs: Usefulness) -> list[str]:
    return [notice.code for notice in signs.notices()]


def test_images_elsewhere_cover_nothing_and_are_distinguished() -> None:
    signs = usefulness(vectors(200, 1), LABELS, vectors(120, 0.5, 8), LABELS[:120], 0)
    assert signs.coverage == 0
    assert (signs.area or 0) > 0.99
    assert codes(signs) == ["covers_nothing"]


def test_equal_and_less_varied_images_are_no_alarm() -> None:
    real = vectors(200, 1)
    same = usefulness(real, LABELS, vectors(199, 1.01), LABELS[:199], 0)
    assert (same.coverage or 0) > 0.8
    assert 0.35 < (same.area or 0) < 0.65
    # Half the spread: poor, but not nothing.
    poor = usefulness(real, LABELS, vectors(200, 0.5), LABELS, 0)
    assert codes(same) == codes(poor) == []


def test_same_picture_again_and_again_is_an_alarm() -> None:
    real = vectors(200, 1)
    # Near the centre, where pictures are close to many real ones.
    signs = usefulness(real, LABELS, vectors(200, 0.1), LABELS, 0)
    assert 0.08 < (signs.spread or 0) < 0.12
    assert "one_picture" in codes(signs)


def test_too_few_common_images_say_nothing() -> None:
    other = np.asarray(["c"] * 200, dtype=object)
    assert usefulness(vectors(200, 1), LABELS, vectors(200, 1), other, 0) == Usefulness(pairs=0)
    assert usefulness(vectors(9, 1), LABELS[:9], vectors(9, 1), LABELS[:9], 0).coverage is None


def test_class_seen_by_chance_alone_is_an_alarm_if_the_labeler_is_a_witness() -> None:
    by_chance = Usefulness(seen=0.12, chance=0.1, seen_val=0.8)
    assert by_chance.notices() == [Notice.of("shows_no_class", seen=12.0, chance=10.0, val=80.0)]
    assert codes(Usefulness(seen=0.4, chance=0.1, seen_val=0.8)) == []
    assert codes(Usefulness(seen=0.12, chance=0.1, seen_val=0.25)) == []
