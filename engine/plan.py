"""Plan the steps of a study: pure and cheap, reads no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from engine.core.errors import StudyError
from engine.core.registry import kind_of, resolve
from engine.core.spec import digest, without
from engine.core.step import Step, Subject, make_step, upstream
from engine.plan_comparison import Comparison, fit_seed
from engine.study import Study


def plan(study: Study) -> list[Step]:
    """The steps of a study, inputs before the steps that use them. Raises `StudyError`."""
    tasks = tasks_of(study)
    task = choose_task(study, tasks)
    common = {"task": task, "tasks": tasks}
    ingest = make_step(
        "ingest",
        {
            "reader": study.reader, **common, "preprocess": study.preprocess, "split": study.split,
            "audit": study.audit, "seed": study.seed,
        },
        plugins=[("readers", study.reader), ("embedders", study.audit.embedder)],
    )  # fmt: skip
    embed = make_step(
        "embed", {"embedder": study.embedder}, {"ingest": ingest},
        plugins=[("embedders", study.embedder)],
    )  # fmt: skip
    cluster = make_step(
        "cluster", {"settings": study.cluster, **common, "seed": study.seed},
        {"ingest": ingest, "embed": embed},
    )  # fmt: skip
    select = make_step(
        "select",
        {"task": task, "settings": study.select, "seed": study.seed},
        {"ingest": ingest, "cluster": cluster, "embed": embed},
    )
    steps = [ingest, embed, cluster, select]
    reduce = _reduce_step(study, task, ingest, embed, cluster)
    if reduce is not None:
        steps.append(reduce)
    comparison = None
    if study.classifier is not None:
        comparison = Comparison(study, common, ingest, embed, reduce)
    if comparison is not None:
        comparison.check()
        # The labeler comes first: its errors surface before hours of training.
        steps += [comparison.real, *comparison.curation.values()]
    elif any(getattr(spec, "strict", False) for spec in study.curate.filters):
        raise StudyError(
            "curate.filters: one is strict, and a study without a classifier does not curate"
            " images; set classifier, or remove strict"
        )
    # Without a comparison one fit is enough.
    fits = study.search.generator_fits if comparison is not None else 1
    for label, generator in study.generators.items():
        for fit in range(fits):
            steps += _generator_steps(
                study, label, generator, common, ingest, cluster, select, comparison, fit
            )
    for label, match in study.match.items():
        steps.append(_match_step(study, label, match, task, ingest, embed, comparison))
    if comparison is not None:
        steps += comparison.steps()
    return steps


def plan_audit(study: Study) -> Step:
    """The step that finds problems in a study's data; no other step needs it. Uses a network as
    embedder if the study names one."""
    tasks = tasks_of(study)
    pixels = resolve("embedders", "pixels").Spec
    networks = [one for one in (study.embedder, study.audit.embedder) if type(one) is not pixels]
    embedder = networks[0] if networks else study.embedder
    return make_step(
        "audit",
        {
            "name": study.name, "reader": study.reader, "task": choose_task(study, tasks),
            "tasks": tasks, "preprocess": study.preprocess, "split": study.split,
            "audit": study.audit, "embedder": embedder, "seed": study.seed,
        },
        plugins=[("readers", study.reader), ("embedders", embedder)],
    )  # fmt: skip


def _reduce_step(study: Study, task: str, ingest: Step, embed: Step, cluster: Step) -> Step | None:
    if study.reduce is None:
        return None
    method = study.reduce.method
    if method == "umap" and find_spec("umap") is None:
        raise StudyError(
            "reduce.method: umap needs umap-learn: pip install"
            ' "synthetic-training-engine[umap]", or set it to tsne'
        )
    inputs = {"ingest": ingest, "embed": embed}
    if method == "stratified":
        inputs["cluster"] = cluster
    return make_step(
        "reduce", {"settings": study.reduce, "task": task, "seed": study.seed}, inputs
    )


def _match_step(
    study: Study, label: str, match: Any, task: str, ingest: Step, embed: Step,
    comparison: Comparison | None,
) -> Step:  # fmt: skip
    inputs = {"ingest": ingest, "embed": embed}
    for role in ("queries", "among"):
        name = getattr(match, role)
        if name in ("train", "val"):
            continue
        if name not in study.generators:
            known = ", ".join(["train", "val", *study.generators])
            raise StudyError(f"match.{label}.{role}: there is no {name!r}; there are {known}")
        curate = comparison.pools[name][0] if comparison is not None else None
        if curate is None or "embed" not in curate.inputs:
            raise StudyError(
                f"match.{label}.{role}: images of {name} are not embedded; set classifier and"
                " curate.filters, and match a generator whose images are filtered"
            )
        inputs |= {f"{role}.curate": curate, f"{role}.generate": curate.inputs["generate"]}
    return make_step(
        "match", {"settings": match, "task": task, "seed": study.seed}, inputs,
        subject=Subject(label),
    )  # fmt: skip


def _generator_steps(
    study: Study,
    label: str,
    spec: Any,
    common: dict[str, Any],
    ingest: Step,
    cluster: Step,
    select: Step,
    comparison: Comparison | None,
    fit: int,
) -> list[Step]:
    """The steps of one generator fit: request, finetune (if it is trained) and generate; in a
    comparison also curate, and as many rounds of top-up requests as the study allows."""
    subject, seed = Subject(label, fit), fit_seed(study.seed, fit)
    kind = resolve("generators", spec.name)
    generator = kind(spec, study.preprocess)
    generator.check()
    inputs = {"ingest": ingest}
    if generator.uses_clusters():
        inputs["cluster"] = cluster
    plugins = [("generators", spec), *generator.nested()]
    nested = {plugin.name: resolve(family, plugin.name).version
              for family, plugin in generator.nested()}  # fmt: skip
    finetune = None
    if generator.trainable:
        finetune = make_step(
            "finetune",
            {
                "generator": without(spec, kind.sampling_fields),
                "preprocess": study.preprocess,
                "task": common["task"], "seed": seed,
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
            "task": common["task"],
            "ingest": ingest.key, "finetune": finetune.key if finetune else None,
        }
    )  # fmt: skip
    if generator.parents() == "representatives":
        inputs = {**inputs, "select": select}
    steps: list[Step] = []
    curate: Step | None = None
    rounds = study.curate.max_rounds if comparison is not None else 1
    for number in range(1, rounds + 1):
        subject = replace(subject, round=number)
        request = make_step(
            "request",
            {
                "request": study.request.one_by_one(),
                "class_groups": study.request.class_groups,
                "least_ratio": comparison.largest_ratio if comparison is not None else 0.0,
                "generator": spec, "generator_key": generator_key,
                "preprocess": study.preprocess, **common, "seed": seed,
            },
            {**inputs, **({"curate": curate} if curate else {})}, plugins, subject,
        )  # fmt: skip
        # The request comes first: its errors surface before hours of training.
        steps.append(request)
        if finetune is not None and number == 1:
            steps.append(finetune)
        generate = make_step(
            "generate",
            {
                "generator": spec, "generator_key": generator_key, "preprocess": study.preprocess,
                **common,
            },
            {"ingest": ingest, "request": request, **({"finetune": finetune} if finetune else {})},
            plugins, subject,
        )  # fmt: skip
        steps.append(generate)
        if comparison is not None:
            curate = comparison.curate(subject, generate, generator_key, generator.filtered)
            steps.append(curate)
    if comparison is not None and curate is not None:
        unfiltered = None
        if "unfiltered" in study.search.arms and "embed" in curate.inputs:
            unfiltered = comparison.curate(
                replace(subject, round=1, filtered=False), generate, generator_key, False
            )
            steps.append(unfiltered)
        comparison.add(label, curate, unfiltered)
    return steps


def tasks_of(study: Study) -> dict[str, Any]:
    """The labelling tasks of the study's reader."""
    return dict(kind_of("readers", study.reader)(study.reader).tasks())


def choose_task(study: Study, tasks: dict[str, Any]) -> str:
    """The task of the study. Raises `StudyError` if it is ambiguous or unknown."""
    if study.task is None:
        if len(tasks) == 1:
            return next(iter(tasks))
        raise StudyError(f"task: the data has several; choose one of {', '.join(tasks)}")
    if study.task not in tasks:
        raise StudyError(f"task: the data has no task {study.task!r}; it has {', '.join(tasks)}")
    return study.task


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
