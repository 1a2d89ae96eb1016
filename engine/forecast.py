"""What a study will cost: the steps that are not done, at rates that a preview measured.

A preview generates and filters a few images and trains at least one classifier, so it knows the
seconds of one image and of one optimizer step, and the share of images that is kept. What a study
consists of follows from its plan. A forecast is a range: the share kept is an interval, and rates
vary by a quarter from run to run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from engine.comparison.arms import REPEATED, SearchSpec, opened_arms, planned_trials
from engine.core.manifest import read_manifest
from engine.core.registry import kind_of
from engine.core.spec import Spec, digest
from engine.core.step import Step
from engine.core.store import Store
from engine.plan import trials_of
from engine.profile import Profile
from engine.report.page import duration
from engine.results.comparison import ConfirmResult
from engine.results.data import ExternalResult, IngestResult
from engine.steps.request import LEAST_SHARE
from engine.steps.train import TrainSpec

# Rates of one machine vary about so much between runs.
_VARIES = 1.25
_Z = 1.96
# Seconds for what a preview does not measure; mostly plots.
_CLOSING = (30.0, 120.0)
# A forward pass, as a share of an optimizer step, which has a backward pass twice as long.
_FORWARD = 1 / 3
# Seconds for reading and decoding an image and storing its prediction, at most.
_READ = 0.0005


class GeneratorRates(Spec):
    """Measured on a preview of one generator.

    fit: seconds of its training; None if it is not trained. generate, curate: seconds of one image.
    start: seconds until the workers of both compute, in each round.
    needed: images of each class that the study uses at most. kept: images kept of those generated,
    by class; empty if they are not filtered.
    """

    fit: float | None
    generate: float
    curate: float
    start: float = 0.0
    needed: dict[str, int]
    kept: dict[str, tuple[int, int]]


class Rates(Spec):
    """Rates of a study. train: seconds of one optimizer step of a classifier; None without a
    comparison."""

    generators: dict[str, GeneratorRates]
    train: float | None
    # Digest of what was measured (`measured_of`).
    measured: str = ""


@dataclass(frozen=True)
class Line:
    """A kind of work with its seconds, as a range."""

    what: str
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    lines: list[Line]

    @property
    def low(self) -> float:
        return sum(line.low for line in self.lines) / _VARIES

    @property
    def high(self) -> float:
        return sum(line.high for line in self.lines) * _VARIES

    def in_words(self) -> str:
        return f"{duration(self.low / 3600)} to {duration(self.high / 3600)}"


def forecast(steps: Sequence[Step], store: Store, profile: Profile, rates: Rates) -> Forecast:
    """The work that is left of a plan. Reads manifests alone."""
    open_steps = [step for step in steps if read_manifest(store, step) is None]
    lines = []
    for label, generator in rates.generators.items():
        of_generator = [step for step in open_steps if step.subject.name == label]
        fits = sum(step.kind == "finetune" for step in of_generator)
        if fits and generator.fit is not None:
            what = f"{fits} fits of {label}" if fits > 1 else f"a fit of {label}"
            lines.append(_line(what, fits * generator.fit))
        draws = sum(step.kind == "generate" and step.subject.round == 1 for step in of_generator)
        if draws:
            fewest, most = images_to_generate(generator)
            each = generator.generate / profile.stage("generate").actors
            each += generator.curate / profile.stage("embed").actors
            what = f"{draws * fewest:,} to {draws * most:,} images of {label}"
            if fewest == most:
                what = f"{draws * most:,} images of {label}"
            # What curation drops is requested once more at least.
            rounds = 2 if most > sum(generator.needed.values()) else 1
            lines.append(Line(
                what, draws * (generator.start + fewest * each),
                draws * (rounds * generator.start + most * each),
            ))  # fmt: skip
    trials = {trial.key: trial for trial in expected_trials(open_steps)}
    missing = [trial for trial in trials.values() if read_manifest(store, trial) is None]
    if missing and rates.train is not None:
        optimizer_steps = sum(training_steps(trial) for trial in missing)
        at_once = max(1, min(len(missing), concurrent_trials(profile)))
        lines.append(_line(f"{len(missing)} classifiers", optimizer_steps * rates.train / at_once))
    for step in (step for step in open_steps if step.kind == "evaluate"):
        lines += _predictions(step, store, profile, rates)
    if any(step.kind == "report" for step in open_steps):
        lines.append(Line("page and logs (assumed)", *_CLOSING))
    return Forecast(lines)


def _predictions(evaluate: Step, store: Store, profile: Profile, rates: Rates) -> list[Line]:
    """Predictions of every confirming classifier for the test images, also those from elsewhere;
    images that are not read yet are not counted."""
    images = 0
    for step in evaluate.inputs.values():
        manifest = (
            read_manifest(store, step) if step.kind in (*IngestResult.kinds, "external") else None
        )
        if manifest is not None:
            counts = (IngestResult.of(manifest).counts["test"] if step.kind in IngestResult.kinds
                      else ExternalResult.of(manifest).counts)  # fmt: skip
            images += sum(counts.values())
    confirm = evaluate.inputs["confirm"]
    done = read_manifest(store, confirm)
    trials = expected_trials([confirm])
    count = images * (len(trials) if done is None else len(ConfirmResult.of(done).trials))
    if not count or rates.train is None:
        return []
    spec = trials[0].spec_as(TrainSpec)
    low = rates.train * _FORWARD / spec.training.batch_size
    high = low + _READ
    if kind_of("classifiers", spec.classifier).on_features:
        # Its steps use vectors that are computed once, which curation does for each image.
        high += max((generator.curate for generator in rates.generators.values()), default=0.0)
    actors = profile.stage("classify").actors
    return [Line(f"{count:,} predictions for test images", count * low / actors,
                 count * high / actors)]  # fmt: skip


def expected_trials(steps: Sequence[Step]) -> list[Step]:
    """The trials that these steps will run. Which arms a confirmation trains is not known before
    the choice, but that it is one of each family is, and what accompanies it."""
    trials = trials_of([step for step in steps if step.kind != "confirm"])
    for step in steps:
        if step.kind == "confirm":
            arms, chosen = step.spec_as(SearchSpec).arms, dict[str, str]()
            for arm in arms:
                chosen.setdefault(arm.family, arm.name)
            opened = {arm.name for arm in opened_arms(step, chosen.values())}
            # The one best on val, and one with the class shares of each chosen family.
            repeated = [arm.name for arm in arms if arm.family == REPEATED]
            families = {arm.family for arm in arms if arm.role == "compared"}
            opened |= set(repeated[: len(families) + 1])
            trials += [trial.step for trial in planned_trials(step) if trial.arm.name in opened]
    return trials


def confirmation_in_words(steps: Sequence[Step]) -> str:
    """What the confirmation of a choice adds to these steps; empty without one."""
    confirm = next((step for step in steps if step.kind == "confirm"), None)
    if confirm is None:
        return ""
    spec = confirm.spec_as(SearchSpec)
    classifiers = len(expected_trials([confirm]))
    # The first fits made the choice; a single fit is confirmed on its own images.
    new = [step.subject.name for step in steps
           if step.kind == "generate" and step.subject.round == 1
           and step.subject.fit >= spec.first_fit > 0]  # fmt: skip
    fits = ""
    if new:
        fits = f"{spec.generator_fits} more fits of {', '.join(dict.fromkeys(new))}, and "
    return f"of these, the confirmation of the choice: {fits}{classifiers} classifiers"


def _line(what: str, seconds: float) -> Line:
    return Line(what, seconds, seconds)


def training_steps(trial: Step) -> int:
    """The optimizer steps of a classifier's training."""
    return trial.spec_as(TrainSpec).training.steps


