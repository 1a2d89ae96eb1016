"""What the page shows of generated images in the space of the embedder: where they lie among real
ones, with their pictures at hand, and whether the two can be told apart."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from engine.context import Context
from engine.core import rows
from engine.core.rng import derive_seed, generator
from engine.core.step import Subject
from engine.data.arrays import pictures, vectors_of
from engine.data.dataset import split_index
from engine.report import plots
from engine.report.sections.curation import generated
from engine.report.sections.fidelity import in_words, numbered, of_fits
from engine.results.images import CurateResult
from engine.vectors.plane import place
from engine.wording import notice_in_words

_SCATTER = 450  # of each side
_PICTURES = 1_500_000  # bytes of small pictures on a page, as they stand in it
_SIDES = (48, 40, 32, 24, 16)  # px
_PLANE_LEAST = 10  # images of both sides
_PROBE_LEAST, _PROBE_MOST = 8, 500  # images of each side
_EASILY_TOLD = 0.9  # area under the ROC curve
_CLEARLY_LESS = 0.15  # of images whose class is seen


@dataclass(frozen=True)
class KeptVectors:
    """Kept images of one generator fit: vectors float32 (n, width), ids and labels (n,).

    embed: the input with vectors of real images in the same space. space: the space in words.
    """

    vectors: np.ndarray
    ids: list[str]
    labels: list[str]
    embed: str
    space: str


def embedded(context: Context, name: str) -> KeptVectors | None:
    """The kept images of a fit (named as in its step labels), with vectors from curate or fidelity.

    None if neither step embedded them.
    """
    curate, embed = context.inputs[f"curate.{name}"], "embed"
    keys = curate.keys(table="scores")
    if not keys:
        fidelity = context.inputs.get(f"fidelity.{name}")
        if fidelity is None or not fidelity.parts:
            return None
        keys = [part.key for part in fidelity.parts]
        if fidelity.inputs["embed"] != context.inputs["embed"].digest:
            embed = "embed.fidelity"
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
    kept_rows = [row for row, image_id in enumerate(ids) if image_id in label_of]
    return KeptVectors(
        vectors_of(scores)[kept_rows], [ids[row] for row in kept_rows],
        [label_of[ids[row]] for row in kept_rows], embed,
        in_words(context.inputs[embed].spec["embedder"]),
    )  # fmt: skip


NOT_EMBEDDED = (
    "its images have no vectors, because no filter embedded them and fidelity is off; set"
    " fidelity.enabled: true"
)


def real_train(context: Context, spec: Any, embed: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Vectors, labels and ids of the train split, by the input `embed`."""
    keys = context.inputs[embed].keys(split="train")
    table = pa.concat_tables(context.store.tables(keys, [rows.IMAGE_ID, rows.EMBEDDING]))
    index = split_index(context.store, context.inputs["ingest"], spec.task, "train")
    label_of = dict(
        zip(index[rows.IMAGE_ID].to_pylist(), index[rows.label_column(spec.task)].to_pylist(),
            strict=True)
    )  # fmt: skip
    ids = table[rows.IMAGE_ID].to_pylist()
    return vectors_of(table), [label_of[image_id] for image_id in ids], ids


