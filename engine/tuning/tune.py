"""A study's settings tried, by what the classifiers of one arm reach on val.

A setting is the study with other values in some fields. What it needs is what the study itself
would compute with these values: a setting is found again when its study runs, and a restart costs
what is missing. Test stays closed. The best setting is written down as a study, with the number of
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
from engine.runtime.base import Outcome, Runtime
from engine.sections import Tune
from engine.steps.search import SearchSpec, trial_steps
from engine.steps.train import PREDICTIONS
from engine.study import Study, lay, validate
from engine.tuning.proposals import Halving, Proposals, Range, Rung, Settings, grid

# What settings may differ in. All else would change what they are compared on, or nothing.
TUNABLE = (
    "embedder", "cluster", "select", "reduce", "generators", "request", "classifier", "training",
    "curate",
)  # fmt: skip
# How much of what each arm adds, and which arms and seeds there are: halving would rank arms by
# trainings that are cut short.
_AMOUNTS = (
    "request.ratio", "request.ratio_by_class", "request.balance_to", "request.per_class",
    "request.classes", "request.class_groups", "search", "seed",
)  # fmt: skip
_TRIALS = 20


@dataclass(frozen=True)
class Setting:
    """What a try's process runs: a setting's classifiers and all that they need.

    values: the study as it is written. broken: steps that failed before, by key, and why.
    """

    values: dict[str, Any]
    tune: Tune
    store: Store
    profile: Profile
    broken: Mapping[str, str] = field(default_factory=dict)

    def study(self, settings: Settings) -> Study:
        """Raises `StudyError`."""
        values = self.laid(settings)
        told = ", ".join(
            f"{name}={'null' if value is None else shown(value)}"
            for name, value in settings.items()
        )
        return validate(Study, values, f"tune.knobs: {told}" if told else "study")

    def laid(self, settings: Settings) -> dict[str, Any]:
        """The study as it would be written. Null is a value of a field, and not its default, which
        laying it over would come to; of a list of plugins it takes the named one away."""
        values = self.values
        for name, value in settings.items():
            values = lay(values, name, value)
        nulls = [name.split(".") for name, value in settings.items() if value is None]
        stands = validate(Study, self.values, "study") if nulls else None
        for *place, last in nulls:
            section = _entry(stands, place)
            if isinstance(section, Spec) and last in type(section).model_fields:
                values = _with_null(values, [*place, last])
        return values

    def halving(self) -> Halving | None:
        if self.tune.scheduler == "none":
            return None
        most = self.study({}).training.steps
        return Halving(max(1, round(self.tune.grace * most)), self.tune.reduction_factor, most)

    def classifiers(self, settings: Settings, steps: int | None = None) -> list[Step]:
        """The `train` steps of the arm, of as many optimizer steps. Raises `StudyError`."""
        study = self.study(settings)
        if study.classifier is None:
            raise StudyError("tune: needs a classifier, by which settings are compared")
        (search,) = named(plan(study), "search")
        spec = search.spec_as(SearchSpec)
        if steps is not None:
            training = {"training": spec.training.shortened(steps)}
            search = replace(search, spec=spec.model_copy(update=training))
        # Of the first generator fit alone: the others are the study's, to see whether it holds.
        found = [
            trial.step
            for trial in trial_steps(search)
            if trial.arm.name == self.tune.arm and trial.fit == 0
        ]
        if not found:
            what = f"there is no arm {self.tune.arm!r}" if self.tune.arm else "name one to judge by"
            arms = ", ".join(arm.name for arm in spec.arms)
            raise StudyError(f"tune.arm: {what}; there are {arms}")
        wanted = self.tune.seeds or len(found)
        if wanted > len(found):
            raise StudyError(f"tune.seeds: {wanted}: search.seeds has {len(found)}; raise it")
        return found[:wanted]

    def needs(self, settings: Settings) -> list[Step]:
        """All that the classifiers need, inputs first."""
        trains = self.classifiers(settings)
        return upstream([needed for step in trains for needed in step.inputs.values()])

    def scores(self, manifests: Iterable[Manifest]) -> list[float]:
        """What classifiers reached on val."""
        if self.objective == "roc_auc":
            return [roc_auc_of(self.store, manifest) for manifest in manifests]
        return [float(manifest.metrics["val"][self.objective]) for manifest in manifests]

    @cached_property
    def objective(self) -> str:
        return self.tune.objective or self.study({}).training.objective

    def __call__(self, settings: Settings, runtime: Runtime) -> Iterator[Rung]:
        needed = self.needs(settings)
        if why := next((self.broken[step.key] for step in needed if step.key in self.broken), ""):
            raise EngineError(why)
        execute(needed, self.store, runtime, self.profile, quiet=True)
        runner = Trials(self.store, runtime, self.profile)
        halving = self.halving()
        for steps in halving.rungs() if halving else [None]:
            trains = self.classifiers(settings, steps)
            found = runner.find(trains)
            missing = [step for step in trains if step.key not in found]
            if missing:
                found |= runner.run(missing, lambda count: None)
            value = float(np.mean(self.scores(found.values())))
            yield Rung(steps or self.study(settings).training.steps, value)


@dataclass(frozen=True)
class Tried:
    """What came of a tuning. tries: a row for each setting, by number; best: one of them. study:
    the study file that it makes."""

    tries: list[dict[str, Any]]
    best: dict[str, Any]
    objective: str
    study: str


def tune(values: dict[str, Any], store: Store, runtime: Runtime, profile: Profile) -> Tried:
    """Try what the study's section `tune` says. Raises `StudyError` before anything is computed,
    `StorageError` where storage fails, and `EngineError` where no setting could be computed."""
    started = time.monotonic()
    study = validate(Study, values, "study")
    settings = study.tune
    one = Setting(values, settings, store, profile)
    sides = check(one)
    listed = known_settings(one, study.seed)
    count = len(listed) if listed is not None else settings.trials or _TRIALS
    ends = None if settings.budget_hours is None else started + 3600 * settings.budget_hours

    def ended() -> bool:
        return ends is not None and time.monotonic() > ends

    before = {step.key for step in one.needs({})}
    leaf = all({step.key for step in one.needs(side)} == before for side in sides)
    say(f"{count} settings and the study as it is, judged by {settings.arm} on val")
    one = replace(one, broken=prepare(one, sides, listed, runtime, ended))
    notes = Notes(store, one, study.seed)
    # Other methods name the same settings each time.
    remembers = settings.method == "optuna"
    proposals = Proposals(
        settings.knobs, settings.method, count, study.seed, ended=ended,
        known=notes.read() if remembers else None, note=notes.write if remembers else None,
    )  # fmt: skip
    told: dict[int, dict[str, Any]] = {}
    objective = one.objective
    halving = one.halving()

    def on_end(outcome: Outcome) -> None:
        row = row_of(one, outcome, halving)
        told[outcome.number] = row
        what = row["error"] or f"{objective} {row['mean']:.3f}" + (
            "" if row["state"] == "ok" else f" at {row['steps']:,} steps, stopped"
        )
        which = ", ".join(f"{name} {shown(value)}" for name, value in outcome.settings.items())
        say(f"try {outcome.number} of {count} ({which or 'the study as it is'}): {what}")

    runtime.tune(one, proposals, halving, profile.trial, leaf, on_end)
    tries = [told[number] for number in sorted(told)]
    done = [row for row in tries if row["state"] == "ok"]
    if not done:
        first = next((row["error"] for row in tries if row["error"]), "the budget was too short")
        raise EngineError(f"tune: none of {len(tries)} settings could be computed: {first}")
    best = max(done, key=lambda row: row["mean"])
    return Tried(tries, best, objective, tuned_study(one, study, tries, best))


def check(one: Setting) -> list[Settings]:
    """Refuse what cannot be tried; returns settings that differ from the study in one knob
    each. Raises `StudyError`."""
    settings = one.tune
    if not settings.knobs:
        raise StudyError("tune.knobs: name the fields to try, as generators.ddpm.guidance_scale")
    if settings.method == "grid" and settings.trials is not None:
        raise StudyError("tune.trials: a grid tries every setting; leave it out, or say random")
    for name in settings.knobs:
        refuse(name, settings)
    one.classifiers({})
    sides = []
    for name, knob in settings.knobs.items():
        values = knob.ends() if isinstance(knob, Range) else knob
        keys = set()
        for value in values:
            sides.append({name: value})
            # Every value is a study that can be planned, before any is computed.
            keys.add(one.classifiers({name: value})[0].key)
        if len(keys) == 1:
            raise StudyError(
                f"tune.knobs: {name} changes nothing that {settings.arm} is trained on; leave it"
                " out, or name another arm as tune.arm"
            )
    return sides


def refuse(name: str, settings: Tune) -> None:
    """Refuse a knob that would change what settings are compared on. Raises `StudyError`."""
    section = name.split(".")[0]
    if settings.scheduler == "asha" and (name == "request" or _is_or_part(name, _AMOUNTS)):
        raise StudyError(
            f"tune.knobs: {name} changes what an arm adds or which it is, and ASHA is never over"
            " arm, ratio or seed; leave it out"
            + (", or say scheduler: none" if section in TUNABLE else "")
        )
    if section not in TUNABLE:
        raise StudyError(
            f"tune.knobs: {name} is no setting: it changes what settings are compared on, or"
            f" nothing; there are fields of {', '.join(TUNABLE)}"
        )
    if name == "training.objective":
        raise StudyError("tune.knobs: training.objective is what settings are compared by")
    if name in ("training", "training.steps") and settings.scheduler == "asha":
        raise StudyError(f"tune.knobs: asha gives each setting its steps; leave {name} out")
    for other in settings.knobs:
        if other.startswith(f"{name}."):
            raise StudyError(f"tune.knobs: {other} is a part of {name}; leave one of them out")


def _is_or_part(name: str, fields: Sequence[str]) -> bool:
    """Whether a dotted name is one of these fields, or a part of one."""
    return any(name == one or name.startswith(f"{one}.") for one in fields)


def known_settings(one: Setting, seed: int) -> list[Settings] | None:
    """All settings, where the method can name them before any is tried. Raises `StudyError`."""
    settings = one.tune
    if settings.method == "optuna":
        if find_spec("optuna") is None:
            raise StudyError(
                "tune.method: optuna needs Optuna: pip install"
                ' "synthetic-training-engine[optuna]", or say random'
            )
        return None
    try:
        if settings.method == "grid":
            return grid(settings.knobs)
    except ValueError as error:
        raise StudyError(
            f"tune.knobs.{error}: a grid needs a list, or a step between low and high"
        ) from None
    proposals = Proposals(settings.knobs, "random", settings.trials or _TRIALS, seed)
    return [asked[1] for asked in iter(proposals.ask, None)][1:]


def prepare(
    one: Setting, sides: Sequence[Settings], listed: Sequence[Settings] | None, runtime: Runtime,
    ended: Callable[[], bool],
) -> dict[str, str]:  # fmt: skip
    """Compute what settings share before any is tried, each step once; returns what failed, by
    key, and why. Raises the error of what all need, and that of storage."""
    counts: Counter[str] = Counter()
    steps: dict[str, Step] = {}
    tried = [{}, *(listed if listed is not None else sides)]
    for settings in tried:
        try:
            needed = one.needs(settings)
        except EngineError:
            continue  # said where it is tried
        steps |= {step.key: step for step in needed}
        counts.update(step.key for step in needed)
    # What Optuna will ask for is not known: what all need is needed in any case.
    least = 2 if listed is not None else len(tried)
    common = [step for step in steps.values() if counts[step.key] == len(tried)]
    execute(common, one.store, runtime, one.profile)
    broken: dict[str, str] = {}
    for step in steps.values():
        needed = upstream([step])
        if not least <= counts[step.key] < len(tried) or ended():
            continue
        if any(before.key in broken for before in needed):
            continue
        try:
            execute(needed, one.store, runtime, one.profile, quiet=True)
        except StorageError:
            raise  # no fault of the settings that need it
        except Exception as error:
            broken[step.key] = one_line(error)
    return broken


class Notes:
    """Which settings were asked for, in the store: Optuna's depend on which were done first, and a
    restart goes on with those that a kill ended."""

    def __init__(self, store: Store, one: Setting, seed: int) -> None:
        left_out = {"trials": None, "budget_hours": None, "tried": 0}
        key = digest(
            {
                "tune": one.tune.model_copy(update=left_out).model_dump(mode="json"),
                "steps": [step.key for step in one.classifiers({})], "seed": seed,
            }
        )  # fmt: skip
        self.store, self.folder = store, store.work(key)

    def read(self) -> dict[int, Settings]:
        found = {}
        for key in self.store.listing(self.folder):
            try:
                note = unseal(self.store.read(key))
            except ValueError:
                continue  # damaged: the setting is proposed anew
            found[int(note["number"])] = dict(note["settings"])
        return found

    def write(self, number: int, settings: Settings) -> None:
        note = seal({"number": number, "settings": settings})
        self.store.put(self.store.join(self.folder, f"{number:06d}.json"), note)


def row_of(one: Setting, outcome: Outcome, halving: Halving | None) -> dict[str, Any]:
    """A row of the table of tries."""
    row: dict[str, Any] = {"try": outcome.number}
    for name in one.tune.knobs:
        row[name] = outcome.settings[name] if outcome.number else field_of(one.study({}), name)
    scores: list[float] = []
    if outcome.reached is not None:
        steps = outcome.reached.steps if halving else None
        trains = one.classifiers(outcome.settings, steps)
        manifests = [read_manifest(one.store, step) for step in trains]
        scores = one.scores(manifest for manifest in manifests if manifest is not None)
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
    one: Setting, study: Study, tries: Sequence[Mapping[str, Any]], best: Mapping[str, Any]
) -> str:
    """The study with the best setting, as a file that says what it was chosen from."""
    knobs = one.tune.knobs
    different = {tuple(shown(row[name]) for name in knobs) for row in tries}
    tried = one.tune.tried + len(different)
    values = one.values
    if best["try"]:
        values = one.laid({name: best[name] for name in knobs})
    name = study.name if study.name.endswith("-tuned") else f"{study.name[:58]}-tuned"
    values = {**values, "name": name, "tune": {"tried": tried}}
    stands = next((row["mean"] for row in tries if row["try"] == 0), None)
    head = (
        f"# {study.name} with the best of {tried} settings by {one.tune.arm} on val:"
        f" {one.objective} {best['mean']:.3f}"
        + (f" ({stands:.3f} as it was)." if stands is not None else ".")
        + "\n# Val has been chosen on: what this setting is worth is for test to say.\n"
    )
    return head + yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )


def roc_auc_of(store: Store, manifest: Manifest) -> float:
    """Mean area under the ROC curves on val of the classifier that a `train` step left."""
    (table,) = store.tables(manifest.keys(file=PREDICTIONS))
    classes = tuple(manifest.metrics["val"]["per_class"])
    labels = class_numbers(table[rows.label_column(manifest.spec["task"])].to_pylist(), classes)
    return float(np.nanmean(roc_auc(labels, np.asarray(table[rows.PROBABILITIES].to_pylist()))))


def field_of(study: Study, name: str) -> Any:
    """What a study says of a dotted field, its defaults among it; None where it has none."""
    found = _entry(study, name.split("."))
    return found.model_dump(mode="json") if isinstance(found, Spec) else found


def _entry(study: Study | None, parts: Sequence[str]) -> Any:
    """What stands at a place of a study, or None."""
    found: Any = study
    for part in parts:
        if isinstance(found, tuple):
            found = next((entry for entry in found if getattr(entry, "name", "") == part), None)
        elif isinstance(found, Mapping):
            found = found.get(part)
        else:
            found = getattr(found, part, None)
    return found


def _with_null(values: Any, parts: Sequence[str]) -> Any:
    """Values as they are written, in which null stands at a place."""
    if not parts:
        return None
    if isinstance(values, list):
        return [
            _with_null(one, parts[1:]) if isinstance(one, dict) and one.get("name") == parts[0]
            else one
            for one in values
        ]  # fmt: skip
    held = values if isinstance(values, dict) else {}
    return {**held, parts[0]: _with_null(held.get(parts[0]), parts[1:])}
