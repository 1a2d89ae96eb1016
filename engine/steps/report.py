"""Report: one HTML page that needs no network, from the tables that the other steps left."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.context import Context, Result
from engine.core import rows
from engine.core.arrays import vectors_of
from engine.core.dataset import class_names, split_index
from engine.core.images import Preprocess, decode_own, encode
from engine.core.manifest import Manifest, read_manifest
from engine.core.registry import resolve
from engine.core.rng import generator
from engine.core.spec import Spec
from engine.core.step import upstream
from engine.metrics.significance import paired_t
from engine.report import plots
from engine.report.page import render
from engine.report.table import as_text, comparison
from engine.steps import StepKind
from engine.steps.generate import first_images

TILES = 8
_SCATTER = 900
_PROBE_LEAST = 8


class ReportSpec(Spec):
    # The study with all its defaults, for the page to show.
    study: dict[str, Any]
    preprocess: Preprocess
    task: str
    generators: tuple[str, ...]
    target_classes: tuple[str, ...] | str
    seed: int


class Report(StepKind):
    version: ClassVar[int] = 2
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
        page = render(
            "report.html",
            name=spec.study["name"], preprocess=spec.preprocess, classes=classes,
            objective=search["objective"], search=search, evaluate=evaluate, table=table,
            ingest=context.inputs["ingest"].metrics, trials=trials.num_rows,
            seeds=len(set(trials[rows.SEED].to_pylist())),
            curve=ratio_curve(trials, search, colours),
            recalls=recall_plots(evaluate, classes, colours),
            confusions=confusions(evaluate), sheets=sheets(context, spec),
            funnels={name: context.inputs[f"curate.{name}"].metrics for name in spec.generators},
            scatter=scatter(context, spec, classes), probes=probes(context, spec, classes),
            only_some=spec.target_classes != "all", targets=spec.target_classes,
            study_confidence=spec.study["curate"]["confidence"],
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
    trials: pa.Table, search: Mapping[str, Any], colours: Mapping[str, int]
) -> dict[str, Any]:
    """The objective on val against the ratio, with t intervals over seeds."""
    held = trials.to_pylist()
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
        for ratio, values in sorted({0.0: real, **by_ratio}.items()):
            interval = paired_t(values)
            points.append(plots.Point(ratio, interval.estimate, interval.low, interval.high))
        lines.append(plots.Line(name, points, colours[name]))
    drawn = [
        plots.Level(name, float(np.mean(values)), colours[family_of[name]])
        for name, values in levels.items()
    ]
    legend = [(line.name, line.colour, "line") for line in lines]
    legend += [(level.name, level.colour, "level") for level in drawn]
    objective = f"val {search['objective'].replace('_', ' ')}"
    return {"svg": plots.ratio_curve(lines, drawn, objective) if lines else "", "legend": legend}


def recall_plots(
    evaluate: Mapping[str, Any], classes: Sequence[str], colours: Mapping[str, int]
) -> list[dict[str, Any]]:
    """For each contrast: recall of each class on test, for real images, baseline and synthetic."""
    found = []
    for contrast in evaluate["contrasts"]:
        arms = list(dict.fromkeys(["real", contrast["against"], contrast["arm"]]))
        of_arms = [colours[evaluate["arms"][arm]["family"]] for arm in arms]
        gains = [
            plots.Gain(
                name, [evaluate["arms"][arm]["per_class"][name]["recall"] for arm in arms],
                gain["mean"], gain["low"], gain["high"],
            )
            for name, gain in zip(classes, contrast["recall_gain"], strict=True)
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
        counts = np.asarray(evaluate["arms"][name]["confusion"])
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        cells = [
            [{"count": int(c), "share": float(s)} for c, s in zip(row, part, strict=True)]
            for row, part in zip(counts, share, strict=True)
        ]
        found.append({"arm": name, "cells": cells})
    return found


def sheets(context: Context, spec: ReportSpec) -> list[dict[str, Any]]:
    """Real images of each target class beside kept and dropped ones of each generator."""
    real = first_images(
        context.store, context.inputs["ingest"].keys(split="train"), spec.task, TILES
    )
    found = []
    for name in spec.generators:
        curated = pa.concat_tables(
            context.store.tables(context.inputs[f"curate.{name}"].keys(table="curated"))
        )
        kept, dropped = choose_tiles(curated)
        wanted = {image_id for ids in [*kept.values(), *dropped.values()] for image_id, _ in ids}
        images = read_images(context, name, wanted)
        classes = []
        for label in sorted({*kept, *dropped}):
            classes.append(
                {
                    "label": label,
                    "real": [_tile(image, spec.preprocess) for image in real.get(label, [])],
                    "kept": [_tile(images[i], spec.preprocess) for i, _ in kept.get(label, [])],
                    "dropped": [
                        (_tile(images[i], spec.preprocess), why)
                        for i, why in dropped.get(label, [])
                    ],
                }
            )
        synthetic = resolve("generators", spec.study["generators"][name]["name"]).synthetic
        found.append({"generator": name, "synthetic": synthetic, "classes": classes})
    return found


Tiles = dict[str, list[tuple[str, str]]]


def choose_tiles(curated: pa.Table) -> tuple[Tiles, Tiles]:
    """Ids (and reasons) of a few kept and dropped images of each intended class."""
    kept: Tiles = {}
    dropped: Tiles = {}
    for image_id, label, good, reason in zip(
        *(curated[name].to_pylist() for name in
          (rows.IMAGE_ID, rows.LABEL_INTENDED, rows.KEPT, rows.REASON)), strict=True
    ):  # fmt: skip
        held = (kept if good else dropped).setdefault(label, [])
        if len(held) < TILES:
            held.append((image_id, reason))
    return kept, dropped


def read_images(context: Context, name: str, wanted: set[str]) -> dict[str, np.ndarray]:
    keys = [p.key for p in context.inputs[f"generate.{name}"].parts if "label" in p.tags]
    found: dict[str, np.ndarray] = {}
    for table in context.store.tables(keys, [rows.IMAGE_ID, rows.IMAGE]):
        mask = pc.is_in(table[rows.IMAGE_ID], pa.array(sorted(wanted), pa.string()))
        held = table.filter(mask)
        encoded = pc.struct_field(held[rows.IMAGE], "bytes").to_pylist()
        for image_id, data in zip(held[rows.IMAGE_ID].to_pylist(), encoded, strict=True):
            found[image_id] = decode_own(data)
    return found


def _tile(image: np.ndarray, preprocess: Preprocess) -> str:
    """An image as a data URL, at most as large as it is shown."""
    data = encode(image, preprocess.model_copy(update={"codec": "png"}))
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


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
        chosen = generator(spec.seed, "scatter", name).permutation(len(both))[:_SCATTER]
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
        found.append({"generator": name, "svg": svg, "shown": len(chosen), "all": len(both)})
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
    return found
