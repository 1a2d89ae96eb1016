"""Fréchet and kernel distance, precision, recall, density and coverage, each against the plain
formula or another library's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg
from scipy.spatial.distance import cdist

from engine.metrics.frechet import Reference, floor, frechet_distance
from engine.metrics.kernel import kernel_distance
from engine.metrics.moments import Moments, merged
from engine.metrics.prdc import prdc


def vectors(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((count, width)) @ np.diag(np.linspace(0.2, 2, width))
    return (mixed + shift).astype(np.float32)


def plain_frechet(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    shift = one.mean(0) - other.mean(0)
    root = linalg.sqrtm(first @ second).real
    return float(shift @ shift + np.trace(first + second - 2 * root))


def test_moments_of_pieces_equal_those_of_the_whole() -> None:
    held = vectors(9000, 12, 0, shift=1000.0)
    whole = Moments.of(held)
    pieces = merged(Moments.of(held[start:stop]) for start, stop in
                    ((0, 1), (1, 700), (700, 9000)))  # fmt: skip
    assert pieces.n == 9000
    np.testing.assert_allclose(pieces.mean, held.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(pieces.scatter, whole.scatter, rtol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov(held.astype(np.float64), rowvar=False),
                               rtol=1e-9)  # fmt: skip
    with pytest.raises(ValueError, match="a covariance needs two"):
        _ = Moments.of(held[:1]).covariance
    with pytest.raises(ValueError, match="no vectors"):
        Moments.of(held[:0])


def test_frechet_distance_equals_the_formula() -> None:
    one, other = vectors(400, 24, 0), vectors(300, 24, 1, shift=0.3)
    assert frechet_distance(one, other) == pytest.approx(plain_frechet(one, other), rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_merged_moments_give_the_distance_of_all_vectors() -> None:
    one, other = vectors(500, 24, 0), vectors(450, 24, 1, shift=0.1)
    halves = Moments.of(other[:200]) + Moments.of(other[200:])
    reference = Reference(Moments.of(one))
    assert reference.distance(halves) == pytest.approx(
        reference.distance(Moments.of(other)), abs=1e-9
    )


def test_short_computation_equals_the_long_one_for_few_vectors() -> None:
    one, other = vectors(20, 64, 0), vectors(30, 64, 1, shift=0.2)
    long = Reference(Moments.of(one)).distance(Moments.of(other))
    assert frechet_distance(one, other) == pytest.approx(long, rel=1e-6)


def test_real_images_are_closer_than_any_other_distribution() -> None:
    real = vectors(600, 16, 0)
    assert floor(real, 0) < frechet_distance(real[:300], vectors(300, 16, 1, shift=0.5)) / 3


def test_kernel_distance_is_the_unbiased_formula() -> None:
    one, other = vectors(60, 10, 0).astype(np.float64), vectors(50, 10, 1).astype(np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 10 + 1) ** 3)

    within = [
        np.mean([kernel(a, b) for i, a in enumerate(held) for j, b in enumerate(held) if i != j])
        for held in (one, other)
    ]
    across = np.mean([kernel(a, b) for a in one for b in other])
    expected = within[0] + within[1] - 2 * across
    assert kernel_distance(one, other, 0, 4).estimate == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="minimum 4 of each"):
        kernel_distance(one[:3], other, 0)


def test_kernel_distance_of_blocks_equals_the_formula_in_any_order() -> None:
    one, other = (
        held.astype(np.float64) for held in (vectors(2500, 8, 0), vectors(1100, 8, 1, shift=0.2))
    )
    kernels = [(a @ b.T / 8 + 1) ** 3 for a, b in ((one, one), (other, other), (one, other))]
    pairs = [
        (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))
        for kernel in kernels[:2]
    ]
    expected = sum(pairs) - 2 * kernels[2].mean()
    found = kernel_distance(one, other, 0, 8)
    assert found.estimate == pytest.approx(expected, abs=1e-9)
    # Shards may arrive in another order.
    again = kernel_distance(np.concatenate([one[900:], one[:900]]), other[::-1], 0, 8)
    assert again.estimate == pytest.approx(expected, abs=1e-9)


def test_kernel_interval_equals_that_of_random_halves() -> None:
    one, other = vectors(40, 6, 0), vectors(30, 6, 1, shift=0.2)
    random = np.random.default_rng(7)
    halves = [
        kernel_distance(
            one[random.permutation(40)[:20]], other[random.permutation(30)[:15]], 0, 2
        ).estimate
        for _ in range(20)
    ]
    found = kernel_distance(one, other, 7, 20)
    spread = 1.96 * np.std(halves, ddof=1)
    assert (found.low, found.high) == pytest.approx(
        (found.estimate - spread, found.estimate + spread), abs=1e-9
    )


def test_kernel_interval_contains_zero_only_for_equal_distributions() -> None:
    held_nil = [
        (found.low <= 0 <= found.high)
        for seed in range(40)
        for found in [kernel_distance(vectors(80, 8, 2 * seed), vectors(80, 8, 2 * seed + 1), seed)]
    ]
    assert sum(held_nil) >= 34
    apart = kernel_distance(vectors(80, 8, 0), vectors(80, 8, 1, shift=1.0), 0)
    assert apart.low > 0


def plain_prdc(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    radius = [np.sort(cdist(held, held), 1)[:, k] for held in (real, fake)]
    apart = cdist(real, fake)
    return (
        float((apart < radius[0][:, None]).any(0).mean()),
        float((apart < radius[1][None, :]).any(1).mean()),
        float((apart < radius[0][:, None]).sum() / (k * len(fake))),
        float((apart.min(1) < radius[0]).mean()),
    )


def test_prdc_equals_the_formulas_over_many_blocks() -> None:
    real, fake = vectors(1500, 6, 0), vectors(1300, 6, 1, shift=0.4)
    found = prdc(real, fake, 5)
    expected = plain_prdc(real.astype(np.float64), fake.astype(np.float64), 5)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected)
    with pytest.raises(ValueError, match="more than k = 5"):
        prdc(real[:5], fake)


def test_prdc_does_not_depend_on_the_order_of_shards() -> None:
    real, fake = vectors(700, 6, 0), vectors(600, 6, 1, shift=0.4)
    mixed = prdc(np.concatenate([real[300:], real[:300]]), fake[::-1])
    found = prdc(real, fake)
    assert vars(mixed) == pytest.approx(vars(found), abs=1e-12)


def test_one_repeated_image_is_precise_and_covers_nothing() -> None:
    real = vectors(300, 6, 0)
    same = np.repeat(real[:1], 300, axis=0) + 1e-3 * vectors(300, 6, 1)
    found = prdc(real, same, 5)
    assert found.precision == 1.0
    assert found.coverage < 0.2
    assert found.recall < 0.05
