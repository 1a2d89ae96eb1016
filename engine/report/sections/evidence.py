"""The evidence for the verdict: every figure of every tested arm, gains of each class, calibration,
confusion on val and on test, training curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from markupsafe import Markup

from engine.comparison.arms import MixSpec, Trial, planned_trials
from engine.context import Context
from engine.core.manifest import Manifest
from engine.core.step import upstream
from engine.metrics.significance import LEAST_REPLICATES, paired_t
from engine.report import charts, plots
from engine.results.comparison import (
    ArmFigure,
    Contrast,
    EvaluateResult,
    MeanInterval,
    MixResult,
    SearchResult,
    TrainResult,
)
from engine.results.data import IngestResult, ReducedClass, ReduceResult

FIGURES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy",
    "macro_precision": "macro precision", "macro_recall": "macro recall", "macro_f1": "macro F1",
    "weighted_precision": "weighted precision", "weighted_f1": "weighted F1",
    "worst_class_recall": "worst class's recall",
    "roc_auc": "ROC-AUC", "average_precision": "PR-AUC", "brier": "Brier score ↓", "ece": "ECE ↓",
}  # fmt: skip
_CURVES = {
    "loss": "training loss", "val_loss": "validation loss", "val_accuracy": "val accuracy",
    "val_macro_f1": "val macro F1", "val_roc_auc": "val ROC-AUC",
}  # fmt: skip
# Largest number of classes with a confusion matrix on the page.
MOST_CLASSES = 30
_MOST_PAIRS = 20
# Largest number of classes named in a sentence.
_MOST_NAMED = 12


@dataclass(frozen=True)
class Trained:
    """A trial with its manifest and its training images by class."""

    trial: Trial
    manifest: Manifest
    images: Mapping[str, int]
    # Generated images among these.
    added: int = 0

    @cached_property
    def result(self) -> TrainResult:
        return TrainResult.of(self.manifest)


def trained(context: Context) -> list[Trained]:
    """Every trial that the search used for its choice."""
    search = context.step.inputs["search"]
    chosen_among = context.result("search", SearchResult).trials
    counts = context.result("ingest", IngestResult).train
    kept = {name: reduced_class.kept for name, reduced_class in reduced(context).items()}
    real = {"all": counts, "reduced": {**counts, **kept}, "none": {}}
    of_mix: dict[str, tuple[dict[str, int], int]] = {}
    trials = []
    for trial in planned_trials(search):
        if trial.step.key not in chosen_among:
            continue
        manifest = context.manifest(trial.step)
        if manifest is None:
            continue
        mix = trial.step.inputs["mix"]
        if mix.key not in of_mix:
            mixed = context.manifest(mix)
            assert mixed is not None, "its trial is done"
            result = MixResult.of(mixed)
            images = {name: real[mix.spec_as(MixSpec).real].get(name, 0) for name in counts}
            for added in result.added.values():
                for name, count in added.items():
                    images[name] += count
            of_mix[mix.key] = (images, result.added_total)
        trials.append(Trained(trial, manifest, *of_mix[mix.key]))
    return trials


def added_to(trials: Sequence[Trained]) -> dict[str, int]:
    """Images added to each arm, in the first generator fit."""
    added: dict[str, int] = {}
    for trial in trials:
        added.setdefault(trial.trial.arm.name, trial.added)
    return added


def reduced(context: Context) -> dict[str, ReducedClass]:
    """The images kept of each dominant class, if the study reduces them."""
    for step in upstream(list(context.step.inputs.values())):
        if step.kind == "reduce" and (manifest := context.manifest(step)):
            return ReduceResult.of(manifest).classes
    return {}


def main_arms(evaluate: EvaluateResult) -> list[str]:
    """The arms in plots: real images, the baseline, and the arms compared with it."""
    compared = [contrast.arm for contrast in evaluate.contrasts if contrast.arm in evaluate.arms]
    return list(dict.fromkeys(["real", evaluate.baseline, *compared]))


def colour_of(evaluate: EvaluateResult, arm: str, colours: Mapping[str, int]) -> plots.Colour:
    return "neutral" if arm == "real" else colours[evaluate.arms[arm].family]


def legend_of(
    evaluate: EvaluateResult, colours: Mapping[str, int]
) -> list[tuple[str, plots.Colour]]:
    """The main arms with their colours."""
    return [(arm, colour_of(evaluate, arm, colours)) for arm in main_arms(evaluate)]


def figures_table(evaluate: EvaluateResult) -> dict[str, Any]:
    """Every figure on test of each tested arm."""
    arms = {name: tested.figures for name, tested in evaluate.arms.items()}
    names = [name for name in FIGURES if any(name in figures for figures in arms.values())]
    return {
        "columns": [FIGURES[name] for name in names],
        "rows": [(arm, [_within(name, figures.get(name)) for name in names])
                 for arm, figures in arms.items()],
    }  # fmt: skip


def _within(name: str, figure: ArmFigure | None) -> MeanInterval | None:
    """A figure with its t interval cut to the range of the metric."""
    if figure is None:
        return None
    most = 2.0 if name == "brier" else 1.0
    return MeanInterval(mean=figure.mean, low=max(0.0, figure.low), high=min(most, figure.high))


def forests(evaluate: EvaluateResult, classes: Sequence[str]) -> list[dict[str, Any]]:
    """For each contrast, the gain in recall of each class and the gain in the objective.

    to_real: the difference from real images alone, if the baseline is another arm.
    """
    entries, arms, objective = [], evaluate.arms, evaluate.objective
    for contrast in evaluate.contrasts:
        series = [f"to {contrast.against}"]
        whole = [(contrast.effect.estimate, contrast.low, contrast.high)]
        gains, difference_to_real = [contrast.recall_gain], None
        if contrast.against != "real" and contrast.recall_gain_to_real:
            series.append("to real")
            ours, real = (
                np.asarray(arms[arm].figures[objective].replicates)
                for arm in (contrast.arm, "real")
            )
            to_real = paired_t((ours - real).tolist())
            whole.append((to_real.estimate, to_real.low, to_real.high))
            if contrast.against == evaluate.baseline:
                difference_to_real = to_real
            gains.append(contrast.recall_gain_to_real)
        rows = [
            charts.ForestRow(name, [(gain.mean, gain.low, gain.high) for gain in of_class])
            for name, *of_class in zip(classes, *gains, strict=True)
        ]
        is_enough = enough(contrast)
        gained = [row.name for row in rows if is_enough and plots.direction(row.gains[0]) > 0]
        lost = [row.name for row in rows if is_enough and plots.direction(row.gains[0]) < 0]
        rows.append(charts.ForestRow(FIGURES[objective], whole, whole=True))
        entries.append(
            {"arm": contrast.arm, "series": series, "svg": charts.forest(rows, series, is_enough),
             "gained": gained, "lost": lost, "summary": classes_in_words(gained, lost),
             "to_real": difference_to_real}
        )  # fmt: skip
    return entries


def enough(contrast: Contrast) -> bool:
    """Whether there are enough replicates to trust the interval of a class."""
    return contrast.replicates >= LEAST_REPLICATES


def classes_in_words(gained: Sequence[str], lost: Sequence[str]) -> str:
    """The classes that gain and those that lose; empty if there are none."""
    phrases = [
        f"{', '.join(names[:_MOST_NAMED])}"
        + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")
        + f" {verb if len(names) > 1 else verb + 's'}"
        for names, verb in ((gained, "gain"), (lost, "lose"))
        if names
    ]
    if not phrases:
        return ""
    few = "descriptive, not corrected for the number of classes"
    return f"Recall of classes: {'; '.join(phrases)} ({few})."


def reliability(evaluate: EvaluateResult, colours: Mapping[str, int]) -> str:
    """Reliability diagram of the main arms; empty without probabilities."""
    drawn = []
    for arm, colour in legend_of(evaluate, colours):
        bins = evaluate.arms[arm].reliability
        images = sum(bin_.images for bin_ in bins)
        if images:
            drawn.append(
                charts.Bins(
                    arm,
                    [(bin_.confidence, bin_.accuracy, bin_.images / images) for bin_ in bins],
                    colour,
                )
            )
    return charts.reliability(drawn) if drawn else ""


def frequency(
    evaluate: EvaluateResult, trials: Sequence[Trained], colours: Mapping[str, int]
) -> str:
    """F1 on test of each class against its number of training images, for the main arms."""
    images = {trial.trial.arm.name: trial.images for trial in trials}
    drawn = []
    for arm, colour in legend_of(evaluate, colours):
        points = []
        for name, figures in evaluate.arms[arm].per_class.items():
            of = figures.f1_interval
            value = plots.Point(0.0, of.mean, of.low, of.high)
            points.append(charts.ClassPoint(name, images[arm].get(name, 0), value))
        drawn.append((arm, colour, points))
    return charts.frequency(drawn, "F1 on test")


def confusions(
    evaluate: EvaluateResult, trials: Sequence[Trained], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Confusion of the main arms on val and on test, summed over classifiers.

    Few classes have whole matrices, many the most frequently confused pairs.
    """
    entries = []
    for arm in main_arms(evaluate):
        matrices = {"test": np.asarray(evaluate.arms[arm].confusion),
                    "val": val_confusion(trials, arm)}  # fmt: skip
        entry: dict[str, Any] = {"arm": arm, "cells": {}, "pairs": []}
        if len(classes) <= MOST_CLASSES:
            entry["cells"] = {name: shares(matrix) for name, matrix in matrices.items()}
        else:
            entry["pairs"] = most_confused(matrices["test"], classes)
        entries.append(entry)
    return entries