def concurrent_trials(profile: Profile) -> int:
    """Trials that run at once on this machine, on one GPU where they need one; a cluster may run
    more."""
    if profile.runtime == "inline":
        return 1
    cores = os.cpu_count() or 1
    trial = profile.trial
    if trial.workers > 1:
        return trial.drivers
    if trial.gpus:
        return max(1, int(1 / trial.gpus))
    reserved = profile.num_cpus or max(4, cores)
    # Logical CPUs beyond the cores add nothing.
    return max(1, min(int(reserved / trial.cpus), cores // trial.threads))


def images_to_generate(generator: GeneratorRates) -> tuple[int, int]:
    """The fewest and the most images of one fit, all rounds together."""
    fewest = most = 0
    for label, needed in generator.needed.items():
        low, high = share_kept(*generator.kept[label]) if label in generator.kept else (1.0, 1.0)
        fewest += math.ceil(needed / max(high, LEAST_SHARE))
        most += math.ceil(needed / max(low, LEAST_SHARE))
    return fewest, most


def share_kept(kept: int, generated: int) -> tuple[float, float]:
    """The interval of Wilson (1927) for a share; all of it without an image."""
    if not generated:
        return 0.0, 1.0
    share, square = kept / generated, _Z * _Z / generated
    centre = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / generated + square / (4 * generated)) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def rates_key(store: Store, study: str) -> str:
    return store.page(study, "rates.json")


def read_rates(store: Store, study: str, measured: str = "") -> Rates | None:
    """The rates that a preview of the study measured in this storage; None if there are none for
    `measured`."""
    try:
        rates = Rates.model_validate_json(store.read(rates_key(store, study)))
    except (FileNotFoundError, ValueError):
        return None
    return rates if rates.measured == measured else None


def measured_of(steps: Sequence[Step], profile: Profile) -> str:
    """What the rates of a plan depend on: the first images of its generators, what an optimizer
    step of its classifiers does, and the device."""
    keys = sorted(step.key for step in steps if step.kind == "generate" and step.subject.fit == 0
                  and step.subject.round == 1)  # fmt: skip
    of_step = [
        [spec.classifier, spec.preprocess, spec.training.batch_size, spec.training.precision]
        for spec in (trial.spec_as(TrainSpec) for trial in trials_of(steps)[:1])
    ]
    return digest([keys, profile.device, of_step])
