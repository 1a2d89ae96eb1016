"""Search: every arm with every seed, each a `train` step in a trial of its own.

A trial that has its manifest is found and not run again, so a restart costs what is missing. What
is chosen is chosen on val: for each family the ratio with the best mean objective, and among the
families that are not synthetic the strongest, which synthetic images must beat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from engine.context import Context, Result
from engine.core import rows
from engine.core.dataset import class_names
from engine.core.images import Preprocess
from engine.core.spec import Spec
from engine.core.step import Step, make_step
from engine.nets.classification import Training
from engine.sections import ClassifierField
from engine.steps import StepKind


class Arm(Spec):
    """One arm of the comparison. `mix` names the input with its images; `budget` multiplies the
    optimizer steps."""

    name: str
    family: str
    mix: str
    # Of added to real images; None where the amount is not given as one.
    ratio: float | None = 0.0
    budget: float = 1.0
    synthetic: bool = False


class SearchSpec(Spec):
    classifier: ClassifierField
    training: Training
    preprocess: Preprocess
    task: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]


class Search(StepKind):
    version: ClassVar[int] = 3
    Spec: ClassVar[type[Spec]] = SearchSpec
    summary: ClassVar[str] = "train every arm with every seed, choose on val"

    def run(self, context: Context) -> Result:
        spec = context.step.spec_as(SearchSpec)
        trials = trial_steps(context.step)
        manifests = context.trials([step for _, _, step in trials])
        scores: dict[str, list[float]] = {arm.name: [] for arm in spec.arms}
        columns: dict[str, list[Any]] = {
            name: [] for name in (
                rows.ARM, "family", rows.RATIO, "synthetic", rows.SEED, "key", "steps", "best_step",
                "images", "accuracy", "macro_f1", "balanced_accuracy",
            )
        }  # fmt: skip
        for arm, number, step in trials:
            manifest = manifests[step.key]
            val = manifest.metrics["val"]
            scores[arm.name].append(float(val[spec.training.objective]))
            for name, value in {
                rows.ARM: arm.name, "family": arm.family, rows.RATIO: arm.ratio,
                "synthetic": arm.synthetic, rows.SEED: number, "key": step.key,
                "steps": steps_of(spec, arm),
                "best_step": manifest.metrics["best_step"], "images": manifest.rows,
                **{name: val[name] for name in ("accuracy", "macro_f1", "balanced_accuracy")},
            }.items():  # fmt: skip
                columns[name].append(value)
        found = choose(spec.arms, scores)
        warnings = hardly_learnt(columns, len(class_names(context.inputs["ingest"])))
        for text in warnings:
            context.say(f"warning: {text}")
        best = max((arm for arm in found["chosen"]), key=lambda name: found["arms"][name]["mean"])
        return Result(
            [context.table("trials", pa.table(columns), table="trials")], len(trials),
            {
                "headline": (
                    f"{len(trials)} trials; best on val: {best}, {spec.training.objective}"
                    f" {found['arms'][best]['mean']:.3f}"
                ),
                "objective": spec.training.objective,
                "warnings": warnings,
                # What was chosen by, for evaluate to hold against what it finds.
                "trials": {key: manifest.digest for key, manifest in manifests.items()},
                **found,
            },
        )  # fmt: skip


def trial_steps(search: Step) -> list[tuple[Arm, int, Step]]:
    """The `train` step of every arm and seed, in order: what each trial of a search computes."""
    spec = search.spec_as(SearchSpec)
    found = []
    for arm in spec.arms:
        mix = search.inputs[arm.mix]
        inputs = {"ingest": search.inputs["ingest"], "mix": mix}
        if "generate" in mix.inputs:
            inputs["generate"] = mix.inputs["generate"]
        training = spec.training.model_copy(update={"steps": steps_of(spec, arm)})
        for number, seed in enumerate(spec.seeds):
            step = make_step(
                "train", f"train.{arm.name.replace(' ', '.')}.{number}",
                {
                    "classifier": spec.classifier,
                    "training": training, "preprocess": spec.preprocess, "task": spec.task,
                    "seed": seed,
                },
                inputs, [("classifiers", spec.classifier)],
            )  # fmt: skip
            found.append((arm, number, step))
    return found


def hardly_learnt(columns: Mapping[str, Sequence[Any]], classes: int) -> list[str]:
    """A warning where the classifiers on real images are near chance: no arm says anything then."""
    scores = [
        score for arm, score in zip(columns[rows.ARM], columns["balanced_accuracy"], strict=True)
        if arm == "real"
    ]  # fmt: skip
    mean, chance = float(np.mean(scores)), 1 / classes
    if mean > chance + 0.1 * (1 - chance):
        return []
    return [
        f"on real images alone the classifier has hardly learnt anything (balanced accuracy"
        f" {mean:.2f} on val, chance is {chance:.2f}), so that no arm says anything; raise"
        " training.steps, change training.learning_rate or the classifier"
    ]


def steps_of(spec: SearchSpec, arm: Arm) -> int:
    """Optimizer steps of an arm's trials."""
    return round(spec.training.steps * arm.budget)


def choose(arms: Sequence[Arm], scores: dict[str, list[float]]) -> dict[str, Any]:
    """The ratio of each family with the best mean on val (the smaller of equals), and the strongest
    family that is not synthetic, at the budget of all."""
    figures = {
        name: {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
        for name, values in scores.items()
    }
    chosen: dict[str, Arm] = {}
    for arm in arms:
        best = chosen.get(arm.family)
        if best is None or figures[arm.name]["mean"] > figures[best.name]["mean"]:
            chosen[arm.family] = arm
    # More steps are no fair rival: they show whether the budget is what limits all arms.
    baselines = [arm for arm in chosen.values() if not arm.synthetic and arm.budget == 1]
    strongest = max(baselines, key=lambda arm: figures[arm.name]["mean"])
    return {
        "arms": figures,
        "chosen": [arm.name for arm in chosen.values()],
        "baseline": strongest.name,
    }
