"""Generated images in the space of the embedder: where they lie among real ones, with pictures, and
whether the two can be distinguished."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
from markupsafe import Markup
from PIL import Image

from engine.core import rows
from engine.core.rng import derive_seed, generator
from engine.data.arrays import pictures
from engine.report.download import Row
from engine.report.generators import GeneratorFit, kept_vectors, real_vectors
from engine.report.page import Section, render
from engine.report.plots import element, svg
from engine.report.results import StudyResults
from engine.report.tiles import image_url, picture_of
from engine.vectors.plane import place

_SCATTER = 450  # of each side
_PICTURES = 1_500_000  # bytes of small pictures on a page, as they stand in it
_SIDES = (48, 40, 32, 24, 16)  # px
_PLANE_LEAST = 10  # images of both sides


@dataclass(frozen=True)
class Plane:
    """Points (n, 2) by a method, and their plot."""

    method: str
    points: np.ndarray
    svg: Markup


@dataclass(frozen=True)
class Sheet:
    """Images in a grid, as one data URL; the URL is empty if no size fits."""

    url: str = ""
    side: int = 0
    columns: int = 0


@dataclass(frozen=True)
class Scatter:
    """A sample of real and kept images of a generator: id, class and side of each point.

    Without planes there are too few images or, without `space`, no vectors. sheet: the pictures of
    the points, in their order. real, kept: images with vectors.
    """

    generator: str
    space: str = ""
    real: int = 0
    kept: int = 0
    ids: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    synthetic: list[bool] = field(default_factory=list)
    planes: list[Plane] = field(default_factory=list)
    sheet: Sheet = Sheet()


def embedding(results: StudyResults) -> Section:
    """A scatter plot and a probe for each generator."""
    scatters = [scatter(results, fits[0]) for fits in results.generators.values()]
    return Section(
        render("embedding.html", results=results, scatters=scatters),
        {
            "embedding": [row for plot in scatters for row in scatter_rows(plot)],
            "probes": [
                {"generator": name, rows.GENERATOR_FIT: fit, "class": entry.label,
                 "roc_auc": area, "images_of_each": entry.images}
                for name, probe in results.probes.items() for entry in probe.classes
                for fit, area in entry.areas.items()
            ],
        },
    )  # fmt: skip


def scatter(results: StudyResults, fit: GeneratorFit) -> Scatter:
    """A sample of real and kept images of a fit in two dimensions, by several methods."""
    store, inputs, spec = results.store, results.inputs, results.spec
    kept = kept_vectors(store, inputs, fit)
    if kept is None:
        return Scatter(fit.name)
    vectors, labels, ids = real_vectors(store, inputs, spec.task, kept.embed)
    both = np.concatenate([vectors, kept.vectors])
    names, every = [*labels, *kept.labels], [*ids, *kept.ids]
    synthetic = np.r_[np.zeros(len(vectors), bool), np.ones(len(kept.ids), bool)]
    order = generator(spec.seed, "scatter", fit.name).permutation(len(both))
    # Sample each side separately, so that the smaller side is not underrepresented.
    chosen = np.concatenate([order[synthetic[order] == side][:_SCATTER] for side in (0, 1)])
    few = Scatter(fit.name, kept.space, len(vectors), len(kept.ids))
    if not kept.ids or len(chosen) < _PLANE_LEAST:
        return few
    shown_labels, sides = [names[row] for row in chosen], synthetic[chosen].tolist()
    numbers = [results.classes.index(label) for label in shown_labels]
    shown_ids = [every[row] for row in chosen]
    images = {
        **pictures(store, inputs["ingest"].keys(split="train"), shown_ids),
        **pictures(store, fit.images, shown_ids),
    }
    return Scatter(
        fit.name, kept.space, few.real, few.kept, shown_ids, shown_labels, sides,
        [
            Plane(method, points, plot(points, numbers, sides, shown_labels))
            for method, points in planes_of(both[chosen], derive_seed(spec.seed, "plane", fit.name))
        ],
        sheet([images[image_id] for image_id in shown_ids], _PICTURES // len(results.generators)),
    )  # fmt: skip


def scatter_rows(scatter: Scatter) -> list[Row]:
    """A row for each image in the planes of a generator, with its coordinates in each."""
    entries = []
    for number, (image_id, label, synthetic) in enumerate(
        zip(scatter.ids, scatter.labels, scatter.synthetic, strict=True)
    ):
        entry: Row = {"generator": scatter.generator, rows.IMAGE_ID: image_id, "class": label,
                      "source": scatter.generator if synthetic else "real"}  # fmt: skip
        for plane in scatter.planes:
            method = plane.method.lower().replace("-", "")
            entry[f"{method}_x"], entry[f"{method}_y"] = plane.points[number].tolist()
        entries.append(entry)
    return entries


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


def sheet(images: Sequence[np.ndarray], most: int) -> Sheet:
    """Images (uint8 height, width, channels) in a grid, as one data URL of at most `most` bytes.

    Tiles are as large as that allows.
    """
    columns = math.ceil(math.sqrt(len(images)))
    lines = math.ceil(len(images) / columns)
    own = max(images[0].shape[:2])
    for side in [own, *(one for one in _SIDES if one < own)] if own <= _SIDES[0] else _SIDES:
        whole = Image.new("RGB", (columns * side, lines * side))
        for number, image in enumerate(images):
            picture = picture_of(image)
            if picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.LANCZOS)
            whole.paste(picture, (number % columns * side, number // columns * side))
        if all(image.shape[-1] == 1 for image in images):
            whole = whole.convert("L")
        for form, options in (("PNG", {}), ("JPEG", {"quality": 80})):
            url = image_url(whole, form, **options)
            if len(url.partition(",")[2]) <= most:
                return Sheet(url, side, columns)
    return Sheet()


def plot(
    points: np.ndarray, classes: Sequence[int], synthetic: Sequence[bool], labels: Sequence[str]
) -> Markup:
    """Points (n, 2) with the names of their classes: discs are real images, rings synthetic ones.

    classes: their numbers.
    """
    width, height = 480, 400
    points = points.astype(float)
    (left, top), (right, bottom) = points.min(0), points.max(0)

    def scaled(value: float, low: float, high: float, size: int) -> float:
        return float(12 + (value - low) / (high - low or 1) * (size - 24))

    drawn = [
        element(
            "circle", f"{label}, {'synthetic' if ring else 'real'}",
            kind=f"{'ring' if ring else 'disc'} c{number % 10}",
            cx=scaled(x, left, right, width), cy=scaled(y, top, bottom, height),
            r="3" if ring else "2.5",
        )
        for (x, y), number, ring, label in zip(points, classes, synthetic, labels, strict=True)
    ]  # fmt: skip
    return svg(drawn, height, "embedding of real and synthetic images, in two dimensions", width)
