"""The results of a study, loaded once, as the sections of its page read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from engine.comparison.arms import MixSpec, SearchSpec, Trial, planned_trials
from engine.context import Context
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.spec import Spec
from engine.core.step import Step, Subject, upstream
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.report.download import Row
from engine.report.generators import GeneratorFit, Probe, probe_generator
from engine.report.table import ArmRow, comparison
from engine.report.tiles import Sheets, sheets
from engine.results.comparison import (
    ConfirmResult,
    EvaluateResult,
    MixResult,
    SearchResult,
    TrainResult,
)
from engine.results.data import IngestResult, ReducedClass, ReduceResult
from engine.settings import Amount
from engine.study import Study

# Names of metrics on the page. A version of `evaluate` (`engine/steps/evaluate.py`) that stores a
# further metric needs a line here.
FIGURES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy",
    "macro_precision": "macro precision", "macro_recall": "macro recall", "macro_f1": "macro F1",
    "weighted_precision": "weighted precision", "weighted_f1": "weighted F1",
    "worst_class_recall": "worst class's recall",
    "roc_auc": "ROC-AUC", "average_precision": "PR-AUC", "brier": "Brier score ↓", "ece": "ECE ↓",
}  # fmt: skip
_TILE = 52  # px


class ReportSpec(Spec):
    # With all its defaults, for the page to show.
    study: Study
    preprocess: Preprocess
    task: str
    generators: tuple[str, ...]
    target_classes: tuple[str, ...] | str
    seed: int


@dataclass(frozen=True)
class Trained:
    """A trial with its manifest, and its training images by class."""

    trial: Trial
    manifest: Manifest
    images: Mapping[str, int]
    # Generated images among these.
    added: int = 0

    @cached_property
    def result(self) -> TrainResult:
        return TrainResult.of(self.manifest)

    @property
    def columns(self) -> Row:
        """The columns that name the classifier in every table."""
        return {"arm": self.trial.arm.name, "stage": self.trial.stage,
                rows.GENERATOR_FIT: self.trial.fit, rows.SEED: self.trial.number}  # fmt: skip


@dataclass(frozen=True, eq=False)
class StudyResults:
    """Everything that the page's sections read.

    inputs: manifests of the report's inputs. trials: every trial of the choice, then of its
    confirmation, as planned. generators: the fits of each. steps: every finished step that the page
    depends on, inputs first; the order does not depend on when they ran. amounts: of images that
    an arm adds of each of its generators, by arm.
    """

    spec: ReportSpec
    store: Store
    inputs: Mapping[str, Manifest]
    ingest: IngestResult
    search_spec: SearchSpec
    search: SearchResult
    confirm_spec: SearchSpec
    confirm: ConfirmResult
    evaluate: EvaluateResult
    trials: tuple[Trained, ...]
    generators: Mapping[str, tuple[GeneratorFit, ...]]
    steps: tuple[tuple[Step, Manifest], ...]
    amounts: Mapping[str, Amount]

    @classmethod
    def load(cls, context: Context) -> StudyResults:
        spec = context.step.spec_as(ReportSpec)
        search, confirm = (context.step.inputs[name] for name in ("search", "confirm"))
        search_spec = search.spec_as(SearchSpec)
        steps = tuple(
            (step, manifest)
            for step in upstream(list(context.step.inputs.values()))
            if (manifest := context.manifest(step)) is not None
        )
        ingest = context.result("ingest", IngestResult)
        searched = context.result("search", SearchResult)
        confirmed = context.result("confirm", ConfirmResult)
        mixes = {arm.name: search.inputs[arm.mixes[0]].spec_as(MixSpec) for arm in search_spec.arms}
        return cls(
            spec, context.store, context.inputs, ingest, search_spec, searched,
            confirm.spec_as(SearchSpec), confirmed, context.result("evaluate", EvaluateResult),
            (
                *load_trials(context, search, searched.trials, steps, ingest),
                *load_trials(context, confirm, confirmed.trials, steps, ingest),
            ),
            {name: load_fits(context, name) for name in spec.generators}, steps,
            {arm: mix.added[0].amount for arm, mix in mixes.items() if mix.added},
        )  # fmt: skip

    @property
    def study(self) -> Study:
        return self.spec.study

    @property
    def classes(self) -> tuple[str, ...]:
        return self.ingest.classes

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What classifiers predict: the classes, or the labels of all tasks."""
        space = self.ingest.space()
        return space.outputs if space else self.classes

    @property
    def objective(self) -> str:
        """The objective as the page names it."""
        name = FIGURES[self.search.objective]
        # Marked wherever it is written.
        mark = " (test relabelled)" if self.ingest.relabelled.get("test") else ""
        return f"{'mean ' if len(self.evaluate.tasks) > 1 else ''}{name}{mark}"

    @property
    def generator_fits(self) -> int:
        """Generator fits of the confirmation."""
        return self.confirm_spec.generator_fits

    @property
    def seeds(self) -> int:
        """Classifiers of the confirmation for each arm and generator fit."""
        return self.confirm_spec.seeds_per_fit

    @property
    def fits_made(self) -> int:
        """Fits of each generator in all, of the choice and of its confirmation."""
        return max(map(len, self.generators.values()), default=0)

    @property
    def replicates(self) -> int:
        """Replicates of the confirmation."""
        return self.confirm_spec.replicates

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the packages that were used."""
        versions: Mapping[str, str] = self.inputs["evaluate"].provenance["versions"]
        return versions

    @property
    def tile(self) -> int:
        """The side of an image on the page, in px: a whole multiple, so that pixels of small images
        stay visible."""
        size = self.spec.preprocess.size
        return _TILE // size * size or _TILE

    @property
    def small(self) -> bool:
        """Whether images are enlarged."""
        return self.spec.preprocess.size <= _TILE // 2

    @property
    def choice(self) -> list[Trained]:
        """The classifiers that the choice was made by."""
        return [item for item in self.trials if item.trial.stage == "search"]

    @cached_property
    def colours(self) -> dict[str, str]:
        """The CSS class of each family, the same on the whole page."""
        arms = [arm.line for arm in self.search_spec.arms if arm.role == "compared"]
        trained = (item.trial.arm.family for item in self.trials)
        families = dict.fromkeys([*self.generators, *arms, *trained])
        return {name: f"c{number % 10}" for number, name in enumerate(families)}

    def colour(self, arm: str) -> str:
        """The CSS class of a tested arm."""
        return "neutral" if arm == "real" else self.colours[self.evaluate.arms[arm].family]

    @property
    def legend(self) -> list[tuple[str, str]]:
        """The arms in plots with their colours: real images, the baseline, and the arms compared
        with it."""
        evaluate = self.evaluate
        compared = [pair.arm for pair in evaluate.contrasts if pair.arm in evaluate.arms]
        arms = dict.fromkeys(["real", evaluate.baseline, *compared])
        return [(arm, self.colour(arm)) for arm in arms]

    def of_arm(self, arm: str) -> list[Trained]:
        """The classifiers of an arm, of both stages."""
        return [item for item in self.trials if item.trial.arm.name == arm]

    def tested(self, arm: str) -> list[Trained]:
        """The classifiers of an arm that were tested: those of the confirmation."""
        return [item for item in self.of_arm(arm) if item.trial.stage == "confirm"]

    def place(self, trial: Trial) -> int:
        """The place of a tested classifier among those of its arm."""
        return trial.number - self.confirm_spec.first_seed

    @cached_property
    def table(self) -> list[ArmRow]:
        """The comparison, a row for each arm."""
        added = {item.trial.arm.name: item.added for item in reversed(self.trials)}
        return comparison(added, self.search, self.confirm, self.evaluate)

    @cached_property
    def mixes(self) -> dict[str, MixResult]:
        """The training images of arms, by key of the step."""
        return mixes_of(self.steps)

    @cached_property
    def reduced(self) -> dict[str, ReducedClass]:
        """The images kept of each dominant class, if the study reduces them."""
        return reduced_of(self.steps)

    @cached_property
    def needed(self) -> dict[str, dict[str, int]]:
        """Images of each class in the largest arm of a generator, by generator."""
        counts: dict[str, dict[str, int]] = {name: {} for name in self.generators}
        for mix in self.mixes.values():
            for name, added in mix.added.items():
                for label, count in added.items():
                    counts[name][label] = max(counts[name].get(label, 0), count)
        return counts

    @cached_property
    def sheets(self) -> Sheets:
        """Images of each class: real ones, and those of each generator's first fit."""
        compared = {arm.family for arm in self.search_spec.arms if arm.role == "compared"}
        return sheets(
            self.store, self.inputs["ingest"].keys(split="train"),
            [fits[0] for fits in self.generators.values()], self.spec.task, self.tile, compared,
        )  # fmt: skip

    @cached_property
    def probes(self) -> dict[str, Probe]:
        """How well real and kept images can be distinguished, by generator."""
        spec = self.spec
        return {
            name: probe_generator(self.store, self.inputs, fits, self.classes, spec.task, spec.seed)
            for name, fits in self.generators.items()
        }


