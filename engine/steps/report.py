"""Report: one self-contained HTML page from the results of the other steps."""

from __future__ import annotations

from engine.context import Context, Output
from engine.report.results import ReportSpec, StudyResults
from engine.report.sections import PAGE_VERSION
from engine.report.study_page import PREDICTIONS, study_page
from engine.report.table import as_text
from engine.results.comparison import ReportResult
from engine.steps import StepKind
from engine.wording import verdict_in_words


class Report(StepKind[ReportSpec]):
    version = PAGE_VERSION
    summary = "write the page"

    def run(self, context: Context) -> Output:
        results = StudyResults.load(context)
        page, evaluate = study_page(results), results.evaluate
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
                verdict=verdict_in_words(
                    evaluate.contrasts, evaluate.objective, evaluate.baseline, evaluate.budget
                ),
            ),
        )  # fmt: skip
