"""The verdict of each declared contrast, from the predictions of a comparison's classifiers.

`evaluate` uses this for the study's own predictions, `score` for those in a file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from engine.comparison.figures import AnyFigures
from engine.metrics.resampling import bootstrap
from engine.metrics.significance import Claim, Paired, mcnemar, verdicts
from engine.results.comparison import Contrast, FailedReplicate, Verdict, WithoutFailed
from engine.settings import Evaluate

# The largest value of a metric; all others are shares.
_LARGEST = 1.0


@dataclass(frozen=True)
class DeclaredContrast:
    """An arm that the study compares with all opened baselines, or with its unfiltered twin.

    best: the baseline that was best on val. real: the one that harm is judged against. tries:
    number of settings of each arm's family on val. drawn: the study does not train the generators,
    so the generator fits are only different draws of their images.
    """

    arm: str
    baselines: tuple[str, ...]
    best: str
    real: str
    tries: Mapping[str, int] = field(default_factory=dict)
    drawn: bool = False
    ratio: float | None = None
    twin: bool = False
    # Whether the numbers of fits and seeds are those of a file.
    claimed: bool = False


def compare(
    figures: AnyFigures, declared: Sequence[DeclaredContrast], objective: str, settings: Evaluate,
    sized: bool = True,
) -> list[Contrast]:  # fmt: skip
    """The effect, intervals and verdict of each contrast. Holm's correction is over the contrasts
    with baselines, and separately over those with twins. sized: as for `verdicts`."""
    predictions, seed = figures.predictions, figures.seed
    arms = dict.fromkeys(name for pair in declared for name in (pair.arm, *pair.baselines))
    scores = {name: predictions.scores(name, objective) for name in arms}
    values = {name: predictions.objective(name, objective) for name in arms}

    def claim(pair: DeclaredContrast) -> Claim:
        return Claim(
            {
                name: Paired(
                    (values[pair.arm] - values[name]).tolist(),
                    bootstrap(scores[pair.arm], scores[name], settings.bootstrap_draws, seed),
                )
                for name in pair.baselines
            },
            pair.best, pair.real,
            _LARGEST - max(float(values[name].mean()) for name in pair.baselines),
        )  # fmt: skip

    claims = [claim(pair) for pair in declared]
    judged: dict[int, Verdict] = {}
    for twin in (False, True):
        places = [place for place, pair in enumerate(declared) if pair.twin == twin]
        of_kind = [claims[place] for place in places]
        judged |= zip(places, verdicts(of_kind, settings.margin, sized=sized), strict=True)
    contrasts = []
    for place, pair in enumerate(declared):
        verdict = judged[place]
        against = verdict.against
        gain_to_real = []
        if "real" in predictions.probabilities:
            gain_to_real = figures.class_gains(pair.arm, "real")
        contrasts.append(Contrast(
            **dict(verdict), arm=pair.arm, twin=pair.twin, ratio=pair.ratio,
            differences=list(claims[place].against[against].differences),
            grouped=verdict.groups < len(predictions.labels),
            tries=pair.tries.get(pair.arm, 1), tries_against=pair.tries.get(against, 1),
            drawn=pair.drawn, claimed=pair.claimed,
            mcnemar=[
                mcnemar(ours, theirs)
                for ours, theirs in zip(
                    predictions.right(pair.arm), predictions.right(against), strict=True
                )
            ],
            recall_gain=figures.class_gains(pair.arm, against),
            recall_gain_to_real=gain_to_real,
            generator_fits=predictions.generator_fits, seeds=predictions.seeds,
        ))  # fmt: skip
    return contrasts


def add_without_failed(
    contrasts: Sequence[Contrast], figures: AnyFigures, declared: Sequence[DeclaredContrast],
    objective: str, settings: Evaluate, failed: Sequence[FailedReplicate],
) -> list[Contrast]:  # fmt: skip
    """The contrasts with their verdicts without the replicates in which one of their arms
    failed."""
    added = []
    for contrast, pair in zip(contrasts, declared, strict=True):
        arms = {pair.arm, *pair.baselines}
        without = {failure.replicate for failure in failed if failure.arm in arms}
        if without:
            rest = _without(figures, declared, contrast, objective, settings, without)
            contrast = contrast.model_copy(update={"without_failed": rest})
        added.append(contrast)
    return added


def _without(
    figures: AnyFigures, declared: Sequence[DeclaredContrast], contrast: Contrast, objective: str,
    settings: Evaluate, failed: Collection[int],
) -> WithoutFailed:  # fmt: skip
    kept = [place for place in range(figures.predictions.replicates) if place not in failed]
    if len(kept) < 2:
        return WithoutFailed(replicates=len(kept), verdict=None)
    rest = figures.of_replicates(kept)
    compared = compare(rest, declared, objective, settings, sized=False)
    same = next(other for other in compared
                if (other.arm, other.twin) == (contrast.arm, contrast.twin))  # fmt: skip
    verdict = Verdict(**{name: getattr(same, name) for name in Verdict.model_fields})
    return WithoutFailed(replicates=len(kept), verdict=verdict)