def mixes_of(steps: Iterable[tuple[Step, Manifest]]) -> dict[str, MixResult]:
    return {step.key: MixResult.of(done) for step, done in steps if step.kind == "mix"}


def reduced_of(steps: Iterable[tuple[Step, Manifest]]) -> dict[str, ReducedClass]:
    return next(
        (ReduceResult.of(done).classes for step, done in steps if step.kind == "reduce"), {}
    )


def load_fits(context: Context, generator: str) -> tuple[GeneratorFit, ...]:
    """The fits of a generator."""
    inputs, fits = context.inputs, []
    for step in context.step.inputs.values():
        if (step.kind, step.subject.name) == ("curate", generator):
            label = Subject(generator, step.subject.fit).label
            fits.append(
                GeneratorFit(
                    generator, step.subject.fit, inputs[f"curate.{label}"],
                    inputs[f"generate.{label}"], inputs.get(f"fidelity.{label}"),
                )
            )  # fmt: skip
    return tuple(fits)


def load_trials(
    context: Context, step: Step, used: Mapping[str, str],
    steps: Iterable[tuple[Step, Manifest]], data: IngestResult,
) -> tuple[Trained, ...]:  # fmt: skip
    """The trials that a step used. used: their digests, by key."""
    kept = {name: reduced.kept for name, reduced in reduced_of(steps).items()}
    real = {"all": data.train, "reduced": {**data.train, **kept}, "none": {}}
    mixes = mixes_of(steps)
    trials = []
    for trial in planned_trials(step):
        if trial.step.key not in used:
            continue
        manifest, mix = context.manifest(trial.step), trial.step.inputs["mix"]
        if manifest is not None:
            own, added = real[mix.spec_as(MixSpec).real], mixes[mix.key].added.values()
            images = {name: own.get(name, 0) + sum(of.get(name, 0) for of in added)
                      for name in data.train}  # fmt: skip
            total = mixes[mix.key].added_total
            trials.append(Trained(trial, manifest, data.by_label(images), total))
    return tuple(trials)
