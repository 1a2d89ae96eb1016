"""Each task of a study with several, and the tasks together."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from engine.report.download import Row
from engine.report.page import Section, render
from engine.report.plots import Point
from engine.report.results import StudyResults
from engine.report.sections.calibration import ClassPoint, frequency
from engine.results.comparison import Effect, TaskResult
from engine.results.joint import CombinationResult, JointResult

# Combinations on the page; the table has all.
_SHOWN = 15
# Metrics on the page, as it names them.
METRICS = {
    "accuracy": "accuracy", "macro_precision": "precision", "macro_recall": "recall",
    "macro_f1": "macro F1", "roc_auc": "ROC-AUC", "ece": "ECE",
}  # fmt: skip


def tasks(results: StudyResults) -> Section:
    """The figures of each task by arm, combinations of labels and common errors; nothing for one
    task with a class per image."""
    evaluate = results.evaluate
    if not evaluate.tasks or evaluate.joint is None:
        return Section()
    arms = [arm for arm, _ in results.legend]
    joint = evaluate.joint
    exchanges = {arm: [pair for pair in joint.exchanges if pair.arm == arm] for arm in arms}
    html = render(
        "tasks.html", results=results, tasks=evaluate.tasks, joint=joint, arms=arms,
        metrics=METRICS, exchanges=exchanges, combinations=shown_combinations(joint),
        errors=[pair for pair in joint.common_errors if pair.arm in arms],
        plot=combination_plot(results, joint),
    )  # fmt: skip
    return Section(
        html,
        {
            "tasks": task_rows(evaluate.tasks), "combinations": combination_rows(joint),
            "common_errors": [dict(pair) for pair in joint.common_errors],
            "exchanges": [dict(pair) for pair in joint.exchanges],
        },
    )  # fmt: skip


def shown_combinations(joint: JointResult) -> dict[str, list[CombinationResult]]:
    """The combinations on the page, by title."""
    every = joint.combinations
    if len(every) <= _SHOWN:
        return {"Combinations": every} if every else {}
    weakest = sorted(every, key=lambda one: one.f1["real"])
    return {
        "Most frequent combinations": every[:_SHOWN],
        "Combinations with the lowest F1 on real images alone": weakest[:_SHOWN],
    }


def combination_plot(results: StudyResults, joint: JointResult) -> Markup | None:
    """F1 of each combination against its real training images; None for fewer than two."""
    learnt = [entry for entry in joint.combinations if entry.train]
    if len(learnt) < 2:
        return None
    arms = [
        (arm, colour, [ClassPoint(entry.name, entry.train,
                                  Point(0.0, entry.f1[arm], entry.f1[arm], entry.f1[arm]))
                       for entry in learnt])
        for arm, colour in results.legend
    ]  # fmt: skip
    return frequency(arms, "F1 of the combination")


def losses(evaluate: Mapping[str, TaskResult], arm: str) -> dict[str, Effect]:
    """The tasks in which an arm is worse than real images alone, beyond the interval."""
    return {name: task.to_real[arm] for name, task in evaluate.items()
            if arm in task.to_real and task.to_real[arm].high < 0}  # fmt: skip


def task_rows(tasks: Mapping[str, TaskResult]) -> list[Row]:
    """A row for each task and tested arm."""
    entries: list[Row] = []
    for name, task in tasks.items():
        for arm, tested in task.arms.items():
            entry: Row = {"task": name, "kind": task.kind, "weight": task.weight, "arm": arm,
                          "test_images": task.images}  # fmt: skip
            for metric, figure in tested.figures.items():
                entry |= {metric: figure.mean, f"{metric}_low": figure.low,
                          f"{metric}_high": figure.high}  # fmt: skip
            for rival, effects in (("baseline", task.to_baseline), ("real", task.to_real)):
                if arm in effects:
                    effect = effects[arm]
                    entry |= {f"to_{rival}": effect.estimate, f"to_{rival}_low": effect.low,
                              f"to_{rival}_high": effect.high}  # fmt: skip
            entries.append(entry)
    return entries


def combination_rows(joint: JointResult) -> list[Row]:
    """A row for each combination of labels and tested arm."""
    return [
        {"combination": entry.name, "training_images": entry.train, "test_images": entry.images,
         "arm": arm, "all_labels_right": right, "f1": entry.f1[arm]}
        for entry in joint.combinations
        for arm, right in entry.right.items()
    ]  # fmt: skip
