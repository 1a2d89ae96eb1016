"""F1 of common and rare classes, and how sure the classifiers are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from engine.report.page import Section, render
from engine.report.plots import Frame, Point, element, path, svg, ticks
from engine.report.results import StudyResults
from engine.results.comparison import ArmResult

_WIDTH, _HEIGHT = 480, 400


def calibration(results: StudyResults) -> Section:
    """Plots of the main arms on test: F1 of classes, and the reliability of each task; without
    probabilities the latter is missing."""
    arms = results.evaluate.arms
    tasks = {name: task.arms for name, task in results.evaluate.tasks.items()} or {"": arms}
    points = []
    for arm, colour in results.legend:
        images = results.tested(arm)[-1].images
        of_arm = [
            ClassPoint(name, images.get(name, 0), Point(0.0, f1.mean, f1.low, f1.high))
            for name, scores in arms[arm].per_class.items()
            for f1 in [scores.f1_interval]
        ]
        points.append((arm, colour, of_arm))
    bins = {name: bins_of(results, of_task) for name, of_task in tasks.items()}
    html = render(
        "calibration.html", results=results, frequency=frequency(points, "F1 on test"),
        reliability={name: reliability(of_task) for name, of_task in bins.items() if of_task},
    )  # fmt: skip
    rows = [{**({"task": name} if name else {}), "arm": arm, **dict(entry)}
            for name, of_task in tasks.items()
            for arm, tested in of_task.items()
            for entry in tested.reliability]  # fmt: skip
    return Section(html, {"reliability": rows})


def bins_of(
    results: StudyResults, arms: Mapping[str, ArmResult]
) -> list[tuple[str, str, list[tuple[float, float, float]]]]:
    """The bins of the main arms, as `reliability` takes them."""
    bins = []
    for arm, colour in results.legend:
        total = sum(entry.images for entry in arms[arm].reliability)
        if total:
            shares = [(entry.confidence, entry.accuracy, entry.images / total)
                      for entry in arms[arm].reliability]  # fmt: skip
            bins.append((arm, colour, shares))
    return bins


def reliability(arms: Sequence[tuple[str, str, Sequence[tuple[float, float, float]]]]) -> Markup:
    """Accuracy against confidence (Niculescu-Mizil and Caruana 2005); a disc's area is the share of
    images in its bin. arms: name, colour, and (confidence, accuracy, share of images) of each bin.
    """
    frame = Frame(_WIDTH, _HEIGHT, 0.0, 1.0, 0.0, 1.0)
    drawn = frame.axes("confidence", "share correct", ticks(0.0, 1.0))
    drawn.append(
        element("line", kind="zero", x1=frame.x(0), x2=frame.x(1), y1=frame.y(0), y2=frame.y(1))
    )
    for name, colour, bins in arms:
        places = path((frame.x(x), frame.y(y)) for x, y, _ in bins)
        drawn.append(element("polyline", kind=f"line {colour}", points=places))
        for x, y, share in bins:
            title = f"{name}: confidence {x:.2f}, accuracy {y:.2f}, {100 * share:.1f}% of images"
            drawn.append(
                element("circle", title, kind=f"dot {colour}", cx=frame.x(x), cy=frame.y(y),
                        r=2.5 + 8 * share**0.5)
            )  # fmt: skip
    return svg(drawn, _HEIGHT, "reliability diagram", _WIDTH)


@dataclass(frozen=True)
class ClassPoint:
    """A class: its training images in an arm, and a figure with its interval."""

    name: str
    images: int
    value: Point


def frequency(arms: Sequence[tuple[str, str, Sequence[ClassPoint]]], y_name: str) -> Markup:
    """A figure of each class against its training images, one colour for each arm.

    Lines connect the points of a class, because both coordinates depend on the arm.
    """
    every = [point for _, _, of_arm in arms for point in of_arm]
    most, least = max(p.images for p in every), max(1, min(p.images for p in every))
    low = max(0.0, min(point.value.y for point in every) - 0.05)
    frame = Frame(_WIDTH, _HEIGHT, least / 1.15, most * 1.15, math.floor(10 * low) / 10, 1.0, True)
    count = len(arms[0][2])

    def x(number: int, point: ClassPoint) -> float:
        # Classes of equal size are drawn side by side.
        return frame.x(point.images) + 12 * (number / max(1, count - 1) - 0.5)

    drawn = frame.axes("training images of the class", y_name, _decades(least, most))
    for number in range(count):
        joined = path((x(number, of_arm[number]), frame.y(of_arm[number].value.y))
                      for _, _, of_arm in arms)  # fmt: skip
        drawn.append(element("polyline", kind="join", points=joined))
    for arm, colour, of_arm in arms:
        for number, point in enumerate(of_arm):
            at, value = x(number, point), point.value
            title = (
                f"{point.name}, {arm}: {point.images:,} images, {value.y:.3f} ({value.low:.3f} to"
                f" {value.high:.3f})"
            )
            drawn.append(
                element("line", kind=f"whisker {colour}", x1=at, x2=at, y1=frame.y(value.low),
                        y2=frame.y(value.high))
            )  # fmt: skip
            drawn.append(
                element("circle", title, kind=f"dot {colour}", cx=at, cy=frame.y(value.y), r="4.5")
            )
    return svg(drawn, _HEIGHT, f"{y_name} of each class against its training images", _WIDTH)


def _decades(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis, about six at most."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        marks = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(marks) <= 6:
            break
    return marks or [low]
