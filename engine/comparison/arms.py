"""The arms of a comparison, their training images, and the classifiers trained on them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import numpy as np

from engine.core.rows import TaskKind
from engine.core.spec import Spec
from engine.core.step import Step, Subject, make_step
from engine.data.images import Preprocess
from engine.nets.classification import Training
from engine.settings import Amount, Classes, ClassifierField


class Added(Spec):
    """Images of one generator, from the inputs `curate.<generator>` and `generate.<generator>`."""

    generator: str
    amount: Amount


# The family of real images that are drawn as often as if images were added.
REPEATED = "repeated"

# How an arm uses synthetic images. add: with all real ones. replace: instead of as many real ones.
# pretrain: in the first steps, and only real ones in the others.
Use = Literal["add", "replace", "pretrain"]


class MixSpec(Spec):
    later_fields: ClassVar[tuple[str, ...]] = ("use", "repeated", "tasks", "folds", "without_fold")

    task: str
    # Kinds of the tasks of a study with several labels per image, whose labels go along.
    tasks: dict[str, TaskKind] = {}
    real: Literal["all", "reduced", "none"] = "all"
    # Draw every class equally often.
    oversampled: bool = False
    added: tuple[Added, ...] = ()
    classes: Classes = "all"
    seed: int = 0
    use: Use = "add"
    # Real images are drawn as often as if these amounts of their class were added.
    repeated: tuple[Amount, ...] = ()
    # Real images without those of one of so many folds.
    folds: int = 0
    without_fold: int = 0


# baseline: candidate baseline. compared: compared with the best baseline. shown: reported only,
# because its budget or its images differ from the rest.
Role = Literal["baseline", "compared", "shown"]


class Arm(Spec):
    """One arm of the comparison."""

    later_fields: ClassVar[tuple[str, ...]] = ("use", "double_of")

    name: str
    family: str
    # The inputs with its images: one per generator fit, or one for all.
    mixes: tuple[str, ...]
    # Ratio of added to real images; None if the amount is not given as a ratio.
    ratio: float | None = 0.0
    # Multiplies the optimizer steps.
    budget: float = 1.0
    # Training settings that differ from those of the other arms.
    training: dict[str, Any] = {}
    role: Role = "baseline"
    # Generators whose images it trains on.
    generators: tuple[str, ...] = ()
    # The filtered arm, if this is its unfiltered twin.
    twin_of: str | None = None
    use: Use = "add"
    # The arm with fewer steps, if this one trains on the same images for twice as many.
    double_of: str | None = None

    @property
    def synthetic_only(self) -> bool:
        """Whether it trains only on generated images."""
        alone = self.role == "shown" and self.ratio is None
        return bool(self.generators) and alone and not (self.twin_of or self.double_of)

    @property
    def follows(self) -> str | None:
        """The chosen arm that it accompanies in the confirmation, without a part in the choice."""
        return self.twin_of or self.double_of

    @property
    def line(self) -> str:
        """What its ratios are compared within: the family, and how its images are used."""
        return self.family if self.use == "add" else f"{self.family} {self.use}"


class SearchSpec(Spec):
    """The trials of a choice, or of its confirmation."""

    later_fields: ClassVar[tuple[str, ...]] = ("first_fit", "first_seed", "tasks")

    classifier: ClassifierField
    training: Training
    preprocess: Preprocess
    task: str
    # Weights of the tasks of a study with several labels per image.
    tasks: dict[str, float] = {}
    arms: tuple[Arm, ...]
    generator_fits: int
    # Seeds of all generator fits, ordered by fit.
    seeds: tuple[int, ...]
    # The numbers of the first fit and seed in the study.
    first_fit: int = 0
    first_seed: int = 0

    @property
    def seeds_per_fit(self) -> int:
        return len(self.seeds) // self.generator_fits

    @property
    def replicates(self) -> int:
        """Generator fits, or the seeds of a single one."""
        return self.generator_fits if self.generator_fits > 1 else self.seeds_per_fit


@dataclass(frozen=True)
class Trial:
    """A classifier of the comparison: its arm, the numbers of its generator fit and seed in the
    study, and the step that trains it. stage: whether it is part of the choice (search) or confirms
    it."""

    arm: Arm
    fit: int
    number: int
    step: Step
    stage: str


@cache
def planned_trials(search: Step) -> tuple[Trial, ...]:
    """The trials of a search or a confirmation: a `train` step for every arm, fit and seed.

    They are ordered by fit, so that a process decodes a pool of images once for all arms.
    """
    spec = search.spec_as(SearchSpec)
    each = spec.seeds_per_fit
    trials = []
    for fit in range(spec.generator_fits):
        for arm in spec.arms:
            mix = search.inputs[arm.mixes[fit % len(arm.mixes)]]
            inputs = {"ingest": search.inputs["ingest"], "mix": mix}
            inputs |= {name: step for name, step in mix.inputs.items() if step.kind == "generate"}
            training = {**arm.training, "steps": optimizer_steps(spec, arm)}
            for number in range(fit * each, (fit + 1) * each):
                seed = spec.first_seed + number
                step = make_step(
                    "train",
                    {
                        "classifier": spec.classifier,
                        "training": spec.training.model_copy(update=training),
                        "preprocess": spec.preprocess, "task": spec.task,
                        "tasks": spec.tasks, "seed": spec.seeds[number],
                    },
                    inputs, [("classifiers", spec.classifier)], Subject(arm.name, number=seed),
                )  # fmt: skip
                trials.append(Trial(arm, spec.first_fit + fit, seed, step, search.kind))
    return tuple(trials)


def opened_arms(search: Step, chosen: Collection[str]) -> list[Arm]:
    """The arms to be tested: the chosen ones, those that accompany them, and the repeated real
    images with the class shares of each chosen arm that adds to all real images: they tell what
    shifted shares alone bring."""
    spec = search.spec_as(SearchSpec)

    def mix_of(arm: Arm) -> MixSpec:
        return search.inputs[arm.mixes[0]].spec_as(MixSpec)

    def shares(arm: Arm) -> str:
        amounts = mix_of(arm).repeated or tuple(added.amount for added in mix_of(arm).added)
        ratios = [amount.ratio for amount in amounts]
        # Drawn twice at x1 is drawn at x2. Rounded as in the names of arms.
        return f"{sum(ratio or 0 for ratio in ratios):g}" if None not in ratios else str(amounts)

    of_chosen = [
        shares(arm) for arm in spec.arms
        if arm.name in chosen and arm.role == "compared" and arm.use == "add"
        and mix_of(arm).real == "all"
    ]  # fmt: skip
    return [
        arm for arm in spec.arms
        if arm.name in chosen or arm.follows in chosen
        or (arm.family == REPEATED and shares(arm) in of_chosen)
    ]  # fmt: skip


def replicates(values: np.ndarray, generator_fits: int) -> np.ndarray:
    """Values of trials (generator fits * seeds, …) as values of replicates (n, …).

    A replicate is a generator fit, with the mean of its seeds; with a single fit, it is a seed.
    """
    if generator_fits == 1:
        return values
    means: np.ndarray = values.reshape(generator_fits, -1, *values.shape[1:]).mean(1)
    return means


def optimizer_steps(spec: SearchSpec, arm: Arm) -> int:
    """Optimizer steps of an arm's trials."""
    return round(spec.training.steps * arm.budget)
