"""The arms of a comparison, what each trains on, and the classifiers that it is tried by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from engine.core.spec import Spec
from engine.core.step import Step, Subject, make_step
from engine.data.images import Preprocess
from engine.nets.classification import Training
from engine.sections import Amount, Classes, ClassifierField


class Added(Spec):
    """Images of one generator; the inputs `curate.<generator>` and `generate.<generator>` have
    them."""

    generator: str
    amount: Amount


class MixSpec(Spec):
    task: str
    real: Literal["all", "reduced", "none"] = "all"
    # Drawn so that every class is seen alike.
    oversampled: bool = False
    added: tuple[Added, ...] = ()
    classes: Classes = "all"
    seed: int = 0


# baseline: one of those whose strongest synthetic images must beat. compared: held against it.
# shown: with another budget or other images than the rest, for the reader alone.
Role = Literal["baseline", "compared", "shown"]


class Arm(Spec):
    """One arm of the comparison."""

    name: str
    family: str
    # The inputs with its images: one for each generator fit, or one for all.
    mixes: tuple[str, ...]
    # Of added to real images; None where the amount is not given as one.
    ratio: float | None = 0.0
    # Multiplies the optimizer steps.
    budget: float = 1.0
    # Settings of its training that are not those of all arms.
    training: dict[str, Any] = {}
    role: Role = "baseline"
    # Whose images it trains on beside real ones.
    generators: tuple[str, ...] = ()
    # The arm that this one differs from in having no filters.
    twin_of: str | None = None


class SearchSpec(Spec):
    classifier: ClassifierField
    training: Training
    preprocess: Preprocess
    task: str
    arms: tuple[Arm, ...]
    generator_fits: int
    # Of each generator fit, one after the other.
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """A classifier of the comparison: its arm, the generator fit, the number of its seed among all
    of the search, and the step that trains it."""

    arm: Arm
    fit: int
    number: int
    step: Step


@cache
def planned_trials(search: Step) -> tuple[Trial, ...]:
    """The `train` step of every arm, generator fit and seed: what each trial of a search computes.

    Fit after fit, so that a process decodes a pool of images once for all arms.
    """
    spec = search.spec_as(SearchSpec)
    each = len(spec.seeds) // spec.generator_fits
    trials = []
    for fit in range(spec.generator_fits):
        for arm in spec.arms:
            mix = search.inputs[arm.mixes[fit % len(arm.mixes)]]
            inputs = {"ingest": search.inputs["ingest"], "mix": mix}
            inputs |= {name: step for name, step in mix.inputs.items() if step.kind == "generate"}
            training = {**arm.training, "steps": optimizer_steps(spec, arm)}
            for number in range(fit * each, (fit + 1) * each):
                step = make_step(
                    "train",
                    {
                        "classifier": spec.classifier,
                        "training": spec.training.model_copy(update=training),
                        "preprocess": spec.preprocess, "task": spec.task,
                        "seed": spec.seeds[number],
                    },
                    inputs, [("classifiers", spec.classifier)], Subject(arm.name, number=number),
                )  # fmt: skip
                trials.append(Trial(arm, fit, number, step))
    return tuple(trials)


def replicates(values: np.ndarray, generator_fits: int) -> np.ndarray:
    """Figures (generator fits * seeds, …) of trials to those of replicates (n, …): generator fits,
    each the mean of its seeds; seeds where there is one fit alone."""
    if generator_fits == 1:
        return values
    means: np.ndarray = values.reshape(generator_fits, -1, *values.shape[1:]).mean(1)
    return means


def optimizer_steps(spec: SearchSpec, arm: Arm) -> int:
    """Optimizer steps of an arm's trials."""
    return round(spec.training.steps * arm.budget)
