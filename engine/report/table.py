"""The comparison table, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.report.page import interval
from engine.results.comparison import (
    ArmResult,
    ConfirmResult,
    Contrast,
    EvaluateResult,
    SearchResult,
)

STARS = (0.05, 0.01, 0.001)


@dataclass(frozen=True)
class ArmRow:
    """One arm. `test` and the later fields are None if test stayed closed for the arm."""

    arm: str
    added: int
    val: float
    val_sd: float
    test: float | None = None
    low: float | None = None
    high: float | None = None
    accuracy: float | None = None
    # The difference from the baseline with its interval: the hull of both methods for a declared
    # contrast. Only declared contrasts have stars.
    against: float | None = None
    against_low: float | None = None
    against_high: float | None = None
    stars: str = ""
    mark: str = ""


def comparison(
    added: Mapping[str, int],
    search: SearchResult,
    confirm: ConfirmResult,
    evaluate: EvaluateResult,
) -> list[ArmRow]:
    """A row for each arm, in the order of the study.

    added: generated images in each arm, whose real images may be fewer than all.
    """
    objective, opened, baseline = search.objective, evaluate.arms, evaluate.baseline
    contrasts = {contrast.arm: contrast for contrast in evaluate.contrasts if not contrast.twin}
    rows = []
    # The means of the choice; twins have only those of the confirmation.
    for arm, val in {**confirm.arms, **search.arms}.items():
        row = ArmRow(arm, added[arm], val.mean, val.sd)
        if arm in opened:
            figure, rival = (opened[name].figures[objective] for name in (arm, baseline))
            low, high, marks = None, None, ""
            if arm in contrasts:
                low, high = contrasts[arm].interval_to(baseline)
                # The row shows the difference from the best baseline on val.
                if contrasts[arm].word == "helps" or contrasts[arm].against == baseline:
                    marks = stars(contrasts[arm])
            elif (difference := evaluate.to_baseline.get(arm)) is not None:
                low, high = difference.low, difference.high
            row = ArmRow(
                row.arm, row.added, row.val, row.val_sd, figure.mean, figure.low, figure.high,
                opened[arm].figures["accuracy"].mean,
                figure.mean - rival.mean, low, high, marks,
                _mark(arm, opened[arm], search, confirm),
            )  # fmt: skip
        rows.append(row)
    return rows


def stars(contrast: Contrast) -> str:
    """*, ** and *** for an adjusted p below 0.05, 0.01 and 0.001. No stars without a verdict, and
    with a single generator fit."""
    one_generator = contrast.generator_fits == 1 or contrast.drawn
    if contrast.word not in ("helps", "harms") or one_generator:
        return ""
    return "*" * sum(contrast.p_adjusted < level for level in STARS)


def _mark(arm: str, tested: ArmResult, search: SearchResult, confirm: ConfirmResult) -> str:
    if arm == search.baseline:
        return "baseline"
    if tested.role == "compared":
        return "compared"
    if arm in confirm.twins:
        return "without filters"
    if arm in confirm.doubles:
        return "twice the steps"
    if tested.role == "shown" and tested.ratio is None:
        return "no real images"
    if tested.ratio and tested.role == "baseline":
        return "chosen on val" if arm in search.chosen else "same class shares"
    return ""


def as_text(rows: Sequence[ArmRow], objective: str) -> str:
    """The table in plain text, a line for each arm."""
    lines = [
        ["arm", "added", f"val {objective}", f"test {objective}", "95% interval", "accuracy",
         "points", ""]
    ]  # fmt: skip
    for row in rows:
        test = ["", "", "", ""]
        if row.test is not None and row.low is not None and row.high is not None:
            test = [
                f"{row.test:.3f}", interval(row.low, row.high), f"{row.accuracy:.3f}",
                f"{100 * (row.against or 0):+.1f}",
            ]  # fmt: skip
        lines.append([row.arm, f"{row.added:,}", f"{row.val:.3f}", *test, row.mark])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text_lines = []
    for line in lines:
        cells = [
            cell.ljust(width) if column in (0, 7) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text_lines.append("  ".join(cells).rstrip())
    return "\n".join([text_lines[0], "-" * len(text_lines[0]), *text_lines[1:]])
