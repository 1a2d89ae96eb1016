"""The course of training: each figure against the optimizer step."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from engine.report.page import Section, render
from engine.report.plots import Frame, Line, Point, element, path, svg, ticks
from engine.report.results import StudyResults, Trained

_CURVES = {
    "loss": "training loss", "val_loss": "validation loss", "val_accuracy": "val accuracy",
    "val_macro_f1": "val macro F1", "val_roc_auc": "val ROC-AUC",
}  # fmt: skip
# A classifier with its figures at each evaluation on val.
History = tuple[Trained, list[dict[str, float]]]


def training(results: StudyResults) -> Section:
    """A plot for each figure of training, with a line for each main arm."""
    histories = [
        (item, json.loads(results.store.read(key)))
        for item in results.trials
        for key in item.manifest.keys(file="history.json")[:1]
    ]
    drawn = []
    for name, title in _CURVES.items():
        lines = [Line(arm, points, colour) for arm, colour in results.legend
                 if (points := mean_curve(histories, arm, name))]  # fmt: skip
        if lines:
            drawn.append((title, curves(lines, title)))
    batch = results.search_spec.training.batch_size
    # An epoch is as many draws as there are images.
    rows = [
        {**item.columns, "step": int(entry["step"]),
         "epoch": entry["step"] * batch / item.manifest.rows,
         **{name: value for name, value in entry.items() if name != "step"}}
        for item, entries in histories
        for entry in entries
    ]  # fmt: skip
    return Section(render("training.html", results=results, curves=drawn), {"history": rows})


def mean_curve(histories: Sequence[History], arm: str, name: str) -> list[Point]:
    """A figure of an arm at each step: the mean over its classifiers."""
    of_step: dict[int, list[float]] = {}
    for item, entries in histories:
        for entry in entries:
            if item.trial.arm.name == arm and name in entry:
                of_step.setdefault(int(entry["step"]), []).append(entry[name])
    return [Point(step, float(np.mean(values)), 0.0, 0.0)
            for step, values in sorted(of_step.items())]  # fmt: skip


def curves(lines: Sequence[Line], title: str) -> Markup:
    """A figure of training against the optimizer step: a line for each arm."""
    width, height = 360, 240
    every = [point for line in lines for point in line.points]
    low, high = min(point.y for point in every), max(point.y for point in every)
    pad = 0.05 * ((high - low) or 0.1)
    frame = Frame(width, height, 0, max(point.x for point in every), max(0, low - pad), high + pad)
    drawn = frame.axes("step", "", ticks(0, frame.x_high, 4))
    for line in lines:
        places = path((frame.x(point.x), frame.y(point.y)) for point in line.points)
        drawn.append(element("polyline", line.name, kind=f"line {line.colour}", points=places))
    return svg(drawn, height, f"{title} during training", width)
