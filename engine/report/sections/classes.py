"""Each class on test: its recall by arm, and what it gains or loses in each comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from engine.metrics.significance import LEAST_REPLICATES
from engine.report.download import Row
from engine.report.page import Section, points, points_interval, render
from engine.report.plots import (
    WIDTH,
    diamond,
    direction,
    element,
    shorten,
    svg,
    text,
    ticks,
)
from engine.report.results import StudyResults
from engine.results.comparison import Contrast, MeanInterval

# Gains below this are written to a tenth of a point.
_SMALL = 0.02
_TOP = 16
# A gain (mean, low, high).
Gain = tuple[float, float, float]


@dataclass(frozen=True)
class ClassRow:
    """One class, or the objective (`whole`): its name, and a gain for each series."""

    name: str
    gains: Sequence[Gain]
    whole: bool = False


@dataclass(frozen=True)
class ClassChange:
    """The gains of a comparison: of each class in recall, of all in the objective.

    arms: with their colours. series: the arms that gains refer to, the contrast's own first.
    gained, lost: classes. declared_to_real: the difference in the objective from real images alone,
    if the baseline is another arm.
    """

    contrast: Contrast
    arms: list[tuple[str, str]]
    series: list[str]
    rows: list[ClassRow]
    gained: list[str]
    lost: list[str]

    @property
    def enough(self) -> bool:
        """Whether there are enough replicates to trust the interval of a class."""
        return self.contrast.replicates >= LEAST_REPLICATES


def classes(results: StudyResults) -> Section:
    """For each comparison, recall of each class and its gains."""
    changes = class_changes(results)
    html = render(
        "classes.html", results=results, changes=changes,
        recall_plots=[recall_plot(results, change) for change in changes],
        gain_plots=[forest(change.rows, change.series, change.enough) for change in changes],
    )  # fmt: skip
    return Section(html, {"classes": class_rows(results)})


def class_changes(results: StudyResults) -> list[ClassChange]:
    return [class_change(results, contrast) for contrast in results.evaluate.contrasts]


def class_change(results: StudyResults, contrast: Contrast) -> ClassChange:
    evaluate, against = results.evaluate, contrast.against
    arms = [(arm, results.colour(arm)) for arm in dict.fromkeys(["real", against, contrast.arm])]
    series = [f"to {against}"]
    whole = [(contrast.effect.estimate, contrast.low, contrast.high)]
    gains = [contrast.recall_gain]
    if against != "real" and contrast.recall_gain_to_real:
        series.append("to real")
        to_real = evaluate.to_real[contrast.arm]
        whole.append((to_real.estimate, to_real.low, to_real.high))
        gains.append(contrast.recall_gain_to_real)
    rows = [ClassRow(name, [as_gain(gain) for gain in of_class])
            for name, *of_class in zip(results.labels, *gains, strict=True)]  # fmt: skip
    enough = contrast.replicates >= LEAST_REPLICATES
    gained, lost = (
        [row.name for row in rows if enough and direction(row.gains[0]) == way] for way in (1, -1)
    )
    rows.append(ClassRow(results.objective, whole, whole=True))
    return ClassChange(contrast, arms, series, rows, gained, lost)


def as_gain(gain: MeanInterval) -> Gain:
    return gain.mean, gain.low, gain.high


def class_rows(results: StudyResults) -> list[Row]:
    """A row for each tested arm and class."""
    # The first contrast of an arm is the one with the baseline.
    gains = {pair.arm: pair for pair in reversed(results.evaluate.contrasts)}
    entries = []
    for arm, tested in results.evaluate.arms.items():
        images = results.tested(arm)[-1].images
        classifiers = len(tested.classifiers["accuracy"])
        for number, name in enumerate(results.labels):
            scores, f1 = tested.per_class[name], tested.per_class[name].f1_interval
            areas = {"roc_auc_mean": scores.roc_auc,
                     "average_precision_mean": scores.average_precision}  # fmt: skip
            entry: Row = {
                "arm": arm, "class": name, "training_images": images.get(name, 0),
                "test_images": scores.images // classifiers,
                "f1_mean": f1.mean, "f1_low": f1.low, "f1_high": f1.high,
                "precision_pooled": scores.precision, "recall_pooled": scores.recall,
                "f1_pooled": scores.f1,
                **{area: value for area, value in areas.items() if value is not None},
            }  # fmt: skip
            if arm in gains:
                entry["recall_gain_against"] = gains[arm].against
                for key, of_classes in (
                    ("recall_gain", gains[arm].recall_gain),
                    ("recall_gain_to_real", gains[arm].recall_gain_to_real),
                ):
                    gain = of_classes[number]
                    entry |= {key: gain.mean, f"{key}_low": gain.low, f"{key}_high": gain.high}
            entries.append(entry)
    return entries


def recall_plot(results: StudyResults, change: ClassChange) -> Markup:
    """A row for each class: recall of each arm, joined by a line, and the differences in words."""
    contrast, tested = change.contrast, results.evaluate.arms
    classifiers = contrast.generator_fits * contrast.seeds
    rows = []
    for number, name in enumerate(results.labels):
        # The number of images shows how reliable the value is.
        title = f"{name} ({tested['real'].per_class[name].images // classifiers})"
        of_class = contrast.recall_gain[number], contrast.recall_gain_to_real[number]
        recalls = [tested[arm].per_class[name].recall for arm, _ in change.arms]
        rows.append(RecallRow(title, recalls, *map(as_gain, of_class)))
    return recalls_of(rows, change.arms, contrast.against, change.enough)


@dataclass(frozen=True)
class RecallRow:
    """One class: recall of each arm, and the gains of the last arm."""

    name: str
    recalls: Sequence[float]
    to_baseline: Gain
    to_real: Gain


def recalls_of(
    rows: Sequence[RecallRow], arms: Sequence[tuple[str, str]], against: str = "baseline",
    enough: bool = True,
) -> Markup:  # fmt: skip
    """The plot of recalls. arms: with their colours.

    against: the arm that the first column of differences refers to; a second column refers to real
    images unless `against` is "real". enough: whether there are enough replicates for an interval
    to show that a class gains or loses.
    """
    rivals = list(dict.fromkeys((against, "real")))
    step, right, bottom = 32, 2 + 124 * len(rivals), 44
    left = 24 + 8 * max((len(shorten(row.name)) for row in rows), default=0)
    height = _TOP + step * len(rows) + bottom - 8
    least = min(0.9, math.floor(10 * min(value for row in rows for value in row.recalls)) / 10)

    def x(value: float) -> float:
        return left + (value - least) / (1 - least) * (WIDTH - left - right)

    drawn = []
    for tick in ticks(least, 1.0):
        at = x(tick)
        drawn.append(element("line", kind="grid", x1=at, x2=at, y1=_TOP, y2=height - bottom + 8))
        drawn.append(text(at, height - bottom + 26, f"{tick:g}", "middle"))
    columns = [WIDTH - right + 18 + 124 * number for number in range(len(rivals))]
    for column, rival in zip(columns, rivals, strict=True):
        drawn.append(text(column, _TOP - 3, f"to {shorten(rival.replace('_', ' '))}", "start"))
    for number, row in enumerate(rows):
        middle = _TOP + step * (number + 0.5)
        drawn.append(text(left - 12, middle + 4, shorten(row.name), "end", "name"))
        ends = [x(value) for value in row.recalls]
        drawn.append(element("line", kind="join", x1=min(ends), x2=max(ends), y1=middle, y2=middle))
        for index, ((arm, colour), recall) in enumerate(zip(arms, row.recalls, strict=True)):
            # Stacked, because equal values would hide each other.
            y = middle + 4.5 * (index - (len(arms) - 1) / 2)
            drawn.append(
                element("circle", f"{arm}: {recall:.3f}", kind=f"dot {colour}", cx=x(recall), cy=y,
                        r="5")
            )  # fmt: skip
        gains = (row.to_baseline, row.to_real)[: len(rivals)]
        for column, gain in zip(columns, gains, strict=True):
            mean, low, high = gain
            kind = ("axis", "good", "bad")[direction(gain) if enough else 0]
            # Whole points save room, but an interval that excludes 0 must not have an end
            # written as 0.
            near_zero = min(abs(low), abs(high)) < 0.005 and direction(gain)
            digits = 1 if max(abs(low), abs(high)) < _SMALL or near_zero else 0
            words = f"{points(mean)} ({points_interval(low, high, digits)})"
            drawn.append(text(column, middle + 4, words if low or high else "0", "start", kind))
    return svg(drawn, height, "recall of each class")


def forest(rows: Sequence[ClassRow], series: Sequence[str], enough: bool = True) -> Markup:
    """A forest plot (Lewis and Clarke 2001) in points: a mark with its interval for each row and
    series, around the line of no difference.

    Classes without spread are grey; all classes are if there are too few replicates (not `enough`).
    """
    top, bottom, right = 14, 42, 150
    step = 13 * len(series) + 11
    left = 24 + 8 * max(len(shorten(row.name)) for row in rows)
    height = top + step * len(rows) + bottom
    values = [value for row in rows for gain in row.gains for value in gain]
    # Very wide intervals of few replicates are cut, which an arrow shows.
    reach = max((abs(gain[0]) for row in rows for gain in row.gains), default=0.0)
    limit = max(0.01, min(max(map(abs, values)), max(3 * reach, 0.1)))

    def x(value: float) -> float:
        inside = min(max(value, -limit), limit)
        return left + (inside + limit) / (2 * limit) * (WIDTH - left - right)

    drawn = []
    for tick in ticks(-limit, limit):
        at, kind = x(tick), "zero" if abs(tick) < 1e-12 else "grid"
        drawn.append(element("line", kind=kind, x1=at, x2=at, y1=top, y2=height - bottom + 4))
        words = points(tick, 0 if limit > 0.04 else 1)
        drawn.append(text(at, height - bottom + 20, words, "middle"))
    drawn.append(text((left + WIDTH - right) / 2, height - 4, "difference, in points", "middle"))
    for number, row in enumerate(rows):
        above = top + step * number
        drawn.append(text(left - 12, above + step / 2 + 4, shorten(row.name), "end", "name"))
        for index, (mean, low, high) in enumerate(row.gains):
            y = float(above + 12 + 13 * index)
            grey = not row.whole and (low == high or not enough)
            colour = f"s{index} grey" if grey else f"s{index}"
            label = f"{points(mean)} ({points_interval(low, high)})" if low or high else "0"
            drawn.append(
                element("line", kind=f"whisker {colour}", x1=x(low), x2=x(high), y1=y, y2=y)
            )
            for end, way in ((low, -1), (high, 1)):
                if way * end > limit:
                    tip = f"M{x(end) + way * 6:.1f} {y:.1f}l{-6 * way} -4v8z"
                    drawn.append(element("path", kind=f"tip {colour}", d=tip))
            title = f"{row.name}, {series[index]}: {label}"
            drawn.append(
                element("path", title, kind=f"mark s{index}", d=diamond(x(mean), y))
                if row.whole
                else element("circle", title, kind=f"mark {colour}", cx=x(mean), cy=y, r="4")
            )
            drawn.append(text(WIDTH - right + 14, y + 4, label, "start"))
    return svg(drawn, height, "difference of each class with its interval")
