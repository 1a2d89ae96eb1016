"""Generators: one contract `fit / load / sample` for all ways of making images.

To add one, write `engine/generators/<name>.py` with a class `<Name>(Generator)`; nothing else has
to know. Heavy libraries are imported inside the methods that need them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from engine.core.rng import generator as random_generator
from engine.core.spec import Spec
from engine.data.images import Preprocess
from engine.work.fit import FitContext
from engine.work.stage import Offload


class GeneratorSpec(Spec):
    name: str


@dataclass(frozen=True)
class TrainingImages:
    """The train split, decoded. `pixels` is uint8 (n, height, width, channels), perhaps mapped from
    disk."""

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
    """One image to make; the step adds its id and seed. `index` counts within the class."""

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
    """A micro-batch of requests. `seeds` belong to the images: draw everything for row i from
    `seeds[i]`.

    parents: uint8 (n, height, width, channels) of the training images named by the requests, or
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
    """What images are conditioned on, numbered: the class, or the cluster within the class."""

    FILE = "conditions.json"

    def __init__(self, pairs: Sequence[tuple[str, int]], by: Literal["class", "cluster"]) -> None:
        self.pairs, self.by = list(pairs), by
        self.numbers = {pair: number for number, pair in enumerate(self.pairs)}

    def __len__(self) -> int:
        return len(self.pairs)

    @classmethod
    def of(cls, data: TrainingImages, by: Literal["class", "cluster"]) -> Conditions:
        held = {cls._pair(*entry, by) for entry in zip(data.labels, data.clusters, strict=True)}
        return cls(sorted(held), by)

    @classmethod
    def load(cls, weights: Path, by: Literal["class", "cluster"]) -> Conditions:
        """Those that `save` wrote."""
        found = json.loads((weights / cls.FILE).read_text())
        return cls([(str(label), int(cluster)) for label, cluster in found], by)

    def save(self, folder: Path) -> None:
        (folder / self.FILE).write_text(json.dumps(self.pairs))

    def numbered(self, labels: Sequence[str], clusters: Sequence[int | None]) -> np.ndarray:
        """Numbers int64 (n,) of labels and clusters."""
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


class Generator:
    """What makes images."""

    version: ClassVar[int]
    Spec: ClassVar[type[GeneratorSpec]]
    # Whether `fit` must run before `load`. (A property, where the spec decides.)
    trainable: bool = False
    # Fields of the spec that only sampling reads: changing them trains nothing anew.
    sampling_fields: ClassVar[tuple[str, ...]] = ()
    # Whether its images are synthetic; else they are a baseline that synthetic ones must beat.
    synthetic: ClassVar[bool] = True
    # Whether the study's filters are asked of its images.
    filtered: ClassVar[bool] = True
    # What the pictures are, in IPTC's vocabulary of digital source types
    # (cv.iptc.org/newscodes/digitalsourcetype).
    digital_source_type: str = "trainedAlgorithmicMedia"
    # What leaves the accelerator's memory while it is not computed with; set before `load`, and
    # heeded by generators of several networks.
    offload: Offload = "none"

    def __init__(self, spec: Any, preprocess: Preprocess) -> None:
        self.spec, self.preprocess = spec, preprocess

    def check(self) -> None:
        """Refuse what cannot work, when the study is read. Raises `StudyError`."""
        return

    def uses_clusters(self) -> bool:
        """Whether images are made for each cluster of a class."""
        return False

    def parents(self) -> Literal["train", "representatives"] | None:
        """Which training images requests start from, if any."""
        return None

    def outside(self) -> Mapping[str, str]:
        """Fingerprint of data that the generator reads beside the study's own, such as a folder."""
        return {}

    def nested(self) -> Sequence[tuple[str, Any]]:
        """(family, spec) of the plugins that the spec names; their versions count for keys."""
        return ()

    def available(self) -> Mapping[str, int] | None:
        """Images of each class that exist already, or None where any number can be made."""
        return None

    def plan(self, label: str, count: int, train: TrainingRows, seed: int) -> Iterator[Request]:
        """The first `count` requests of a class. Request i never depends on `count`: a larger plan
        extends it."""
        order = random_generator(seed, "parents", label).permutation(len(train.image_ids))
        clusters = proportional(train.clusters) if self.uses_clusters() else None
        for index in range(count):
            parent = int(order[index % len(order)]) if self.parents() else None
            cluster = None
            if clusters is not None:
                # An image that starts from another belongs where that one does.
                cluster = next(clusters) if parent is None else int(train.clusters[parent])
            yield Request(
                label=label,
                index=index,
                cluster=cluster,
                parent_id=None if parent is None else train.image_ids[parent],
            )

    def prompt_warnings(self, prompts: Sequence[str]) -> list[str]:
        """What is to be said of these prompts, such as that they are cut off. Distinct ones."""
        return []

    def fingerprint(self) -> dict[str, Any]:
        """Settings of sampling that change pixels, for the record of what was made how."""
        return {"spec": self.spec.model_dump()}

    def fit(self, context: FitContext, data: TrainingImages, seed: int) -> None:
        """Train, from the newest checkpoint if there is one, and `context.publish` the weights."""
        raise NotImplementedError

    def load(self, weights: Path | None, device: str) -> None:
        """Get ready to sample; `weights` is the folder that `fit` published."""
        raise NotImplementedError

    def sample(self, batch: SampleBatch) -> list[np.ndarray | str]:
        """One uint8 array (height, width, channels) for each request, or the reason why there is
        none."""
        raise NotImplementedError


def proportional(clusters: Sequence[int]) -> Iterator[int]:
    """Endless cluster numbers whose every prefix follows the clusters' sizes as closely as whole
    numbers can."""
    names, counts = np.unique(np.asarray(clusters), return_counts=True)
    share, given = counts / counts.sum(), np.zeros(len(names))
    while True:
        chosen = int(np.argmax(share * (given.sum() + 1) - given))
        given[chosen] += 1
        yield int(names[chosen])
