"""A study to its steps: pure and cheap, without a look at any data."""

from __future__ import annotations

from typing import Any

from engine.core.errors import StudyError
from engine.core.registry import resolve
from engine.core.spec import digest
from engine.core.step import Step, make_step, upstream
from engine.study import Study


def plan(study: Study) -> list[Step]:
    """The steps of a study, inputs before what uses them. Raises `StudyError`."""
    tasks = dict(resolve("readers", study.reader.name)(study.reader).tasks())  # type: ignore[attr-defined]
    task = choose_task(study, tasks)
    common = {"task": task, "tasks": tasks}
    ingest = make_step(
        "ingest", "ingest",
        {
            "reader": study.reader, **common, "preprocess": study.preprocess, "split": study.split,
            "audit": study.audit, "seed": study.seed,
        },
        plugins=[("readers", study.reader), ("embedders", study.audit.embedder)],
    )  # fmt: skip
    embed = make_step(
        "embed", "embed", {"embedder": study.embedder}, {"ingest": ingest},
        plugins=[("embedders", study.embedder)],
    )  # fmt: skip
    cluster = make_step(
        "cluster", "cluster", {"settings": study.cluster, **common, "seed": study.seed},
        {"ingest": ingest, "embed": embed},
    )  # fmt: skip
    select = make_step(
        "select",
        "select",
        {"task": task, "per_cluster": study.select.per_cluster},
        {"cluster": cluster},
    )
    steps = [ingest, embed, cluster, select]
    for label, generator in study.generators.items():
        steps += _generator_steps(study, label, generator, common, ingest, cluster, select)
    return steps


def _generator_steps(
    study: Study,
    label: str,
    spec: Any,
    common: dict[str, Any],
    ingest: Step,
    cluster: Step,
    select: Step,
) -> list[Step]:
    """request, finetune (of what is trained) and generate of one generator."""
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
    if kind.trainable:
        finetune = make_step(
            "finetune", f"finetune.{label}",
            {
                "generator": without_sampling(spec, kind.sampling_fields),
                "preprocess": study.preprocess,
                "task": common["task"], "seed": study.seed,
            },
            inputs, plugins,
        )  # fmt: skip
    generator_key = digest(
        {
            "code": kind.version,
            **({"nested": nested} if nested else {}),
            "spec": spec,
            "preprocess": study.preprocess,
            "task": common["task"],
            "ingest": ingest.key, "finetune": finetune.key if finetune else None,
        }
    )  # fmt: skip
    if generator.parents() == "representatives":
        inputs = {**inputs, "select": select}
    request = make_step(
        "request", f"request.{label}",
        {
            "request": study.request, "generator": spec, "generator_key": generator_key,
            "preprocess": study.preprocess, **common, "seed": study.seed,
        },
        inputs, plugins,
    )  # fmt: skip
    generate_inputs = {
        "ingest": ingest,
        "request": request,
        **({"finetune": finetune} if finetune else {}),
    }
    generate = make_step(
        "generate", f"generate.{label}",
        {
            "generator": spec,
            "generator_key": generator_key,
            "preprocess": study.preprocess,
            **common,
        },
        generate_inputs, plugins,
    )  # fmt: skip
    # The request first: what is wrong with it is told before hours of training.
    return [request, *([finetune] if finetune else []), generate]


def without_sampling(spec: Any, fields: tuple[str, ...]) -> Any:
    """The spec with the fields that training never reads at their defaults."""
    return spec.model_copy(update={name: type(spec).model_fields[name].default for name in fields})


def choose_task(study: Study, tasks: dict[str, Any]) -> str:
    """The task that the study is about. Raises `StudyError` where that is not clear."""
    if study.task is None:
        if len(tasks) == 1:
            return next(iter(tasks))
        raise StudyError(f"task: the data has several; choose one of {', '.join(tasks)}")
    if study.task not in tasks:
        raise StudyError(f"task: the data has no task {study.task!r}; it has {', '.join(tasks)}")
    return study.task


def until(steps: list[Step], name: str) -> list[Step]:
    """The steps up to those named, by kind (`generate`) or label (`generate.ddpm`).

    Of generators, only what the named steps need; of the rest, all that stands before them.
    """
    chosen = named(steps, name)
    needed = {step.key for step in upstream(chosen)}
    last = max(index for index, step in enumerate(steps) if step in chosen)
    return [
        step
        for index, step in enumerate(steps)
        if step.key in needed or (index <= last and "." not in step.label)
    ]


def named(steps: list[Step], name: str) -> list[Step]:
    """All steps of this kind or label. Raises `StudyError`."""
    chosen = [step for step in steps if name in (step.kind, step.label)]
    if not chosen:
        labels = dict.fromkeys([step.kind for step in steps] + [step.label for step in steps])
        raise StudyError(f"there is no step {name!r} in this study; there are {', '.join(labels)}")
    return chosen
