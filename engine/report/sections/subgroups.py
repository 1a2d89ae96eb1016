"""The comparison within parts of the test set, and on test sets from elsewhere."""

from __future__ import annotations

from engine.comparison.subgroups import LEAST_IMAGES
from engine.metrics.significance import LEAST_GROUPS, LEAST_REPLICATES
from engine.report.download import Row
from engine.report.page import Section, render
from engine.report.results import StudyResults
from engine.results.comparison import Subgroup


def subgroups(results: StudyResults) -> Section:
    """A row for each part, or set, and compared arm; nothing if the study names none."""
    evaluate = results.evaluate
    tables = {"subgroups": evaluate.subgroups, "external": evaluate.external}
    losing = {name: [(part, arm) for part in parts
                     for arm in losing_arms(part, results.confirm_spec.replicates)]
              for name, parts in tables.items()}  # fmt: skip
    html = render(
        "subgroups.html", results=results, tables=tables, losing=losing, least=LEAST_IMAGES
    )
    return Section(
        html, {name: [row for part in parts for row in part_rows(part)]
               for name, parts in tables.items()}
    )  # fmt: skip


def losing_arms(part: Subgroup, replicates: int) -> list[str]:
    """The arms that are worse than real images here, beyond their interval; none with fewer
    replicates or test groups than a verdict needs."""
    if replicates < LEAST_REPLICATES or part.groups < LEAST_GROUPS:
        return []
    return [arm for arm, effect in part.to_real.items() if effect.high < 0]


def part_rows(part: Subgroup) -> list[Row]:
    """A row for each compared arm."""
    entries: list[Row] = []
    for arm, effect in part.to_baseline.items():
        score, real = part.scores[arm], part.to_real.get(arm)
        entries.append({
            "column": part.column, "value": part.value, "test_images": part.images, "arm": arm,
            "score": score.mean, "score_low": score.low, "score_high": score.high,
            "to_baseline": effect.estimate, "to_baseline_low": effect.low,
            "to_baseline_high": effect.high,
            "to_real": real.estimate if real else None,
            "to_real_low": real.low if real else None, "to_real_high": real.high if real else None,
        })  # fmt: skip
    return entries
