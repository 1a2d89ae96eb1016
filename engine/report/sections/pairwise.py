"""Every pair of tested arms, and a model that was not trained: descriptions outside the verdict."""

from __future__ import annotations

from engine.report.page import Section, render
from engine.report.results import FIGURES, StudyResults


def pairwise(results: StudyResults) -> Section:
    """McNemar's test over all tested arms, as a matrix; nothing for results of earlier versions."""
    pairs = results.evaluate.pairs
    arms = list(dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second)))
    cells = {(pair.first, pair.second): (pair.first_only - pair.second_only, pair)
             for pair in pairs}  # fmt: skip
    cells |= {(second, first): (-more, pair) for (first, second), (more, pair) in cells.items()}
    html = render("pairwise.html", results=results, arms=arms, cells=cells) if pairs else ""
    return Section(html, {"pairs": [dict(pair) for pair in pairs]})


def zero_shot(results: StudyResults) -> Section:
    """The figures of the model that classifies without training; nothing if there is none."""
    result = results.evaluate.zero_shot
    if result is None:
        return Section()
    sets = {"all tasks" if result.tasks else "": result.figures, **result.tasks}
    metrics = [name for name in FIGURES if any(name in figures for figures in sets.values())]
    html = render(
        "zero_shot.html", results=results, model=result.model, sets=sets, metrics=metrics,
        names=FIGURES,
    )  # fmt: skip
    return Section(html, {"zero_shot": [{"task": name, **figures}
                                        for name, figures in sets.items()]})  # fmt: skip
