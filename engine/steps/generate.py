"""Generate: sample every requested image that no commit has yet.

Images leave a worker encoded and marked: PNG text (or a comment) with their request,
and XMP with IPTC's digital source type. A black, blank or NaN image is sampled again with a
derived seed at most twice, then quarantined with its reason.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Manifest, Part, copy_files
from engine.core.names import natural
from engine.core.registry import kind_of, name_of
from engine.core.rng import derive_seed
from engine.core.rows import TaskKind
from engine.core.shards import OK, Commit, image_column, parquet_rows
from engine.core.spec import Spec, digest
from engine.core.step import Step
from engine.core.store import Store
from engine.data.arrays import first_images, sampled_images
from engine.data.images import Preprocess, decode_own, encode, extension
from engine.generators import SampleBatch
from engine.report.sheet import contact_sheet
from engine.results.images import GenerateResult, RequestResult
from engine.settings import GeneratorField
from engine.steps import StepKind
from engine.steps.request import planned_shards
from engine.work.stage import Batch, Place, Stage

TRIES = 3
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    "Iptc4xmpExt:DigitalSourceType="
    '"http://cv.iptc.org/newscodes/digitalsourcetype/{kind}"/></rdf:RDF></x:xmpmeta>'
)


class GenerateSpec(Spec):
    generator: GeneratorField
    generator_key: str
    preprocess: Preprocess
    task: str
    tasks: dict[str, TaskKind]


class Parents(Stage):
    """The decoded parent images of the requests."""

    writes = ("parents",)

    def __init__(self, store: Store, images: Sequence[str]) -> None:
        self.store, self.images = store, list(images)

    def load(self, place: Place) -> None:
        # The encoded train split fits into every actor; the decoded one would not.
        self.encoded: dict[str, bytes] = {}
        for table in self.store.tables(self.images, [rows.IMAGE_ID, rows.IMAGE]):
            encoded = pc.struct_field(table[rows.IMAGE], "bytes").to_pylist()
            self.encoded.update(zip(table[rows.IMAGE_ID].to_pylist(), encoded, strict=True))

    def __call__(self, batch: Batch) -> Batch:
        pixels = [decode_own(self.encoded[parent]) for parent in batch[rows.PARENT_ID].to_pylist()]
        return {**batch, "parents": np.stack(pixels)}


class Sample(Stage):
    """Requests to pixels, always in batches of the planned shape."""

    writes = ("pixels", rows.STATUS, rows.SEED, "attempt")
    device = "accelerator"

    def __init__(self, store: Store, spec: GenerateSpec, weights: Sequence[Part]) -> None:
        self.store, self.spec, self.weights = store, spec, list(weights)
        # Records out-of-memory splits: pixels of such a batch may differ in the last bit.
        self.provenance: dict[str, Any] = {}

    def load(self, place: Place) -> None:
        self.generator = kind_of("generators", self.spec.generator)(
            self.spec.generator, self.spec.preprocess
        )
        self.generator.offload = place.offload
        self.batch_size = place.batch_size
        if not self.weights:
            self.generator.load(None, place.device)
            return
        with tempfile.TemporaryDirectory() as folder:
            self.generator.load(copy_files(self.store, self.weights, Path(folder)), place.device)

    def __call__(self, batch: Batch) -> Batch:
        columns = {
            "labels": batch[rows.label_column(self.spec.task)].to_pylist(),
            "clusters": batch[rows.CLUSTER].to_pylist(),
            "prompts": batch[rows.PROMPT].to_pylist(),
            "negative_prompts": batch[rows.NEGATIVE_PROMPT].to_pylist(),
            "strengths": batch[rows.STRENGTH].to_pylist(),
            "uris": batch[rows.URI].to_pylist(),
            "seeds": batch[rows.SEED].to_pylist(),
        }
        parents = batch.get("parents")
        count = len(columns["seeds"])
        seeds, attempts = list(columns["seeds"]), [0] * count
        images = self._sample(columns, parents, list(range(count)), seeds)
        for attempt in range(1, TRIES):
            # Sampling an existing file again changes nothing.
            failed = [
                row for row in range(count) if _fault(images[row]) and columns["uris"][row] is None
            ]
            if not failed:
                break
            for row in failed:
                seeds[row] = derive_seed(columns["seeds"][row], "again", attempt)
                attempts[row] = attempt
            again = self._sample(columns, parents, failed, seeds)
            for row, image in zip(failed, again, strict=True):
                images[row] = image
        status = [_fault(image) or OK for image in images]
        return {
            **batch, "pixels": images, rows.STATUS: status, rows.SEED: seeds, "attempt": attempts,
        }  # fmt: skip

    def _sample(
        self,
        columns: dict[str, list[Any]],
        parents: np.ndarray | None,
        chosen: list[int],
        seeds: list[int],
    ) -> list[np.ndarray | str]:
        """Sample the chosen rows, padded by repetition to the planned shape, because pixels depend
        on it."""
        padded = chosen + [chosen[-1]] * (self.batch_size - len(chosen))
        images = self._in_memory(columns, parents, padded, seeds)
        return images[: len(chosen)]

    def _in_memory(
        self,
        columns: dict[str, list[Any]],
        parents: np.ndarray | None,
        row_numbers: list[int],
        seeds: list[int],
    ) -> list[np.ndarray | str]:
        """Sample; splits the batch in half when the accelerator is out of memory."""
        picked = {name: [values[row] for row in row_numbers] for name, values in columns.items()}
        picked["seeds"] = [seeds[row] for row in row_numbers]
        try:
            images: list[np.ndarray | str] = self.generator.sample(
                SampleBatch(**picked, parents=None if parents is None else parents[row_numbers])
            )
            return images
        except RuntimeError as error:
            # torch.cuda.OutOfMemoryError is a RuntimeError; its text identifies it without torch.
            if "out of memory" not in str(error).lower() or len(row_numbers) == 1:
                raise
        self.provenance["out_of_memory"] = True
        half = len(row_numbers) // 2
        return self._in_memory(columns, parents, row_numbers[:half], seeds) + self._in_memory(
            columns, parents, row_numbers[half:], seeds
        )


def _fault(image: np.ndarray | str) -> str | None:
    """The reason why an image is unusable, or None."""
    if isinstance(image, str):
        return image
    low, high = int(image.min()), int(image.max())
    if high < 8:
        return "black"
    return "blank" if high - low < 4 else None


class Encode(Stage):
    """Pixels to the study's codec, with the request written into the file."""

    writes = (rows.IMAGE, rows.SOURCE, rows.GENERATOR_KEY)

    def __init__(self, spec: GenerateSpec, digital_source_type: str) -> None:
        self.spec = spec
        self.xmp = _XMP.format(kind=digital_source_type)

    def load(self, place: Place) -> None:
        self.threads = ThreadPoolExecutor(place.threads)

    def __call__(self, batch: Batch) -> Batch:
        ids = batch[rows.IMAGE_ID].to_pylist()
        count = len(ids)
        label = batch[rows.label_column(self.spec.task)].to_pylist()
        cluster, prompt, parent = (
            batch[name].to_pylist() for name in (rows.CLUSTER, rows.PROMPT, rows.PARENT_ID)
        )

        def encoded(row: int) -> bytes | None:
            if batch[rows.STATUS][row] != OK:
                return None
            made_from = {
                "image_id": ids[row],
                "generator_key": self.spec.generator_key,
                "seed": batch[rows.SEED][row],
                "label": label[row],
                "cluster": cluster[row],
                "prompt": prompt[row],
                "parent_id": parent[row],
                "attempt": batch["attempt"][row],
            }  # fmt: skip
            text = json.dumps(
                {name: value for name, value in made_from.items() if value is not None}
            )
            return encode(
                batch["pixels"][row], self.spec.preprocess, {"synthetic": text, "xmp": self.xmp}
            )

        images = list(self.threads.map(encoded, range(count)))
        return {
            **batch,
            rows.IMAGE: image_column(images, ids, extension(self.spec.preprocess)),
            rows.SOURCE: [name_of(self.spec.generator)] * count,
            rows.GENERATOR_KEY: [self.spec.generator_key] * count,
        }


