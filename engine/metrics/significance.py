"""Whether a difference is more than chance: tests, corrections and the verdict of a comparison.

Differences are paired: replicate i of one arm against replicate i of the other (the same seed, the
same test images). A replicate is a generator fit with its images and classifiers or, with a single
fit, a classifier's seed. Two methods cover two sources of chance and must agree for any verdict:

    paired t     over replicates: would other fits and seeds agree?
    bootstrap    over replicates and test groups at once: would other patients agree?
                 (`engine.metrics.resampling`)

Fewer than `LEAST_REPLICATES` or `LEAST_GROUPS` leave every comparison undecided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from engine.core.notice import Notice
from engine.metrics.power import Design, detectable, size_needed
from engine.metrics.resampling import Resampled
from engine.results.comparison import AgainstBaseline, Estimate, Verdict, Word

LEAST_REPLICATES = 5
# With few groups a percentile interval is too narrow: if all replicates make the same errors, 9% of
# null studies with 10 equal groups are significant, 5% to 7% with 20 to 50 (300 simulated each).
LEAST_GROUPS = 20
# With five replicates the p-value is at least 1/16, with eight 1/128.
LEAST_FOR_WILCOXON = 8


def paired_t(differences: Sequence[float], level: float = 0.95) -> Estimate:
    """Student's t interval of the mean of paired differences. Raises `ValueError` for fewer than
    two.

    If all are equal there is no spread to test against: the interval is a point and p is 1, because
    equal differences are common by chance on few images.
    """
    if len(differences) < 2:
        raise ValueError(f"too few replicates: {len(differences)} (an interval needs two)")
    mean = float(np.mean(differences))
    if _without_spread(differences):
        return Estimate(estimate=mean, low=mean, high=mean, p=1.0, level=level)
    test = stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval(level)
    return Estimate(
        estimate=mean, low=float(low), high=float(high), p=float(test.pvalue), level=level
    )


def _without_spread(differences: Sequence[float]) -> bool:
    return bool(stats.sem(differences) <= 1e-12)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979, step-down). Raises `ValueError` for NaN."""
    if not np.isfinite(p_values).all():
        raise ValueError(f"a p-value is not a number: {list(p_values)}")
    order = np.argsort(p_values)
    multiplied = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(multiplied).clip(max=1.0)
    return list(adjusted.tolist())


def tost(differences: Sequence[float], margin: float) -> float:
    """p-value of "the difference exceeds ± margin" (two one-sided t tests, Schuirmann 1987); 1
    without spread."""
    if _without_spread(differences):
        return 1.0
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return float(max(above, below))


def standardised(differences: Sequence[float]) -> float | None:
    """Effect size of paired differences: mean over standard deviation (Cohen's d_z), corrected for
    bias (Hedges 1981). None without spread, and for two pairs, where the correction yields 0."""
    values = np.asarray(differences, dtype=float)
    spread = float(values.std(ddof=1))
    if spread <= 1e-12 or len(values) < 3:
        return None
    return float(values.mean() / spread * (1 - 3 / (4 * (len(values) - 1) - 1)))


def wilcoxon(differences: Sequence[float]) -> float | None:
    """p-value of the signed-rank test (Wilcoxon 1945, exact without ties); None below
    `LEAST_FOR_WILCOXON` replicates, and if all differences are 0."""
    values = np.asarray(differences, dtype=float)
    if len(values) < LEAST_FOR_WILCOXON or not values.any():
        return None
    return float(stats.wilcoxon(values).pvalue)


