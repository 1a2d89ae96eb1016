"""How often does the field's habit say that synthetic images help, where they do not?

The same simulated studies (`benchmarks.simulated`), with predictions of 20 late epochs of each
training, are judged in several ways:

    best epoch     the mean over three seeds of the best epoch on test is higher than that of real
                   images, for the best of six ratios on test
    and t < 5%     the same, if a t-test over the three pairs of seeds is significant
    on val         epoch and ratio are chosen on val, and test is used once; the mean is higher
    engine         epoch and ratio are chosen on val, then five new fits are judged by the engine

The last column is the share of studies with a true gain of so many points that each finds.

`python -m benchmarks.published_habit [--studies N] [--processes N] [--quick]`
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from scipy import stats

from benchmarks.known_answers import counted, share
from benchmarks.simulated import CLASSES, FIT, Images, Skill, decide, gain_of
from benchmarks.timing import machine, print_table

_EPOCHS, _SEEDS, _RATIOS = 20, 3, 6
# Standard deviations on the scale of log odds: of an epoch as a whole, and of each image in it.
_EPOCH, _IMAGE = 0.1, 0.5
_TEST, _VAL = 400, 300
WAYS = ("best epoch", "and t < 5%", "on val", "engine")


@dataclass(frozen=True)
class Curves:
    """Accuracy of each seed and epoch on val and on test: (seeds, epochs)."""

    val: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, val: Images, test: Images, gain: float, random: np.random.Generator) -> Curves:
        epochs = random.normal(0, _EPOCH, (_SEEDS, _EPOCHS, 1))
        of_fits = random.normal(0, FIT, (_SEEDS, 1, 1))
        curves = []
        for images in (val, test):
            own = Skill.of(images, 1, gain, random).of_images
            odds = images.hard + own + of_fits + epochs
            odds = odds + random.normal(0, _IMAGE, odds.shape)
            curves.append((random.random(odds.shape) < 1 / (1 + np.exp(-odds))).mean(-1))
        return cls(*curves)

    def chosen_on_val(self) -> np.ndarray:
        """Accuracy on test of each seed, at the epoch that is best on val."""
        return np.asarray(self.test[np.arange(len(self.val)), self.val.argmax(1)])


def judged(points: float, seed: int) -> dict[str, bool]:
    """Whether each way says that one of the ratios helps. points: the true gain of all ratios."""
    random = np.random.default_rng([7, seed])
    val, test = (Images.of([1] * count, random) for count in (_VAL, _TEST))
    gain = gain_of(points)
    real = Curves.of(val, test, 0.0, random)
    ratios = [Curves.of(val, test, gain, random) for _ in range(_RATIOS)]
    best_real = real.test.max(1)
    best = max((curves.test.max(1) for curves in ratios), key=np.mean)
    on_val = max(ratios, key=lambda curves: curves.val.max(1).mean()).chosen_on_val()
    higher = bool(best.mean() > best_real.mean())
    return {
        "best epoch": higher,
        "and t < 5%": higher and bool(stats.ttest_rel(best, best_real).pvalue < 0.05),
        "on val": bool(on_val.mean() > real.chosen_on_val().mean()),
        "engine": decide(
            test, {"real": 0.0, "made": gain}, random, objective="accuracy"
        ).word == "helps",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="40 studies of each kind")
    arguments = parser.parse_args()
    count = 40 if arguments.quick else arguments.studies
    print(machine("scipy"))
    print(f"{_TEST} test and {_VAL} val images in {len(CLASSES)} classes, {_RATIOS} ratios")
    os.environ["OMP_NUM_THREADS"] = "1"
    lines: dict[str, list[str]] = {way: [way] for way in WAYS}
    gains: Sequence[float] = (0.0, 0.02, 0.05, 0.1)
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        for points in gains:
            run = partial(judged, points)
            name = f"{100 * points:g} points"
            made = list(counted(name, pool.map(run, range(count), chunksize=5), count))
            for way in WAYS:
                lines[way].append(share(sum(study[way] for study in made), count))
    print_table(
        f"Studies that say “helps”, in % of {count:,} each, by the true gain",
        ["way", *(f"{100 * points:g} points" for points in gains)], list(lines.values()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
