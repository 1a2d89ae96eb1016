"""Tuning: tries settings of a study and compares them by the classifiers of one arm on val.

A setting is the study with other values in some fields. It computes the steps that a study with
these values would compute. A later run of that study therefore finds them, and a restart computes
only what is missing. Test is never read. The best setting is written as a study, with the number of
settings that it was chosen from.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import yaml

from engine.core.errors import EngineError, StorageError, StudyError, one_line
from engine.core.manifest import read_manifest
from engine.core.progress import say
from engine.core.sealed import seal, unseal
from engine.core.spec import digest
from engine.core.step import Step, upstream
from engine.core.store import Store
from engine.execute import execute
from engine.profile import Profile
from engine.report.tries import shown
from engine.runtime.base import Outcome, Runtime
from engine.study import Study, validate
from engine.tuning.proposals import Halving, Proposals, Range, Settings, grid
from engine.tuning.settings import Tune
from engine.tuning.variants import StudyVariants, field_of

# Sections that settings may change. All others would change the comparison itself, or nothing.
TUNABLE = (
    "embedder", "cluster", "select", "reduce", "generators", "request", "classifier", "training",
    "curate",
)  # fmt: skip
# Fields that decide which arms and seeds there are, and how much each arm adds. ASHA must not vary
# them, because it would rank arms by shortened trainings.
_AMOUNTS = (
    "request.ratio", "request.ratio_by_class", "request.balance_to", "request.per_class",
    "request.allocate", "request.classes", "request.class_groups", "search", "seed",
)  # fmt: skip
_TRIALS = 20


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
        row[name] = outcome.settings[name] if outcome.number else field_of(variants.study({}), name)
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
