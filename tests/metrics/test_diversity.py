from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from engine.metrics.diversity import Directions, vendi_score


def vectors(count: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal((count, width)) @ np.diag(np.linspace(0.1, 2, width))).astype(
        np.float32
    )


def plain_vendi(held: np.ndarray) -> float:
    """Definition 3.1 of the paper, by the entropy of the whole kernel matrix."""
    unit = held / np.linalg.norm(held.astype(np.float64), axis=1, keepdims=True)
    shares = linalg.eigvalsh(unit @ unit.T / len(held))
    shares = shares[shares > 1e-14]
    return float(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize(("count", "width"), [(60, 12), (12, 60), (40, 40)])
def test_score_equals_the_formula(count: int, width: int) -> None:
    held = vectors(count, width)
    assert vendi_score(held) == pytest.approx(plain_vendi(held), abs=1e-6)
    assert Directions.of(held).vendi == pytest.approx(plain_vendi(held), abs=1e-6)


def test_score_counts_unrelated_images() -> None:
    assert vendi_score(np.eye(7)) == pytest.approx(7)
    assert vendi_score(np.repeat(np.eye(7), 5, axis=0)) == pytest.approx(7)
    assert vendi_score(np.full((9, 4), 0.5)) == pytest.approx(1)


def test_partial_sums_of_workers_give_the_score_of_all() -> None:
    held = vectors(9000, 16)
    whole = Directions.of(held)
    pieces = [Directions.of(held[start:stop]) for start, stop in ((0, 1), (1, 5000), (5000, 9000))]
    merged = sum(pieces[1:], pieces[0])
    assert merged.n == 9000
    assert merged.vendi == pytest.approx(whole.vendi, abs=1e-9)
    assert whole.vendi == pytest.approx(vendi_score(held[::-1]), abs=1e-9)
    with pytest.raises(ValueError, match="no vectors"):
        _ = Directions.of(held[:0]).vendi
