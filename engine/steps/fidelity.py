"""Fidelity: are generated images realistic, diverse, and not copies of train?

Compares sets with val in an embedder's space, for each class and for all together. Three sets are
compared with the same val images: kept images, all generated images, and real train images, which
give the figures of real images (the floor). Most figures depend on the number of images, so the
sets have the same size, with val's class mix: the number that the study requests, the same for
every generator fit. Sets that are too small get no figures.

The manifest's metrics have a scope of all classes together, then one for each class:

    classes     the classes of the scope
    val         number of val images, the reference of all sets
    few         the reason why there are no figures
    val_sampled, val_nearest
                number of sampled val images, and their median cosine distance to train
    sets        by name: kept, generated (if curation changed it) and real: `n` images and the
                figures of `ValReference.figures`; for a set that is too small, only `n`
    floor       if train has fewer images than that: the sets again, each with as many images as
                train has; otherwise empty
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from engine.context import Context, Output
from engine.core import rows
from engine.core.manifest import Part
from engine.core.names import natural
from engine.core.notice import Notice
from engine.core.registry import kind_of
from engine.core.rng import derive_seed
from engine.core.shards import parquet_rows
from engine.core.spec import Spec
from engine.data.dataset import by_id, split_index
from engine.metrics.diversity import vendi_score
from engine.metrics.frechet import Reference, frechet_distance
from engine.metrics.kernel import kernel_distance
from engine.metrics.memorization import near_expected, near_limit, share_nearer
from engine.metrics.minimums import FRECHET_LEAST, LEAST, NEAR, NEAR_LEAST
from engine.metrics.moments import Moments
from engine.metrics.prdc import prdc
from engine.results.data import IngestResult
from engine.results.images import FidelityResult, FidelityScope, FidelitySet
from engine.settings import EmbedderField
from engine.stages.images import FEW, EmbedImages, generated_shards
from engine.stages.vectors import SUMS, Embedded, SampledVectors, SetSums, Sums, draw, room
from engine.steps import StepKind
from engine.steps.request import RequestSpec, allocated, needed_images
from engine.vectors.similarity import most_similar

_OFTEN_NEAR = 0.05


class FidelitySpec(Spec):
    embedder: EmbedderField
    sample: Annotated[int, Field(ge=LEAST)]
    k: Annotated[int, Field(ge=1, lt=LEAST)]
    task: str
    seed: int


class Fidelity(StepKind[FidelitySpec]):
    version = 3
    summary = "compare generated images with real ones"
    scratch = (SUMS,)

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(FidelitySpec)
        parts, keys = generated_vectors(context, spec)
        generated = generated_sets(context, keys)
        real = {"real": real_set(context, spec, "train"), "val": real_set(context, spec, "val")}
        sides = {**generated, **real}
        kept, val = generated["kept"].counts, real["val"].counts
        classes = sorted(set().union(*(side.counts for side in generated.values())), key=natural)
        enough = [label for label in classes if kept[label] >= LEAST and val[label]]
        together = [enough] if len(enough) > 1 else []
        request = context.step.inputs["generate"].inputs["request"]
        given = request.inputs.get("allocate")
        # Images of each class that the study requests and every generator fit keeps.
        needed = needed_images(
            request.spec_as(RequestSpec), context.result("ingest", IngestResult),
            allocated(context.manifest(given) if given else None),
        )  # fmt: skip
        planned = [
            plan_scope(spec, sides, needed, labels)
            for labels in [*together, *([label] for label in classes)]
        ]
        inputs = FidelityInputs(context, sides, planned)
        scopes = []
        with context.progress(len(planned), "scopes") as bar:
            for number, scope in enumerate(planned):
                scopes.append(measure(spec, inputs, scope, number))
                bar.advance(1)
        return Output(
            parts, max(map(len, generated.values())),
            FidelityResult(
                headline=headline(scopes), scopes=scopes,
                warnings=warnings(scopes, kept, classes, enough),
            ),
        )  # fmt: skip


def generated_vectors(context: Context, spec: FidelitySpec) -> tuple[list[Part], list[str]]:
    """The parts that this step writes, and the keys of the parts with the vectors of all generated
    images. Reuses curate's vectors if they are in the same space."""
    curate = context.inputs["curate"]
    if curate.inputs.get("embed") == context.inputs["embed"].digest:
        return [], curate.keys(table="scores")
    stages, schema = EmbedImages.stages(spec.embedder, hashes=False)
    shards = generated_shards(context)
    few = sum(shard.rows for shard in shards) <= FEW
    commits = context.compute(
        "embed", shards, rows_of=parquet_rows, stages=stages, schema=schema,
        fingerprint={
            "embedder": spec.embedder.model_dump(), "images": context.inputs["generate"].digest,
        },
        replace=True, here=few and kind_of("embedders", spec.embedder).light,
    )  # fmt: skip
    parts = [commit.data for commit in commits if commit.data]
    return parts, [part.key for part in parts]


