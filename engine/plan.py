"""Plan the steps of a study: pure and cheap, reads no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec

from engine.core.errors import StudyError
from engine.core.registry import kind_of, name_of, resolve
from engine.core.spec import digest, without
from engine.core.step import Step, Subject, make_step, upstream
from engine.plan_arms import DataPlan, Pool, every_fit, fit_seed, largest_ratio, real_mix
from engine.plan_comparison import (
    Curation,
    check_comparison,
    curate_step,
    external_steps,
    labeler_step,
    plan_comparison,
    plan_curation,
)
from engine.plan_labels import labelling_of, relabelling_steps
from engine.study import Study


def plan(study: Study) -> list[Step]:
    """The steps of a study, inputs before the steps that use them. Raises `StudyError`."""
    data = _with_allocation(_data_steps(study))
    steps, pools, curation = data.steps, dict[str, list[Pool]](), None
    if study.classifier is not None:
        curation = plan_curation(data)
        check_comparison(data, curation)
        # What may be wrong with data and the labeler surfaces before hours of training.
        steps += [*external_steps(data), real_mix(data), *curation.inputs.values()]
    elif any(getattr(spec, "strict", False) for spec in study.curate.filters):
        raise StudyError(
            "curate.filters: one is strict, and a study without a classifier does not curate"
            " images; set classifier, or remove strict"
        )
    if data.allocate is not None:
        steps += [step for step in (real_mix(data), *data.allocation) if step not in steps]
    # Without a comparison one fit is enough.
    fits = len(every_fit(study)) if curation is not None else 1
    for label in study.generators:
        for fit in range(fits):
            chain, pool = _generator_steps(data, curation, label, fit)
            steps += chain
            if pool is not None:
                pools.setdefault(label, []).append(pool)
    steps += [_match_step(data, pools, label) for label in study.match]
    return steps + plan_comparison(data, pools) if curation is not None else steps


def plan_audit(study: Study) -> Step:
    """The step that finds problems in a study's data; no other step needs it. Uses a network as
    embedder if the study names one."""
    labels = labelling_of(study)
    pixels = resolve("embedders", "pixels").Spec
    networks = [one for one in (study.embedder, study.audit.embedder) if type(one) is not pixels]
    embedder = networks[0] if networks else study.embedder
    return make_step(
        "audit",
        {
            "name": study.name, "reader": study.reader, "task": labels.task,
            "tasks": labels.tasks, "cells": labels.cells, "preprocess": study.preprocess,
            "split": study.split.made, "audit": study.audit, "embedder": embedder,
            "seed": study.seed,
        },
        plugins=[("readers", study.reader), ("embedders", embedder)],
    )  # fmt: skip


def _data_steps(study: Study) -> DataPlan:
    """The steps on the study's own images."""
    labels = labelling_of(study)
    task = labels.task
    common = {"task": task, "tasks": labels.tasks}
    ingest = make_step(
        "ingest",
        {
            "reader": study.reader, **common, "cells": labels.cells,
            "preprocess": study.preprocess,
            "split": study.split.made, "audit": study.audit, "seed": study.seed,
        },
        plugins=[("readers", study.reader), ("embedders", study.audit.embedder)],
    )  # fmt: skip
    embed = make_step(
        "embed", {"embedder": study.embedder}, {"ingest": ingest},
        plugins=[("embedders", study.embedder)],
    )  # fmt: skip
    votes: tuple[Step, ...] = ()
    if study.relabel is not None:
        votes = relabelling_steps(study, labels, ingest, embed)
        ingest = make_step("revise", {"task": task}, {"ingest": ingest, "relabel": votes[-1]})
    cluster = make_step(
        "cluster", {"settings": study.cluster, **common, "seed": study.seed},
        {"ingest": ingest, "embed": embed},
    )  # fmt: skip
    select = make_step(
        "select",
        {"task": task, "settings": study.select, "seed": study.seed},
        {"ingest": ingest, "cluster": cluster, "embed": embed},
    )
    reduce = None
    if study.reduce is not None:
        method = study.reduce.method
        if method == "umap" and find_spec("umap") is None:
            raise StudyError(
                "reduce.method: umap needs umap-learn: pip install"
                ' "synthetic-training-engine[umap]", or set it to tsne'
            )
        inputs = {"ingest": ingest, "embed": embed}
        if method == "stratified":
            inputs["cluster"] = cluster
        reduce = make_step(
            "reduce", {"settings": study.reduce, "task": task, "seed": study.seed}, inputs
        )
    request = study.request.one_by_one()
    return DataPlan(study, request, labels, ingest, embed, cluster, select, reduce, votes=votes)


def _with_allocation(data: DataPlan) -> DataPlan:
    """The plan with the step that allocates images, if the study has one, and the classifier on
    real images whose scores it reads."""
    study, settings = data.study, data.request.allocate
    if settings is None:
        return data
    scores = None
    if settings.method == "tiers":
        if study.classifier is None:
            raise StudyError(
                "request.allocate: tiers are by the scores of a classifier; set classifier, or"
                " method: inverse_frequency"
            )
        scores = labeler_step(data, study.classifier, study.training)
    allocate = make_step(
        "allocate",
        {
            "settings": settings, "classes": data.request.classes, "task": data.task,
            "tasks": data.labels.weights,
        },
        {"ingest": data.ingest, **({"train": scores} if scores else {})},
    )  # fmt: skip
    return replace(data, scores=scores, allocate=allocate)