def saturation(
    ratios: Sequence[float], scores: np.ndarray, resampled: np.ndarray, margin: float,
    draws: int = 2000, seed: int = 0,
) -> tuple[float, float, float]:  # fmt: skip
    """The lowest ratio within `margin` of the best, with its 95% percentile interval over resampled
    replicates and images.

    ratios: rising, the first of them 0. scores: (replicates, ratios). resampled: the scores with
    resampled images (tries, replicates, ratios).
    """
    random = np.random.default_rng(seed)
    images = random.integers(0, len(resampled), (draws, 1))
    chosen = random.integers(0, len(scores), (draws, len(scores)))
    means = np.concatenate([scores.mean(0, keepdims=True), resampled[images, chosen].mean(1)])
    near = means >= means.max(1, keepdims=True) - margin
    points = np.asarray(ratios)[near.argmax(1)]
    low, high = np.quantile(points[1:], [0.025, 0.975], method="inverted_cdf")
    return float(points[0]), float(low), float(high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact McNemar test of two classifiers on the same images: p-value of "equally accurate".
    first, second: whether each is right, bool (n,).

    Descriptive, for a single replicate: pooled over seeds, 60% of null differences would be
    significant.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


@dataclass(frozen=True)
class Paired:
    """An arm compared with another: the differences of paired replicates, and their bootstrap."""

    differences: Sequence[float]
    resampled: Resampled

    def one_sided(self, better: bool) -> float:
        """The larger of both methods' p-values of "the arm is not better", or "not worse"."""
        if _without_spread(self.differences):
            return 1.0
        side = "greater" if better else "less"
        by_t = float(stats.ttest_1samp(self.differences, 0, alternative=side).pvalue)
        return max(by_t, self.resampled.below(0.0) if better else self.resampled.above(0.0))


@dataclass(frozen=True)
class Claim:
    """What is claimed of an arm: its comparison with each opened baseline, by name. best: the
    baseline that was best on val. real: the one that harm is judged against. possible: the largest
    difference that the metric allows."""

    against: Mapping[str, Paired]
    best: str
    real: str
    possible: float = math.inf

    @property
    def beaten_least(self) -> str:
        """The baseline with the largest p-value; of equal ones, that with the smallest effect."""
        return max(
            self.against,
            key=lambda name: (self.against[name].one_sided(True),
                              -self.against[name].resampled.estimate),
        )  # fmt: skip


def verdicts(
    claims: Sequence[Claim], margin: float, level: float = 0.95, sized: bool = True
) -> list[Verdict]:
    """Judge all claims of a study together.

    `helps`: better than every opened baseline, by both methods; a union of baselines needs no
    correction, because all must be beaten (Berger 1982), and Holm's corrects for the number of
    claims. `harms`: worse than real images, likewise. Both are one-sided at half of 1 - level.
    `equivalent`: both methods put the difference from the best baseline on val within ± margin in
    the same way. Each needs `LEAST_GROUPS` groups of each class if the metric is a mean over
    classes. Otherwise the word is `undecided`, as with too few replicates or test groups.

    sized: simulate what such a study can find, and the size that would find the margin. That takes
    a hundred times longer than the verdict.
    """
    # The smallest p-value must be below 1 - strictest.
    strictest = 1 - (1 - level) / max(len(claims), 1)
    helps = holm([claim.against[claim.beaten_least].one_sided(True) for claim in claims])
    harms = holm([claim.against[claim.real].one_sided(False) for claim in claims])
    near = [claim.against[claim.best] for claim in claims]
    equivalences = np.maximum(
        holm([tost(pair.differences, margin) for pair in near]),
        holm([pair.resampled.beyond(margin) for pair in near]),
    )
    return [
        _verdict(claim, p_helps, p_harms, float(equivalence), margin, level, strictest, sized)
        for claim, p_helps, p_harms, equivalence in zip(
            claims, helps, harms, equivalences, strict=True
        )
    ]


def _verdict(
    claim: Claim, p_helps: float, p_harms: float, equivalence: float, margin: float,
    level: float, strictest: float, sized: bool,
) -> Verdict:  # fmt: skip
    word: Word = "undecided"
    against, obstacle = claim.beaten_least, None
    words: tuple[tuple[Word, float, float, str], ...] = (
        ("helps", p_helps, (1 - level) / 2, claim.beaten_least),
        ("harms", p_harms, (1 - level) / 2, claim.real),
        ("equivalent", equivalence, 1 - level, claim.best),
    )
    for name, p, limit, baseline in words:
        if p < limit and _obstacle(claim.against[baseline], 1 - strictest) is None:
            word, against = name, baseline
            break
    else:
        obstacle = _obstacle(claim.against[against], 1 - strictest)
    pairs = [(pair.differences, pair.resampled) for pair in claim.against.values()]
    # One-sided, at the strictest level of Holm's correction.
    design = Design.of(pairs, (1 - strictest) / 2)
    needed = size_needed(design, margin) if sized and not obstacle else None
    noticeable = detectable(design, claim.possible) if sized and not obstacle else None
    differences, resampled = claim.against[against].differences, claim.against[against].resampled
    effect, interval = paired_t(differences, level), resampled.interval(level)
    near = paired_t(differences, 2 * level - 1), resampled.interval(2 * level - 1)
    return Verdict(
        word=word, against=against,
        baselines=[
            AgainstBaseline(
                against=name, effect=paired_t(pair.differences, level),
                bootstrap=pair.resampled.interval(level), p=pair.one_sided(True),
            )
            for name, pair in claim.against.items()
        ],
        effect=effect, bootstrap=interval,
        low=min(effect.low, interval.low), high=max(effect.high, interval.high),
        p_helps=p_helps, p_harms=p_harms, equivalence_p=equivalence, margin=margin,
        detectable=noticeable.estimate if noticeable else None,
        possible=claim.possible if math.isfinite(claim.possible) else None,
        detectable_low=noticeable.low if noticeable else None,
        detectable_high=noticeable.high if noticeable else None,
        replicates=len(differences), replicates_needed=needed and needed[0],
        groups=resampled.groups,
        groups_needed=needed and math.ceil(needed[1] * resampled.groups),
        obstacle=obstacle, effect_size=standardised(differences),
        wilcoxon_p=wilcoxon(differences),
        near_low=min(estimate.low for estimate in near),
        near_high=max(estimate.high for estimate in near),
    )  # fmt: skip


def _obstacle(pair: Paired, strictest: float) -> Notice | None:
    """Why this comparison cannot be decided."""
    differences, resampled = pair.differences, pair.resampled
    replicates, groups = len(differences), resampled.groups
    if replicates < LEAST_REPLICATES:
        return Notice.of("few_replicates", replicates=replicates, minimum=LEAST_REPLICATES)
    if groups < LEAST_GROUPS:
        return Notice.of("few_groups", groups=groups, minimum=LEAST_GROUPS)
    effective = float(resampled.effective_groups or groups)
    if effective < LEAST_GROUPS - 1e-9:
        return Notice.of("unequal_groups", groups=groups, effective=effective, minimum=LEAST_GROUPS)
    if resampled.rarest is not None and resampled.rarest < LEAST_GROUPS - 1e-9:
        return Notice.of("few_of_class", groups=int(resampled.rarest), minimum=LEAST_GROUPS)
    minimum = math.ceil(2 / strictest)
    if len(resampled.draws) < minimum:
        return Notice.of("few_draws", minimum=minimum)
    return Notice.of("no_spread") if np.ptp(differences) <= 1e-12 else None
