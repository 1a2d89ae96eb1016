"""All arms, the declared comparisons, and every figure on test."""

from __future__ import annotations

from engine.report.download import Row
from engine.report.page import Section, render
from engine.report.results import FIGURES, StudyResults
from engine.report.table import STARS, stars


def arms(results: StudyResults) -> Section:
    """A row for each arm, in the order of the study."""
    evaluate = results.evaluate
    budgets = {**({"real": evaluate.budget} if evaluate.budget else {}), **evaluate.budget_of}
    return Section(
        render("arms.html", results=results, table=results.table, levels=STARS),
        {
            "arms": arm_rows(results),
            # The effect of twice the steps, on test.
            "budget": [
                {"arm": f"{arm} double" if arm != "real" else "real_double", "against": arm,
                 "difference": gain.estimate, "low": gain.low, "high": gain.high}
                for arm, gain in budgets.items()
            ],
            "reduced": [
                {"class": name, **dict(reduced)} for name, reduced in results.reduced.items()
            ],
        },
    )  # fmt: skip


def comparisons(results: StudyResults) -> Section:
    """A row for each comparison of an arm with a baseline, or with its unfiltered twin."""
    contrasts = [(contrast, stars(contrast)) for contrast in results.evaluate.contrasts]
    html = render("comparisons.html", results=results, contrasts=contrasts)
    return Section(html, {"contrasts": contrast_rows(results)})


def figures(results: StudyResults) -> Section:
    """Every figure of each tested arm; `arms.csv` has them too."""
    tested = results.evaluate.arms.values()
    metrics = [name for name in FIGURES if any(name in arm.figures for arm in tested)]
    return Section(render("figures.html", results=results, metrics=metrics, names=FIGURES))


def arm_rows(results: StudyResults) -> list[Row]:
    """A row for each arm; figures of test where it was opened."""
    entries = []
    for row in results.table:
        tested = results.evaluate.arms.get(row.arm)
        entry: Row = {
            "arm": row.arm, "role": row.mark, "images_added": row.added, "val_mean": row.val,
            "val_sd": row.val_sd, "difference_to_baseline": row.against,
            "difference_low": row.against_low, "difference_high": row.against_high,
            "stars": row.stars, "test_opened": tested is not None,
        }  # fmt: skip
        for name in FIGURES:
            figure = tested.figures.get(name) if tested else None
            entry |= {
                f"test_{name}{end}": getattr(figure, field, None)
                for end, field in (("", "mean"), ("_low", "low"), ("_high", "high"))
            }
        entries.append(entry)
    return entries


def contrast_rows(results: StudyResults) -> list[Row]:
    """A row for each comparison of an arm with a baseline or its twin. The verdict and the adjusted
    p-values are the arm's, over all its baselines; further statistics stand with the comparison
    that the verdict rests on."""
    entries: list[Row] = []
    for contrast in results.evaluate.contrasts:
        for pair in contrast.baselines:
            entry: Row = {
                "arm": contrast.arm, "against": pair.against,
                "objective": results.evaluate.objective, "verdict": contrast.word,
                "decides": pair.against == contrast.against,
                "difference": pair.effect.estimate, "t_low": pair.effect.low,
                "t_high": pair.effect.high, "t_p": pair.effect.p,
                "bootstrap_low": pair.bootstrap.low, "bootstrap_high": pair.bootstrap.high,
                "bootstrap_p": pair.bootstrap.p, "low": pair.low, "high": pair.high,
                "p_better": pair.p, "p_helps_holm": contrast.p_helps,
                "p_harms_holm": contrast.p_harms, "equivalence_p_holm": contrast.equivalence_p,
                "margin": contrast.margin, "replicates": contrast.replicates,
                "test_groups": contrast.groups,
            }  # fmt: skip
            decides = pair.against == contrast.against
            more: Row = {
                "effect_size": contrast.effect_size, "wilcoxon_p": contrast.wilcoxon_p,
                "detectable": contrast.detectable, "mcnemar_p_least": min(contrast.mcnemar),
                "mcnemar_p_most": max(contrast.mcnemar),
                **{f"difference_{number}": difference
                   for number, difference in enumerate(contrast.differences)},
            }  # fmt: skip
            entries.append(entry | (more if decides else dict.fromkeys(more)))
    return entries