def _match_step(data: DataPlan, pools: Mapping[str, Sequence[Pool]], label: str) -> Step:
    study, match = data.study, data.study.match[label]
    inputs = {"ingest": data.ingest, "embed": data.embed}
    for role in ("queries", "among"):
        name = getattr(match, role)
        if name in ("train", "val"):
            continue
        if name not in study.generators:
            known = ", ".join(["train", "val", *study.generators])
            raise StudyError(f"match.{label}.{role}: there is no {name!r}; there are {known}")
        if name not in pools or "embed" not in pools[name][0].curate.inputs:
            raise StudyError(
                f"match.{label}.{role}: images of {name} are not embedded; set classifier and"
                " curate.filters, and match a generator whose images are filtered"
            )
        first = pools[name][0]
        inputs |= {f"{role}.curate": first.curate, f"{role}.generate": first.generate}
    return make_step(
        "match", {"settings": match, "task": data.task, "seed": study.seed}, inputs,
        subject=Subject(label),
    )  # fmt: skip


def _generator_steps(
    data: DataPlan, curation: Curation | None, label: str, fit: int
) -> tuple[list[Step], Pool | None]:
    """The steps of one generator fit: request, finetune (if it is trained) and generate; in a
    comparison also curate, and as many rounds of top-up requests as the study allows. Also returns
    the pool of its images, None without a comparison."""
    study, spec = data.study, data.study.generators[label]
    subject, seed = Subject(label, fit), fit_seed(study.seed, fit)
    kind = kind_of("generators", spec)
    generator = kind(spec, study.preprocess)
    generator.check()
    inputs = {"ingest": data.ingest}
    if generator.uses_clusters():
        inputs["cluster"] = data.cluster
    plugins = [("generators", spec), *generator.nested()]
    nested = {name_of(plugin): kind_of(family, plugin).version
              for family, plugin in generator.nested()}  # fmt: skip
    finetune = None
    if generator.trainable:
        finetune = make_step(
            "finetune",
            {
                "generator": without(spec, kind.sampling_fields),
                "preprocess": study.preprocess,
                "task": data.task, "seed": seed,
            },
            inputs, plugins, subject,
        )  # fmt: skip
    generator_key = digest(
        {
            "code": kind.version,
            **({"nested": nested} if nested else {}),
            # Later fits draw differently even without training.
            **({"fit": fit} if fit else {}),
            "spec": spec,
            "preprocess": study.preprocess,
            "task": data.task,
            "ingest": data.ingest.key, "finetune": finetune.key if finetune else None,
        }
    )  # fmt: skip
    sampling = {"generator": spec, "generator_key": generator_key, "preprocess": study.preprocess,
                "task": data.task, "tasks": data.tasks}  # fmt: skip
    trained = {"finetune": finetune} if finetune is not None else {}
    if generator.parents() == "representatives":
        inputs = {**inputs, "select": data.select}

    steps: list[Step] = []
    curate = None
    rounds = study.curate.max_rounds if curation is not None else 1
    for number in range(1, rounds + 1):
        of_round = replace(subject, round=number)
        request = make_step(
            "request",
            {
                "request": data.request, "class_groups": study.request.class_groups,
                "least_ratio": largest_ratio(study) if curation is not None else 0.0,
                **sampling, "seed": seed,
            },
            {
                **inputs, **({"curate": curate} if curate else {}),
                **({"allocate": data.allocate} if data.allocate else {}),
            }, plugins, of_round,
        )  # fmt: skip
        generate = make_step(
            "generate", sampling, {"ingest": data.ingest, "request": request, **trained}, plugins,
            of_round,
        )  # fmt: skip
        # The request comes first: its errors surface before hours of training.
        steps += [request, *(trained.values() if number == 1 else ()), generate]
        if curation is not None:
            filters = curation if generator.filtered else Curation()
            curate = curate_step(data, filters, of_round, generate, generator_key)
            steps.append(curate)
    if curate is None:
        return steps, None
    unfiltered = None
    if "unfiltered" in study.search.arms and "embed" in curate.inputs:
        twin = replace(subject, filtered=False)
        unfiltered = curate_step(data, Curation(), twin, generate, generator_key)
        steps.append(unfiltered)
    return steps, Pool(curate, unfiltered)


def data_set(steps: Sequence[Step]) -> Step:
    """The step with the data that a study works on: as it was read, or with revised labels."""
    return next(step for kind in ("revise", "ingest") for step in steps if step.kind == kind)


def until(steps: list[Step], name: str) -> list[Step]:
    """The steps up to those named, by kind (`generate`) or label (`generate.ddpm`).

    Of generators, only the steps that the named ones need; of the rest, all earlier steps.
    """
    chosen = named(steps, name)
    needed = {step.key for step in upstream(chosen)}
    last = max(index for index, step in enumerate(steps) if step in chosen)
    return [
        step
        for index, step in enumerate(steps)
        if step.key in needed or (index <= last and not step.subject.name)
    ]


def trials_of(steps: Sequence[Step]) -> list[Step]:
    """The trials that these steps run; trials are not in the plan."""
    return [trial for step in steps for trial in resolve("steps", step.kind)().trials(step)]


def named(steps: list[Step], name: str) -> list[Step]:
    """The steps of this kind or label, or the trial of this label. Raises `StudyError`."""
    chosen = [step for step in steps if name in (step.kind, step.label)]
    chosen = chosen or [step for step in trials_of(steps) if step.label == name]
    if not chosen:
        labels = dict.fromkeys([step.kind for step in steps] + [step.label for step in steps])
        raise StudyError(f"there is no step {name!r} in this study; there are {', '.join(labels)}")
    return chosen
