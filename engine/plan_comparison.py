"""The steps of a plan that test whether images help: curation's inputs, the arms, the search, the
verdict, the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.comparison.arms import Added, Arm, SearchSpec
from engine.core.errors import StudyError
from engine.core.registry import kind_of
from engine.core.rng import derive_seed
from engine.core.step import Step, Subject, make_step
from engine.settings import Amount, Request, Tune
from engine.stages.measuring import measuring
from engine.study import Study

# An arm with its mixes: one for each generator fit, or one for all.
PlannedArm = tuple[Arm, Sequence[Step]]


@dataclass(frozen=True)
class DataPlan:
    """A study, and the steps on its real images. request: with groups of classes expanded."""

    study: Study
    request: Request
    task: str
    tasks: Mapping[str, Any]
    ingest: Step
    embed: Step
    cluster: Step
    select: Step
    reduce: Step | None

    @property
    def steps(self) -> list[Step]:
        steps = [self.ingest, self.embed, self.cluster, self.select]
        return [*steps, self.reduce] if self.reduce is not None else steps


@dataclass(frozen=True)
class Curation:
    """How generated images are filtered; empty without filters, or without images to filter.

    inputs: the labeler's training and the measurements of val. plugins: those whose versions are
    part of the key of `curate`.
    """

    filters: tuple[Any, ...] = ()
    labeler: Any = None
    inputs: Mapping[str, Step] = field(default_factory=dict)
    plugins: tuple[tuple[str, Any], ...] = ()


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


def plan_curation(data: DataPlan) -> Curation:
    """How the images of all generators are filtered."""
    study, filters = data.study, data.study.curate.filters
    spec: Any = study.curate.labeler
    kinds = [kind_of("generators", generator) for generator in study.generators.values()]
    if not (filters and any(kind.filtered for kind in kinds)):
        return Curation()
    inputs: dict[str, Step] = {}
    labelers: list[tuple[str, Any]] = [("labelers", spec)] if spec is not None else []
    if spec is not None and kind_of("labelers", spec).trained:
        classifier, training = spec.classifier or study.classifier, spec.training or study.training
        spec = spec.model_copy(update={"classifier": classifier, "training": training})
        inputs["labeler"] = make_step(
            "train",
            {
                "classifier": classifier, "training": training, "preprocess": study.preprocess,
                "task": data.task, "seed": derive_seed(study.seed, "labeler"),
            },
            {"ingest": data.ingest, "mix": real_mix(data)}, [("classifiers", classifier)],
            Subject("labeler"),
        )  # fmt: skip
        labelers.append(("classifiers", classifier))
    pixel_spec = measuring(data.task, study.preprocess, spec, filters)
    if pixel_spec.labeler is not None or pixel_spec.filters:
        inputs["measure"] = make_step(
            "measure", pixel_spec.model_dump(), {"ingest": data.ingest, **inputs},
            [*(("filters", one) for one in pixel_spec.filters), *labelers], Subject("val"),
        )  # fmt: skip
    plugins = (*(("filters", one) for one in filters), *labelers)
    return Curation(filters, spec, inputs, plugins)


def curate_step(
    data: DataPlan, curation: Curation, subject: Subject, generate: Step, generator_key: str
) -> Step:
    """The step that selects from generated images."""
    study, inputs = data.study, {"ingest": data.ingest, "generate": generate}
    spec: dict[str, Any] = {"filters": ()}
    plugins: list[tuple[str, Any]] = []
    if curation.filters:
        inputs |= {"embed": data.embed, **curation.inputs}
        spec = {"filters": curation.filters, "labeler": curation.labeler,
                "embedder": study.embedder}  # fmt: skip
        plugins = [*curation.plugins, ("embedders", study.embedder)]
        # Replicates that confirm a choice are never filtered by what came out of them.
        if study.curate.stop_if_useless and subject.fit == 0 and subject.round == 1:
            spec["stop_if_useless"] = True
    return make_step(
        "curate",
        {
            "task": data.task, "preprocess": study.preprocess, "generator_key": generator_key,
            **spec,
        },
        inputs, plugins, subject,
    )  # fmt: skip


def check_comparison(data: DataPlan, curation: Curation) -> None:
    """Raise `StudyError` if an arm is impossible, or if a classifier does not fit the image size
    or its training."""
    study = data.study
    arms = study.search.arms
    if "synthetic_only" in arms and study.request.classes != "all":
        raise StudyError(
            "search.arms: synthetic_only needs images of every class; set request.classes to"
            " all, or remove it"
        )
    # Otherwise a requested arm would be missing silently.
    kinds = [kind_of("generators", generator) for generator in study.generators.values()]
    if "synthetic_only" in arms and not any(kind.synthetic for kind in kinds):
        raise StudyError(
            "search.arms: synthetic_only needs a generator that makes new images; add one to"
            " generators, or remove it"
        )
    if "unfiltered" in arms and not curation.filters:
        raise StudyError(
            "search.arms: unfiltered needs filtered images; set curate.filters and add a"
            " generator other than traditional, or remove it"
        )
    named: dict[str, float] = {}
    for ratio in _ratios(data):
        if (other := named.setdefault(_ratio_name(ratio), ratio)) != ratio:
            raise StudyError(
                f"search.ratios: the arms of {other!r} and {ratio!r} (of search.ratios or"
                f" request.ratio) would both be named {_ratio_name(ratio)}; round them to six"
                " digits"
            )
    trainings = [{}, *_training_arms(study).values()]
    trained: list[tuple[Any, Any]] = [
        (study.classifier, study.training.model_copy(update=training)) for training in trainings
    ]
    if "labeler" in curation.inputs:
        trained.append((curation.labeler.classifier, curation.labeler.training))
    for spec, training in trained:
        kind_of("classifiers", spec)(spec, study.preprocess, ()).check(training)


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


def plan_comparison(data: DataPlan, pools: Mapping[str, Sequence[Pool]]) -> list[Step]:
    """The mixes except `real_mix`, and all later steps. pools: one for each fit of each
    generator."""
    study, settings = data.study, data.study.search
    search, mixes = _trials_step(data, pools, "search", choice_fits(study), settings.seeds, 0)
    fits = confirm_fits(study)
    confirm, of_confirm = _trials_step(
        data, pools, "confirm", fits, settings.seeds if len(fits) == 1 else 1,
        len(search.spec_as(SearchSpec).seeds), {"search": search},
    )  # fmt: skip
    mixes |= of_confirm
    fidelity = _fidelity_steps(data, pools)
    plugins = [("classifiers", study.classifier)]
    evaluate = make_step(
        "evaluate",
        {
            "settings": study.evaluate, "classifier": study.classifier,
            "preprocess": study.preprocess, "task": data.task,
            "objective": study.training.objective, "seed": study.seed,
        },
        {"ingest": data.ingest, "search": search, "confirm": confirm}, plugins,
    )  # fmt: skip
    images = {
        f"{step.kind}.{pool.subject.label}": step
        for pool in _every(pools)
        for step in (pool.curate, pool.generate)
    }
    report = make_step(
        "report",
        {
            # The page reports only the number of tuned settings.
            "study": study.model_copy(update={"tune": Tune(tried=study.tune.tried)}),
            "preprocess": study.preprocess, "task": data.task, "generators": tuple(pools),
            "target_classes": data.request.classes, "seed": study.seed,
        },
        {
            "ingest": data.ingest, "embed": data.embed, "search": search, "confirm": confirm,
            "evaluate": evaluate, **images,
            # Includes real vectors if fidelity uses another embedder than the study.
            **{step.label: step for step in fidelity},
        },
    )  # fmt: skip
    own = [mix for mix in mixes.values() if mix != real_mix(data)]
    return [*own, *fidelity, search, confirm, evaluate, report]


def _trials_step(
    data: DataPlan, pools: Mapping[str, Sequence[Pool]], kind: str, fits: range, seeds: int,
    first_seed: int, inputs: Mapping[str, Step] | None = None,
) -> tuple[Step, dict[str, Step]]:  # fmt: skip
    """A step that trains classifiers on the images of some generator fits, and the mixes of its
    arms. seeds: of each fit."""
    study = data.study
    arms = [*_real_arms(data), *_generator_arms(data, pools, fits)]
    mixes = {mix.label: mix for _, of_arm in arms for mix in of_arm}
    step = make_step(
        kind,
        {
            "classifier": study.classifier, "training": study.training,
            "preprocess": study.preprocess, "task": data.task,
            "arms": tuple(arm for arm, _ in arms),
            "generator_fits": len(fits),
            "seeds": tuple(
                derive_seed(study.seed, "classifier", first_seed + number)
                for number in range(len(fits) * seeds)
            ),
            "first_fit": fits.start, "first_seed": first_seed,
        },
        {"ingest": data.ingest, **(inputs or {}), **mixes}, [("classifiers", study.classifier)],
    )  # fmt: skip
    return step, mixes


def real_mix(data: DataPlan) -> Step:
    """All real images."""
    return mix_step(data, "real")


def mix_step(
    data: DataPlan, name: str, real: str = "all", oversampled: bool = False,
    added: tuple[Added, ...] = (), curates: Mapping[str, Step] | None = None, fit: int = 0,
) -> Step:  # fmt: skip
    """The training images of an arm. curates: the last `curate` of each generator in `added`."""
    inputs = {"ingest": data.ingest}
    if real == "reduced":
        assert data.reduce is not None, "the study has been checked"
        inputs["reduce"] = data.reduce
    for label, curate in (curates or {}).items():
        inputs |= {f"curate.{label}": curate, f"generate.{label}": curate.inputs["generate"]}
    return make_step(
        "mix",
        {
            "task": data.task, "real": real, "oversampled": oversampled, "added": added,
            # Real images do not depend on the target classes.
            "classes": data.request.classes if added else "all",
            "seed": fit_seed(data.study.seed, fit) if added else 0,
        },
        inputs, subject=Subject(name, fit),
    )  # fmt: skip


def _training_arms(study: Study) -> dict[str, dict[str, Any]]:
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


def _real_arms(data: DataPlan) -> list[PlannedArm]:
    """The arms with only real images."""
    real = real_mix(data)
    arms = [_arm("real", [real]), _arm("real_double", [real], budget=2.0, role="shown")]
    if "oversampled" in data.study.search.arms:
        arms.append(_arm("oversampled", [mix_step(data, "oversampled", oversampled=True)]))
    arms += [
        _arm(name, [real], training=training)
        for name, training in _training_arms(data.study).items()
    ]
    if data.reduce is not None:
        arms.append(_arm("reduced", [mix_step(data, "reduced", real="reduced")]))
    return arms


def _generator_arms(
    data: DataPlan, pools: Mapping[str, Sequence[Pool]], fits: range
) -> list[PlannedArm]:
    """The arms of each generator and of combined generators, with a mix for each of `fits`."""
    study, arms = data.study, list[PlannedArm]()

    def mixes(
        name: str, amount: Amount, real: str, curates: Mapping[str, Sequence[Step]]
    ) -> list[Step]:
        """A mix for each generator fit."""
        added = tuple(Added(generator=label, amount=amount) for label in curates)
        return [
            mix_step(
                data, name, real, added=added, fit=fit,
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
        synthetic = any(kind_of("generators", study.generators[label]).synthetic
                        for label in labels)  # fmt: skip
        role = "compared" if synthetic else "baseline"
        for suffix, amount in _amounts(data).items():
            name, twin = f"{family} {suffix}", f"{family} unfiltered {suffix}"
            fields = {"ratio": amount.ratio, "generators": labels}
            of_arm = mixes(name, amount, real, curates)
            arms.append(_arm(name, of_arm, family, role=role, **fields))
            if unfiltered:
                of_twin = mixes(twin, amount, real, {family: unfiltered})
                arms.append(
                    _arm(twin, of_twin, f"{family} unfiltered", role="shown", twin_of=name,
                         **fields)
                )  # fmt: skip
        if synthetic and family in study.generators and "synthetic_only" in study.search.arms:
            only = f"{family} only"
            alone = mixes(only, Amount(ratio=1.0), "none", curates)
            arms.append(_arm(only, alone, ratio=None, role="shown", generators=labels))
    return arms


def _fidelity_steps(data: DataPlan, pools: Mapping[str, Sequence[Pool]]) -> list[Step]:
    """A fidelity step for each generator fit, after an embed step of the real images if fidelity
    uses another embedder than the study."""
    study, settings = data.study, data.study.fidelity
    if not settings.enabled or not pools:
        return []
    embedder = settings.embedder or study.embedder
    plugins = [("embedders", embedder)]
    own = make_step(
        "embed", {"embedder": embedder}, {"ingest": data.ingest}, plugins, Subject("fidelity")
    )
    embed = data.embed if own == data.embed else own
    steps = [
        make_step(
            "fidelity",
            {
                "embedder": embedder, "sample": settings.sample, "k": settings.k,
                "task": data.task, "seed": study.seed,
            },
            {
                "ingest": data.ingest, "embed": embed, "curate": pool.curate,
                "generate": pool.generate,
            },
            plugins, pool.subject,
        )
        for pool in _every(pools)
    ]  # fmt: skip
    return [own, *steps] if embed is own else steps


def _every(pools: Mapping[str, Sequence[Pool]]) -> list[Pool]:
    return [pool for fits in pools.values() for pool in fits]


def largest_ratio(study: Study) -> float:
    """The largest ratio of the arms, as a share of each class's real images."""
    least = 1.0 if "synthetic_only" in study.search.arms else 0.0
    return max(least, *study.search.ratios)


def _ratios(data: DataPlan) -> list[float]:
    asked = data.request.ratio
    return sorted({*data.study.search.ratios, *([asked] if asked else [])})


def _amounts(data: DataPlan) -> dict[str, Amount]:
    """The amounts that the arms of a generator add, by the suffix of the arm's name: every ratio
    of the search, and the study's request."""
    request = data.request
    amounts = {_ratio_name(ratio): Amount(ratio=ratio) for ratio in _ratios(data)}
    if request.balance_to is not None:
        amounts[f"to {request.balance_to}"] = Amount(balance_to=request.balance_to)
    if request.per_class is not None:
        amounts[f"+{request.per_class}"] = Amount(per_class=request.per_class)
    if request.ratio_by_class is not None:
        amounts["by class"] = Amount(ratio_by_class=request.ratio_by_class)
    return amounts


def _ratio_name(ratio: float) -> str:
    """The suffix of an arm's name for its ratio."""
    return f"x{ratio:g}"


def fit_seed(seed: int, fit: int) -> int:
    """The seed of all draws of a generator fit: the study's own for the first."""
    return derive_seed(seed, "generator fit", fit) if fit else seed
