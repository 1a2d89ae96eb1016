"""The variants of a study that a tuning tries: the study with other values in some fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from engine.comparison.arms import SearchSpec, planned_trials
from engine.core import rows
from engine.core.errors import EngineError, StudyError
from engine.core.manifest import Manifest
from engine.core.spec import Spec
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.execute import Trials, execute
from engine.metrics.probabilities import macro, roc_auc
from engine.nets.classification import class_numbers
from engine.plan import named, plan
from engine.profile import Profile
from engine.report.tries import shown
from engine.results.comparison import TrainResult
from engine.runtime.base import Runtime
from engine.steps.train import PREDICTIONS
from engine.study import Study, override, validate
from engine.tuning.proposals import Halving, Rung, Settings
from engine.tuning.settings import Tune


@dataclass(frozen=True)
class StudyVariants:
    """The variants of a study by setting. As a `Try`, it computes a setting's classifiers and all
    steps that they need.

    values: the study file's values. broken: reasons of steps that failed before, by key.
    """

    values: dict[str, Any]
    tune: Tune
    store: Store
    profile: Profile
    broken: Mapping[str, str] = field(default_factory=dict)

    def study(self, settings: Settings) -> Study:
        """The study with a setting. Raises `StudyError`."""
        values = self.values_with(settings)
        changes = ", ".join(
            f"{name}={'null' if value is None else shown(value)}"
            for name, value in settings.items()
        )
        return validate(Study, values, f"tune.knobs: {changes}" if changes else "study")

    def values_with(self, settings: Settings) -> dict[str, Any]:
        """The values of a study file with a setting.

        A null is written as null, where `lay` would restore the default. A null for an entry of a
        list of plugins removes the entry.
        """
        values = self.values
        for name, value in settings.items():
            values = override(values, name, value)
        nulls = [name.split(".") for name, value in settings.items() if value is None]
        study = validate(Study, self.values, "study") if nulls else None
        for *path, last in nulls:
            section = _entry(study, path)
            if isinstance(section, Spec) and last in type(section).model_fields:
                values = _with_null(values, [*path, last])
        return values

    def halving(self) -> Halving | None:
        """The budgets of ASHA; None without it."""
        if self.tune.scheduler == "none":
            return None
        most = self.study({}).training.steps
        return Halving(max(1, round(self.tune.grace * most)), self.tune.reduction_factor, most)

    def classifiers(self, settings: Settings, steps: int | None = None) -> list[Step]:
        """The `train` steps of the tuned arm. steps: optimizer steps; None: the study's. Raises
        `StudyError`."""
        study = self.study(settings)
        if study.classifier is None:
            raise StudyError("tune: needs a classifier to compare settings; name one as classifier")
        (search,) = named(plan(study), "search")
        spec = search.spec_as(SearchSpec)
        if steps is not None:
            training = {"training": spec.training.shortened(steps)}
            search = replace(search, spec=spec.model_copy(update=training))
        # Only the first generator fit: the study itself trains the others, as a check.
        trains = [
            trial.step
            for trial in planned_trials(search)
            if trial.arm.name == self.tune.arm and trial.fit == 0
        ]
        if not trains:
            problem = f"no arm {self.tune.arm!r}" if self.tune.arm else "name the arm to tune"
            arms = ", ".join(arm.name for arm in spec.arms)
            raise StudyError(f"tune.arm: {problem}; choose one of {arms}")
        wanted = self.tune.seeds or len(trains)
        if wanted > len(trains):
            raise StudyError(
                f"tune.seeds: {wanted} is more than search.seeds ({len(trains)}); lower it, or"
                " raise search.seeds"
            )
        return trains[:wanted]

    def needs(self, settings: Settings) -> list[Step]:
        """All steps that the classifiers need, inputs first."""
        trains = self.classifiers(settings)
        return upstream([needed for step in trains for needed in step.inputs.values()])

    def scores(self, manifests: Iterable[Manifest]) -> list[float]:
        """The objective of classifiers on val."""
        manifests = list(manifests)
        several = any(TrainResult.of(manifest).val.tasks for manifest in manifests)
        if self.objective == "roc_auc" and not several:
            return [roc_auc_of(self.store, manifest) for manifest in manifests]
        return [TrainResult.of(one).val.figures[self.objective] for one in manifests]

    @cached_property
    def objective(self) -> str:
        return self.tune.objective or self.study({}).training.objective

    def __call__(self, settings: Settings, runtime: Runtime) -> Iterator[Rung]:
        needed = self.needs(settings)
        reason = next((self.broken[step.key] for step in needed if step.key in self.broken), "")
        if reason:
            raise EngineError(reason)
        execute(needed, self.store, runtime, self.profile, quiet=True)
        runner = Trials(self.store, runtime, self.profile)
        halving = self.halving()
        for steps in halving.rungs() if halving else [None]:
            trains = self.classifiers(settings, steps)
            manifests = runner.find(trains)
            missing = [step for step in trains if step.key not in manifests]
            if missing:
                manifests |= runner.run(missing, lambda count: None)
            value = float(np.mean(self.scores(manifests.values())))
            yield Rung(steps or self.study(settings).training.steps, value)


def roc_auc_of(store: Store, manifest: Manifest) -> float:
    """Mean area under the ROC curves, on val, of the classifier of a `train` step."""
    (table,) = store.tables(manifest.keys(file=PREDICTIONS))
    classes = tuple(TrainResult.of(manifest).val.per_class)
    labels = class_numbers(table[rows.label_column(manifest.spec["task"])].to_pylist(), classes)
    return float(macro(roc_auc(labels, np.asarray(table[rows.PROBABILITIES].to_pylist()))))


def field_of(study: Study, name: str) -> Any:
    """The value of a study's field by its dotted name, defaults included; None if there is none."""
    value = _entry(study, name.split("."))
    return value.model_dump(mode="json") if isinstance(value, Spec) else value


def _entry(study: Study | None, path: Sequence[str]) -> Any:
    """The value at a path of a study, or None."""
    value: Any = study
    for part in path:
        if isinstance(value, tuple):
            value = next((entry for entry in value if getattr(entry, "name", "") == part), None)
        elif isinstance(value, Mapping):
            value = value.get(part)
        else:
            value = getattr(value, part, None)
    return value


def _with_null(values: Any, path: Sequence[str]) -> Any:
    """The values of a study file with null at a path."""
    if not path:
        return None
    if isinstance(values, list):
        return [
            _with_null(entry, path[1:])
            if isinstance(entry, dict) and entry.get("name") == path[0]
            else entry
            for entry in values
        ]
    mapping = values if isinstance(values, dict) else {}
    return {**mapping, path[0]: _with_null(mapping.get(path[0]), path[1:])}