def generated_sets(context: Context, keys: list[str]) -> dict[str, Embedded]:
    """The kept images under their labels in use and, if curation changed anything, all generated
    images under their requested labels."""
    curated = pa.concat_tables(context.store.tables(context.inputs["curate"].keys(table="curated")))
    kept = curated.filter(curated[rows.KEPT])
    sets = {"kept": embedded(context, keys, kept, rows.LABEL)}
    if kept.num_rows < curated.num_rows or kept[rows.LABEL] != kept[rows.LABEL_INTENDED]:
        sets["generated"] = embedded(context, keys, curated, rows.LABEL_INTENDED)
    return sets


def real_set(context: Context, spec: FidelitySpec, split: str) -> Embedded:
    index = split_index(context.store, context.inputs["ingest"], spec.task, split)
    keys = context.inputs["embed"].keys(split=split)
    return embedded(context, keys, index, rows.label_column(spec.task))


def embedded(context: Context, keys: list[str], table: pa.Table, label: str) -> Embedded:
    """The images of a table that have a vector."""
    return Embedded.of(context.store, keys, by_id(table, label))


@dataclass(frozen=True)
class Draw:
    """Rows of a set: all chosen ones, and the sampled ones among them."""

    whole: np.ndarray
    some: np.ndarray


@dataclass
class Scope:
    """Images of some classes, drawn and not yet read.

    val_count: number of val images. shares: the share of each class in val. few: the reason why
    nothing is drawn. sets: the size of each set. floor: the size of train if it is smaller, else 0.
    draws: by set and size, including val.
    """

    labels: Sequence[str]
    val_count: int
    shares: Mapping[str, float]
    few: Notice | None = None
    sets: dict[str, int] = field(default_factory=dict)
    floor: int = 0
    draws: dict[tuple[str, int], Draw] = field(default_factory=dict)


def plan_scope(
    spec: FidelitySpec, sides: Mapping[str, Embedded], needed: Mapping[str, int],
    labels: Sequence[str],
) -> Scope:  # fmt: skip
    """Choose the images of each set to compare with val. needed: images of each class to keep."""
    counts = {name: side.counts for name, side in sides.items()}
    val_count = sum(counts["val"][label] for label in labels)
    shares = {label: counts["val"][label] / val_count for label in labels if counts["val"][label]}
    scope = Scope(labels, val_count, shares)
    if val_count < LEAST:
        scope.few = Notice.of("few_in_val", images=val_count)
        return scope
    available = {name: room(counts[name], shares) for name in sides if name not in ("real", "val")}
    if max(available.values()) < LEAST:
        scope.few = Notice.of("few_generated", images=max(available.values()))
        return scope
    wanted = room(needed, shares)
    # Fits keep different numbers of images; only equal sizes are comparable. Real images do not
    # limit the size, or one rare class would reduce it to almost nothing.
    n = min(count for count in (*available.values(), wanted) if count >= LEAST)
    real = room(counts["real"], shares)
    scope.sets = {name: n if count >= LEAST else count for name, count in available.items()}
    scope.floor = real if LEAST <= real < n else 0
    if not scope.floor:
        scope.sets["real"] = min(n, real)

    def sample(name: str, count: int) -> np.ndarray:
        return draw(sides[name].labels, shares, min(count, spec.sample), spec.seed)

    numbers = [*scope.sets.items(), *((name, scope.floor) for name in (*available, "real"))]
    for name, count in numbers:
        if count >= LEAST and available.get(name, LEAST) >= LEAST:
            whole = draw(sides[name].labels, shares, count, spec.seed)
            scope.draws[name, count] = Draw(whole, sample(name, count))
    every = np.flatnonzero(np.isin(sides["val"].labels, list(shares)))
    scope.draws["val", val_count] = Draw(every, sample("val", val_count))
    return scope