class Generate(StepKind[GenerateSpec]):
    version = 1
    summary = "make the images"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(GenerateSpec)
        shards = list(planned_shards(context))
        commits = context.compute(
            "generate",
            shards,
            rows_of=parquet_rows,
            stages=sampling_stages(context, spec),
            schema=rows.synthetic_schema(spec.tasks),
            fingerprint=fingerprint(context, spec),
            prefix=context.store.generated(spec.generator_key),
        )
        warn_of_mixed_places(context, commits)
        parts = [commit.data for commit in commits if commit.data]
        kept = sum(commit.kept for commit in commits)
        if not parts:
            raise_nothing_usable(commits)
        reasons = Counter(status for commit in commits for status in commit.status if status != OK)
        requested = Counter(shard.tags["label"] for shard in shards for _ in range(shard.rows))
        sheet = context.file("sheet", "png", draw_sheet(context, spec, parts), file="sheet.png")
        set_aside = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        headline = f"{kept:,} images of {len(requested)} classes" + (
            f"; quarantined: {set_aside}" if set_aside else ""
        )
        return Output(
            [*parts, sheet], kept,
            GenerateResult(
                headline=headline,
                requested=dict(requested),
                quarantined=dict(sorted(reasons.items())),
                warnings=context.result("request", RequestResult).warnings,
            ),
        )  # fmt: skip

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        return [store.generated(step.spec_as(GenerateSpec).generator_key)]


