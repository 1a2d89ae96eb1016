"""Plots as inline SVG, coloured by the CSS classes `c0` to `c9` so that they work in light and dark
mode.

Coordinates refer to a fixed view box, which the page scales. Names of classes and arms come from
users and are always escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from engine.report.page import points, points_interval

WIDTH, HEIGHT = 720, 320
# Gains below this are written to a tenth of a point.
_SMALL = 0.02
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 16, 44
# Height of a saturation's row above the curves.
_ROW = 20


# The number of a page colour, or a CSS class.
Colour = int | str


@dataclass(frozen=True)
class Point:
    """A value at `x` with its interval."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """A named series of points."""

    name: str
    points: Sequence[Point]
    colour: Colour


@dataclass(frozen=True)
class Level:
    """A named horizontal line."""

    name: str
    y: float
    colour: int


@dataclass(frozen=True)
class Saturation:
    """The ratio beyond which the line `name` gains no more, with its interval."""

    name: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Gain:
    """One class: the value of each arm and the gains of the last arm, with intervals."""

    name: str
    values: Sequence[float]
    # (mean, low, high) to the baseline, and to real images alone.
    to_baseline: tuple[float, float, float]
    to_real: tuple[float, float, float]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, int(high / step + 1e-9) + 1)]


def ratio_curve(
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
    height = HEIGHT + top - _TOP

    def x(value: float) -> float:
        return _LEFT + value / last * (WIDTH - _LEFT - _RIGHT - 30)

    def y(value: float) -> float:
        inside = min(max(value, low), high)
        return height - _BOTTOM - (inside - low) / (high - low) * (height - top - _BOTTOM)

    drawn = grid([(y(tick), f"{tick:g}") for tick in ticks(low, high)])
    for tick in sorted({0.0, *(point.x for point in points)}):
        drawn.append(text(x(tick), height - _BOTTOM + 18, f"{tick:g}", "middle"))
    x_name = "images added per real image of each target class"
    drawn.append(text((WIDTH + _LEFT) / 2, height - 6, x_name, "middle"))
    drawn.append(
        Markup('<text class="axis axis-y" transform="translate(14 {}) rotate(-90)" '
               'text-anchor="middle">{}</text>').format(
                   rounded((height - _BOTTOM + top) / 2), y_name)
    )  # fmt: skip
    for level in levels:
        at = rounded(y(level.y))
        drawn.append(
            Markup('<line class="level c{}" x1="{}" x2="{}" y1="{}" y2="{}"><title>{}: {}</title>'
                   "</line>").format(level.colour, _LEFT, WIDTH - _RIGHT, at, at,
                                     level.name, f"{level.y:.3f}")
        )  # fmt: skip
    # Intervals of several lines are drawn side by side so that they do not overlap.
    shifts = {line.name: 7 * (index - (len(lines) - 1) / 2) for index, line in enumerate(lines)}
    for line in lines:
        shift = shifts[line.name]
        ends = [f"{rounded(x(p.x) + shift)},{rounded(y(p.y))}" for p in line.points]
        path = " ".join([f"{rounded(x(start.x))},{rounded(y(start.y))}", *ends])
        drawn.append(
            Markup('<polyline class="line {}" points="{}"/>').format(kind_of(line.colour), path)
        )
        for point in line.points:
            drawn.append(_dot(kind_of(line.colour), line.name, point, x(point.x) + shift, y))
    drawn.append(_dot("neutral", "real", start, x(start.x), y))
    line_of = {line.name: line for line in lines}
    for row, saturated in enumerate(saturations):
        line = line_of[saturated.name]
        # Shifted like the points of the line.
        low_x, at_x, high_x = (
            x(ratio) + (shifts[saturated.name] if ratio else 0.0)
            for ratio in (saturated.low, saturated.ratio, saturated.high)
        )
        value = next((point.y for point in line.points if point.x == saturated.ratio), start.y)
        drawn.append(
            _saturation(kind_of(line.colour), saturated, (low_x, at_x, high_x),
                        _TOP + _ROW * (row + 0.5), y(value))
        )  # fmt: skip
    return svg(drawn, height, f"{y_name} against the ratio of added images")


def _saturation(
    kind: str, saturation: Saturation, across: tuple[float, float, float], row: float, curve: float
) -> Markup:
    """A band from low to high in its row, with a diamond at the point.

    A dashed line leads from the diamond to a ring on the curve. The name is on the side with room.
    """
    low, at, high = across
    right = WIDTH - _RIGHT - high > low - _LEFT
    title = shorten(saturation.name.replace("_", " "))
    name = text(
        high + 11 if right else low - 11, row + 4, title, "start" if right else "end"
    )  # fmt: skip
    return Markup(
        '<g class="saturation {}"><title>{}</title>'
        '<rect x="{}" y="{}" width="{}" height="10" rx="2"/>'
        '<line x1="{}" x2="{}" y1="{}" y2="{}"/><circle cx="{}" cy="{}" r="8"/>'
        '<path d="M{} {}l6 -6l6 6l-6 6z"/></g>{}'
    ).format(
        kind, f"{saturation.name}: saturation at x{saturation.ratio:g}"
        f" ({saturation.low:g} to {saturation.high:g})",
        rounded(low), rounded(row - 5), rounded(high - low),
        rounded(at), rounded(at), rounded(row + 6), rounded(curve - 8), rounded(at), rounded(curve),
        rounded(at - 6), rounded(row), name,
    )  # fmt: skip


def _dot(kind: str, name: str, point: Point, across: float, y: Callable[[float], float]) -> Markup:
    """A point with its interval."""
    return Markup(
        '<line class="whisker {}" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        '<circle class="dot {}" cx="{}" cy="{}" r="4.5"><title>{}</title></circle>'
    ).format(
        kind, rounded(across), rounded(across), rounded(y(point.low)), rounded(y(point.high)),
        kind, rounded(across), rounded(y(point.y)),
        f"{name} x{point.x:g}: {point.y:.3f}, {point.low:.3f} to {point.high:.3f}",
    )  # fmt: skip


def direction(gain: tuple[float, float, float]) -> int:
    """1 or -1 if an interval (mean, low, high) is above or below zero, else 0.

    Also 0 without spread: equal differences on few images are common by chance.
    """
    _, low, high = gain
    return 0 if low == high else int(low > 0) - int(high < 0)


def recall_by_class(
    gains: Sequence[Gain], arms: Sequence[str], colours: Sequence[Colour],
    against: str = "baseline", enough: bool = True,
) -> Markup:  # fmt: skip
    """A row for each class: recall of each arm, joined by a line, and the difference in words.

    against: the arm that the first column of differences refers to; a second column refers to real
    images unless `against` is "real". enough: whether there are enough replicates for an interval
    to show that a class gains or loses.
    """
    rivals = list(dict.fromkeys((against, "real")))
    row, right = 32, 2 + 124 * len(rivals)
    left = 24 + 8 * max((len(shorten(gain.name)) for gain in gains), default=0)
    height = _TOP + row * len(gains) + _BOTTOM - 8
    least = min(0.9, math.floor(10 * min(v for gain in gains for v in gain.values)) / 10)

    def x(value: float) -> float:
        return left + (value - least) / (1 - least) * (WIDTH - left - right)

    drawn = []
    for tick in ticks(least, 1.0):
        across = rounded(x(tick))
        drawn.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                across, across, _TOP, height - _BOTTOM + 8
            )
        )
        drawn.append(text(x(tick), height - _BOTTOM + 26, f"{tick:g}", "middle"))
    columns = [WIDTH - right + 18 + 124 * number for number in range(len(rivals))]
    for place, rival in zip(columns, rivals, strict=True):
        drawn.append(text(place, _TOP - 3, f"to {shorten(rival.replace('_', ' '))}", "start"))
    for number, gain in enumerate(gains):
        middle = _TOP + row * (number + 0.5)
        drawn.append(text(left - 12, middle + 4, shorten(gain.name), "end", "name"))
        ends = [x(value) for value in gain.values]
        drawn.append(
            Markup('<line class="join" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                rounded(min(ends)), rounded(max(ends)), middle, middle
            )
        )
        # Stacked, because equal values would hide each other.
        heights = [middle + 4.5 * (index - (len(arms) - 1) / 2) for index in range(len(arms))]
        for colour, arm, recall, end, height_of in zip(
            colours, arms, gain.values, ends, heights, strict=True
        ):
            drawn.append(
                Markup('<circle class="dot {}" cx="{}" cy="{}" r="5"><title>{}: {}</title>'
                       "</circle>").format(kind_of(colour), rounded(end), rounded(height_of),
                                           arm, f"{recall:.3f}")
            )  # fmt: skip
        for place, (mean, low, high) in zip(
            columns, (gain.to_baseline, gain.to_real)[: len(rivals)], strict=True
        ):
            way = direction((mean, low, high)) if enough else 0
            kind = ("axis", "good", "bad")[way]
            # Whole points save room, but an interval that excludes 0 must not have an end
            # written as 0.
            near_zero = min(abs(low), abs(high)) < 0.005 and direction((mean, low, high))
            digits = 1 if max(abs(low), abs(high)) < _SMALL or near_zero else 0
            words = f"{points(mean)} ({points_interval(low, high, digits)})"
            drawn.append(text(place, middle + 4, words if low or high else "0", "start", kind))
    return svg(drawn, height, "recall of each class")


def scatter(
    points: Sequence[tuple[float, float]], classes: Sequence[int], synthetic: Sequence[bool],
    names: Sequence[str],
) -> Markup:  # fmt: skip
    """Points of a projection with their names: discs are real images, rings synthetic ones."""
    width, height = 480, 400
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    across, down = (min(xs), max(xs)), (min(ys), max(ys))

    def place(value: float, low: float, high: float, size: float) -> str:
        return rounded(12 + (value - low) / (high - low or 1) * (size - 24))

    drawn = [
        Markup('<circle class="{} c{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
            "ring" if is_synthetic else "disc", number % 10, place(x, *across, width),
            place(y, *down, height), "3" if is_synthetic else "2.5", name,
        )
        for (x, y), number, is_synthetic, name in zip(
            points, classes, synthetic, names, strict=True
        )
    ]  # fmt: skip
    return svg(drawn, height, "embedding of real and synthetic images, in two dimensions", width)


def kind_of(colour: Colour) -> str:
    """The CSS class of a colour."""
    return colour if isinstance(colour, str) else f"c{colour}"


def grid(labels: Sequence[tuple[float, str]]) -> list[Markup]:
    drawn = []
    for y, words in labels:
        drawn.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
                _LEFT, WIDTH - _RIGHT, rounded(y), rounded(y)
            )
        )
        drawn.append(text(_LEFT - 8, y + 4, words, "end"))
    return drawn


def text(x: float, y: float, words: str, anchor: str, kind: str = "axis") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        kind, rounded(x), rounded(y), anchor, words
    )


def svg(drawn: Sequence[Markup], height: int, label: str, width: int = WIDTH) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, escape(label), Markup("").join(drawn)
    )


def rounded(value: float) -> str:
    return f"{value:.1f}"


def shorten(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"
