"""The sections of a study's page, in order. Each is a function of the results, in a module with the
plots and the tables of the section; its text is in the template of its name."""

from __future__ import annotations

from collections.abc import Callable

from engine.report.page import CONTENTS, Section
from engine.report.results import StudyResults
from engine.report.sections.allocation import allocation
from engine.report.sections.arms import arms, comparisons, figures
from engine.report.sections.calibration import calibration
from engine.report.sections.classes import classes
from engine.report.sections.confusion import confusion
from engine.report.sections.cost import cost, models
from engine.report.sections.curation import curation
from engine.report.sections.embedding import embedding
from engine.report.sections.fidelity import fidelity
from engine.report.sections.images import first_images, images
from engine.report.sections.methods import methods, not_known
from engine.report.sections.pairwise import pairwise, zero_shot
from engine.report.sections.provenance import provenance
from engine.report.sections.ratio_curve import ratio_curve
from engine.report.sections.subgroups import subgroups
from engine.report.sections.tasks import tasks
from engine.report.sections.training import training
from engine.report.sections.verdict import verdict, warnings


def contents(results: StudyResults) -> Section:
    """The place of the table of contents."""
    return Section(CONTENTS)


SECTIONS: tuple[Callable[[StudyResults], Section], ...] = (
    verdict,
    first_images,
    contents,
    warnings,
    arms,
    comparisons,
    pairwise,
    figures,
    zero_shot,
    tasks,
    ratio_curve,
    classes,
    subgroups,
    calibration,
    confusion,
    training,
    images,
    curation,
    fidelity,
    embedding,
    allocation,
    models,
    cost,
    methods,
    not_known,
    provenance,
)
# Raised by hand when the page changes, so that finished studies get the new one.
PAGE_VERSION = 14
