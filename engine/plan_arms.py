"""The arms of a comparison: their amounts, their mixes, and the generator fits that they use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from engine.comparison.arms import REPEATED, Added, Arm, Role, Use
from engine.core.registry import kind_of
from engine.core.rng import derive_seed
from engine.core.step import Step, Subject, make_step
from engine.nets.classification import Training
from engine.plan_labels import Labelling
from engine.settings import Amount, Request
from engine.study import Study

# An arm with its mixes: one for each generator fit, or one for all.
PlannedArm = tuple[Arm, Sequence[Step]]


@dataclass(frozen=True)
class DataPlan:
    """A study, and the steps on its real images. request: with groups of classes expanded."""

    study: Study
    request: Request
    labels: Labelling
    ingest: Step
    embed: Step
    cluster: Step
    select: Step
    reduce: Step | None
    # With `request.allocate`: the classifier whose scores it reads, and what each class gets.
    scores: Step | None = None
    allocate: Step | None = None
    # The steps before `ingest` if labels are revised: the data as it was read, and the votes.
    votes: tuple[Step, ...] = ()

    @property
    def task(self) -> str:
        return self.labels.task

    @property
    def tasks(self) -> Mapping[str, Any]:
        return self.labels.tasks

    @property
    def steps(self) -> list[Step]:
        steps = [*self.votes, self.ingest, self.embed, self.cluster, self.select, self.reduce]
        return list(dict.fromkeys(step for step in steps if step is not None))

    @property
    def allocation(self) -> list[Step]:
        """The steps that allocate images, after those on real images."""
        return [step for step in (self.scores, self.allocate) if step is not None]


@dataclass(frozen=True)
class Pool:
    """The images of a generator fit: its last `curate`, and the same images without filters."""

    curate: Step
    unfiltered: Step | None

    @property
    def generate(self) -> Step:
        return self.curate.inputs["generate"]

    @property
    def subject(self) -> Subject:
        """The generator and its fit, whatever the last round."""
        return Subject(self.curate.subject.name, self.curate.subject.fit)


def choice_fits(study: Study) -> range:
    """The generator fits whose classifiers choose."""
    return range(study.search.generator_fits)


def confirm_fits(study: Study) -> range:
    """The generator fits whose classifiers confirm the choice: new ones, or the first of the choice
    if there is to be only one."""
    search = study.search
    if search.confirm_fits == 1:
        return range(1)
    return range(search.generator_fits, search.generator_fits + search.confirm_fits)


def every_fit(study: Study) -> range:
    return range(max(choice_fits(study).stop, confirm_fits(study).stop))


def real_mix(data: DataPlan) -> Step:
    """All real images."""
    return mix_step(data, "real")


def mix_step(
    data: DataPlan, name: str, real: str = "all", oversampled: bool = False,
    added: tuple[Added, ...] = (), curates: Mapping[str, Step] | None = None, fit: int = 0,
    use: Use = "add", repeated: tuple[Amount, ...] = (),
) -> Step:  # fmt: skip
    """The training images of an arm. curates: the last `curate` of each generator in `added`."""
    inputs = {"ingest": data.ingest}
    if real == "reduced":
        assert data.reduce is not None, "the study has been checked"
        inputs["reduce"] = data.reduce
    if data.allocate is not None and any(
        amount.allocate is not None for amount in (*repeated, *(one.amount for one in added))
    ):
        inputs["allocate"] = data.allocate
    for label, curate in (curates or {}).items():
        inputs |= {f"curate.{label}": curate, f"generate.{label}": curate.inputs["generate"]}
    return make_step(
        "mix",
        {
            "task": data.task, "real": real, "oversampled": oversampled, "added": added,
            # Real images do not depend on the target classes.
            "classes": data.request.classes if added or repeated else "all",
            "seed": fit_seed(data.study.seed, fit) if added else 0,
            "use": use, "repeated": repeated, "tasks": data.labels.learned,
        },
        inputs, subject=Subject(name, fit),
    )  # fmt: skip


def search_training(study: Study) -> Training:
    """The training of all arms. Where some arms pretrain, the checkpoints of the others are chosen
    from as many."""
    if "pretrain" not in study.search.use:
        return study.training
    return study.training.model_copy(update={"choose_after": study.search.pretrain_share})


def training_arms(study: Study) -> dict[str, dict[str, Any]]:
    """The arms that train on the real images with other settings, and these settings."""
    search = study.search
    settings: dict[str, dict[str, Any]] = {
        "class_weighted": {"class_weights": "balanced"},
        "mixup": {"mixup_alpha": search.mixup_alpha, "cutmix_alpha": 0.0},
        "cutmix": {"cutmix_alpha": search.cutmix_alpha, "mixup_alpha": 0.0},
    }
    return {name: settings[name] for name in search.arms if name in settings}


def _arm(name: str, mixes: Sequence[Step], family: str = "", **fields: Any) -> PlannedArm:
    labels = tuple(mix.label for mix in mixes)
    return Arm(name=name, family=family or name, mixes=labels, **fields), mixes


def real_arms(data: DataPlan) -> list[PlannedArm]:
    """The arms with only real images."""
    real = real_mix(data)
    arms = [_arm("real", [real]), _arm("real_double", [real], budget=2.0, role="shown")]
    if "oversampled" in data.study.search.arms:
        arms.append(_arm("oversampled", [mix_step(data, "oversampled", oversampled=True)]))
    arms += _repeated_arms(data)
    arms += [
        _arm(name, [real], training=training)
        for name, training in training_arms(data.study).items()
    ]
    if data.reduce is not None:
        arms.append(_arm("reduced", [mix_step(data, "reduced", real="reduced")]))
    return arms


def _repeated_arms(data: DataPlan) -> list[PlannedArm]:
    """Real images alone, with the class shares of each arm that adds generated ones."""
    if "repeated" not in data.study.search.arms:
        return []
    parts = [tuple(part for part in of_arm if part != "reduced")
             for of_arm in data.study.search.combine.values()]  # fmt: skip
    arms: dict[str, PlannedArm] = {}
    for count in sorted({1, *map(len, parts)}):
        for suffix, amount in amounts(data).items():
            if amount.ratio is not None:
                suffix = ratio_name(count * amount.ratio)
            elif count > 1:
                suffix = f"{count} times {suffix}"
            name = f"repeated {suffix}"
            if name not in arms:
                ratio = None if amount.ratio is None else count * amount.ratio
                mix = mix_step(data, name, repeated=(amount,) * count)
                arms[name] = _arm(name, [mix], REPEATED, ratio=ratio)
    return list(arms.values())


def role_of(study: Study, labels: Sequence[str]) -> Role:
    """The part of an arm with images of these generators: claims are about synthetic images."""
    specs = [study.generators[label] for label in labels]
    if any(getattr(spec, "real", False) for spec in specs):
        return "baseline" if all(getattr(spec, "baseline", False) for spec in specs) else "shown"
    synthetic = any(kind_of("generators", spec).synthetic for spec in specs)
    return "compared" if synthetic else "baseline"


def generator_arms(
    data: DataPlan, pools: Mapping[str, Sequence[Pool]], fits: range
) -> list[PlannedArm]:
    """The arms of each generator and of combined generators, with a mix for each of `fits`."""
    study, arms = data.study, list[PlannedArm]()

    def mixes(
        name: str, amount: Amount, real: str, curates: Mapping[str, Sequence[Step]],
        use: Use = "add",
    ) -> list[Step]:  # fmt: skip
        """A mix for each generator fit."""
        added = tuple(Added(generator=label, amount=amount) for label in curates)
        return [
            mix_step(
                data, name, real, added=added, fit=fit, use=use,
                curates={label: of_fit[fit] for label, of_fit in curates.items()},
            )
            for fit in fits
        ]  # fmt: skip

    combined = {**{label: (label,) for label in study.generators}, **study.search.combine}
    for family, parts in combined.items():
        real = "reduced" if "reduced" in parts else "all"
        labels = tuple(part for part in parts if part != "reduced")
        curates = {label: [pool.curate for pool in pools[label]] for label in labels}
        unfiltered = [pool.unfiltered for pool in pools.get(family, ()) if pool.unfiltered]
        role = role_of(study, labels)
        for use, (suffix, amount) in product(study.search.use, amounts(data).items()):
            if use != "add" and (role != "compared" or not possible(use, amount, parts)):
                continue
            kind = family if use == "add" else f"{family} {use}"
            name, twin = f"{kind} {suffix}", f"{kind} unfiltered {suffix}"
            fields: dict[str, Any] = {"ratio": amount.ratio, "generators": labels, "use": use}
            if use == "pretrain":
                fields["training"] = {"first_share": study.search.pretrain_share}
            of_arm = mixes(name, amount, real, curates, use)
            arms.append(_arm(name, of_arm, family, role=role, **fields))
            if role == "compared":
                arms.append(
                    _arm(f"{name} double", of_arm, f"{family} double", role="shown",
                         double_of=name, budget=2.0, **fields)
                )  # fmt: skip
            if unfiltered:
                of_twin = mixes(twin, amount, real, {family: unfiltered}, use)
                arms.append(
                    _arm(twin, of_twin, f"{family} unfiltered", role="shown", twin_of=name,
                         **fields)
                )  # fmt: skip
        alone = role == "compared" and "synthetic_only" in study.search.arms
        if alone and family in study.generators:
            only = f"{family} only"
            of_only = mixes(only, Amount(ratio=1.0), "none", curates)
            arms.append(_arm(only, of_only, ratio=None, role="shown", generators=labels))
    return arms


def possible(use: Use, amount: Amount, parts: Sequence[str]) -> bool:
    """Whether an amount can be used so. Replaced images are at most as many as there are."""
    if use != "replace":
        return True
    return amount.ratio is not None and amount.ratio * len(parts) <= 1 and "reduced" not in parts


def largest_ratio(study: Study) -> float:
    """The largest ratio of the arms, as a share of each class's real images."""
    least = 1.0 if "synthetic_only" in study.search.arms else 0.0
    return max(least, *study.search.ratios)


def ratios(data: DataPlan) -> list[float]:
    asked = data.request.ratio
    return sorted({*data.study.search.ratios, *([asked] if asked else [])})


def amounts(data: DataPlan) -> dict[str, Amount]:
    """The amounts that the arms of a generator add, by the suffix of the arm's name: every ratio
    of the search, and the study's request."""
    request = data.request
    named = {ratio_name(ratio): Amount(ratio=ratio) for ratio in ratios(data)}
    if request.balance_to is not None:
        named[f"to {request.balance_to}"] = Amount(balance_to=request.balance_to)
    if request.per_class is not None:
        named[f"+{request.per_class}"] = Amount(per_class=request.per_class)
    if request.ratio_by_class is not None:
        named["by class"] = Amount(ratio_by_class=request.ratio_by_class)
    if request.allocate is not None:
        named["allocated"] = Amount(allocate=request.allocate)
    return named


def ratio_name(ratio: float) -> str:
    """The suffix of an arm's name for its ratio."""
    return f"x{ratio:g}"


def fit_seed(seed: int, fit: int) -> int:
    """The seed of all draws of a generator fit: the study's own for the first."""
    return derive_seed(seed, "generator fit", fit) if fit else seed
