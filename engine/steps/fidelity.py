"""Fidelity: are generated images like real ones, of as many kinds, and none of train over again?

Of each class and of all together, against val, in an embedder's space. Three sets are held against
the same images of val: those that curation kept, all that were generated, and real ones of train,
which say what figures real images get (the floor). They have equally many images, of each class
like val, for most figures depend on the number. Too few images get no figures.

The manifest's metrics hold a scope for each class, and first one of all together:

    classes    what it is of
    val        images of val, that all sets are held against
    few        why there are no figures, or empty
    sets       by name: kept, generated (where curation changed it) and real: `n` images and the
               figures of `Against.figures`; of a set that has too few, their number alone
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from engine.context import Context, Result
from engine.core import rows
from engine.core.arrays import grouped_vectors
from engine.core.dataset import split_index
from engine.core.manifest import Part
from engine.core.nearest import Rows, most_similar
from engine.core.registry import resolve
from engine.core.rng import derive_seed, generator
from engine.core.shards import parquet_rows
from engine.core.spec import Spec
from engine.metrics.diversity import vendi_score
from engine.metrics.frechet import Reference, frechet_distance
from engine.metrics.kernel import kernel_distance
from engine.metrics.moments import Moments
from engine.metrics.prdc import prdc
from engine.sections import EmbedderField
from engine.steps import StepKind
from engine.steps.curate import generated_shards
from engine.steps.embed import EmbedImages

# Images of a set, without which its figures mean nothing.
LEAST = 20
# Below this number, a Fréchet distance is largely the number's doing.
FRECHET_LEAST = 2048
# An image nearer to train than all but this share of val counts as near, where val has enough
# images to say.
NEAR, _NEAR_LEAST = 0.01, 100
_OFTEN_NEAR = 0.05
# Images that a light embedder does while workers would start.
_FEW = 2048


class FidelitySpec(Spec):
    embedder: EmbedderField
    sample: Annotated[int, Field(ge=LEAST)]
    k: Annotated[int, Field(ge=1, lt=LEAST)]
    task: str
    seed: int


class Fidelity(StepKind):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[Spec]] = FidelitySpec
    summary: ClassVar[str] = "measure how like real ones generated images are"

    def run(self, context: Context) -> Result:
        spec = context.step.spec_as(FidelitySpec)
        parts, keys = generated_vectors(context, spec)
        sets = generated_sets(context, keys)
        train, val = (real_set(context, spec, split) for split in ("train", "val"))
        kept = sets["kept"].counts
        classes = sorted(set().union(*(side.counts for side in sets.values())))
        enough = [label for label in classes if kept[label] >= LEAST and val.counts[label]]
        scopes = [[label] for label in classes]
        if len(enough) > 1:
            scopes.insert(0, enough)
        found = []
        with context.progress(len(scopes), "scopes") as bar:
            for labels in scopes:
                found.append(measure(spec, sets, train, val, labels))
                bar.advance(1)
        return Result(
            parts, max(map(len, sets.values())),
            {
                "headline": headline(found), "scopes": found,
                "warnings": warnings(found, kept, classes, enough),
            },
        )  # fmt: skip


class Embedded:
    """Embedded images: labels, text (n,), and vectors, float32 (n, width)."""

    def __init__(self, labels: Sequence[str], vectors: np.ndarray) -> None:
        self.labels, self.vectors = np.asarray(labels, dtype=object), vectors
        self.counts = Counter(self.labels.tolist())

    def __len__(self) -> int:
        return len(self.labels)

    def room(self, shares: Mapping[str, float]) -> int:
        """How many images it has in a mix of classes."""
        return int(min(self.counts[label] / share for label, share in shares.items()) + 1e-9)

    def draw(self, shares: Mapping[str, float], n: int, seed: int) -> np.ndarray:
        """Rows of `n` images in a mix of classes, by chance."""
        chosen = []
        for label, count in quotas(shares, n).items():
            own = np.flatnonzero(self.labels == label)
            order = generator(seed, "fidelity", label).permutation(len(own))
            chosen.append(own[order[:count]])
        return np.sort(np.concatenate(chosen))


def quotas(shares: Mapping[str, float], n: int) -> dict[str, int]:
    """How many of `n` images each class has: its share rounded down, or up where most is lacking,
    so that the sum is n. Never more than the least whole number above its share."""
    exact = {label: n * share for label, share in shares.items()}
    found = {label: int(count + 1e-9) for label, count in exact.items()}
    lacking = sorted(exact, key=lambda label: found[label] - exact[label])
    for label in lacking[: n - sum(found.values())]:
        found[label] += 1
    return found


def generated_vectors(context: Context, spec: FidelitySpec) -> tuple[list[Part], list[str]]:
    """Parts that this step makes, and keys of those with the vectors of all generated images: what
    curate embedded in the same space is not embedded again."""
    curate = context.inputs["curate"]
    if curate.inputs.get("embed") == context.inputs["embed"].digest:
        return [], curate.keys(table="scores")
    stages, schema = EmbedImages.stages(spec.embedder, hashes=False)
    shards = generated_shards(context)
    few = sum(shard.rows for shard in shards) <= _FEW
    commits = context.compute(
        "embed", shards, rows_of=parquet_rows, stages=stages, schema=schema,
        fingerprint={
            "embedder": spec.embedder.model_dump(), "images": context.inputs["generate"].digest,
        },
        replace=True, here=few and resolve("embedders", spec.embedder.name).light,
    )  # fmt: skip
    parts = [commit.data for commit in commits if commit.data]
    return parts, [part.key for part in parts]


def generated_sets(context: Context, keys: list[str]) -> dict[str, Embedded]:
    """The images kept, under the labels that they are used as, and, where those are others, all
    that were generated under the labels that were asked for."""
    curated = pa.concat_tables(context.store.tables(context.inputs["curate"].keys(table="curated")))
    kept = curated.filter(curated[rows.KEPT])
    found = {"kept": embedded(context, keys, kept, rows.LABEL)}
    if kept.num_rows < curated.num_rows or kept[rows.LABEL] != kept[rows.LABEL_INTENDED]:
        found["generated"] = embedded(context, keys, curated, rows.LABEL_INTENDED)
    return found


def real_set(context: Context, spec: FidelitySpec, split: str) -> Embedded:
    index = split_index(context.store, context.inputs["ingest"], spec.task, split)
    keys = context.inputs["embed"].keys(split=split)
    return embedded(context, keys, index, rows.label_column(spec.task))


def embedded(context: Context, keys: list[str], table: pa.Table, label: str) -> Embedded:
    """The images of a table that have a vector."""
    label_of = dict(zip(table[rows.IMAGE_ID].to_pylist(), table[label].to_pylist(), strict=True))
    ids, vectors = grouped_vectors(context.store, keys, dict.fromkeys(label_of, "")).get(
        "", ([], np.empty((0, 1), np.float32))
    )
    return Embedded([label_of[image_id] for image_id in ids], vectors)


def measure(
    spec: FidelitySpec, sets: Mapping[str, Embedded], train: Embedded, val: Embedded,
    labels: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """One scope: the sets, and train, against the images of val of these classes."""
    held = sum(val.counts[label] for label in labels)
    scope: dict[str, Any] = {"classes": list(labels), "val": held, "few": "", "sets": {}}
    shares = {label: val.counts[label] / held for label in labels if val.counts[label]}
    if held < LEAST:
        scope["few"] = f"{held} in val"
        return scope
    sides = {**sets, "real": train}
    room = {name: side.room(shares) for name, side in sides.items()}
    # A few real images must not keep generated ones from being measured: then there is no floor.
    n = min((count for count in room.values() if count >= LEAST), default=0)
    if max(room[name] for name in sets) < LEAST:
        scope["few"] = f"{max(room[name] for name in sets)} generated"
        return scope
    against = Against(spec, train, val, shares)
    scope["sets"] = {
        name: against.figures(side, n) if room[name] >= LEAST else {"n": room[name]}
        for name, side in sides.items()
    }
    return scope


class Against:
    """The images of val that sets are held against. shares: of each class among them."""

    def __init__(
        self, spec: FidelitySpec, train: Embedded, val: Embedded, shares: Mapping[str, float]
    ) -> None:
        self.spec, self.train, self.shares = spec, train, shares
        every = np.flatnonzero(np.isin(val.labels, list(shares)))
        self.vectors = Rows(val.vectors, every)
        self.some = val.vectors[val.draw(shares, min(len(every), spec.sample), spec.seed)]
        # The kernel is made for numbers of about 1: of vectors of length 1, as many embedders give,
        # it would see little but the mean.
        lengths = np.linalg.norm(self.some, axis=1)
        self.scale = np.sqrt(val.vectors.shape[1]) if np.allclose(lengths, 1, atol=1e-3) else 1.0

    @cached_property
    def reference(self) -> Reference:
        return Reference(Moments.of(self.vectors))

    @cached_property
    def near(self) -> float | None:
        """The distance to train that a share `NEAR` of val stays below."""
        if len(self.some) < _NEAR_LEAST:
            return None
        return float(np.quantile(self.to_train(self.some), NEAR))

    def to_train(self, vectors: np.ndarray) -> np.ndarray:
        """Cosine distance of each to the nearest training image, whatever its class."""
        return np.asarray(1 - most_similar(vectors, self.train.vectors, 1)[0][:, 0])

    def figures(self, side: Embedded, n: int) -> dict[str, Any]:
        """Of `n` images of a set.

        frechet, vendi: of all of them. kernel (with the ends of its interval), precision, recall,
        density, coverage, nearest (median cosine distance to train) and near (the share nearer
        than all but 1% of val; None where val has too few to say): of `sampled` of them. Of train
        itself there is no distance to it.
        """
        spec = self.spec
        chosen = Rows(side.vectors, side.draw(self.shares, n, spec.seed))
        some = side.vectors[side.draw(self.shares, min(n, spec.sample), spec.seed)]
        scaled = self.some * self.scale, some * self.scale
        kernel = kernel_distance(*scaled, derive_seed(spec.seed, "fidelity"))
        shares = prdc(self.some, some, spec.k)
        found = {
            "n": len(chosen), "sampled": len(some), "frechet": self.frechet(chosen),
            "kernel": [kernel.estimate, kernel.low, kernel.high], "precision": shares.precision,
            "recall": shares.recall, "density": shares.density, "coverage": shares.coverage,
            "vendi": vendi_score(chosen),
        }  # fmt: skip
        if side is not self.train:
            distance = self.to_train(some)
            near = None if self.near is None else float((distance < self.near).mean())
            found |= {"nearest": float(np.median(distance)), "near": near}
        return found

    def frechet(self, chosen: Rows) -> float:
        if len(chosen) + len(self.vectors) < chosen.shape[1]:
            return frechet_distance(self.vectors[: len(self.vectors)], chosen[: len(chosen)])
        return self.reference.distance(Moments.of(chosen))


def headline(scopes: Sequence[Mapping[str, Any]]) -> str:
    """The first scope that has figures of what was kept."""
    for scope in scopes:
        kept, real = (scope["sets"].get(name, {}) for name in ("kept", "real"))
        if "frechet" in kept:
            floor = f", of real ones {real['frechet']:.3g}" if "frechet" in real else ""
            return f"Fréchet distance {kept['frechet']:.3g}{floor}, {kept['n']:,} images of each"
    return "too few images to say"


def warnings(
    scopes: Sequence[Mapping[str, Any]], kept: Mapping[str, int], classes: Sequence[str],
    enough: Sequence[str],
) -> list[str]:  # fmt: skip
    """What a reader of the figures must know."""
    found = []
    first = next((scope["sets"]["kept"] for scope in scopes if "kept" in scope["sets"]), {})
    if "frechet" in first and first["n"] < FRECHET_LEAST:
        found.append(
            f"a Fréchet distance of {first['n']:,} images, fewer than {FRECHET_LEAST:,}, is largely"
            " the number's doing: hold it against that of as many real ones alone"
        )
    if first.get("near") is not None and first["near"] > _OFTEN_NEAR:
        found.append(
            f"{100 * first['near']:.0f}% of the images kept lie nearer to a training image than"
            f" {100 * (1 - NEAR):.0f}% of held-out ones do"
        )
    left_out = [f"{label} ({kept[label]} kept)" for label in classes if label not in enough]
    if len(enough) > 1 and left_out:
        found.append(f"the whole leaves out classes with fewer than {LEAST} images kept:"
                     f" {', '.join(left_out)}")  # fmt: skip
    return found