class FidelityInputs:
    """The inputs of all scopes: vectors of the sampled rows of each set, their distances to train,
    and sums of the sets that are used whole."""

    def __init__(
        self, context: Context, sides: Mapping[str, Embedded], scopes: Sequence[Scope]
    ) -> None:
        chosen: dict[str, list[np.ndarray]] = {name: [] for name in sides}
        whole = {}
        for number, scope in enumerate(scopes):
            for (name, n), taken in scope.draws.items():
                chosen[name].append(taken.some)
                if self.few(sides[name], n):
                    chosen[name].append(taken.whole)
                else:
                    whole[sums_name(number, name, n)] = sides[name], taken.whole
        if any(chosen.values()):
            chosen["real"] = [np.arange(len(sides["real"]))]
        self.sides = sides
        self.some = {
            name: SampledVectors(context.store, sides[name], places)
            for name, places in chosen.items()
        }
        self.whole = SetSums(context, whole)
        self._distances: dict[str, np.ndarray] = {}

    @staticmethod
    def few(side: Embedded, n: int) -> bool:
        """Whether `n` vectors take less memory than their sums."""
        return n < side.width

    def to_train(self, name: str, chosen: np.ndarray) -> np.ndarray:
        """Cosine distance of each of these rows of a set to the nearest training image of any
        class."""
        some = self.some[name]
        if name not in self._distances:
            train = self.some["real"].vectors
            self._distances[name] = np.asarray(1 - most_similar(some.vectors, train, 1)[0][:, 0])
        distances: np.ndarray = self._distances[name][some.at(chosen)]
        return distances


def sums_name(number: int, name: str, n: int) -> str:
    return f"{number}-{name}-{n}"


def measure(spec: FidelitySpec, inputs: FidelityInputs, scope: Scope, number: int) -> FidelityScope:
    """The figures of one scope: each set compared with the val images of its classes."""
    if scope.few:
        return FidelityScope(classes=list(scope.labels), val=scope.val_count, few=scope.few,
                             sets={}, floor={})  # fmt: skip
    reference = ValReference(spec, inputs, scope, number)
    sets = {
        name: reference.figures(name, n) if (name, n) in scope.draws else FidelitySet(n=n)
        for name, n in scope.sets.items()
    }
    floor = {
        name: reference.figures(name, scope.floor)
        for name, n in scope.draws
        if scope.floor and n == scope.floor and name != "val"
    }
    return FidelityScope(
        classes=list(scope.labels), val=scope.val_count, few=None, sets=sets, floor=floor,
        val_sampled=len(reference.some), val_nearest=float(np.median(reference.distances)),
        near_expected=reference.near_expected(sets["kept"].sampled if "kept" in sets else None),
    )  # fmt: skip


