"""The page of a study: its sections in one HTML file, and the tables behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.report.download import CSV, as_csv, data_url, page_file
from engine.report.page import render, with_contents
from engine.report.results import StudyResults
from engine.report.sections import SECTIONS

PREDICTIONS = "predictions.parquet"
# Placeholder for the links to the tables in a template.
_TABLES = "<!-- tables -->"
_LINKED = 150_000  # largest table, in bytes, that is embedded in the page


@dataclass(frozen=True)
class StudyPage:
    """The page, and its tables as CSV by the name of the file. timed: tables with times of the
    run."""

    html: str
    tables: dict[str, bytes]
    timed: set[str]


def study_page(results: StudyResults) -> StudyPage:
    sections = [section(results) for section in SECTIONS]
    tables = {
        f"{name}.csv": as_csv(entries)
        for section in sections
        for name, entries in section.tables.items()
        if entries
    }
    html = render("report.html", results=results, sections=sections)
    links = render("downloads.html", study=results.study.name, links=links_to(tables))
    return StudyPage(
        with_contents(html.replace(_TABLES, links, 1)), tables,
        {f"{name}.csv" for section in sections for name in section.timed},
    )  # fmt: skip


def links_to(tables: Mapping[str, bytes]) -> list[tuple[str, str]]:
    """Names and URLs of tables: small ones as data URLs, large ones and predictions as files."""
    urls = [
        (name, data_url(data, CSV) if len(data) <= _LINKED else page_file(name))
        for name, data in tables.items()
    ]
    return [*urls, (PREDICTIONS, page_file(PREDICTIONS))]
