"""Report: one self-contained HTML page from the results of the other steps."""

from __future__ import annotations

from typing import ClassVar

from engine.context import Context, Output
from engine.core.spec import Spec
from engine.report.results import ReportSpec, StudyResults
from engine.report.study_page import PREDICTIONS, study_page
from engine.report.table import as_text
from engine.results.comparison import ReportResult
from engine.steps import StepKind


class Report(StepKind):
    version: ClassVar[int] = 10
    Spec: ClassVar[type[Spec]] = ReportSpec
    summary: ClassVar[str] = "write the page"

    def run(self, context: Context) -> Output:
        results = StudyResults.load(context)
        page = study_page(results)
        data = page.html.encode()
        parts = [context.file("report", "html", data, timed=True, file="report.html")]
        for name, encoded in page.tables.items():
            stem, _, suffix = name.partition(".")
            timed = name in page.timed
            parts.append(context.file(stem, suffix, encoded, timed=timed, file=name))
        # The table of evaluate, under a readable name.
        (predictions,) = (part for part in context.inputs["evaluate"].parts
                          if part.tags.get("table") == "predictions")  # fmt: skip
        parts.append(predictions.model_copy(update={"tags": {"file": PREDICTIONS}}))
        return Output(
            parts, len(results.table),
            ReportResult(
                headline=f"a page and {len(page.tables) + 1} tables",
                table=as_text(results.table, results.search.objective),
                verdict=results.evaluate.verdict,
            ),
        )  # fmt: skip