class ValReference:
    """The val images of a scope, the reference of its sets."""

    def __init__(
        self, spec: FidelitySpec, inputs: FidelityInputs, scope: Scope, number: int
    ) -> None:
        self.spec, self.inputs, self.scope, self.number = spec, inputs, scope, number
        chosen = scope.draws["val", scope.val_count]
        self.some = inputs.some["val"].of(chosen.some)
        self.distances = inputs.to_train("val", chosen.some)
        # The kernel expects components of about 1; vectors of length 1, which many embedders give,
        # would reduce it to little more than the mean.
        lengths = np.linalg.norm(self.some, axis=1)
        self.scale = np.sqrt(self.some.shape[1]) if np.allclose(lengths, 1, atol=1e-3) else 1.0

    @cached_property
    def reference(self) -> Reference:
        val_count = self.scope.val_count
        return Reference(self.moments("val", val_count, self.sums("val", val_count)))

    @cached_property
    def near(self) -> tuple[float, int] | None:
        """The distance to train that the share `NEAR` of val is within, and the number of these
        images."""
        return near_limit(self.distances, NEAR) if len(self.some) >= NEAR_LEAST else None

    def near_expected(self, images: int | None) -> list[float] | None:
        """The share of so many images that is near to train if none is copied, with its range."""
        if self.near is None or not images:
            return None
        return list(near_expected(self.near[1], len(self.some), images))

    def figures(self, name: str, n: int) -> FidelitySet:
        """The figures of `n` images of a set.

        All images: frechet, vendi. `sampled` images: kernel (with its interval), precision, recall,
        density, coverage, nearest (median cosine distance to train) and near (the share nearer
        than all but 1% of val, with its interval; None if val is too small). Train has no
        distances to itself.
        """
        spec, chosen, sums = self.spec, self.scope.draws[name, n], self.sums(name, n)
        some = self.inputs.some[name].of(chosen.some)
        scaled = self.some * self.scale, some * self.scale
        kernel = kernel_distance(*scaled, derive_seed(spec.seed, "fidelity"))
        shares = prdc(self.some, some, spec.k)
        nearest, near = None, None
        if name != "real":
            distance = self.inputs.to_train(name, chosen.some)
            nearest = float(np.median(distance))
            near = None if self.near is None else list(share_nearer(distance, self.near[0]))
        return FidelitySet(
            n=n, sampled=len(some), frechet=self.frechet(name, n, sums),
            kernel=[kernel.estimate, kernel.low, kernel.high], precision=shares.precision,
            recall=shares.recall, density=shares.density, coverage=shares.coverage,
            vendi=sums.directions.vendi if sums else vendi_score(self.vectors(name, n)),
            nearest=nearest, near=near,
        )  # fmt: skip

    def sums(self, name: str, n: int) -> Sums | None:
        """The sums of a set that is used whole; None if its vectors are few."""
        if self.inputs.few(self.inputs.sides[name], n):
            return None
        return self.inputs.whole.of(sums_name(self.number, name, n))

    def moments(self, name: str, n: int, sums: Sums | None) -> Moments:
        return sums.moments if sums is not None else Moments.of(self.vectors(name, n))

    def frechet(self, name: str, n: int, sums: Sums | None) -> float:
        val_count = self.scope.val_count
        if n + val_count < self.some.shape[1]:
            return frechet_distance(self.vectors("val", val_count), self.vectors(name, n))
        return self.reference.distance(self.moments(name, n, sums))

    def vectors(self, name: str, n: int) -> np.ndarray:
        """The vectors of all chosen rows of a set with few vectors."""
        return self.inputs.some[name].of(self.scope.draws[name, n].whole)


def headline(scopes: Sequence[FidelityScope]) -> str:
    """The Fréchet distance of the kept images in the first scope that has one."""
    for scope in scopes:
        sets = scope.floor if "kept" in scope.floor else scope.sets
        frechet = {name: side.frechet for name, side in sets.items() if side.frechet is not None}
        if "kept" in frechet:
            floor = f", real images {frechet['real']:.3g}" if "real" in frechet else ""
            n = sets["kept"].n
            return f"Fréchet distance {frechet['kept']:.3g}{floor}, {n:,} images of each"
    return "too few images for figures"


def warnings(
    scopes: Sequence[FidelityScope], kept: Mapping[str, int], classes: Sequence[str],
    enough: Sequence[str],
) -> list[Notice]:  # fmt: skip
    """Warnings for readers of the figures."""
    notices = []
    first = next((scope for scope in scopes if "kept" in scope.sets), None)
    if first is not None:
        of_kept = first.sets["kept"]
        if of_kept.frechet is not None and of_kept.n < FRECHET_LEAST:
            notices.append(Notice.of("few_for_frechet", images=of_kept.n, least=FRECHET_LEAST))
        if first.floor:
            real = first.floor["real"].n
            notices.append(Notice.of("small_train", real=real, generated=of_kept.n))
        often = max(_OFTEN_NEAR, first.near_expected[2] if first.near_expected else 0.0)
        if of_kept.near is not None and of_kept.near[0] > often:
            percent, low, high = (100 * value for value in of_kept.near)
            notices.append(
                Notice.of("near_train", percent=percent, low=low, high=high,
                          farther=100 * (1 - NEAR), most=100 * often)
            )  # fmt: skip
    left_out = [f"{label} ({kept[label]} kept)" for label in classes if label not in enough]
    if len(enough) > 1 and left_out:
        omitted = ", ".join(left_out)
        notices.append(Notice.of("classes_omitted", least=LEAST, classes=omitted))
    return notices
