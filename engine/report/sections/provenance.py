"""Where the page comes from: every step with its key, versions, and the whole study."""

from __future__ import annotations

import json

from engine import __version__
from engine.core.spec import canonical
from engine.report.page import Section, render
from engine.report.results import StudyResults
from engine.report.sections.cost import Hours


def provenance(results: StudyResults) -> Section:
    """A row for each step that the page depends on."""
    steps = [
        {"step": step.label, "kind": step.kind, "key": step.key, "rows": manifest.rows,
         "started": manifest.provenance["started"], "seconds": manifest.provenance["seconds"],
         "device": manifest.provenance.get("device"), **Hours.of(manifest).columns}
        for step, manifest in results.steps
    ]  # fmt: skip
    html = render(
        "provenance.html", results=results, steps=steps, engine=__version__,
        provenance=results.inputs["evaluate"].provenance,
        study=json.dumps(canonical(results.study), indent=2),
    )  # fmt: skip
    return Section(html, {"steps": steps}, timed=("steps",))
