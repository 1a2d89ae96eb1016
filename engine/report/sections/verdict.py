"""The top of the page: the verdict on each comparison, and what a reader must be warned of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from engine.core.notice import Notice
from engine.core.registry import kind_of
from engine.report.generators import GeneratorFit, Probe
from engine.report.page import Section, render
from engine.report.results import StudyResults
from engine.report.sections.classes import class_changes
from engine.report.sections.tasks import losses
from engine.study import Study

_EASILY_TOLD = 0.9  # area under the ROC curve
_CLEARLY_LESS = 0.15  # of images whose class is seen


def verdict(results: StudyResults) -> Section:
    """The headline, and a box for each comparison."""
    return Section(
        render("verdict.html", results=results, changes=class_changes(results),
               lost=partial(losses, results.evaluate.tasks))
    )  # fmt: skip


def warnings(results: StudyResults) -> Section:
    """What limits the result: the budget, the images, earlier openings of test."""
    images = [image_warnings(results.probes[name], fits, results.classes)
              for name, fits in results.generators.items()]  # fmt: skip
    return Section(
        render("warnings.html", results=results, images=images, weak=weak_baselines(results.study))
    )


def weak_baselines(study: Study) -> list[str]:
    """What the baselines of a study lack: synthetic images may only stand in for it."""
    lacking = []
    if not study.training.pixel_settings() and not study.training.mixup_alpha:
        lacking.append("online augmentation (training.crop_padding and others)")
    kinds = (kind_of("generators", spec) for spec in study.generators.values())
    if all(kind.synthetic for kind in kinds):
        lacking.append("an arm with moved copies of real images (the generator traditional)")
    return lacking


@dataclass(frozen=True)
class ImageWarnings:
    """Warnings about a generator's images, by fit.

    apart: areas under the ROC curve of the classes that are easily distinguished from real images,
    if most are.
    misread: percent of kept images in which the labeler sees the requested class, if clearly less
    than `agreement_val`, that of real ones. notes: fit, notice, and whether
    the text is the reason that forbids the export.
    """

    generator: str
    fits: int
    apart: dict[int, list[float]]
    misread: dict[int, float]
    agreement_val: float
    notes: list[tuple[int, Notice, bool]]


def image_warnings(
    probe: Probe, fits: Sequence[GeneratorFit], classes: Sequence[str]
) -> ImageWarnings:
    """The warnings about a generator's images, on which the verdict rests."""
    apart, misread, agreement_val = {}, {}, 0.0
    for fit in fits:
        areas = [entry.areas[fit.fit] for entry in probe.classes if fit.fit in entry.areas]
        if areas and float(np.median(areas)) >= _EASILY_TOLD:
            apart[fit.fit] = [area for area in areas if area >= _EASILY_TOLD]
        labeler = fit.curated.labeler
        if labeler is None or labeler.agreement_kept is None:
            continue
        funnel = fit.curated.funnel
        kept = [funnel[name].kept if name in funnel else 0 for name in classes]
        reference = labeler.accuracy_on_val(kept)
        if labeler.agreement_kept < reference - _CLEARLY_LESS:
            misread[fit.fit], agreement_val = 100 * labeler.agreement_kept, 100 * reference
    notes = [
        (fit.fit, notice, notice in stops)
        for fit in fits
        for stops in [[report.stops for report in fit.curated.filters if report.stops]]
        for notice in [*stops, *fit.curated.warnings]
    ]
    return ImageWarnings(fits[0].name, len(fits), apart, misread, agreement_val, notes)
