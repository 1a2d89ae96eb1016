"""Primitives of plots as inline SVG, coloured by CSS classes for light and dark mode.

Coordinates refer to a fixed view box, which the page scales. Names of classes and arms come from
users and are always escaped. Each plot is drawn in the module of its section.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 42


@dataclass(frozen=True)
class Point:
    """A value at `x` with its interval."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """A named series of points. colour: a CSS class."""

    name: str
    points: Sequence[Point]
    colour: str


def element(tag: str, title: str = "", /, **attributes: str | float) -> Markup:
    """An element of an SVG, with an optional tooltip. Floats are rounded to a tenth; `kind` is the
    CSS class, and `_` in a name becomes `-`."""
    names = {"kind": "class"}
    opened = Markup("").join(
        Markup(' {}="{}"').format(
            names.get(name, name.replace("_", "-")),
            f"{value:.1f}" if isinstance(value, float) else value,
        )
        for name, value in attributes.items()
    )
    if not title:
        return Markup("<{}{}/>").format(tag, opened)
    return Markup("<{}{}><title>{}</title></{}>").format(tag, opened, title, tag)


def text(x: float, y: float, words: str, anchor: str, kind: str = "axis") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, words
    )


def vertical_text(x: int, y: float, words: str) -> Markup:
    """The name of a vertical axis."""
    return Markup(
        '<text class="axis axis-y" transform="translate({} {:.1f}) rotate(-90)"'
        ' text-anchor="middle">{}</text>'
    ).format(x, y, words)


def path(places: Iterable[tuple[float, float]]) -> str:
    """Points of a polyline."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def diamond(x: float, y: float) -> str:
    """The path of a diamond around a point."""
    return f"M{x - 6:.1f} {y:.1f}l6 -6l6 6l-6 6z"


def svg(drawn: Sequence[Markup], height: int, label: str, width: int = WIDTH) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, escape(label), Markup("").join(drawn)
    )


def shorten(name: str) -> str:
    return name if len(name) <= 20 else name[:19] + "…"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = max(high - low, 1e-9)
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, int(high / step + 1e-9) + 1)]


def direction(gain: tuple[float, float, float]) -> int:
    """1 or -1 if an interval (mean, low, high) is above or below zero, else 0.

    Also 0 without spread: equal differences on few images are common by chance.
    """
    _, low, high = gain
    return 0 if low == high else int(low > 0) - int(high < 0)


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
            y = self.y(tick)
            drawn.append(element("line", kind="grid", x1=_LEFT, x2=self.width - _RIGHT, y1=y, y2=y))
            drawn.append(text(_LEFT - 7, y + 4, f"{tick:g}", "end"))
        for tick in x_ticks:
            drawn.append(text(self.x(tick), self.height - _BOTTOM + 17, f"{tick:,.10g}", "middle"))
        middle = (_LEFT + self.width - _RIGHT) / 2
        drawn.append(text(middle, self.height - 6, x_name, "middle"))
        if y_name:
            drawn.append(vertical_text(12, (self.height - _BOTTOM + _TOP) / 2, y_name))
        return drawn
