"""Report: one HTML page that needs no network, from the tables that the other steps left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from engine import __version__
from engine.context import Context, Result
from engine.core import rows
from engine.core.arrays import vectors_of
from engine.core.dataset import class_names, split_index
from engine.core.images import Preprocess
from engine.core.manifest import Manifest, read_manifest
from engine.core.rng import generator
from engine.core.spec import Spec
from engine.core.step import upstream
from engine.metrics.significance import paired_t
from engine.report import plots
from engine.report.page import render
from engine.report.table import as_text, comparison
from engine.steps import StepKind
from engine.steps._curated import closest, filters_told, sheets, words
from engine.steps._fidelity import fidelity_tables
from engine.steps.search import replicates

_TILE = 52  # px
_SCATTER = 450  # of each side
_PROBE_LEAST = 8
_EASILY_TOLD = 0.9  # area under the ROC curve
_CLEARLY_LESS = 0.15  # of images whose class is seen


class ReportSpec(Spec):
    # The study with all its defaults, for the page to show.
    study: dict[str, Any]
    preprocess: Preprocess
    task: str
    generators: tuple[str, ...]
    target_classes: tuple[str, ...] | str
    seed: int


class Report(StepKind):
    version: ClassVar[int] = 5
    Spec: ClassVar[type[Spec]] = ReportSpec
    summary: ClassVar[str] = "write the page"

    def run(self, context: Context) -> Result:
        spec = context.step.spec_as(ReportSpec)
        search, evaluate = (context.inputs[name].metrics for name in ("search", "evaluate"))
        trials = pa.concat_tables(context.store.tables(context.inputs["search"].keys()))
        table = comparison(trials.to_pydict(), search, evaluate)
        classes = class_names(context.inputs["ingest"])
        # One colour for each family, on the whole page.
        families = dict.fromkeys([*spec.generators, *trials["family"].to_pylist()])
        colours = {name: number for number, name in enumerate(families)}
        curated = {name: context.inputs[f"curate.{name}"].metrics for name in spec.generators}
        probed = probes(context, spec, classes)
        search_spec = context.inputs["search"].spec
        synthetic = {arm["family"] for arm in search_spec["arms"] if arm["role"] == "compared"}
        page = render(
            "report.html",
            name=spec.study["name"], preprocess=spec.preprocess, classes=classes,
            objective=search["objective"], search=search, evaluate=evaluate, table=table,
            ingest=context.inputs["ingest"].metrics, trials=trials.num_rows,
            seeds=len(search_spec["seeds"]), search_spec=search_spec,
            replicates="generator fits" if search_spec["generator_fits"] > 1 else "seeds",
            study_margin=context.inputs["evaluate"].spec["settings"]["margin"],
            arm_notes=arm_notes(search_spec["arms"]),
            curve=ratio_curve(trials, search, search_spec["generator_fits"], colours),
            recalls=recall_plots(evaluate, classes, colours),
            confusions=confusions(evaluate), reduced=reduced(context),
            sheets=sheets(context, spec.generators, spec.task, spec.preprocess, synthetic),
            closest=closest(context, spec.generators, spec.preprocess),
            funnels=curated, reasons=words(curated), filters=filters_told(curated),
            seen={name: shares(held["labeler"]["confusion"])
                  for name, held in curated.items() if "labeler" in held},
            scatter=scatter(context, spec, classes), probes=probed,
            fidelity=fidelity_tables(context, spec.generators),
            warnings=image_warnings(probed, curated, spec),
            needed=needed(context), seeds_used=[int(seed) for seed in search_spec["seeds"]],
            study_seed=spec.study["seed"], engine=__version__,
            python=context.inputs["evaluate"].provenance["python"],
            # Small pictures at a whole multiple of their size, with their pixels to be seen.
            tile=_TILE // spec.preprocess.size * spec.preprocess.size or _TILE,
            small=spec.preprocess.size <= _TILE // 2,
            only_some=spec.target_classes != "all", targets=spec.target_classes,
            steps=history(context), study=json.dumps(spec.study, indent=2),
            versions=context.inputs["evaluate"].provenance["versions"],
        )  # fmt: skip
        data = page.encode()
        text = as_text(table, search["objective"])
        return Result(
            [context.file("report", "html", data, file="report.html")], len(table),
            {
                "headline": f"{len(data) / 2**20:.1f} MiB",
                "table": text,
                "verdict": evaluate["verdict"],
            },
        )  # fmt: skip


def ratio_curve(
    trials: pa.Table, search: Mapping[str, Any], generator_fits: int, colours: Mapping[str, int]
) -> dict[str, Any]:
    """The objective on val against the ratio, with t intervals over replicates."""
    # Twins and other arms that only show something have no part in the choice.
    held = [entry for entry in trials.to_pylist() if entry["role"] != "shown"
            or entry["family"] == "real_double"]  # fmt: skip
    families: dict[str, dict[float, list[float]]] = {}
    levels: dict[str, list[float]] = {}
    family_of = {entry[rows.ARM]: entry["family"] for entry in held}
    for entry in held:
        value = entry[search["objective"]]
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
    objective = f"val {search['objective'].replace('_', ' ')}"
    start = _point(0.0, real, generator_fits)
    below = [line.name for line in lines if all(point.y <= start.y for point in line.points)]
    svg = plots.ratio_curve(lines, drawn, start, objective) if lines else ""
    return {"svg": svg, "legend": legend, "below_real": below}


def _point(ratio: float, values: Sequence[float], generator_fits: int) -> plots.Point:
    interval = paired_t(replicates(np.asarray(values), generator_fits).tolist())
    return plots.Point(ratio, interval.estimate, interval.low, interval.high)


_ARM_NOTES = {
    "oversampled": "“oversampled” draws every class alike.",
    "class_weighted": "“class weighted” weighs an image's loss by how rare its class is.",
    "mixup": "“mixup” and “cutmix” mix each batch of real images with itself.",
    "cutmix": "“mixup” and “cutmix” mix each batch of real images with itself.",
}


def arm_notes(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the table must know of arms that are named shortly."""
    families = {arm["family"] for arm in arms}
    found = [text for family, text in _ARM_NOTES.items() if family in families]
    if any(arm["twin_of"] for arm in arms):
        found.append("“unfiltered” adds as many images of a generator as its rival, as they come.")
    if any(arm["ratio"] is None and arm["role"] == "shown" for arm in arms):
        found.append("“only” trains on generated images alone, as many as there are real ones.")
    return list(dict.fromkeys(found))


