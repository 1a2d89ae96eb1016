"""Generators: one interface `fit / load / sample` for all ways to make images.

To add one, write `engine/generators/<name>.py` with a class `<Name>(Generator)`; no other file
changes. Heavy libraries are imported inside the methods that need them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from engine.core.notice import Notice
from engine.core.rng import generator as random_generator
from engine.core.spec import Configured, S, Spec
from engine.data.images import Preprocess
from engine.work.fit import FitContext
from engine.work.stage import Offload


class GeneratorSpec(Spec):
    name: str


@dataclass(frozen=True)
class TrainingImages:
    """The decoded train split. `pixels` is uint8 (n, height, width, channels), possibly mapped
    from disk."""

    pixels: np.ndarray
    image_ids: Sequence[str]
    labels: Sequence[str]
    # Cluster of each image within its class; all 0 unless the generator asks for clusters.
    clusters: Sequence[int]


@dataclass(frozen=True)
class TrainingRows:
    """The training images of one class, in a fixed order, without their pixels."""

    image_ids: Sequence[str]
    clusters: Sequence[int]


@dataclass(frozen=True)
class Request:
    """One image to generate; the step adds its id and seed. `index` counts within the class."""

    label: str
    index: int
    cluster: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    parent_id: str | None = None
    strength: float | None = None
    uri: str | None = None


@dataclass(frozen=True)
class SampleBatch:
    """A micro-batch of requests. Every random draw for row i must come from `seeds[i]`.

    parents: uint8 (n, height, width, channels), the training images that the requests name, or
    None.
    """

    labels: Sequence[str]
    clusters: Sequence[int | None]
    prompts: Sequence[str | None]
    negative_prompts: Sequence[str | None]
    strengths: Sequence[float | None]
    uris: Sequence[str | None]
    seeds: Sequence[int]
    parents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.seeds)


class Conditions:
    """The numbered conditions of a generator: classes, or clusters within classes."""

    FILE = "conditions.json"

    def __init__(self, pairs: Sequence[tuple[str, int]], by: Literal["class", "cluster"]) -> None:
        self.pairs, self.by = list(pairs), by
        self.numbers = {pair: number for number, pair in enumerate(self.pairs)}

    def __len__(self) -> int:
        return len(self.pairs)

    @classmethod
    def of(cls, data: TrainingImages, by: Literal["class", "cluster"]) -> Conditions:
        """The conditions that occur in the training images."""
        pairs = {cls._pair(*entry, by) for entry in zip(data.labels, data.clusters, strict=True)}
        return cls(sorted(pairs), by)

    @classmethod
    def load(cls, weights: Path, by: Literal["class", "cluster"]) -> Conditions:
        """The conditions that `save` wrote."""
        pairs = json.loads((weights / cls.FILE).read_text())
        return cls([(str(label), int(cluster)) for label, cluster in pairs], by)

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_text(json.dumps(self.pairs))

    def numbered(self, labels: Sequence[str], clusters: Sequence[int | None]) -> np.ndarray:
        """The condition numbers, int64 (n,), of labels and clusters."""
        return np.asarray(
            [
                self.numbers[self._pair(label, cluster, self.by)]
                for label, cluster in zip(labels, clusters, strict=True)
            ],
            dtype=np.int64,
        )

    @staticmethod
    def _pair(label: str, cluster: int | None, by: str) -> tuple[str, int]:
        return (label, int(cluster or 0) if by == "cluster" else 0)


class Generator(Configured[S]):
    """A way to make images, with its settings."""

    version: ClassVar[int]
    # Whether `fit` must run before `load`.
    trainable: bool = False
    # Fields of the spec that only sampling reads: changing them does not retrain.
    sampling_fields: ClassVar[tuple[str, ...]] = ()
    # Whether its images are synthetic; otherwise they are a baseline for synthetic images.
    synthetic: ClassVar[bool] = True
    # Whether the study's filters apply to its images.
    filtered: ClassVar[bool] = True
    # The kind of images, in IPTC's vocabulary of digital source types
    # (cv.iptc.org/newscodes/digitalsourcetype).
    digital_source_type: str = "trainedAlgorithmicMedia"
    # What leaves the accelerator's memory while it is idle; set before `load`. Only generators with
    # several networks support it.
    offload: Offload = "none"

    def __init__(self, spec: S, preprocess: Preprocess) -> None:
        self.spec, self.preprocess = spec, preprocess

    def check(self) -> None:
        """Raise `StudyError` for impossible settings. Called when the study is read."""

    def uses_clusters(self) -> bool:
        """Whether requests name clusters."""
        return False

    def parents(self) -> Literal["train", "representatives"] | None:
        """The training images that requests start from, or None."""
        return None

    def external_digests(self) -> Mapping[str, str]:
        """Digests of data that the generator reads from outside the study, such as a folder."""
        return {}

    def nested(self) -> Sequence[tuple[str, Any]]:
        """(family, spec) of the plugins that the spec names; their versions enter keys."""
        return ()

    def available(self) -> Mapping[str, int] | None:
        """The number of existing images by class, or None if the generator makes any number."""
        return None

    def plan(self, label: str, count: int, train: TrainingRows, seed: int) -> Iterator[Request]:
        """The first `count` requests of a class. Request i does not depend on `count`: a larger
        plan extends a smaller one."""
        order = random_generator(seed, "parents", label).permutation(len(train.image_ids))
        clusters = proportional(train.clusters) if self.uses_clusters() else None
        for index in range(count):
            parent = int(order[index % len(order)]) if self.parents() else None
            cluster = None
            if clusters is not None:
                # An image that starts from another belongs to its cluster.
                cluster = next(clusters) if parent is None else int(train.clusters[parent])
            yield Request(
                label=label,
                index=index,
                cluster=cluster,
                parent_id=None if parent is None else train.image_ids[parent],
            )

    def prompt_warnings(self, prompts: Sequence[str]) -> list[Notice]:
        """Warnings about these distinct prompts, such as that they are truncated."""
        return []

    def fingerprint(self) -> dict[str, Any]:
        """The settings of sampling that change pixels, which the commit records store."""
        return {"spec": self.spec.model_dump()}

    def fit(self, context: FitContext, data: TrainingImages, seed: int) -> None:
        """Train from the newest checkpoint, if there is one, and publish the weights by
        `context.publish`."""
        raise NotImplementedError

    def load(self, weights: Path | None, device: str) -> None:
        """Prepare to sample; `weights` is the folder that `fit` published."""
        raise NotImplementedError

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        """One uint8 array (height, width, channels) for each request, or the reason why there is
        none."""
        raise NotImplementedError


def proportional(clusters: Sequence[int]) -> Iterator[int]:
    """Endless cluster numbers; every prefix is as proportional to the clusters' sizes as whole
    numbers allow."""
    names, counts = np.unique(np.asarray(clusters), return_counts=True)
    share, given = counts / counts.sum(), np.zeros(len(names))
    while True:
        chosen = int(np.argmax(share * (given.sum() + 1) - given))
        given[chosen] += 1
        yield int(names[chosen])
