"""The labels of a study: one task with a class per image, or several labels per image as cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.core.errors import StudyError
from engine.core.labels import CELL, Cells, CellTask, Task
from engine.core.registry import kind_of
from engine.core.rng import derive_seed
from engine.core.step import Step, Subject, make_step
from engine.settings_labels import Voter
from engine.study import Study


@dataclass(frozen=True)
class Labelling:
    """task: whose column has one value per image: the study's task, or cells. tasks: kinds of all
    label columns. cells: None for one task with a class per image."""

    task: str
    tasks: dict[str, Any]
    cells: Cells | None = None
    # The weight of each task that classifiers learn; empty for one task with a class per image.
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def learned(self) -> dict[str, Any]:
        """The kinds of the tasks that classifiers learn, likewise."""
        return {name: self.tasks[name] for name in self.weights}


def labelling_of(study: Study) -> Labelling:
    """The labels of a study. Raises `StudyError` if its tasks are ambiguous, unknown or unfit."""
    kinds = dict(kind_of("readers", study.reader)(study.reader).tasks())
    tasks = study.tasks or {_one_task(study, kinds): Task()}
    if unknown := [name for name in tasks if name not in kinds]:
        raise StudyError(f"tasks: the data has no task {unknown[0]!r}; it has {', '.join(kinds)}")
    for name, task in tasks.items():
        if task.none is not None and kinds[name] == "single":
            raise StudyError(
                f"tasks.{name}.none: {name} has one label per image; remove none, or name its"
                " separator in reader.multi"
            )
    if len(tasks) == 1 and kinds[next(iter(tasks))] == "single":
        return Labelling(next(iter(tasks)), kinds)
    _check_cells(study, kinds)
    cells = Cells(
        tasks=tuple(CellTask(name=name, none=task.none) for name, task in tasks.items()),
        least=study.rare_below,
    )
    weights = {name: task.weight for name, task in tasks.items()}
    return Labelling(CELL, {**kinds, CELL: "single"}, cells, weights)


def _one_task(study: Study, kinds: Mapping[str, Any]) -> str:
    if study.task is None:
        if len(kinds) == 1:
            return next(iter(kinds))
        raise StudyError(
            f"task: the data has several; choose one of {', '.join(kinds)}, or name several in"
            " tasks"
        )
    if study.task not in kinds:
        raise StudyError(f"task: the data has no task {study.task!r}; it has {', '.join(kinds)}")
    return study.task


def _check_cells(study: Study, kinds: Mapping[str, Any]) -> None:
    """Raise `StudyError` for what a study with several labels per image cannot have."""
    if CELL in kinds:
        raise StudyError(f"reader.labels: the name {CELL} is taken; give the task another")
    for name in ("classes", "rename"):
        if getattr(study.reader, name, None):
            raise StudyError(
                f"reader.{name}: needs one task with one label per image; change the labels in the"
                " data"
            )
    if study.evaluate.external:
        raise StudyError(
            "evaluate.external: needs one task with one label per image; remove it, or choose one"
        )


def relabelling_steps(
    study: Study, labels: Labelling, ingest: Step, embed: Step
) -> tuple[Step, ...]:
    """The steps that vote on the labels of `ingest`, `relabel` at the end. Raises `StudyError`."""
    settings = study.relabel
    assert settings is not None
    if labels.cells is not None:
        raise StudyError("relabel: needs one task with one label per image; remove it")
    mixes = [
        make_step(
            "mix",
            {"task": labels.task, "seed": study.seed, "folds": settings.folds,
             "without_fold": fold},
            {"ingest": ingest}, subject=Subject("without fold", number=fold),
        )
        for fold in range(settings.folds)
    ]  # fmt: skip
    inputs, steps, plugins = {"ingest": ingest}, [ingest], list[tuple[str, Any]]()
    for name, voter in settings.voters.items():
        if voter.classifier is not None:
            kind = kind_of("classifiers", voter.classifier)
            training = voter.training or study.training
            kind(voter.classifier, study.preprocess, ()).check(training)
            plugins.append(("classifiers", voter.classifier))
            trained = {
                f"vote.{name}.{fold}": _vote(study, labels, name, voter, ingest, mix, fold)
                for fold, mix in enumerate(mixes)
            }
            inputs |= trained
            steps += [step for step in (*mixes, *trained.values()) if step not in steps]
            continue
        assert voter.labeler is not None, "a voter is either"
        plugins.append(("labelers", voter.labeler))
        if kind_of("labelers", voter.labeler).reads == "embedding":
            if settings.test_too:
                raise StudyError(
                    f"relabel.voters.{name}: test has no vectors before it is opened; set"
                    " test_too to false, or vote by classifiers alone"
                )
            inputs["embed"] = embed
            steps += [embed] if embed not in steps else []
    spec = {"settings": settings, "task": labels.task, "preprocess": study.preprocess,
            "seed": study.seed}  # fmt: skip
    return (*steps, make_step("relabel", spec, inputs, plugins))


def _vote(
    study: Study, labels: Labelling, name: str, voter: Voter, ingest: Step, mix: Step, fold: int
) -> Step:
    """A classifier that did not learn from a fold. Its checkpoint is the last one: the best on val
    would have been chosen by labels that it votes on."""
    training = voter.training or study.training
    return make_step(
        "train",
        {
            "classifier": voter.classifier,
            "training": training.model_copy(update={"evaluate_every": training.steps}),
            "preprocess": study.preprocess, "task": labels.task,
            "seed": derive_seed(study.seed, "vote", name, fold),
        },
        {"ingest": ingest, "mix": mix}, [("classifiers", voter.classifier)],
        Subject(f"vote {name}", number=fold),
    )  # fmt: skip
