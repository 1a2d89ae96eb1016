"""How many images each class was to get, and why."""

from __future__ import annotations

from engine.report.page import Section, render
from engine.report.results import StudyResults
from engine.results.images import AllocateResult

# Classes on the page; the table has all.
_SHOWN = 40


def allocation(results: StudyResults) -> Section:
    """The table of the allocation; nothing if the study allocates no images."""
    settings = results.study.request.allocate
    manifests = [done for step, done in results.steps if step.kind == AllocateResult.kind]
    if settings is None or not manifests:
        return Section()
    classes = AllocateResult.of(manifests[0]).classes
    entries = sorted(classes.items(), key=lambda entry: -entry[1].images)
    html = render(
        "allocation.html", results=results, settings=settings, entries=entries[:_SHOWN],
        classes=len(entries),
    )  # fmt: skip
    return Section(html, {"allocation": [{"class": name, **dict(entry)}
                                         for name, entry in entries]})  # fmt: skip
