"""Simulated studies with image-level predictions, whose truth is known.

Each image has a difficulty. Each arm finds some images and some patients harder than other arms do,
by chance (`_OWN`), so that arms differ on a test set although they are equally good. Each generator
fit has a random effect of its own (`FIT`), as each draw of its images has (`_DRAW`). All are
effects on the log odds of a correct prediction, so that arms with the same `gain` are equally good
in expectation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

from engine.comparison.classified import Predictions
from engine.comparison.figures import Figures
from engine.comparison.verdict import DeclaredContrast, compare
from engine.metrics.classification import METRICS
from engine.results.comparison import Contrast
from engine.settings import Evaluate

CLASSES = ("a", "b", "c", "d")
# Standard deviations on the scale of log odds.
_HARD, _OWN, _PATIENT, FIT, _DRAW = 2.0, 0.5, 0.5, 0.15, 0.05
_CENTRE = 1.5


@dataclass(frozen=True)
class Images:
    """Images of a split: their class, patient and difficulty."""

    labels: np.ndarray
    groups: np.ndarray
    hard: np.ndarray

    @classmethod
    def of(cls, sizes: Sequence[int], random: np.random.Generator) -> Images:
        """sizes: images of each patient."""
        groups = np.repeat(np.arange(len(sizes)), sizes)
        patients = random.normal(0, _PATIENT, len(sizes))[groups]
        hard = random.normal(_CENTRE, _HARD, len(groups)) + patients
        return cls(random.integers(0, len(CLASSES), len(groups)), groups, hard)


@dataclass(frozen=True)
class Skill:
    """What an arm adds to the log odds of each image, and the effect of each of its fits."""

    of_images: np.ndarray
    of_fits: np.ndarray

    @classmethod
    def of(cls, images: Images, fits: int, gain: float, random: np.random.Generator) -> Skill:
        own = random.normal(0, _OWN, len(images.hard))
        patients = random.normal(0, _OWN, images.groups.max() + 1)[images.groups]
        of_fits = random.normal(0, FIT, fits) + random.normal(0, _DRAW, fits)
        return cls(gain + own + patients, of_fits)

    def predictions(self, images: Images, random: np.random.Generator) -> np.ndarray:
        """One-hot predictions float32 (fits, n, classes)."""
        odds = images.hard + self.of_images + self.of_fits[:, None]
        right = random.random(odds.shape) < 1 / (1 + np.exp(-odds))
        others = (images.labels + random.integers(1, len(CLASSES), odds.shape)) % len(CLASSES)
        return np.eye(len(CLASSES), dtype=np.float32)[np.where(right, images.labels, others)]


def figures(
    images: Images, gains: Mapping[str, float], fits: int, random: np.random.Generator
) -> Figures:
    """A comparison of arms, with one classifier for each of `fits` fits."""
    made = {
        arm: Skill.of(images, fits, gain, random).predictions(images, random)
        for arm, gain in gains.items()
    }
    predictions = Predictions(CLASSES, images.labels, images.groups.astype(str), made, fits)
    return Figures(predictions, int(random.integers(2**31)))


@cache
def _accuracies() -> tuple[np.ndarray, np.ndarray]:
    """Gains, and the expected accuracy that each has."""
    gains = np.linspace(-3, 6, 181)
    spread = np.sqrt(_HARD**2 + _PATIENT**2 + 2 * _OWN**2 + FIT**2 + _DRAW**2)
    odds = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000) * spread + _CENTRE
    return gains, np.asarray([(1 / (1 + np.exp(-(odds + gain)))).mean() for gain in gains])


def gain_of(points: float) -> float:
    """The change of log odds that raises the expected accuracy by this share."""
    gains, accuracies = _accuracies()
    return float(np.interp(np.interp(0.0, gains, accuracies) + points, accuracies, gains))


@dataclass(frozen=True)
class Decision:
    """What a simulated study says of its synthetic arm. effect: in standard errors."""

    word: str
    effect: float
    decided: bool


def decide(
    images: Images, gains: Mapping[str, float], random: np.random.Generator, fits: int = 5,
    objective: str = "macro_f1",
) -> Decision:  # fmt: skip
    """The verdict on the arm `made` against all other arms; the first of these is real."""
    baselines = tuple(name for name in gains if name != "made")
    declared = DeclaredContrast("made", baselines, baselines[0], baselines[0])
    found = figures(images, gains, fits, random)
    (contrast,) = compare(found, [declared], objective, Evaluate(bootstrap_draws=1000), sized=False)
    error = float(np.std(contrast.differences, ddof=1)) / np.sqrt(fits)
    return Decision(
        contrast.word, contrast.effect.estimate / max(error, 1e-9), contrast.obstacle is None
    )


def two_folders(seed: int) -> Decision:
    """Two arms that are equally good, on 400 images without groups."""
    random = np.random.default_rng([1, seed])
    images = Images.of([1] * 400, random)
    return decide(images, {"other": 0.0, "made": 0.0}, random)


def six_ratios(seed: int) -> Decision:
    """Six ratios that are as good as real images; the best on val is confirmed by fresh fits."""
    random = np.random.default_rng([2, seed])
    val, test = Images.of([1] * 300, random), Images.of([1] * 400, random)
    ratios = {f"made x{number}": 0.0 for number in range(6)}
    # What a ratio is worth apart from chance, the same on val and test: nothing.
    chosen = figures(val, {"real": 0.0, **ratios}, 1, random)
    best = max(ratios, key=lambda name: chosen.predictions.objective(name, "macro_f1").mean())
    return decide(test, {"real": 0.0, "made": ratios[best]}, random)


def few_patients(seed: int, gain: float = 0.0, objective: str = "macro_f1") -> Decision:
    """Two arms that are equally good, on 25 to 40 patients of 1 to 30 images."""
    random = np.random.default_rng([3, seed])
    sizes = random.integers(1, 31, random.integers(25, 41))
    images = Images.of(sizes, random)
    return decide(images, {"other": 0.0, "made": gain}, random, objective=objective)


def one_wrong_baseline(seed: int) -> Decision:
    """An arm that equals the best of four baselines and is better than the others."""
    random = np.random.default_rng([4, seed])
    images = Images.of([1] * 400, random)
    gains = {"real": -0.3, "oversampled": -0.2, "class_weighted": 0.0, "traditional": -0.1}
    return decide(images, {**gains, "made": 0.0}, random)


DESIGNS = {
    "two folders": two_folders, "six ratios against real": six_ratios,
    "25 to 40 patients": few_patients, "one wrong baseline": one_wrong_baseline,
}  # fmt: skip


def noticed(design: str, seed: int) -> bool:
    """Whether a study finds the difference that another study of its kind says it can find."""
    random = np.random.default_rng([5, seed])
    sizes = [1] * 400 if design == "two folders" else random.integers(1, 31, 40)
    images = Images.of(sizes, random)
    declared = DeclaredContrast("made", ("other",), "other", "other")

    def contrast(gain: float) -> Contrast:
        found = figures(images, {"other": 0.0, "made": gain}, 5, random)
        return compare(found, [declared], "accuracy", Evaluate(bootstrap_draws=1000))[0]

    stated = contrast(0.0)
    if stated.detectable is None:
        return False
    images = Images.of(sizes, random)
    return contrast(gain_of(stated.detectable)).word == "helps"


def covered(images: int, seed: int) -> dict[str, bool]:
    """Whether the intervals of a single arm contain the expected scores of a new fit."""
    random = np.random.default_rng([6, seed])
    found = figures(Images.of([1] * images, random), {"real": 0.0}, 5, random)
    return {
        metric: interval.low <= expected_scores()[metric] <= interval.high
        for metric in ("accuracy", "macro_f1")
        for interval in [found.mean("real", metric)]
    }


@cache
def expected_scores() -> dict[str, float]:
    """The scores of new fits on very many images."""
    random = np.random.default_rng(0)
    metrics: dict[str, list[float]] = {"accuracy": [], "macro_f1": []}
    for _ in range(20):
        images = Images.of([1] * 20_000, random)
        predictions = Skill.of(images, 10, 0.0, random).predictions(images, random)
        made = Predictions(
            CLASSES, images.labels, images.groups.astype(str), {"real": predictions}, 10
        )
        matrices = made.confusions("real")
        for name, values in metrics.items():
            values.append(float(METRICS[name](matrices).mean()))
    return {name: float(np.mean(values)) for name, values in metrics.items()}