def val_confusion(trials: Sequence[Trained], arm: str) -> np.ndarray:
    """Counts (classes, classes) of an arm's classifiers on val."""
    matrices = [trial.result.val.confusion for trial in trials if trial.trial.arm.name == arm]
    return np.asarray(np.sum(matrices, axis=0))


def most_confused(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    share = wrong / np.maximum(matrix.sum(1, keepdims=True), 1)
    order = np.argsort(-share, axis=None, kind="stable")[:_MOST_PAIRS]
    return [
        {"true": classes[row], "predicted": classes[column], "count": int(wrong[row, column]),
         "share": float(share[row, column])}
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]  # fmt: skip


def shares(matrix: Sequence[Sequence[int]] | np.ndarray) -> list[list[dict[str, Any]]]:
    """Counts of a confusion matrix with their shares of the row."""
    counts = np.asarray(matrix)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return [
        [{"count": int(c), "share": float(s)} for c, s in zip(row, part, strict=True)]
        for row, part in zip(counts, share, strict=True)
    ]


def histories(context: Context, trials: Sequence[Trained]) -> list[list[dict[str, float]]]:
    """The training history of each trial, step by step."""
    return [
        json.loads(context.store.read(key))
        for trial in trials
        for key in trial.manifest.keys(file="history.json")[:1]
    ]


def curves(
    evaluate: EvaluateResult, trials: Sequence[Trained],
    histories: Sequence[Sequence[Mapping[str, float]]], colours: Mapping[str, int],
) -> list[tuple[str, Markup]]:  # fmt: skip
    """A title and a plot for each training figure: the mean over an arm's classifiers."""
    drawn = []
    for name, title in _CURVES.items():
        lines = []
        for arm, colour in legend_of(evaluate, colours):
            of_step: dict[int, list[float]] = {}
            for trial, history in zip(trials, histories, strict=True):
                if trial.trial.arm.name == arm:
                    for entry in history:
                        if name in entry:
                            of_step.setdefault(int(entry["step"]), []).append(entry[name])
            points = [plots.Point(step, float(np.mean(values)), 0.0, 0.0)
                      for step, values in sorted(of_step.items())]  # fmt: skip
            if points:
                lines.append(plots.Line(arm, points, colour))
        if lines:
            drawn.append((title, charts.curves(lines, title)))
    return drawn
