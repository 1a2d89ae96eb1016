"""From requested to kept images: the funnel, the filters, and what the labeler sees."""

from __future__ import annotations

from collections.abc import Mapping

from engine.core.registry import kind_of
from engine.report.download import Row
from engine.report.generators import GeneratorFit
from engine.report.page import Section, render
from engine.report.results import StudyResults
from engine.report.sections.confusion import MOST_CLASSES, cells, most_confused
from engine.report.sections.fidelity import FigureCell, cell, near_of


def curation(results: StudyResults) -> Section:
    """For each generator, its fits, the funnel and filters of the first, and the labeler's view."""
    generators = results.generators
    reasons = {report.name: str(kind_of("filters", report).drop_reason)
               for fits in generators.values() for report in fits[0].curated.filters}  # fmt: skip
    few = len(results.classes) <= MOST_CLASSES
    seen = {name: fits[0].curated.labeler.confusion for name, fits in generators.items()
            if fits[0].curated.labeler is not None}  # fmt: skip
    html = render(
        "curation.html", results=results, reasons=reasons,
        near={name: [near_train(fit) for fit in fits] for name, fits in generators.items()},
        cells={name: cells(counts, results.classes) if few else []
               for name, counts in seen.items()},
        pairs={name: [] if few else most_confused(counts, results.classes)
               for name, counts in seen.items()},
    )  # fmt: skip
    every = [fit for fits in generators.values() for fit in fits]
    return Section(
        html,
        {
            "funnel": [
                {
                    **fit.columns, "class": label,
                    "needed": results.needed[fit.name].get(label, 0),
                    "requested": entry.requested, "generated": entry.generated,
                    "kept": entry.kept, "unusable": entry.requested - entry.generated,
                    **{f"dropped_by_{why}": count for why, count in entry.reasons.items()},
                }
                for fit in every
                for label, entry in fit.curated.funnel.items()
            ],
            "filters": [
                {**fit.columns, "filter": report.name, "place": place, "dropped": report.dropped}
                for fit in every
                for place, report in enumerate(fit.curated.filters, 1)
            ],
            "limits": [row for fit in every for row in limit_rows(fit)],
            "seen": [row for fit in every for row in seen_rows(fit, results.classes)],
        },
    )  # fmt: skip


def near_train(fit: GeneratorFit) -> FigureCell:
    """The share of kept images near to train, in percent."""
    return cell("near", [near_of(fit.measured.scopes) if fit.measured else None])


def limit_rows(fit: GeneratorFit) -> list[Row]:
    """A row for each filter and limit, and class if the limit differs by class. No value means no
    limit."""
    return [
        {**fit.columns, "filter": report.name, "limit": name, "class": label, "value": value}
        for report in fit.curated.filters
        for name, limit in report.limits.items()
        for label, value in (limit.items() if isinstance(limit, Mapping) else [(None, limit)])
    ]


def seen_rows(fit: GeneratorFit, classes: tuple[str, ...]) -> list[Row]:
    """A row for each requested class and class seen by the labeler. Empty cells are left out."""
    if fit.curated.labeler is None:
        return []
    return [
        {**fit.columns, "asked_for": seen.true, "seen": seen.predicted, "images": seen.count,
         "share_of_asked": seen.share}
        for row in cells(fit.curated.labeler.confusion, classes)
        for seen in row
        if seen.count
    ]  # fmt: skip
