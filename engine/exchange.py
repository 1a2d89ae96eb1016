"""`jobs/exchange_rate.py`: how many real images a synthetic one is worth.

The study runs up to its verdict at each of `search.real_fractions`, each time with all that learns
on that fraction of the real training images alone. The fractions are nested, and val and test are
the same, so that the scores of all fractions are compared on the same images
(`engine.comparison.exchange`). Test is opened once for each fraction.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.cli import add_common, command, make_runtime, read
from engine.comparison.arms import SearchSpec
from engine.comparison.exchange import Arm, Rate, Scores, exchange_rates
from engine.comparison.figures import Figures
from engine.comparison.predictions import to_predictions, uris
from engine.core.errors import StudyError
from engine.core.manifest import Manifest
from engine.core.progress import say
from engine.core.step import Step
from engine.core.store import Store
from engine.data.dataset import split_index
from engine.execute import execute
from engine.plan import data_set, named, plan, until
from engine.plan_labels import labelling_of
from engine.profile import Profile
from engine.report.download import as_csv
from engine.results.comparison import EvaluateResult, MixResult
from engine.results.data import IngestResult
from engine.runtime.base import Runtime
from engine.study import Study


@command
def run_exchange_rate(argv: Sequence[str] | None = None) -> int:
    """Run a study at fractions of its real images and print what a synthetic image is worth;
    returns the exit code."""
    parser = argparse.ArgumentParser(
        description="How many real images is a synthetic one worth? Runs the study at each of"
        " search.real_fractions."
    )
    add_common(parser)
    arguments = parser.parse_args(argv)
    study, profile = read(arguments.study, arguments.profile, arguments.sets)
    store = Store(profile.storage)
    store.probe()
    with closing(make_runtime(profile)) as runtime:
        rates = measure(study, store, runtime, profile)
    table = as_csv([asdict(rate) for rate in rates])
    page = store.page(study.name, "exchange_rate.csv")
    store.put(page, table)
    for rate in rates:
        print(in_words(rate), flush=True)
    say(f"table: {store.location(page)}")
    return 0


@dataclass(frozen=True)
class Fraction:
    """The scores of real images alone at one fraction, and of the arms with synthetic ones."""

    share: float
    images: int
    real: Scores
    arms: list[Arm]


def measure(study: Study, store: Store, runtime: Runtime, profile: Profile) -> list[Rate]:
    """The rates of the chosen arms at all fractions. Raises `StudyError` without a comparison."""
    if study.classifier is None:
        raise StudyError("an exchange rate needs classifiers to compare: set classifier")
    if labelling_of(study).cells is not None:
        raise StudyError("an exchange rate needs one task with one label per image")
    fractions = []
    for share in study.search.real_fractions:
        say(f"fraction {share:g} of the real training images")
        split = study.split.model_copy(update={"train_fraction": share})
        part = study.model_copy(update={"split": split})
        steps = until(plan(part), "evaluate")
        manifests = execute(steps, store, runtime, profile)
        fractions.append(_scores(part, share, steps, store, manifests))
    real = {fraction.share: fraction.real for fraction in fractions}
    arms = [arm for fraction in fractions for arm in fraction.arms]
    largest = fractions[-1]
    return exchange_rates(real, arms, round(largest.images / largest.share), study.seed)


def _scores(
    study: Study, share: float, steps: list[Step], store: Store, manifests: Mapping[str, Manifest]
) -> Fraction:
    """The scores of a finished study."""

    def step(name: str) -> Step:
        return named(steps, name)[0]

    ingest, evaluate = manifests[data_set(steps).key], manifests[step("evaluate").key]
    evaluated, data = EvaluateResult.of(evaluate), IngestResult.of(ingest)
    confirm = step("confirm")
    spec = confirm.spec_as(SearchSpec)
    table = pa.concat_tables(store.tables(evaluate.keys(table="predictions")))
    test = split_index(store, ingest, spec.task, "test")
    predictions = to_predictions(
        table, Path("predictions"), test, uris(store, ingest), spec.task, data.classes
    )
    figures, objective = Figures(predictions, study.seed), evaluated.objective

    def scores(arm: str) -> Scores:
        return Scores(figures.replicates(arm, objective), figures.resampled(arm, objective))

    arms = []
    for arm in spec.arms:
        tested = arm.name in evaluated.arms and arm.follows is None
        # Images that replace real ones have no fraction of real images that they are added to.
        added_to_all = arm.generators and arm.ratio is not None and arm.use != "replace"
        if not tested or not added_to_all:
            continue
        mixes = [MixResult.of(manifests[confirm.inputs[mix].key]) for mix in arm.mixes]
        added = round(float(np.mean([mix.added_total for mix in mixes])))
        arms.append(Arm(arm.name, share, added, scores(arm.name)))
    return Fraction(share, sum(data.train.values()), scores("real"), arms)


def in_words(rate: Rate) -> str:
    """A rate in one line."""
    start = f"{rate.arm} at {100 * rate.fraction:g}% of the real images ({rate.added:,} added):"
    if rate.rate is None:
        return f"{start} {rate.censored}{_ends(rate)}"
    return (
        f"{start} as good as {100 * (rate.as_good_as or 0):.0f}% of them, so that a synthetic image"
        f" is worth {rate.rate:.2f} real ones{_ends(rate)}"
    )


def _ends(rate: Rate) -> str:
    """The interval in words; an end where the curve does not reach is open."""
    low, high = (np.isfinite(end) for end in (rate.low, rate.high))
    if low and high:
        return f" (95% interval {rate.low:.2f} to {rate.high:.2f})"
    if low:
        return f" (at least {rate.low:.2f})"
    return f" (at most {rate.high:.2f})" if high else " (nothing can be said: the interval is open)"
