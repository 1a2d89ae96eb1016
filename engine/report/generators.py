"""The images of each generator fit: manifests, tables and vectors, and how well a linear probe
distinguishes kept images from real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.data.arrays import vectors_of
from engine.data.dataset import generated_images, split_index
from engine.metrics.probe import probe
from engine.report.download import Row
from engine.results.images import CurateResult, FidelityResult

_PROBE_LEAST, _PROBE_MOST = 8, 500  # images of each side


@dataclass(frozen=True)
class GeneratorFit:
    """One fit of a generator: the manifests of its images, their curation and their fidelity."""

    name: str
    fit: int
    curate: Manifest
    generate: Manifest
    fidelity: Manifest | None = None

    @cached_property
    def curated(self) -> CurateResult:
        return CurateResult.of(self.curate)

    @cached_property
    def measured(self) -> FidelityResult | None:
        """None if fidelity was not measured."""
        return FidelityResult.of(self.fidelity) if self.fidelity else None

    @property
    def images(self) -> list[str]:
        """Keys of the parts with the images."""
        return generated_images(self.generate)

    @property
    def columns(self) -> Row:
        """The columns that name the fit in every table."""
        return {"generator": self.name, rows.GENERATOR_FIT: self.fit}

    def curated_table(self, store: Store) -> pa.Table:
        """Every image, kept or not."""
        return pa.concat_tables(store.tables(self.curate.keys(table="curated")))


@dataclass(frozen=True)
class KeptVectors:
    """Kept images of one generator fit: vectors float32 (n, width), ids and labels (n,).

    embed: the input with vectors of real images in the same space. space: the embedder's name.
    """

    vectors: np.ndarray
    ids: list[str]
    labels: list[str]
    embed: str
    space: str


def embedder_name(spec: Mapping[str, object]) -> str:
    """The name of an embedder and, if it has one, its model."""
    return " ".join(str(spec[key]) for key in ("name", "model") if key in spec)


def kept_vectors(
    store: Store, inputs: Mapping[str, Manifest], fit: GeneratorFit
) -> KeptVectors | None:
    """The kept images of a fit with vectors from curate or fidelity; None if neither embedded
    them. inputs: of the report."""
    embed, keys = "embed", fit.curate.keys(table="scores")
    if not keys:
        if fit.fidelity is None or not fit.fidelity.parts:
            return None
        keys = [part.key for part in fit.fidelity.parts]
        if fit.fidelity.inputs["embed"] != inputs["embed"].digest:
            embed = "embed.fidelity"
    scores = pa.concat_tables(store.tables(keys, [rows.IMAGE_ID, rows.EMBEDDING]))
    curated = fit.curated_table(store)
    kept = curated.filter(curated[rows.KEPT])
    label_of = dict(zip(*(kept[column].to_pylist() for column in (rows.IMAGE_ID, rows.LABEL)),
                        strict=True))  # fmt: skip
    ids = scores[rows.IMAGE_ID].to_pylist()
    kept_rows = [row for row, image_id in enumerate(ids) if image_id in label_of]
    return KeptVectors(
        vectors_of(scores)[kept_rows], [ids[row] for row in kept_rows],
        [label_of[ids[row]] for row in kept_rows], embed,
        embedder_name(inputs[embed].spec["embedder"]),
    )  # fmt: skip


def real_vectors(
    store: Store, inputs: Mapping[str, Manifest], task: str, embed: str
) -> tuple[np.ndarray, list[str], list[str]]:
    """Vectors, labels and ids of the train split, by the input `embed`."""
    keys = inputs[embed].keys(split="train")
    table = pa.concat_tables(store.tables(keys, [rows.IMAGE_ID, rows.EMBEDDING]))
    index = split_index(store, inputs["ingest"], task, "train")
    label_of = dict(
        zip(index[rows.IMAGE_ID].to_pylist(), index[rows.label_column(task)].to_pylist(),
            strict=True)
    )  # fmt: skip
    ids = table[rows.IMAGE_ID].to_pylist()
    return vectors_of(table), [label_of[image_id] for image_id in ids], ids


@dataclass
class ClassProbe:
    """The probe of one class: the area under the ROC curve by fit (of fits with enough images), and
    the images of each side, the minimum over fits."""

    label: str
    areas: dict[int, float]
    images: int

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.areas.values())))


@dataclass(frozen=True)
class Probe:
    """How well real and kept images of a class can be distinguished, for one generator.

    The measure is the AUC of a cross-validated logistic regression on embeddings. 0.5: not at all;
    near 1, a classifier may learn "synthetic" instead of the class. embedded: whether every fit has
    vectors. least: images of each side that a measurement needs.
    """

    fits: int
    embedded: bool
    space: str
    classes: list[ClassProbe]
    least: int = _PROBE_LEAST


def probe_generator(
    store: Store, inputs: Mapping[str, Manifest], fits: Sequence[GeneratorFit],
    classes: Sequence[str], task: str, seed: int,
) -> Probe:  # fmt: skip
    """The probe of every class that has kept images of the generator."""
    entries: dict[str, ClassProbe] = {}
    space, embedded = "", True
    real_in: dict[str, tuple[np.ndarray, list[str], list[str]]] = {}
    for fit in fits:
        kept = kept_vectors(store, inputs, fit)
        if kept is None:
            embedded = False
            continue
        space = kept.space
        if kept.embed not in real_in:
            real_in[kept.embed] = real_vectors(store, inputs, task, kept.embed)
        vectors, labels, _ = real_in[kept.embed]
        for label in classes:
            real = vectors[np.asarray(labels) == label]
            synthetic = kept.vectors[np.asarray(kept.labels, dtype=object) == label]
            if not len(synthetic):
                continue
            # Equal numbers, so that the class size gives no clue.
            count = min(len(real), len(synthetic), _PROBE_MOST)
            entry = entries.setdefault(label, ClassProbe(label, {}, count))
            entry.images = min(count, entry.images or count)
            if count >= _PROBE_LEAST:
                # The first fit keeps the draws of a study with one fit.
                named = (fit.name, label, fit.fit) if fit.fit else (fit.name, label)
                entry.areas[fit.fit] = probe(real, synthetic, count, seed, named)
    return Probe(len(fits), embedded, space, list(entries.values()))
