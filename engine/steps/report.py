"""Report: one self-contained HTML page from the tables of the other steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from engine import __version__
from engine.comparison.arms import Arm, MixSpec, SearchSpec, replicates
from engine.context import Context, Output
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.spec import Spec
from engine.core.step import Step
from engine.data.images import Preprocess
from engine.metrics.significance import LEAST_REPLICATES, paired_t
from engine.report import plots
from engine.report.download import beside, data_url
from engine.report.page import in_points, render, with_contents
from engine.report.sections.cost import cost, done_steps, weights
from engine.report.sections.curation import filter_rows, first_screen, labels_seen, sheets, words
from engine.report.sections.embedding import image_warnings, probes, scatter
from engine.report.sections.evidence import (
    FIGURES,
    MOST_CLASSES,
    added_to,
    colour_of,
    confusions,
    curves,
    enough,
    figures_table,
    forests,
    frequency,
    histories,
    legend_of,
    reduced,
    reliability,
    trained,
)
from engine.report.sections.fidelity import closest_of_fits, fidelity_tables, fit_rows, of_fits
from engine.report.sections.image_tables import image_tables
from engine.report.sections.methods import methods, not_known, synthetic_only
from engine.report.sections.tables import as_files, comparison_tables, record_tables
from engine.report.table import STARS, as_text, comparison, stars
from engine.results.comparison import (
    EvaluateResult,
    MixResult,
    ReportResult,
    SaturationPoint,
    SearchResult,
)
from engine.results.data import IngestResult
from engine.results.images import CurateResult
from engine.sections import Amount
from engine.steps import StepKind
from engine.steps.evaluate import EvaluateSpec
from engine.wording import verdict_in_words

_TILE = 52  # px
_LINKED = 150_000  # largest table, in bytes, that is embedded in the page
PREDICTIONS = "predictions.parquet"
# Tables with durations.
TIMED = ("trials.csv", "steps.csv", "cost.csv", "prices.csv")


class ReportSpec(Spec):
    # The study with all its defaults, for the page to show.
    study: dict[str, Any]
    preprocess: Preprocess
    task: str
    generators: tuple[str, ...]
    target_classes: tuple[str, ...] | str
    seed: int


class Report(StepKind):
    version: ClassVar[int] = 9
    Spec: ClassVar[type[Spec]] = ReportSpec
    summary: ClassVar[str] = "write the page"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(ReportSpec)
        search_spec = context.step.inputs["search"].spec_as(SearchSpec)
        margin = context.step.inputs["evaluate"].spec_as(EvaluateSpec).settings.margin
        ingest = context.result("ingest", IngestResult)
        search = context.result("search", SearchResult)
        evaluate = context.result("evaluate", EvaluateResult)
        provenance = context.inputs["evaluate"].provenance
        trials = pa.concat_tables(context.store.tables(context.inputs["search"].keys()))
        classes = ingest.classes
        # One colour for each family, on the whole page.
        compared = [arm.family for arm in search_spec.arms if arm.role == "compared"]
        families = dict.fromkeys([*spec.generators, *compared, *trials["family"].to_pylist()])
        colours = {name: number % 10 for number, name in enumerate(families)}
        curated = {name: context.result(f"curate.{name}", CurateResult) for name in spec.generators}
        # Small images are enlarged by a whole factor, so that their pixels stay visible.
        side = _TILE // spec.preprocess.size * spec.preprocess.size or _TILE
        every_fit = {
            name: [CurateResult.of(fit) for fit in of_fits(context, "curate", name)]
            for name in spec.generators
        }
        sheet = sheets(context, spec.generators, spec.task, side, compared)
        probed = probes(context, spec, classes)
        models = trained(context)
        table = comparison(added_to(models), search, evaluate)
        trainings = histories(context, models)
        steps = done_steps(context)
        planes = scatter(context, spec, classes)
        nearest = closest_of_fits(context, spec.generators, side)
        saved = weights(context, steps, models, evaluate, search_spec, spec.study["name"])
        hours = cost(steps, models, evaluate)
        wanted = needed(context)
        tables = as_files(
            comparison_tables(
                table, trials.to_pylist(), search_spec, evaluate, models, trainings, classes
            )
            | image_tables(context, wanted, probed, planes, nearest, reduced(context), classes)
            | record_tables(saved, hours, evaluate.objective, steps)
        )
        page = render(
            "report.html",
            name=spec.study["name"], preprocess=spec.preprocess, classes=classes,
            objective=FIGURES[search.objective], search=search, evaluate=evaluate, table=table,
            ingest=ingest, trials=trials.num_rows,
            replication=replication(search_spec), search_spec=search_spec,
            replicates=unit_of(search_spec), counted=counted(search_spec),
            saturations=saturation_in_words(
                evaluate.saturation, search_spec.arms,
                margin, replicate_count(search_spec),
            ),
            tried=spec.study.get("tune", {}).get("tried", 0),
            study_margin=margin,
            arm_notes=arm_notes(search_spec.arms), stars=STARS, starred=stars,
            figures=figures_table(evaluate), tables=links(tables, PREDICTIONS),
            curve=ratio_curve(
                trials, search, search_spec.generator_fits, colours,
                saturated(
                    evaluate.saturation, search_spec.arms, replicate_count(search_spec)
                ),
            ),
            recalls=recall_plots(evaluate, classes, colours), forests=forests(evaluate, classes),
            main=legend_of(evaluate, colours), reliability=reliability(evaluate, colours),
            frequency=frequency(evaluate, models, colours),
            curves=curves(evaluate, models, trainings, colours),
            most_classes=MOST_CLASSES, confusions=confusions(evaluate, models, classes),
            reduced=reduced(context),
            sheets=sheet, first_images=first_screen(sheet),
            closest=nearest, fits={name: fit_rows(context, name) for name in spec.generators},
            funnels=curated, reasons=words(curated), filters=filter_rows(curated),
            seen=labels_seen(curated, classes),
            scatter=planes, probes=probed,
            fidelity=fidelity_tables(context, spec.generators),
            warnings=image_warnings(probed, every_fit, spec),
            needed=wanted, seeds_used=[int(seed) for seed in search_spec.seeds],
            study_seed=spec.study["seed"], engine=__version__, python=provenance["python"],
            tile=side,
            small=spec.preprocess.size <= _TILE // 2,
            only_some=spec.target_classes != "all", targets=spec.target_classes,
            weights=saved,
            cost=hours,
            methods=methods(
                spec.study, ingest, search_spec, amounts_of(context.step.inputs["search"]),
                search, evaluate, provenance["versions"],
                __version__,
            ),
            not_known=not_known(spec.study, ingest, search_spec, search, evaluate),
            steps=[step_row(step, manifest) for step, manifest in steps],
            study=json.dumps(spec.study, indent=2), versions=provenance["versions"],
        )  # fmt: skip
        data = with_contents(page).encode()
        parts = [context.file("report", "html", data, timed=True, file="report.html")]
        for name, encoded in tables.items():
            stem, _, suffix = name.partition(".")
            parts.append(context.file(stem, suffix, encoded, timed=name in TIMED, file=name))
        # The table of evaluate, under a readable name.
        (predictions,) = (part for part in context.inputs["evaluate"].parts
                          if part.tags.get("table") == "predictions")  # fmt: skip
        parts.append(predictions.model_copy(update={"tags": {"file": PREDICTIONS}}))
        return Output(
            parts, len(table),
            ReportResult(
                headline=f"a page and {len(tables) + 1} tables",
                table=as_text(table, search.objective),
                verdict=verdict_in_words(
                    evaluate.contrasts, evaluate.objective, evaluate.baseline, evaluate.budget
                ),
            ),
        )  # fmt: skip


def links(tables: Mapping[str, bytes], *others: str) -> list[tuple[str, str]]:
    """Names and URLs of tables: small ones as data URLs, large ones and `others` as files."""
    urls = [
        (name, data_url(encoded) if len(encoded) <= _LINKED else beside(name))
        for name, encoded in tables.items()
    ]
    return urls + [(name, beside(name)) for name in others]


def step_row(step: Step, manifest: Manifest) -> dict[str, Any]:
    """A step of the study: its key, start and duration."""
    return {
        "label": step.label, "key": step.key, "rows": manifest.rows,
        "started": manifest.provenance["started"], "seconds": manifest.provenance["seconds"],
    }  # fmt: skip


def ratio_curve(
    trials: pa.Table, search: SearchResult, generator_fits: int, colours: Mapping[str, int],
    saturations: Sequence[plots.Saturation],
) -> dict[str, Any]:  # fmt: skip
    """The objective on val against the ratio, with t intervals over replicates."""
    # Arms with the role "shown" have no part in the choice.
    entries = [entry for entry in trials.to_pylist() if entry["role"] != "shown"
            or entry["family"] == "real_double"]  # fmt: skip
    families: dict[str, dict[float, list[float]]] = {}
    levels: dict[str, list[float]] = {}
    family_of = {entry[rows.ARM]: entry["family"] for entry in entries}
    for entry in entries:
        value = entry[search.objective]
        if entry[rows.RATIO]:
            families.setdefault(entry["family"], {}).setdefault(entry[rows.RATIO], []).append(value)
        else:
            levels.setdefault(entry[rows.ARM], []).append(value)
    real = levels.pop("real")
    lines = []
    for name, by_ratio in families.items():
        points = []
        for ratio, values in sorted(by_ratio.items()):
            points.append(_point(ratio, values, generator_fits))
        lines.append(plots.Line(name, points, colours[name]))
    drawn = [
        plots.Level(name, float(np.mean(values)), colours[family_of[name]])
        for name, values in levels.items()
    ]
    legend = [("real", "neutral", "line"), *((line.name, line.colour, "line") for line in lines)]
    legend += [(level.name, level.colour, "level") for level in drawn]
    if saturations:
        legend.append(("saturation with its 95% interval", "neutral", "saturation"))
    objective = f"val {FIGURES[search.objective]}"
    start = _point(0.0, real, generator_fits)
    below = [line.name for line in lines if all(point.y <= start.y for point in line.points)]
    svg = plots.ratio_curve(lines, drawn, start, objective, saturations) if lines else ""
    return {"svg": svg, "legend": legend, "below_real": below, "saturated": bool(saturations)}


def replication(search_spec: SearchSpec) -> str:
    """How often each arm was trained, with the number of seeds per generator fit."""
    fits = search_spec.generator_fits
    seeds = len(search_spec.seeds) // fits
    per_fit = f"{seeds} classifier seed{'s' if seeds > 1 else ''}"
    if fits == 1:
        return f"the same {per_fit}"
    return f"{fits} fits of each generator and {per_fit} for each fit (the same in all arms)"


def unit_of(search_spec: SearchSpec) -> str:
    """The kind of replicate."""
    return "generator fits" if search_spec.generator_fits > 1 else "seeds"


def counted(search_spec: SearchSpec) -> str:
    """The number and kind of replicates."""
    return f"{replicate_count(search_spec)} {unit_of(search_spec)}"


def replicate_count(search_spec: SearchSpec) -> int:
    fits = search_spec.generator_fits
    return fits if fits > 1 else len(search_spec.seeds)


def saturated(
    points: Mapping[str, SaturationPoint], arms: Sequence[Arm], replicates: int
) -> list[plots.Saturation]:
    """For each family, the ratio beyond which more images add nothing.

    A family is left out if the ratio or its interval reaches the largest ratio tried. With too few
    replicates the list is empty.
    """
    if replicates < LEAST_REPLICATES:
        return []
    return [
        plots.Saturation(family, point.ratio, point.low, point.high)
        for family, point in points.items()
        if max(point.ratio, point.high) < largest_ratio(family, arms)
    ]


def largest_ratio(family: str, arms: Sequence[Arm]) -> float:
    """The largest ratio tried."""
    return max(arm.ratio or 0.0 for arm in arms
               if arm.family == family and arm.role != "shown")  # fmt: skip


def saturation_in_words(
    points: Mapping[str, SaturationPoint], arms: Sequence[Arm], margin: float,
    replicates: int,
) -> list[str]:  # fmt: skip
    """For each family, its saturation in words."""
    if points and replicates < LEAST_REPLICATES:
        return [
            f"Saturation is not reported: too few replicates ({replicates}, minimum"
            f" {LEAST_REPLICATES})."
        ]
    seen = {saturation.name for saturation in saturated(points, arms, replicates)}
    within = in_points(margin)
    sentences = []
    for family, point in points.items():
        bracket = f"95% interval over replicates: {point.low:g} to {point.high:g}"
        name = family.replace("_", " ")
        if family in seen and not point.ratio:
            sentences.append(
                f"{name}: no ratio adds more than {within} to real images alone, so saturation"
                f" is at 0 ({bracket})."
            )
        elif family in seen:
            sentences.append(
                f"{name}: beyond a ratio of {point.ratio:g} ({bracket}), more images add at most"
                f" {within}."
            )
        else:
            sentences.append(
                f"{name}: no saturation was seen up to x{largest_ratio(family, arms):g} (the"
                f" smallest ratio within {within} of the best is {point.ratio:g}; {bracket})."
            )
    return sentences


def _point(ratio: float, values: Sequence[float], generator_fits: int) -> plots.Point:
    interval = paired_t(replicates(np.asarray(values), generator_fits).tolist())
    return plots.Point(ratio, interval.estimate, interval.low, interval.high)


_ARM_NOTES = {
    "oversampled": "“oversampled” draws every class equally often.",
    "class_weighted": "“class weighted” weights the loss of an image by the rarity of its class.",
    "mixup": "“mixup” and “cutmix” mix the real images within each batch.",
    "cutmix": "“mixup” and “cutmix” mix the real images within each batch.",
}


def arm_notes(arms: Sequence[Arm]) -> list[str]:
    """Explanations of arms with short names."""
    families = {arm.family for arm in arms}
    notes = [text for family, text in _ARM_NOTES.items() if family in families]
    if any(arm.twin_of for arm in arms):
        notes.append("“unfiltered” adds as many images as its filtered twin, without filters.")
    if any(synthetic_only(arm) for arm in arms):
        notes.append(
            "“only” trains on generated images alone, as many as there are real ones; its accuracy"
            " is the classification accuracy score (Ravuri and Vinyals 2019). It is for information"
            " and cannot be the baseline."
        )
    return list(dict.fromkeys(notes))


def recall_plots(
    evaluate: EvaluateResult, classes: Sequence[str], colours: Mapping[str, int]
) -> list[dict[str, Any]]:
    """For each contrast: recall of each class on test, for real images, baseline and synthetic."""
    entries = []
    for contrast in evaluate.contrasts:
        arms = list(dict.fromkeys(["real", contrast.against, contrast.arm]))
        seeds = contrast.generator_fits * contrast.seeds
        of_arms = [colour_of(evaluate, arm, colours) for arm in arms]
        gains = [
            plots.Gain(
                # The number of images shows how reliable the value is.
                f"{name} ({evaluate.arms['real'].per_class[name].images // seeds})",
                [evaluate.arms[arm].per_class[name].recall for arm in arms],
                *((gain.mean, gain.low, gain.high) for gain in gains_of),
            )
            for name, *gains_of in zip(
                classes, contrast.recall_gain, contrast.recall_gain_to_real, strict=True
            )
        ]  # fmt: skip
        entries.append(
            {
                "arms": list(zip(arms, of_arms, strict=True)),
                "against": contrast.against,
                "svg": plots.recall_by_class(
                    gains, arms, of_arms, contrast.against, enough(contrast)
                ),
            }
        )
    return entries


def amounts_of(search: Step) -> dict[str, Amount]:
    """Amount of images that each arm adds per generator, by arm."""
    amounts = {}
    for arm in search.spec_as(SearchSpec).arms:
        added = search.inputs[arm.mixes[0]].spec_as(MixSpec).added
        if added:
            amounts[arm.name] = added[0].amount
    return amounts


def needed(context: Context) -> dict[str, dict[str, int]]:
    """Images of each class in the largest arm of a generator, by generator."""
    counts: dict[str, dict[str, int]] = {}
    search = context.step.inputs["search"]
    for step in search.inputs.values():
        manifest = context.manifest(step) if step.kind == "mix" else None
        if manifest is None:
            continue
        for name, added in MixResult.of(manifest).added.items():
            of_generator = counts.setdefault(name, {})
            for label, count in added.items():
                of_generator[label] = max(of_generator.get(label, 0), count)
    return counts
