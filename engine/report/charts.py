"""Plots of the evidence for a verdict, as inline SVG: gains of each class, reliability, F1 against
the number of training images, training curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from engine.report.page import points, points_interval
from engine.report.plots import (
    WIDTH,
    Colour,
    Line,
    Point,
    kind_of,
    rounded,
    shorten,
    svg,
    text,
    ticks,
)

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 42


@dataclass(frozen=True)
class Frame:
    """The plot area: values from (x_low, y_low) to (x_high, y_high) in width × height."""

    width: int
    height: int
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    logarithmic: bool = False

    def x(self, value: float) -> float:
        low, high, value = (
            (math.log10(max(one, 1e-9)) if self.logarithmic else one)
            for one in (self.x_low, self.x_high, value)
        )
        share = (value - low) / ((high - low) or 1)
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        inside = min(max(value, self.y_low), self.y_high)
        share = (inside - self.y_low) / ((self.y_high - self.y_low) or 1)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def axes(self, x_name: str, y_name: str, x_ticks: Sequence[float]) -> list[Markup]:
        drawn = []
        for tick in ticks(self.y_low, self.y_high):
            drawn.append(
                Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    _LEFT, self.width - _RIGHT, rounded(self.y(tick)), rounded(self.y(tick))
                )
            )
            drawn.append(text(_LEFT - 7, self.y(tick) + 4, f"{tick:g}", "end"))
        for tick in x_ticks:
            drawn.append(text(self.x(tick), self.height - _BOTTOM + 17, f"{tick:,.10g}", "middle"))
        middle = (_LEFT + self.width - _RIGHT) / 2
        drawn.append(text(middle, self.height - 6, x_name, "middle"))
        if y_name:
            drawn.append(
                Markup('<text class="axis axis-y" transform="translate(12 {}) rotate(-90)"'
                       ' text-anchor="middle">{}</text>').format(
                           rounded((self.height - _BOTTOM + _TOP) / 2), y_name)
            )  # fmt: skip
        return drawn


@dataclass(frozen=True)
class ForestRow:
    """Gains (mean, low, high) of a row, one per series. whole: the row is not a single class."""

    name: str
    gains: Sequence[tuple[float, float, float]]
    whole: bool = False


def forest(
    rows: Sequence[ForestRow], series: Sequence[str], enough: bool = True
) -> Markup:  # fmt: skip
    """A forest plot (Lewis and Clarke 2001) in points: a mark with its interval for each row and
    series, around the line of no difference.

    Classes without spread are grey; all classes are if there are too few replicates (not `enough`).
    """
    step = 13 * len(series) + 11
    left = 24 + 8 * max(len(shorten(row.name)) for row in rows)
    right = 150
    height = _TOP + step * len(rows) + _BOTTOM
    values = [value for row in rows for gain in row.gains for value in gain]
    # Very wide intervals of few replicates are cut, which an arrow shows.
    reach = max((abs(gain[0]) for row in rows for gain in row.gains), default=0.0)
    limit = max(0.01, min(max(map(abs, values)), max(3 * reach, 0.1)))

    def x(value: float) -> float:
        inside = min(max(value, -limit), limit)
        return left + (inside + limit) / (2 * limit) * (WIDTH - left - right)

    drawn = []
    for tick in ticks(-limit, limit):
        across, kind = rounded(x(tick)), "zero" if abs(tick) < 1e-12 else "grid"
        drawn.append(
            Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                kind, across, across, _TOP, height - _BOTTOM + 4
            )
        )
        drawn.append(text(x(tick), height - _BOTTOM + 20, points(tick, 0 if limit > 0.04 else 1),
                          "middle"))  # fmt: skip
    drawn.append(text((left + WIDTH - right) / 2, height - 4, "difference, in points", "middle"))
    for number, row in enumerate(rows):
        top = _TOP + step * number
        drawn.append(text(left - 12, top + step / 2 + 4, shorten(row.name), "end", "name"))
        for index, (mean, low, high) in enumerate(row.gains):
            y = top + 12 + 13 * index
            grey = not row.whole and (low == high or not enough)
            colour = f"s{index} grey" if grey else f"s{index}"
            label = f"{points(mean)} ({points_interval(low, high)})" if low or high else "0"
            drawn.append(
                Markup('<line class="whisker {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                    colour, rounded(x(low)), rounded(x(high)), rounded(y), rounded(y)
                )
            )
            for end, way in ((low, -1), (high, 1)):
                if way * end > limit:
                    tip = x(end) + way * 6
                    drawn.append(
                        Markup('<path class="tip {}" d="M{} {}l{} -4v8z"/>').format(
                            colour, rounded(tip), rounded(y), -6 * way
                        )
                    )
            name = f"{row.name}, {series[index]}: {label}"
            if row.whole:
                drawn.append(
                    Markup('<path class="mark s{}" d="M{} {}l6 -6l6 6l-6 6z"><title>{}</title>'
                           "</path>").format(index, rounded(x(mean) - 6), rounded(y), name)
                )  # fmt: skip
            else:
                drawn.append(
                    Markup('<circle class="mark {}" cx="{}" cy="{}" r="4"><title>{}</title>'
                           "</circle>").format(colour, rounded(x(mean)), rounded(y), name)
                )  # fmt: skip
            drawn.append(text(WIDTH - right + 14, y + 4, label, "start"))
    return svg(drawn, height, "difference of each class with its interval")


@dataclass(frozen=True)
class Bins:
    """One arm of a reliability diagram: (confidence, accuracy, share of the images) of each bin."""

    name: str
    bins: Sequence[tuple[float, float, float]]
    colour: Colour


def reliability(arms: Sequence[Bins]) -> Markup:
    """Accuracy against confidence (Niculescu-Mizil and Caruana 2005); a disc's area is the share of
    images in its bin."""
    width, height = 480, 400
    frame = Frame(width, height, 0.0, 1.0, 0.0, 1.0)
    drawn = frame.axes("confidence", "share correct", ticks(0.0, 1.0))
    drawn.append(
        Markup('<line class="zero" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            *(rounded(value) for value in (frame.x(0), frame.x(1), frame.y(0), frame.y(1)))
        )
    )
    for arm in arms:
        kind = kind_of(arm.colour)
        path = " ".join(f"{rounded(frame.x(x))},{rounded(frame.y(y))}" for x, y, _ in arm.bins)
        drawn.append(Markup('<polyline class="line {}" points="{}"/>').format(kind, path))
        for x, y, share in arm.bins:
            drawn.append(
                Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>')
                .format(kind, rounded(frame.x(x)), rounded(frame.y(y)),
                        rounded(2.5 + 8 * share**0.5),
                        f"{arm.name}: confidence {x:.2f}, accuracy {y:.2f},"
                        f" {100 * share:.1f}% of images")
            )  # fmt: skip
    return svg(drawn, height, "reliability diagram", width)


@dataclass(frozen=True)
class ClassPoint:
    """A class: its training images in an arm, and a figure with its interval."""

    name: str
    images: int
    value: Point


def frequency(arms: Sequence[tuple[str, Colour, Sequence[ClassPoint]]], y_name: str) -> Markup:
    """A figure of each class against its training images, one colour for each arm.

    Lines connect the points of a class, because both coordinates depend on the arm.
    """
    width, height = 480, 400
    every = [point for _, _, of_arm in arms for point in of_arm]
    most, least = max(p.images for p in every), max(1, min(p.images for p in every))
    low = max(0.0, min(point.value.y for point in every) - 0.05)
    frame = Frame(width, height, least / 1.15, most * 1.15, math.floor(10 * low) / 10, 1.0, True)
    drawn = frame.axes("training images of the class", y_name, _decades(least, most))
    for number in range(len(arms[0][2])):
        aside = 12 * (number / max(1, len(arms[0][2]) - 1) - 0.5)
        path = " ".join(
            f"{rounded(frame.x(of[number].images) + aside)},{rounded(frame.y(of[number].value.y))}"
            for _, _, of in arms
        )
        drawn.append(Markup('<polyline class="join" points="{}"/>').format(path))
    for arm, colour, of_arm in arms:
        kind = kind_of(colour)
        for number, point in enumerate(of_arm):
            # Classes of equal size are drawn side by side.
            aside = 12 * (number / max(1, len(of_arm) - 1) - 0.5)
            x, value = rounded(frame.x(point.images) + aside), point.value
            label = f"{point.name}, {arm}: {point.images:,} images, {value.y:.3f}"
            drawn.append(
                Markup('<line class="whisker {}" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                       '<circle class="dot {}" cx="{}" cy="{}" r="4.5"><title>{}</title></circle>'
                       ).format(kind, x, x, rounded(frame.y(value.low)),
                                rounded(frame.y(value.high)), kind, x, rounded(frame.y(value.y)),
                                f"{label} ({value.low:.3f} to {value.high:.3f})")
            )  # fmt: skip
    return svg(drawn, height, f"{y_name} of each class against its training images", width)


def _decades(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis, about six at most."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        marks = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(marks) <= 6:
            break
    return marks or [low]


def curves(lines: Sequence[Line], title: str) -> Markup:
    """A training figure against the optimizer step: a line for each arm."""
    width, height = 360, 240
    every = [point for line in lines for point in line.points]
    low, high = min(point.y for point in every), max(point.y for point in every)
    pad = 0.05 * ((high - low) or 0.1)
    frame = Frame(width, height, 0, max(point.x for point in every), max(0, low - pad), high + pad)
    drawn = frame.axes("step", "", ticks(0, frame.x_high, 4))
    for line in lines:
        kind = kind_of(line.colour)
        path = " ".join(f"{rounded(frame.x(p.x))},{rounded(frame.y(p.y))}" for p in line.points)
        drawn.append(
            Markup('<polyline class="line {}" points="{}"><title>{}</title></polyline>').format(
                kind, path, line.name
            )
        )
    return svg(drawn, height, f"{title} during training", width)
