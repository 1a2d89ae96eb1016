"""Shared parts of tests of trainable generators: a fit without Ray, its weights, a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engine.core.manifest import copy_files
from engine.core.registry import resolve
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.generators import Generator, GeneratorSpec, SampleBatch, TrainingImages
from engine.work.fit import FitContext, read_result


class Killed(Exception):
    """Raised from a fit's report, to end it like a kill."""


def context(store: Store, attempt: str = "one", **fields: Any) -> FitContext:
    return FitContext(store, "work/x", f"weights/{attempt}", attempt, "inputs", **fields)


def fit(
    store: Store,
    spec: GeneratorSpec,
    preprocess: Preprocess,
    data: TrainingImages,
    attempt: str = "one",
    **fields: Any,
) -> dict[str, str]:
    """Train; returns the digests of the published files."""
    generator = resolve("generators", spec.name)(spec, preprocess)
    generator.fit(context(store, attempt, **fields), data, seed=5)
    parts, _ = read_result(store, "work/x", attempt)
    return {part.tags["file"]: part.sha256 for part in parts}


def loaded(store: Store, spec: GeneratorSpec, preprocess: Preprocess, folder: Path) -> Any:
    """A generator with the weights of the first attempt."""
    generator = resolve("generators", spec.name)(spec, preprocess)
    generator.load(weights(store, folder), "cpu")
    return generator


def weights(store: Store, folder: Path) -> Path:
    """The files of the first attempt, copied to a folder."""
    parts, _ = read_result(store, "work/x", "one")
    return copy_files(store, parts, folder)


def published(store: Store, name: str) -> bytes:
    """One file of the first attempt."""
    parts, _ = read_result(store, "work/x", "one")
    (key,) = (part.key for part in parts if part.tags["file"] == name)
    return store.read(key)


def images_of(generator: Generator, requests: SampleBatch) -> np.ndarray:
    """The sampled images, (n, height, width, channels); fails if one is missing."""
    images = generator.sample(requests)
    assert not [image for image in images if isinstance(image, str)]
    return np.stack(images)


def batch(labels: list[str], seeds: list[int], clusters: list[int | None] | None = None) -> Any:
    nothing = [None] * len(labels)
    return SampleBatch(labels, clusters or nothing, nothing, nothing, nothing, nothing, seeds)