def recall_plots(
    evaluate: Mapping[str, Any], classes: Sequence[str], colours: Mapping[str, int]
) -> list[dict[str, Any]]:
    """For each contrast: recall of each class on test, for real images, baseline and synthetic."""
    found = []
    for contrast in evaluate["contrasts"]:
        arms = list(dict.fromkeys(["real", contrast["against"], contrast["arm"]]))
        seeds = contrast["generator_fits"] * contrast["seeds"]
        of_arms = [colours[evaluate["arms"][arm]["family"]] for arm in arms]
        gains = [
            plots.Gain(
                # How many images a figure rests on says how far to believe it.
                f"{name} ({evaluate['arms']['real']['per_class'][name]['images'] // seeds})",
                [evaluate["arms"][arm]["per_class"][name]["recall"] for arm in arms],
                *((gain["mean"], gain["low"], gain["high"]) for gain in gains_of),
            )
            for name, *gains_of in zip(
                classes, contrast["recall_gain"], contrast["recall_gain_to_real"], strict=True
            )
        ]  # fmt: skip
        found.append(
            {
                "arms": list(zip(arms, of_arms, strict=True)),
                "against": contrast["against"],
                "svg": plots.recall_by_class(gains, arms, of_arms),
            }
        )
    return found


def confusions(evaluate: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Confusion on test of real, the baseline and the synthetic arms, summed over seeds."""
    names = dict.fromkeys(
        ["real", evaluate["baseline"], *(c["arm"] for c in evaluate["contrasts"])]
    )
    found = []
    for name in names:
        found.append({"arm": name, "cells": shares(evaluate["arms"][name]["confusion"])})
    return found


def shares(matrix: Sequence[Sequence[int]]) -> list[list[dict[str, Any]]]:
    """Counts of a confusion matrix with their shares of the row."""
    counts = np.asarray(matrix)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return [
        [{"count": int(c), "share": float(s)} for c, s in zip(row, part, strict=True)]
        for row, part in zip(counts, share, strict=True)
    ]


def embedded(
    context: Context, spec: ReportSpec, name: str
) -> tuple[np.ndarray, list[str], list[str]] | None:
    """Vectors, ids and labels of a generator's kept images, where they were embedded."""
    curate = context.inputs[f"curate.{name}"]
    keys = curate.keys(table="scores")
    if not keys:
        return None
    scores = pa.concat_tables(context.store.tables(keys, [rows.IMAGE_ID, rows.EMBEDDING]))
    curated = pa.concat_tables(context.store.tables(curate.keys(table="curated")))
    label_of = {
        image_id: label
        for image_id, label, good in zip(
            *(curated[column].to_pylist() for column in (rows.IMAGE_ID, rows.LABEL, rows.KEPT)),
            strict=True,
        )
        if good
    }
    ids = scores[rows.IMAGE_ID].to_pylist()
    held = [row for row, image_id in enumerate(ids) if image_id in label_of]
    return (
        vectors_of(scores)[held], [ids[row] for row in held],
        [label_of[ids[row]] for row in held],
    )  # fmt: skip


def real_train(context: Context, spec: ReportSpec) -> tuple[np.ndarray, list[str]]:
    """Vectors and labels of the train split."""
    keys = context.inputs["embed"].keys(split="train")
    table = pa.concat_tables(context.store.tables(keys, [rows.IMAGE_ID, rows.EMBEDDING]))
    index = split_index(context.store, context.inputs["ingest"], spec.task, "train")
    label_of = dict(
        zip(index[rows.IMAGE_ID].to_pylist(), index[rows.label_column(spec.task)].to_pylist(),
            strict=True)
    )  # fmt: skip
    return vectors_of(table), [label_of[image_id] for image_id in table[rows.IMAGE_ID].to_pylist()]


def scatter(context: Context, spec: ReportSpec, classes: Sequence[str]) -> list[dict[str, Any]]:
    """t-SNE (van der Maaten and Hinton 2008) of a sample of real and kept images, by generator."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    vectors, labels = real_train(context, spec)
    found = []
    for name in spec.generators:
        made = embedded(context, spec, name)
        if made is None or not len(made[0]):
            continue
        both = np.concatenate([vectors, made[0]])
        names = [*labels, *made[2]]
        synthetic = np.r_[np.zeros(len(vectors), bool), np.ones(len(made[0]), bool)]
        order = generator(spec.seed, "scatter", name).permutation(len(both))
        # As many of each where there are as many: a sample of all would show a few of one.
        chosen = np.concatenate([order[synthetic[order] == side][:_SCATTER] for side in (0, 1)])
        if len(chosen) < 10:
            continue
        held = both[chosen]
        if held.shape[1] > 50 and len(held) > 50:
            held = PCA(50, random_state=0).fit_transform(held)
        perplexity = min(30.0, (len(held) - 1) / 3)
        placed = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(held)
        numbers = [classes.index(names[row]) for row in chosen]
        svg = plots.scatter(
            [tuple(point) for point in placed.tolist()], numbers, synthetic[chosen].tolist()
        )
        found.append(
            {
                "generator": name,
                "svg": svg,
                "shown": len(chosen),
                "real": int((~synthetic[chosen]).sum()),
                "made": int(synthetic[chosen].sum()),
            }
        )
    return found


def probes(
    context: Context, spec: ReportSpec, classes: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """How well real and kept images of one class can be told apart: AUC of a logistic regression on
    embeddings, cross-validated. 0.5: not at all; near 1, "synthetic" may come to mean the class."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors, labels = real_train(context, spec)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in spec.generators:
        made = embedded(context, spec, name)
        if made is None:
            continue
        entries = []
        for label in classes:
            real = vectors[[row for row, value in enumerate(labels) if value == label]]
            other = made[0][[row for row, value in enumerate(made[2]) if value == label]]
            if min(len(real), len(other)) < _PROBE_LEAST:
                continue
            # As many of each, so that the class's size is no clue.
            count = min(len(real), len(other), 500)
            order = generator(spec.seed, "probe", name, label)
            both = np.concatenate(
                [side[order.permutation(len(side))[:count]] for side in (real, other)]
            )
            truth = np.r_[np.zeros(count), np.ones(count)]
            folds = StratifiedKFold(min(5, count), shuffle=True, random_state=0)
            model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
            scores = cross_val_predict(model, both, truth, cv=folds, method="decision_function")
            entries.append(
                {"label": label, "auc": float(roc_auc_score(truth, scores)), "images": count}
            )
        found[name] = entries
    return found


def image_warnings(
    probed: Mapping[str, Sequence[Mapping[str, Any]]],
    curated: Mapping[str, Mapping[str, Any]],
    spec: ReportSpec,
) -> list[str]:
    """What a reader of the verdict must know of the images that it is about."""
    found = []
    for name in spec.generators:
        said = []
        areas = [entry["auc"] for entry in probed.get(name, ())]
        if areas and float(np.median(areas)) >= _EASILY_TOLD:
            said.append(
                f"are easily told from real ones (area under the ROC curve {min(areas):.2f} to"
                f" {max(areas):.2f}), so that a classifier may learn what is synthetic in place of"
                " the class"
            )
        metrics = curated[name]
        labeler = metrics.get("labeler", {})
        kept, real = labeler.get("agreement_kept"), labeler.get("agreement_val")
        if kept is not None and real is not None and kept < real - _CLEARLY_LESS:
            said.append(
                f"often show another class than was asked for: the labeler sees the"
                f" right one in {100 * kept:.0f}% of those kept, in {100 * real:.0f}% of real ones"
            )
        if said:
            found.append(f"images of {name} {'; and they '.join(said)}")
        found += [
            f"{name}: {told['stops']}; the study's strict setting stops their export"
            for told in metrics.get("filters", ())
            if told["stops"]
        ]
        found += [f"{name}: {text}" for text in metrics.get("warnings", ())]
    return found


def needed(context: Context) -> dict[str, dict[str, int]]:
    """Images of each class that the largest arm of a generator adds, by generator."""
    found: dict[str, dict[str, int]] = {}
    search = context.step.inputs["search"]
    for step in search.inputs.values():
        manifest = read_manifest(context.store, step) if step.kind == "mix" else None
        if manifest is None:
            continue
        for name, added in manifest.metrics["added"].items():
            held = found.setdefault(name, {})
            for label, count in added.items():
                held[label] = max(held.get(label, 0), count)
    return found


def reduced(context: Context) -> dict[str, Any]:
    """What was kept of each dominant class, where the study reduces them."""
    for step in upstream(list(context.step.inputs.values())):
        if step.kind == "reduce" and (manifest := read_manifest(context.store, step)):
            return dict(manifest.metrics["classes"])
    return {}


def history(context: Context) -> list[dict[str, Any]]:
    """Every step that the page rests on, with its key, when it ran and how long."""
    found = []
    for step in upstream(list(context.step.inputs.values())):
        manifest: Manifest | None = read_manifest(context.store, step)
        if manifest is not None:
            found.append(
                {
                    "label": step.label, "key": step.key, "rows": manifest.rows,
                    "started": manifest.provenance["started"],
                    "seconds": manifest.provenance["seconds"],
                    "headline": manifest.metrics.get("headline", ""),
                }
            )  # fmt: skip
    return sorted(found, key=lambda entry: str(entry["started"]))
