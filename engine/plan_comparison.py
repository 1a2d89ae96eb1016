"""The steps of a plan that test whether images help: curation's inputs, the search, the verdict,
the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.comparison.arms import SearchSpec
from engine.core.errors import StudyError
from engine.core.registry import kind_of
from engine.core.rng import derive_seed
from engine.core.step import Step, Subject, make_step
from engine.plan_arms import (
    DataPlan,
    Pool,
    choice_fits,
    confirm_fits,
    generator_arms,
    ratio_name,
    ratios,
    real_arms,
    real_mix,
    role_of,
    search_training,
    training_arms,
)
from engine.stages.measuring import measuring
from engine.tuning.settings import Tune

# Values of the filter agreement's `match` that name no tasks.
_MATCHES = ("all", "any")


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
        inputs["labeler"] = labeler_step(data, classifier, training)
        labelers.append(("classifiers", classifier))
    pixel_spec = measuring(data.task, study.preprocess, spec, filters)
    if pixel_spec.labeler is not None or pixel_spec.filters:
        inputs["measure"] = make_step(
            "measure", pixel_spec.model_dump(), {"ingest": data.ingest, **inputs},
            [*(("filters", one) for one in pixel_spec.filters), *labelers], Subject("val"),
        )  # fmt: skip
    plugins = (*(("filters", one) for one in filters), *labelers)
    return Curation(filters, spec, inputs, plugins)


def labeler_step(data: DataPlan, classifier: Any, training: Any) -> Step:
    """The training of a classifier on real images that has no part in the comparison."""
    study = data.study
    return make_step(
        "train",
        {
            "classifier": classifier, "training": training, "preprocess": study.preprocess,
            "task": data.task, "tasks": data.labels.weights,
            "seed": derive_seed(study.seed, "labeler"),
        },
        {"ingest": data.ingest, "mix": real_mix(data)}, [("classifiers", classifier)],
        Subject("labeler"),
    )  # fmt: skip


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
    roles = {role_of(study, [label]) for label in study.generators}
    if "synthetic_only" in arms and "compared" not in roles:
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
    for ratio in ratios(data):
        if (other := named.setdefault(ratio_name(ratio), ratio)) != ratio:
            raise StudyError(
                f"search.ratios: the arms of {other!r} and {ratio!r} (of search.ratios or"
                f" request.ratio) would both be named {ratio_name(ratio)}; round them to six"
                " digits"
            )
    learned = data.labels.learned
    for filter_spec in study.curate.filters:
        match = getattr(filter_spec, "match", "all")
        unknown = [name for name in match if name not in learned] if match not in _MATCHES else []
        if unknown or (match != "all" and not learned):
            raise StudyError(
                f"curate.filters: agreement: match: {unknown[0] if unknown else match!r}: name"
                f" tasks of the study ({', '.join(learned) or 'it has one label per image'}), or"
                " set it to all"
            )
    for column in study.evaluate.subgroups:
        if data.tasks.get(column) != "single" or column == data.task:
            others = ", ".join(name for name in data.tasks if name != data.task) or "none"
            raise StudyError(
                f"evaluate.subgroups: {column!r} is not another single-label task of the reader"
                f" ({others}); add the column to reader.labels"
            )
    trainings = [{}, *training_arms(study).values()]
    trained: list[tuple[Any, Any]] = [
        (study.classifier, study.training.model_copy(update=training)) for training in trainings
    ]
    if "labeler" in curation.inputs:
        trained.append((curation.labeler.classifier, curation.labeler.training))
    for spec, training in trained:
        kind_of("classifiers", spec)(spec, study.preprocess, ()).check(training)


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
            "preprocess": study.preprocess, "task": data.task, "tasks": data.labels.weights,
            "objective": study.training.objective, "seed": study.seed,
        },
        {
            "ingest": data.ingest, "search": search, "confirm": confirm,
            **{step.label: step for step in external_steps(data)},
        },
        plugins,
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


def external_steps(data: DataPlan) -> list[Step]:
    """The steps that read test sets from elsewhere."""
    return [_external_step(data, name) for name in data.study.evaluate.external]


def _external_step(data: DataPlan, name: str) -> Step:
    """The step that reads a test set from elsewhere. Raises `StudyError` if it is unclear which of
    its tasks is the study's."""
    study, spec = data.study, data.study.evaluate.external[name]
    tasks = dict(kind_of("readers", spec)(spec).tasks())
    task = data.task if data.task in tasks else next(iter(tasks))
    if task != data.task and len(tasks) > 1:
        raise StudyError(
            f"evaluate.external.{name}: has the tasks {', '.join(tasks)}; name the study's,"
            f" {data.task}"
        )
    return make_step(
        "external",
        {
            "name": name, "reader": spec, "task": task, "tasks": tasks,
            "preprocess": study.preprocess, "split": study.split.made, "audit": study.audit,
            "seed": study.seed,
        },
        {"ingest": data.ingest}, [("readers", spec)], Subject(name),
    )  # fmt: skip


def _trials_step(
    data: DataPlan, pools: Mapping[str, Sequence[Pool]], kind: str, fits: range, seeds: int,
    first_seed: int, inputs: Mapping[str, Step] | None = None,
) -> tuple[Step, dict[str, Step]]:  # fmt: skip
    """A step that trains classifiers on the images of some generator fits, and the mixes of its
    arms. seeds: of each fit."""
    study = data.study
    # Twice the steps are for the chosen arms alone.
    arms = [planned for planned in (*real_arms(data), *generator_arms(data, pools, fits))
            if kind == "confirm" or planned[0].double_of is None]  # fmt: skip
    mixes = {mix.label: mix for _, of_arm in arms for mix in of_arm}
    step = make_step(
        kind,
        {
            "classifier": study.classifier, "training": search_training(study),
            "preprocess": study.preprocess, "task": data.task, "tasks": data.labels.weights,
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


def _fidelity_steps(data: DataPlan, pools: Mapping[str, Sequence[Pool]]) -> list[Step]:
    """A fidelity step for each generator fit, after an embed step of the real images if fidelity
    uses another embedder than the study."""
    study, settings = data.study, data.study.fidelity
    if not settings.enabled or not pools:
        return []
    embedder = settings.embedder or study.embedder
    plugins = [("embedders", embedder)]
    # Vectors do not depend on labels, which may have been revised.
    images = data.embed.inputs["ingest"]
    own = make_step(
        "embed", {"embedder": embedder}, {"ingest": images}, plugins, Subject("fidelity")
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
