"""Tuning: tries settings of a study and compares them by the classifiers of one arm on val.

A setting is the study with other values in some fields. It computes the steps that a study with
these values would compute. A later run of that study therefore finds them, and a restart computes
only what is missing. Test is never read. The best setting is written as a study, with the number of
settings that it was chosen from.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
import yaml

from engine.comparison.arms import SearchSpec, planned_trials
from engine.core import rows
from engine.core.errors import EngineError, StorageError, StudyError, one_line
from engine.core.manifest import Manifest, read_manifest
from engine.core.progress import say
from engine.core.sealed import seal, unseal
from engine.core.spec import Spec, digest
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.execute import Trials, execute
from engine.metrics.probabilities import roc_auc
from engine.nets.classification import class_numbers
from engine.plan import named, plan
from engine.profile import Profile
from engine.report.tries import shown
from engine.results.comparison import TrainResult
from engine.runtime.base import Outcome, Runtime
from engine.sections import Tune
from engine.steps.train import PREDICTIONS
from engine.study import Study, override, validate
from engine.tuning.proposals import Halving, Proposals, Range, Rung, Settings, grid

# Sections that settings may change. All others would change the comparison itself, or nothing.
TUNABLE = (
    "embedder", "cluster", "select", "reduce", "generators", "request", "classifier", "training",
    "curate",
)  # fmt: skip
# Fields that decide which arms and seeds there are, and how much each arm adds. ASHA must not vary
# them, because it would rank arms by shortened trainings.
_AMOUNTS = (
    "request.ratio", "request.ratio_by_class", "request.balance_to", "request.per_class",
    "request.classes", "request.class_groups", "search", "seed",
)  # fmt: skip
_TRIALS = 20


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
        if self.objective == "roc_auc":
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


@dataclass(frozen=True)
class TuningResult:
    """The result of a tuning. tries: a row for each setting, in order. best: one of these rows.
    study: the text of the tuned study file."""

    tries: list[dict[str, Any]]
    best: dict[str, Any]
    objective: str
    study: str


def tune(values: dict[str, Any], store: Store, runtime: Runtime, profile: Profile) -> TuningResult:
    """Try the settings of the study's section `tune`. values: of the study file.

    Raises `StudyError` before anything is computed, `StorageError` if storage fails, and
    `EngineError` if every setting failed.
    """
    started = time.monotonic()
    study = validate(Study, values, "study")
    settings = study.tune
    variants = StudyVariants(values, settings, store, profile)
    sides = check(variants)
    listed = known_settings(variants, study.seed)
    count = len(listed) if listed is not None else settings.trials or _TRIALS
    ends = None if settings.budget_hours is None else started + 3600 * settings.budget_hours

    def ended() -> bool:
        return ends is not None and time.monotonic() > ends

    baseline = {step.key for step in variants.needs({})}
    leaf = all({step.key for step in variants.needs(side)} == baseline for side in sides)
    say(f"{count} settings and the study as it is, compared by arm {settings.arm} on val")
    variants = replace(variants, broken=prepare(variants, sides, listed, runtime, ended))
    log = ProposalLog(store, variants, study.seed)
    # Other methods propose the same settings each time.
    logs = settings.method == "optuna"
    proposals = Proposals(
        settings.knobs, settings.method, count, study.seed, ended=ended,
        known=log.read() if logs else None, on_new=log.write if logs else None,
    )  # fmt: skip
    rows_by_number: dict[int, dict[str, Any]] = {}
    objective = variants.objective
    halving = variants.halving()

    def on_end(outcome: Outcome) -> None:
        row = row_of(variants, outcome, halving)
        rows_by_number[outcome.number] = row
        result = row["error"] or f"{objective} {row['mean']:.3f}" + (
            "" if row["state"] == "ok" else f" at {row['steps']:,} steps, stopped"
        )
        changes = ", ".join(f"{name} {shown(value)}" for name, value in outcome.settings.items())
        say(f"try {outcome.number} of {count} ({changes or 'the study as it is'}): {result}")

    runtime.tune(variants, proposals, halving, profile.trial, leaf, on_end)
    tries = [rows_by_number[number] for number in sorted(rows_by_number)]
    done = [row for row in tries if row["state"] == "ok"]
    if not done:
        first = next(
            (row["error"] for row in tries if row["error"]), "the time was over; raise budget_hours"
        )
        raise EngineError(f"tune: none of {len(tries)} settings finished: {first}")
    best = max(done, key=lambda row: row["mean"])
    return TuningResult(tries, best, objective, tuned_study(variants, study, tries, best))


def check(variants: StudyVariants) -> list[Settings]:
    """Check every knob and value before anything is computed; returns settings that change one knob
    each. Raises `StudyError`."""
    settings = variants.tune
    if not settings.knobs:
        raise StudyError("tune.knobs: name the fields to try, as generators.ddpm.guidance_scale")
    if settings.method == "grid" and settings.trials is not None:
        raise StudyError("tune.trials: a grid tries every setting; leave it out, or use random")
    for name in settings.knobs:
        check_knob(name, settings)
    variants.classifiers({})
    sides = []
    for name, knob in settings.knobs.items():
        values = knob.ends() if isinstance(knob, Range) else knob
        keys = set()
        for value in values:
            sides.append({name: value})
            # Planning every value now finds invalid studies before any is computed.
            keys.add(variants.classifiers({name: value})[0].key)
        if len(keys) == 1:
            raise StudyError(
                f"tune.knobs: {name} does not affect the training of arm {settings.arm}; leave it"
                " out, or name another arm as tune.arm"
            )
    return sides


def check_knob(name: str, settings: Tune) -> None:
    """Raise `StudyError` for a knob that would change the comparison itself."""
    section = name.split(".")[0]
    if settings.scheduler == "asha" and (name == "request" or _is_or_part(name, _AMOUNTS)):
        raise StudyError(
            f"tune.knobs: {name} changes the arms or the amounts that they add, and ASHA must not"
            " compare arms, ratios or seeds; leave it out"
            + (", or set scheduler: none" if section in TUNABLE else "")
        )
    if section not in TUNABLE:
        raise StudyError(
            f"tune.knobs: {name} cannot be tuned: it changes the comparison itself, or nothing;"
            f" choose fields of {', '.join(TUNABLE)}"
        )
    if name == "training.objective":
        raise StudyError(
            "tune.knobs: training.objective is the measure that settings are compared by; leave it"
            " out"
        )
    if name in ("training", "training.steps") and settings.scheduler == "asha":
        raise StudyError(f"tune.knobs: ASHA chooses the steps of each setting; leave {name} out")
    for part in settings.knobs:
        if part.startswith(f"{name}."):
            raise StudyError(f"tune.knobs: {part} is a part of {name}; leave one of them out")


def _is_or_part(name: str, fields: Sequence[str]) -> bool:
    """Whether a dotted name is one of these fields, or a part of one."""
    return any(name == entry or name.startswith(f"{entry}.") for entry in fields)


def known_settings(variants: StudyVariants, seed: int) -> list[Settings] | None:
    """All settings in advance; None for Optuna, which chooses by results. Raises `StudyError`."""
    settings = variants.tune
    if settings.method == "optuna":
        if find_spec("optuna") is None:
            raise StudyError(
                "tune.method: optuna is not installed; pip install"
                ' "synthetic-training-engine[optuna]", or use random'
            )
        return None
    try:
        if settings.method == "grid":
            return grid(settings.knobs)
    except ValueError as error:
        raise StudyError(
            f"tune.knobs.{error}: a grid needs a list of values, or a range with a step"
        ) from None
    proposals = Proposals(settings.knobs, "random", settings.trials or _TRIALS, seed)
    return [proposal[1] for proposal in iter(proposals.ask, None)][1:]


def prepare(
    variants: StudyVariants, sides: Sequence[Settings], listed: Sequence[Settings] | None,
    runtime: Runtime, ended: Callable[[], bool],
) -> dict[str, str]:  # fmt: skip
    """Compute the steps that several settings share, each once; returns the reasons of failures by
    step key. Raises the error of a step that all settings need, and that of storage."""
    counts: Counter[str] = Counter()
    steps: dict[str, Step] = {}
    candidates = [{}, *(listed if listed is not None else sides)]
    for settings in candidates:
        try:
            needed = variants.needs(settings)
        except EngineError:
            continue  # reported when the setting is tried
        steps |= {step.key: step for step in needed}
        counts.update(step.key for step in needed)
    # Without a list, only steps that all candidates need are certain to be needed.
    threshold = 2 if listed is not None else len(candidates)
    common = [step for step in steps.values() if counts[step.key] == len(candidates)]
    execute(common, variants.store, runtime, variants.profile)
    broken: dict[str, str] = {}
    for step in steps.values():
        needed = upstream([step])
        if not threshold <= counts[step.key] < len(candidates) or ended():
            continue
        if any(before.key in broken for before in needed):
            continue
        try:
            execute(needed, variants.store, runtime, variants.profile, quiet=True)
        except StorageError:
            raise  # not the settings' fault
        except Exception as error:
            broken[step.key] = one_line(error)
    return broken


class ProposalLog:
    """The proposed settings of a tuning, in the store. Optuna's proposals depend on the order of
    results, so a restart after a kill must repeat them."""

    def __init__(self, store: Store, variants: StudyVariants, seed: int) -> None:
        ignored = {"trials": None, "budget_hours": None, "tried": 0}
        key = digest(
            {
                "tune": variants.tune.model_copy(update=ignored).model_dump(mode="json"),
                "steps": [step.key for step in variants.classifiers({})], "seed": seed,
            }
        )  # fmt: skip
        self.store, self.folder = store, store.work(key)

    def read(self) -> dict[int, Settings]:
        """The settings by number."""
        settings = {}
        for key in self.store.listing(self.folder):
            try:
                record = unseal(self.store.read(key))
            except ValueError:
                continue  # damaged: the setting is proposed anew
            settings[int(record["number"])] = dict(record["settings"])
        return settings

    def write(self, number: int, settings: Settings) -> None:
        record = seal({"number": number, "settings": settings})
        self.store.put(self.store.join(self.folder, f"{number:06d}.json"), record)


def row_of(variants: StudyVariants, outcome: Outcome, halving: Halving | None) -> dict[str, Any]:
    """A row of the table of tries."""
    row: dict[str, Any] = {"try": outcome.number}
    for name in variants.tune.knobs:
        row[name] = (
            outcome.settings[name] if outcome.number else field_of(variants.study({}), name)
        )
    scores: list[float] = []
    if outcome.reached is not None:
        steps = outcome.reached.steps if halving else None
        trains = variants.classifiers(outcome.settings, steps)
        manifests = [read_manifest(variants.store, step) for step in trains]
        scores = variants.scores(manifest for manifest in manifests if manifest is not None)
    state = "failed" if outcome.reached is None else "ok"
    if halving is not None and outcome.reached is not None and outcome.reached.steps < halving.most:
        state = "stopped"
    return {
        **row, "state": state,
        "mean": float(np.mean(scores)) if scores else None,
        "sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        "steps": outcome.reached.steps if outcome.reached else None,
        "seconds": round(outcome.seconds, 1), "error": outcome.error, "scores": scores,
    }  # fmt: skip


def tuned_study(
    variants: StudyVariants, study: Study, tries: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
) -> str:  # fmt: skip
    """The text of a study file with the best setting, and a comment on its origin."""
    knobs = variants.tune.knobs
    different = {tuple(shown(row[name]) for name in knobs) for row in tries}
    tried = variants.tune.tried + len(different)
    values = variants.values
    if best["try"]:
        values = variants.values_with({name: best[name] for name in knobs})
    name = study.name if study.name.endswith("-tuned") else f"{study.name[:58]}-tuned"
    values = {**values, "name": name, "tune": {"tried": tried}}
    before = next((row["mean"] for row in tries if row["try"] == 0), None)
    head = (
        f"# {study.name} with the best of {tried} settings, by arm {variants.tune.arm} on val:"
        f" {variants.objective} {best['mean']:.3f}"
        + (f" ({before:.3f} before tuning)." if before is not None else ".")
        + "\n# The setting was chosen on val, so this value is optimistic; test decides.\n"
    )
    return head + yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )


def roc_auc_of(store: Store, manifest: Manifest) -> float:
    """Mean area under the ROC curves, on val, of the classifier of a `train` step."""
    (table,) = store.tables(manifest.keys(file=PREDICTIONS))
    classes = tuple(TrainResult.of(manifest).val.per_class)
    labels = class_numbers(table[rows.label_column(manifest.spec["task"])].to_pylist(), classes)
    return float(np.nanmean(roc_auc(labels, np.asarray(table[rows.PROBABILITIES].to_pylist()))))


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
