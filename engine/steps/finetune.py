"""Finetune: train a generator on the train split."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from engine.context import Context, Output
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.registry import kind_of
from engine.core.rng import derive_seed
from engine.core.spec import Spec
from engine.core.step import Step
from engine.core.store import Store
from engine.data.arrays import read_pixels
from engine.data.dataset import by_id, split_index
from engine.data.images import Preprocess
from engine.generators import TrainingImages
from engine.results.images import FinetuneResult
from engine.settings import GeneratorField
from engine.steps import StepKind
from engine.work.fit import SAMPLES, FitContext


class FinetuneSpec(Spec):
    """Sampling fields of `generator` are at their defaults, so that they do not change the key."""

    generator: GeneratorField
    preprocess: Preprocess
    task: str
    seed: int


@dataclass(frozen=True)
class TrainGenerator:
    """The work of each worker of the fit: decode the train split and train."""

    store: Store
    spec: FinetuneSpec
    images: list[str]
    label_of: dict[str, str]
    cluster_of: dict[str, int]

    def __call__(self, fit: FitContext) -> None:
        spec = self.spec
        pixels, ids = read_pixels(self.store, self.images, spec.preprocess.shape)
        data = TrainingImages(
            pixels=pixels,
            image_ids=ids,
            labels=[self.label_of[image_id] for image_id in ids],
            clusters=[self.cluster_of.get(image_id, 0) for image_id in ids],
        )
        generator = kind_of("generators", spec.generator)(spec.generator, spec.preprocess)
        generator.fit(fit, data, derive_seed(spec.seed, "finetune"))


class Finetune(StepKind[FinetuneSpec]):
    version = 1
    summary = "train the generator on the train split"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(FinetuneSpec)
        ingest = context.inputs["ingest"]
        index = split_index(context.store, ingest, spec.task, "train")
        label_of = by_id(index, rows.label_column(spec.task))
        train = TrainGenerator(
            store=context.store,
            spec=spec,
            images=ingest.keys(split="train"),
            label_of=label_of,
            cluster_of=read_clusters(context),
        )
        generator = kind_of("generators", spec.generator)(spec.generator, spec.preprocess)
        outside = dict(generator.external_digests())
        store, step = context.store, context.step
        samples = store.location(store.join(store.work(step.key), SAMPLES))
        context.say(f"sample images appear in {samples}")
        parts, metrics = context.fit(train, "steps", outside)
        sample_keys = [part.key for part in parts if part.tags["file"].startswith(f"{SAMPLES}/")]
        if sample_keys:
            # The working folder is deleted with its checkpoints when the step ends.
            context.say(f"the last samples: {store.location(sample_keys[-1])}")
        size = sum(part.bytes for part in parts) / 2**20
        figures = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        return Output(
            parts, len(label_of),
            FinetuneResult(
                headline=f"{figures}; weights {size:.1f} MiB", **metrics, outside=outside
            ),
        )  # fmt: skip

    def outdated(self, step: Step, manifest: Manifest, store: Store) -> str | None:
        spec = step.spec_as(FinetuneSpec)
        generator = kind_of("generators", spec.generator)(spec.generator, spec.preprocess)
        if dict(generator.external_digests()) != FinetuneResult.of(manifest).outside:
            return "the checkpoint that the generator starts from changed"
        return None


def read_clusters(context: Context) -> dict[str, int]:
    """The cluster of each training image; empty if the step has no clusters as input."""
    if "cluster" not in context.inputs:
        return {}
    table = pa.concat_tables(context.store.tables(context.inputs["cluster"].keys(table="clusters")))
    return by_id(table, rows.CLUSTER)