def sampling_stages(context: Context, spec: GenerateSpec) -> list[Stage]:
    """The stages from requests to encoded images."""
    generator = kind_of("generators", spec.generator)(spec.generator, spec.preprocess)
    stages: list[Stage] = []
    if generator.parents():
        stages.append(Parents(context.store, context.inputs["ingest"].keys(split="train")))
    stages.append(Sample(context.store, spec, weights(context.inputs)))
    stages.append(Encode(spec, generator.digital_source_type))
    return stages


def weights(inputs: Any) -> Sequence[Part]:
    finetune: Manifest | None = inputs.get("finetune")
    return finetune.parts if finetune else ()


def fingerprint(context: Context, spec: GenerateSpec) -> dict[str, Any]:
    """Everything that pixels depend on in addition to the request; shards with another fingerprint
    are refused."""
    generator = kind_of("generators", spec.generator)(spec.generator, spec.preprocess)
    weight_digests = {part.tags["file"]: part.sha256 for part in weights(context.inputs)}
    return {
        "generator_key": spec.generator_key,
        "weights": digest(weight_digests) if weight_digests else None,
        "train_images": context.inputs["ingest"].digest if generator.parents() else None,
        **generator.fingerprint(),
        "preprocess": spec.preprocess.model_dump(),
    }


def warn_of_mixed_places(context: Context, commits: Sequence[Commit]) -> None:
    """Warn if shards come from different places: pixels are bitwise reproducible only for one
    device and one batch shape."""
    names = ("device", "machine", "batch_size", "software", "out_of_memory")
    places = {tuple(commit.provenance.get(name, "") for name in names) for commit in commits}
    if len(places) > 1:
        descriptions = "; ".join(
            f"{device} {machine}, batches of {size}, {software}"
            + (" (halved: out of memory)" if halved else "")
            for device, machine, size, software, halved in sorted(places, key=str)
        )
        context.say(
            f"warning: the shards were generated in different places ({descriptions}): the images"
            " are close, not bitwise equal"
        )


def raise_nothing_usable(commits: Sequence[Commit]) -> None:
    reasons = Counter(status for commit in commits for status in commit.status)
    raise DataError(
        f"generate: no usable image was generated ({dict(reasons)}); inspect the generator with"
        " --preview 4"
    )


def draw_sheet(
    context: Context, spec: GenerateSpec, parts: Sequence[Part], per_class: int = 8
) -> bytes:
    """Real and synthetic images of each class side by side, as PNG."""
    real = sampled_images(
        context.store, context.inputs["ingest"].keys(split="train"), spec.task, per_class
    )
    generated: dict[str, list[np.ndarray]] = defaultdict(list)
    for part in parts:
        images = generated[label := part.tags["label"]]
        if (lacking := per_class - len(images)) > 0:
            found = first_images(context.store, [part.key], spec.task, lacking)
            images += found.get(label, [])
    return contact_sheet(
        {label: (real.get(label, []), generated[label]) for label in sorted(generated, key=natural)}
    )
