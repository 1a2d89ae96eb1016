"""HTML pages from the templates of this package: escaped by default, self-contained, no network."""

from __future__ import annotations

from typing import Any


def duration(hours: float) -> str:
    """A time for people: seconds below two minutes, minutes below two hours."""
    if hours < 1 / 30:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.1f} h"


def hours(number: float | None) -> str:
    """A number of hours, small ones too; what is not known is nothing."""
    if number is None:
        return ""
    return f"{number:,.1f}" if number >= 10 else f"{number:.2g}"


def points(difference: float, digits: int = 1) -> str:
    """A difference of shares in points, with its sign; nothing has none."""
    text = f"{100 * difference:+.{digits}f}"
    return text if float(text) else text[1:]


def render(template: str, **values: Any) -> str:
    """Render a template of `engine/report/templates` with autoescaping."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("engine.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"duration": duration, "hours": hours, "points": points}
    return environment.get_template(template).render(**values)
