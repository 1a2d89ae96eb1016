"""HTML pages from the templates of this package: escaped by default, self-contained, no network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from engine.report.download import Row
from engine.wording import (
    detectable_in_words,
    failed_in_words,
    notice_in_words,
    opened_in_words,
    range_in_words,
    what_would_settle,
    which_baseline,
    word_in_words,
)

if TYPE_CHECKING:
    from jinja2 import Environment

NO_SPREAD = "no spread"
# The lowest and highest value of a metric, where that is not 0 to 1; intervals end there.
RANGES = {"brier": (0.0, 2.0)}
# Placeholder for the table of contents in a template.
CONTENTS = "<!-- contents -->"
_HEADING = re.compile("<h2>(.*?)</h2>", re.DOTALL)
# What is said in addition to a heading stays out of its link.
_ASIDE = re.compile("<span.*?</span>|<[^>]*>", re.DOTALL)


@dataclass(frozen=True)
class Section:
    """A section of a page, with the tables behind it. timed: tables with times of the run."""

    html: str = ""
    tables: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    timed: tuple[str, ...] = ()


def duration(hours: float) -> str:
    """A duration in words: seconds below two minutes, minutes below two hours."""
    if hours < 1 / 30:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.1f} h"


def hours(number: float | None) -> str:
    """A number of hours with two digits if small; empty if unknown."""
    if number is None:
        return ""
    return f"{number:,.1f}" if number >= 10 else f"{number:.2g}"


def points(difference: float, digits: int = 1) -> str:
    """A difference of shares in points, with its sign; zero has no sign."""
    text = f"{100 * difference:+.{digits}f}"
    return text if float(text) else text[1:]


def in_points(share: float) -> str:
    """A share in points, without a sign."""
    number = f"{100 * share:g}"
    return f"{number} {'point' if number == '1' else 'points'}"


def interval(low: float, high: float, digits: int = 3) -> str:
    """An interval in words; equal replicates have none."""
    return NO_SPREAD if alike(low, high) else f"{low:.{digits}f} to {high:.{digits}f}"


def figure_interval(low: float, high: float, metric: str) -> str:
    """The interval of a figure in words, cut at the ends of the metric's range."""
    least, most = RANGES.get(metric, (0.0, 1.0))
    return interval(max(low, least), min(high, most))


def points_interval(low: float, high: float, digits: int = 1) -> str:
    """An interval of a difference of shares, in points."""
    return NO_SPREAD if alike(low, high) else f"{points(low, digits)} to {points(high, digits)}"


def p_value(p: float, equals: str = "") -> str:
    """A p-value; "< 0.001" for very small ones. equals: text before the number in a sentence."""
    return "< 0.001" if p < 0.001 else f"{equals}{p:.3f}"


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def capital(text: str) -> str:
    """A text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def alike(low: float, high: float) -> bool:
    """Whether the ends of an interval are equal."""
    return abs(high - low) < 1e-12


def with_contents(page: str) -> str:
    """The page with an id for each `<h2>`, and links to them in place of `CONTENTS`."""
    # By title: of several sections with one title, the first.
    links: dict[str, str] = {}
    count = 0

    def numbered(heading: re.Match[str]) -> str:
        nonlocal count
        count += 1
        title = _ASIDE.sub("", heading[1]).strip()
        links.setdefault(title, f'<a href="#section-{count}">{title}</a>')
        return f'<h2 id="section-{count}">{heading[1]}</h2>'

    page = _HEADING.sub(numbered, page)
    return page.replace(CONTENTS, f'<nav class="note">{" · ".join(links.values())}</nav>', 1)


def render(template: str, **values: Any) -> str:
    """Render a template of `engine/report/templates` with autoescaping."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("engine.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "duration": duration, "hours": hours, "points": points, "in_points": in_points,
        "interval": interval, "figure_interval": figure_interval,
        "points_interval": points_interval, "p_value": p_value,
        "listed": listed, "capital": capital, "number": "{:,}".format,
        "in_words": notice_in_words, "what_would_settle": what_would_settle,
        "word_in_words": word_in_words, "which_baseline": which_baseline,
        "opened_in_words": opened_in_words, "detectable_in_words": detectable_in_words,
        "range_in_words": range_in_words, "failed_in_words": failed_in_words,
    }  # fmt: skip
    return environment