def scatter(context: Context, spec: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A sample of real and kept images of each generator's first fit in two dimensions, by several
    methods, with a sheet of their pictures in the order of the points; or the reason for none."""
    panels = []
    for name in spec.generators:
        kept = embedded(context, name)
        if kept is None:
            panels.append({"generator": name, "planes": [], "why": NOT_EMBEDDED})
            continue
        vectors, labels, ids = real_train(context, spec, kept.embed)
        both = np.concatenate([vectors, kept.vectors])
        names, every = [*labels, *kept.labels], [*ids, *kept.ids]
        synthetic = np.r_[np.zeros(len(vectors), bool), np.ones(len(kept.ids), bool)]
        order = generator(spec.seed, "scatter", name).permutation(len(both))
        # Sample each side separately, so that the smaller side is not underrepresented.
        chosen = np.concatenate([order[synthetic[order] == side][:_SCATTER] for side in (0, 1)])
        if not kept.ids or len(chosen) < _PLANE_LEAST:
            why = f"{len(kept.ids)} kept and {len(vectors)} real images"
            panels.append({"generator": name, "planes": [], "why": f"too few: {why}"})
            continue
        numbers = [classes.index(names[row]) for row in chosen]
        titles = [f"{names[row]}, {'synthetic' if synthetic[row] else 'real'}" for row in chosen]
        planes = [
            {
                "method": method,
                "points": points.tolist(),
                "svg": plots.scatter(
                    [tuple(point) for point in points.tolist()],
                    numbers,
                    synthetic[chosen].tolist(),
                    titles,
                ),
            }
            for method, points in planes_of(both[chosen], derive_seed(spec.seed, "plane", name))
        ]
        shown_ids = {every[row] for row in chosen}
        images = {
            **pictures(context.store, context.inputs["ingest"].keys(split="train"), shown_ids),
            **pictures(context.store, generated(context, name), shown_ids),
        }
        panels.append(
            {
                "generator": name, "planes": planes, "space": kept.space,
                "ids": [every[row] for row in chosen], "labels": [names[row] for row in chosen],
                "synthetic": synthetic[chosen].tolist(),
                "sheet": sheet([images[every[row]] for row in chosen],
                               _PICTURES // len(spec.generators)),
                "real": int((~synthetic[chosen]).sum()),
                "synthetic_count": int(synthetic[chosen].sum()),
            }
        )  # fmt: skip
    return panels


def planes_of(vectors: np.ndarray, seed: int) -> list[tuple[str, np.ndarray]]:
    """Points (n, 2) of vectors (n, width), by each installed method."""
    from sklearn.decomposition import PCA
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        linear = PCA(2, random_state=seed % 2**32).fit_transform(vectors)
    planes = [("PCA", linear), ("t-SNE", place(vectors, "tsne", seed))]
    if find_spec("umap") is not None:
        planes.append(("UMAP", place(vectors, "umap", seed)))
    return planes


def sheet(images: Sequence[np.ndarray], most: int) -> dict[str, Any]:
    """Images (uint8 height, width, channels) in a grid, as one data URL of at most `most` bytes.

    Tiles are as large as that allows; the URL is empty if no size fits.
    """
    columns = math.ceil(math.sqrt(len(images)))
    lines = math.ceil(len(images) / columns)
    own = max(images[0].shape[:2])
    for side in [own, *(one for one in _SIDES if one < own)] if own <= _SIDES[0] else _SIDES:
        whole = Image.new("RGB", (columns * side, lines * side))
        for number, image in enumerate(images):
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            if picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.LANCZOS)
            whole.paste(picture, (number % columns * side, number // columns * side))
        if all(image.shape[-1] == 1 for image in images):
            whole = whole.convert("L")
        for form, options in (("PNG", {}), ("JPEG", {"quality": 80})):
            target = io.BytesIO()
            whole.save(target, form, **options)
            if 4 * len(target.getvalue()) / 3 <= most:
                encoded = base64.b64encode(target.getvalue()).decode()
                return {"url": f"data:image/{form.lower()};base64,{encoded}", "side": side,
                        "columns": columns}  # fmt: skip
    return {"url": "", "side": 0, "columns": columns}


def probes(context: Context, spec: Any, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How well real and kept images of a class can be distinguished, by generator.

    The measure is the AUC of a cross-validated logistic regression on embeddings. 0.5: not at all;
    near 1, a classifier may learn "synthetic" instead of the class. Each value has `why` nothing
    was measured, or `space` and an entry per class with `areas` by fit (of fits with enough images)
    and `images` of each side, the minimum over fits.
    """
    by_generator: dict[str, dict[str, Any]] = {}
    real_in: dict[str, tuple[np.ndarray, list[str]]] = {}
    for name in spec.generators:
        entries: dict[str, dict[str, Any]] = {}
        summary: dict[str, Any] = {"why": "", "space": "", "entries": []}
        fits = len(of_fits(context, "curate", name))
        for fit in range(fits):
            kept = embedded(context, Subject(name, fit).label)
            if kept is None:
                summary["why"] = NOT_EMBEDDED
                continue
            summary["space"] = kept.space
            if kept.embed not in real_in:
                real_in[kept.embed] = real_train(context, spec, kept.embed)[:2]
            vectors, labels = real_in[kept.embed]
            for label in classes:
                real = vectors[[row for row, value in enumerate(labels) if value == label]]
                synthetic = kept.vectors[[row for row, value in enumerate(kept.labels)
                                      if value == label]]  # fmt: skip
                if not len(synthetic):
                    continue
                entry = entries.setdefault(label, {"label": label, "areas": {}, "images": None})
                # Equal numbers, so that the class size gives no clue.
                count = min(len(real), len(synthetic), _PROBE_MOST)
                entry["images"] = min(count, entry["images"] or count)
                if count >= _PROBE_LEAST:
                    # The first fit keeps the draws of a study with one fit.
                    named = (name, label, fit) if fit else (name, label)
                    entry["areas"][fit] = probe(real, synthetic, count, spec.seed, named)
        by_generator[name] = {**summary, "fits": fits, "least": _PROBE_LEAST,
                       "entries": [with_mean(entry) for entry in entries.values()]}  # fmt: skip
    return by_generator


def probe(
    real: np.ndarray, synthetic: np.ndarray, count: int, seed: int, named: Sequence[str | int]
) -> float:
    """Out-of-fold area under the ROC curve that separates `count` images of each side."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = generator(seed, "probe", *named)
    sides = [side[order.permutation(len(side))[:count]] for side in (real, synthetic)]
    both = np.concatenate(sides)
    truth = np.r_[np.zeros(count), np.ones(count)]
    folds = StratifiedKFold(min(5, count), shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
    scores = cross_val_predict(model, both, truth, cv=folds, method="decision_function")
    return float(roc_auc_score(truth, scores))


def with_mean(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of a class with the mean, minimum and maximum of its areas over fits."""
    areas = list(entry["areas"].values())
    spread = {"auc": float(np.mean(areas)), "low": min(areas), "high": max(areas)} if areas else {}
    return {**entry, **spread}


def _range(values: Sequence[float], digits: str, unit: str = "") -> str:
    """The range of values, or one value if both ends are written alike."""
    low, high = (f"{value:{digits}}{unit}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def image_warnings(
    probed: Mapping[str, Mapping[str, Any]],
    curated: Mapping[str, Sequence[CurateResult]],
    spec: Any,
) -> list[str]:
    """Warnings about the images that the verdict rests on. curated: the result of each fit, by
    generator."""
    warnings = []
    for name in spec.generators:
        fits = curated[name]
        # By fit: areas of the probe, and how often the labeler sees the requested class.
        told_apart: dict[int, list[float]] = {}
        seen_right: dict[int, tuple[float, float]] = {}
        for fit, result in enumerate(fits):
            areas = [entry["areas"][fit] for entry in probed.get(name, {}).get("entries", ())
                     if fit in entry["areas"]]  # fmt: skip
            if areas and float(np.median(areas)) >= _EASILY_TOLD:
                told_apart[fit] = areas
            if (labeler := result.labeler) is None or (kept := labeler.agreement_kept) is None:
                continue
            if kept < labeler.agreement_val - _CLEARLY_LESS:
                seen_right[fit] = kept, labeler.agreement_val
        if told_apart:
            areas = [area for of_fit in told_apart.values() for area in of_fit]
            warnings.append(
                f"images of {_called(name, list(told_apart), len(fits))} are easily distinguished"
                f" from real ones (area under the ROC curve {_range(areas, '.2f')} by class),"
                " so a classifier may learn “synthetic” instead of the class"
            )
        if seen_right:
            shares = [100 * kept for kept, _ in seen_right.values()]
            real = next(iter(seen_right.values()))[1]
            warnings.append(
                f"images of {_called(name, list(seen_right), len(fits))} often show another class"
                " than requested: the labeler sees the requested class in"
                f" {_range(shares, '.0f', '%')} of kept images, and the true class"
                f" in {100 * real:.0f}% of real images"
            )
        for fit, result in enumerate(fits):
            called = _called(name, [fit], len(fits))
            warnings += [
                f"{called}: {notice_in_words(report.stops)}; the study's strict setting stops the"
                " export"
                for report in result.filters
                if report.stops
            ]
            warnings += [f"{called}: {notice_in_words(notice)}" for notice in result.warnings]
    return warnings


def _called(name: str, numbers: Sequence[int], fits: int) -> str:
    """A generator's name, with the fits concerned unless all are."""
    return name if len(numbers) == fits else f"{name}, {numbered(numbers)}"
