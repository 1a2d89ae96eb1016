"""The objective on val against the ratio of added images, and where more images add nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from engine.comparison.arms import Arm, replicates
from engine.metrics.significance import LEAST_REPLICATES
from engine.report.download import Row
from engine.report.page import Section, render
from engine.report.plots import (
    WIDTH,
    Line,
    Point,
    diamond,
    element,
    path,
    shorten,
    svg,
    text,
    ticks,
    vertical_text,
)
from engine.report.results import StudyResults
from engine.results.comparison import SaturationPoint

_HEIGHT = 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 16, 44
# Height of a saturation's row above the curves.
_ROW = 20


@dataclass(frozen=True)
class Level:
    """A named horizontal line. colour: a CSS class."""

    name: str
    y: float
    colour: str


@dataclass(frozen=True)
class Saturation:
    """The ratio beyond which more images of a family add nothing. seen: whether it and its interval
    are below the largest ratio tried."""

    family: str
    point: SaturationPoint
    largest: float

    @property
    def seen(self) -> bool:
        return max(self.point.ratio, self.point.high) < self.largest


@dataclass(frozen=True)
class ArmOnVal:
    """An arm with the objective on val, its mean and interval."""

    arm: Arm
    point: Point
    replicates: int


def ratio_curve(results: StudyResults) -> Section:
    """A line for each family and use with ratios, a level for each other arm."""
    arms = arms_on_val(results)
    saturations = saturations_of(results)
    families: dict[str, list[Point]] = {}
    levels = {}
    for on_val in arms:
        # Arms with the role "shown" have no part in the choice.
        if on_val.arm.role == "shown" and on_val.arm.family != "real_double":
            continue
        if on_val.arm.ratio:
            families.setdefault(on_val.arm.line, []).append(on_val.point)
        else:
            levels[on_val.arm.name] = on_val
    start = levels.pop("real").point
    colours = results.colours
    lines = [Line(name, sorted(points, key=lambda point: point.x), colours[name])
             for name, points in families.items()]  # fmt: skip
    across = [Level(name, on_val.point.y, colours[on_val.arm.family])
              for name, on_val in levels.items()]  # fmt: skip
    seen = [saturation for saturation in saturations if saturation.seen]
    legend = [("real", "neutral", "line"), *((line.name, line.colour, "line") for line in lines),
              *((level.name, level.colour, "level") for level in across)]  # fmt: skip
    if seen:
        legend.append(("saturation with its 95% interval", "neutral", "saturation"))
    html = render(
        "ratio_curve.html", results=results, legend=legend, saturations=saturations,
        least=LEAST_REPLICATES,
        below_real=[line.name for line in lines
                    if all(point.y <= start.y for point in line.points)],
        svg=plot(lines, across, start, f"val {results.objective}", seen) if lines else "",
    )  # fmt: skip
    return Section(
        html,
        {
            "ratios": [ratio_row(on_val, results.search.objective) for on_val in arms],
            "saturation": [
                {"family": family, **dict(point)}
                for family, point in results.evaluate.saturation.items()
            ],
        },
    )


def arms_on_val(results: StudyResults) -> list[ArmOnVal]:
    """The objective of each arm on val, in the order of the search."""
    values: dict[str, list[float]] = {}
    arm_of: dict[str, Arm] = {}
    for item in results.choice:
        arm = arm_of.setdefault(item.trial.arm.name, item.trial.arm)
        score = item.result.val.figures[results.search.objective]
        values.setdefault(arm.name, []).append(score)
    arms = []
    for name, arm in arm_of.items():
        by_replicate = replicates(np.asarray(values[name]), results.search_spec.generator_fits)
        interval = results.evaluate.val[name]
        point = Point(arm.ratio or 0.0, interval.mean, interval.low, interval.high)
        arms.append(ArmOnVal(arm, point, len(by_replicate)))
    return arms


def ratio_row(on_val: ArmOnVal, objective: str) -> Row:
    """The objective of an arm on val, as the curve shows it against the ratio."""
    arm, point = on_val.arm, on_val.point
    return {
        "arm": arm.name, "family": arm.family, "ratio": arm.ratio, "role": arm.role,
        "objective": objective, "val_mean": point.y, "val_low": point.low, "val_high": point.high,
        "replicates": on_val.replicates,
    }  # fmt: skip


def saturations_of(results: StudyResults) -> list[Saturation]:
    """The saturation of each family; with too few replicates the list is empty."""
    if results.search_spec.replicates < LEAST_REPLICATES:
        return []
    ratios: dict[str, float] = {}
    for arm in results.search_spec.arms:
        if arm.role != "shown":
            ratios[arm.line] = max(arm.ratio or 0.0, ratios.get(arm.line, 0.0))
    return [
        Saturation(family, point, ratios[family])
        for family, point in results.evaluate.saturation.items()
    ]


def plot(
    lines: Sequence[Line], levels: Sequence[Level], start: Point, y_name: str,
    saturations: Sequence[Saturation] = (),
) -> Markup:  # fmt: skip
    """The objective against the ratio.

    One line per family begins at `start`, the value of real images alone; arms without a ratio are
    levels. Each saturation has a named row above the plot: its interval is a band, and a line
    leads from its point down to the curve.
    """
    points = [start, *(point for line in lines for point in line.points)]
    values = [v for p in points for v in (p.low, p.high)] + [level.y for level in levels]
    # Intervals of two seeds can be very wide; they are cut at 0 and 1.
    low, high = max(0.0, min(values)), min(1.0, max(values))
    pad = 0.06 * (high - low or 0.1)
    low, high = max(0.0, low - pad), min(1.0, high + pad)
    last = max((point.x for point in points), default=1.0)
    top = _TOP + _ROW * len(saturations)
    height = _HEIGHT + top - _TOP

    def x(value: float) -> float:
        return _LEFT + value / last * (WIDTH - _LEFT - _RIGHT - 30)

    def y(value: float) -> float:
        inside = min(max(value, low), high)
        return height - _BOTTOM - (inside - low) / (high - low) * (height - top - _BOTTOM)

    drawn = []
    for tick in ticks(low, high):
        at = y(tick)
        drawn.append(element("line", kind="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at))
        drawn.append(text(_LEFT - 8, at + 4, f"{tick:g}", "end"))
    for tick in sorted({0.0, *(point.x for point in points)}):
        drawn.append(text(x(tick), height - _BOTTOM + 18, f"{tick:g}", "middle"))
    x_name = "images added per real image of each target class"
    drawn.append(text((WIDTH + _LEFT) / 2, height - 6, x_name, "middle"))
    drawn.append(vertical_text(14, (height - _BOTTOM + top) / 2, y_name))
    for level in levels:
        at = y(level.y)
        drawn.append(
            element("line", f"{level.name}: {level.y:.3f}", kind=f"level {level.colour}",
                    x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at)
        )  # fmt: skip
    # Intervals of several lines are drawn side by side so that they do not overlap.
    shifts = {line.name: 7 * (index - (len(lines) - 1) / 2) for index, line in enumerate(lines)}
    for line in lines:
        shift = shifts[line.name]
        ends = [(x(point.x) + shift, y(point.y)) for point in line.points]
        drawn.append(
            element("polyline", kind=f"line {line.colour}",
                    points=path([(x(start.x), y(start.y)), *ends]))
        )  # fmt: skip
        for point in line.points:
            drawn += dot(line.colour, line.name, point, x(point.x) + shift, y)
    drawn += dot("neutral", "real", start, x(start.x), y)
    line_of = {line.name: line for line in lines}
    for row, saturation in enumerate(saturations):
        line, ratio = line_of[saturation.family], saturation.point.ratio
        # Shifted like the points of the line.
        across = [x(value) + (shifts[line.name] if value else 0.0)
                  for value in (saturation.point.low, ratio, saturation.point.high)]  # fmt: skip
        curve = next((point.y for point in line.points if point.x == ratio), start.y)
        drawn.append(band(saturation, line.colour, across, _TOP + _ROW * (row + 0.5), y(curve)))
    return svg(drawn, height, f"{y_name} against the ratio of added images")


def band(
    saturation: Saturation, colour: str, across: Sequence[float], row: float, curve: float
) -> Markup:
    """A band from low to high in its row, with a diamond at the point.

    A dashed line leads from the diamond to a ring on the curve. The name is on the side with room.
    """
    low, at, high = across
    family, point = saturation.family, saturation.point
    right = WIDTH - _RIGHT - high > low - _LEFT
    name = text(high + 11 if right else low - 11, row + 4, shorten(family.replace("_", " ")),
                "start" if right else "end")  # fmt: skip
    title = f"{family}: saturation at x{point.ratio:g} ({point.low:g} to {point.high:g})"
    return Markup('<g class="saturation {}"><title>{}</title>{}{}{}{}</g>{}').format(
        colour, title,
        element("rect", x=low, y=row - 5, width=high - low, height="10", rx="2"),
        element("line", x1=at, x2=at, y1=row + 6, y2=curve - 8),
        element("circle", cx=at, cy=curve, r="8"), element("path", d=diamond(at, row)), name,
    )  # fmt: skip


def dot(
    colour: str, name: str, point: Point, across: float, y: Callable[[float], float]
) -> list[Markup]:
    """A point with its interval."""
    title = f"{name} x{point.x:g}: {point.y:.3f}, {point.low:.3f} to {point.high:.3f}"
    return [
        element("line", kind=f"whisker {colour}", x1=across, x2=across, y1=y(point.low),
                y2=y(point.high)),
        element("circle", title, kind=f"dot {colour}", cx=across, cy=y(point.y), r="4.5"),
    ]  # fmt: skip
