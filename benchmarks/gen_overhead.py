"""Overhead of the engine around a model that is loaded and warm.

`embed` (MobileNetV2 on photographs of 128 px in the engine's image parts) and `generate` (a small
class-conditional UNet with random weights, 16 px) run as the `ShardWorker` that a Ray actor runs:
it reads requests or images from Parquet, runs the stages, and commits every shard to local disk,
with fsync. The bare loop has the same encoded bytes or seeds in memory and does the minimum: decode
with Pillow, model, encode; no Parquet read, no pipeline, no commit. For `embed`, encoding is a
Parquet buffer of ids and vectors; for `generate`, a PNG per image without the engine's marks. Both
run the same batches with the same weights and number of PyTorch threads, in turn, each in a
separate thread; one call of the worker has a few shards, like a call of an actor.

How to read it. The ratio is bare time / engine time: 1 means that the engine is free, 0.97 that it
costs 3%, more than 1 that it overlapped decoding or encoding with the model, because it has a
thread for each stage and the bare loop has a single one. The ratio of CPU time excludes this
overlap. The lines `actor` are the same worker in a warm Ray actor in another process; their CPU
time is that of the actor and the driver. Before any timing, vectors must be close and pixels
identical.

`python -m benchmarks.gen_overhead [--quick] [--pairs N] [--threads N] [--only NAME …]`
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.timing import (
    Cost,
    Quartiles,
    in_turn,
    machine,
    print_table,
    quartiles,
    ratios,
)
from engine.context import Context
from engine.core import rows
from engine.core.manifest import Manifest, Part
from engine.core.shards import Shard, ShardSet, parquet_rows
from engine.core.spec import Spec
from engine.core.step import Step, Subject
from engine.core.store import Store
from engine.data.decoding import decode
from engine.data.images import Preprocess, encode, preprocess
from engine.embedders.cnn import CnnSpec
from engine.generators.ddpm import Ddpm, DdpmSpec
from engine.profile import Profile
from engine.runtime.cluster import RayRuntime
from engine.settings import Request as RequestSettings
from engine.stages.images import EmbedImages, image_shards
from engine.steps.generate import Encode, GenerateSpec, Sample
from engine.steps.request import Request, RequestSpec, planned_shards
from engine.work.memory import keep_freed_memory
from engine.work.shard_worker import ShardWorker
from engine.work.stage import Place

SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "mobilenet_v2"
PHOTOGRAPHS = SHARED / "data" / "clothing"
TASKS: dict[str, Any] = {"kind": "single"}
CLASSES = ("circle", "square")
PHOTOGRAPH = Preprocess(size=128)
PICTURE = Preprocess(size=16)
KEY = "0" * 16
GUIDANCE_SCALE = 1.5


@dataclass
class Workload:
    """One step's worker and shards, and the bare loop over the same rows.

    bare: returns vectors (n, width), or pixels (n, height, width, channels).
    read: the same from a commit of the engine.
    """

    name: str
    worker: ShardWorker
    shards: list[Shard]
    bare: Callable[[], np.ndarray]
    read: Callable[[pa.Table], np.ndarray]
    equal: Callable[[np.ndarray, np.ndarray], bool]

    @property
    def images(self) -> int:
        return sum(shard.rows for shard in self.shards)


# The engine's side -------------------------------------------------------------------------------


def compute(worker: ShardWorker, shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """One call of an actor: compute and commit `shards` under new names."""
    stamp = time.monotonic_ns()
    fresh = [replace(shard, name=f"{shard.name}-{stamp}") for shard in shards]
    summaries = list(worker(fresh))
    if not all(summary["won"] and not summary["reasons"] for summary in summaries):
        raise SystemExit(f"the engine refused rows: {summaries}")
    return summaries


def outputs(workload: Workload, summaries: Sequence[dict[str, Any]]) -> np.ndarray:
    """The engine's results for these summaries, in order."""
    found = []
    for summary in summaries:
        commit = workload.worker.shards.read(summary["shard"], 0)
        assert commit.data is not None
        with workload.worker.shards.store.parquet(commit.data.key) as file:
            found.append(workload.read(file.read()))
    return np.concatenate(found)


class Actor:
    """A worker in a separate process, as in Ray Data's pool."""

    def __init__(self, worker: ShardWorker, threads: int) -> None:
        torch.set_num_threads(threads)
        self.worker = worker
        self.worker.load()

    def compute(self, shards: Sequence[Shard]) -> list[dict[str, Any]]:
        return compute(self.worker, shards)

    def cpu(self) -> float:
        return time.process_time()


def make_context(store: Store, inputs: dict[str, Manifest], spec: Spec) -> Context:
    profile = Profile()
    return Context(
        step=Step("generate", Subject(), spec, {}), inputs=inputs, store=store,
        runtime=None,  # type: ignore[arg-type]
        stage_resources=profile.stage, fit_resources=profile.fit, device="cpu",
    )  # fmt: skip


def make_manifest(
    kind: str, parts: Sequence[Part], metrics: Mapping[str, Any] | None = None
) -> Manifest:
    return Manifest(
        kind=kind, key=KEY, label=kind, spec={}, inputs={}, parts=tuple(parts), rows=0,
        metrics=dict(metrics or {}), provenance={},
    )  # fmt: skip


# Embed -------------------------------------------------------------------------------------------


def embed_workload(store: Store, shard_count: int, shard_rows: int, batch_size: int) -> Workload:
    """Photographs in image parts as ingest writes them, and MobileNetV2 at their 128 px."""
    spec = CnnSpec(model=str(WEIGHTS), input_size=PHOTOGRAPH.size)
    context = make_context(store, {}, spec)
    table = image_table(shard_count * shard_rows)
    part = context.table("images-train", table, row_group_size=shard_rows, split="train")
    context = make_context(store, {"ingest": make_manifest("ingest", [part])}, spec)
    shards = image_shards(context, ("train",))
    stages, schema = EmbedImages.stages(spec)
    worker = ShardWorker(
        ShardSet(store, "embed"), parquet_rows, stages, schema, Place("cpu", 1, batch_size)
    )
    return Workload(
        "embed",
        worker,
        shards,
        bare_embed(table, shard_rows, batch_size),
        lambda found: np.stack(found[rows.EMBEDDING].to_numpy()),
        lambda first, second: np.allclose(first, second, rtol=1e-4, atol=1e-5),
    )


def image_table(count: int) -> pa.Table:
    """The first `count` training photographs, preprocessed and encoded as by ingest."""
    paths = sorted((PHOTOGRAPHS / "train").rglob("*.jpg"))[:: 3000 // count or 1][:count]
    encoded = [
        encode(preprocess(decode(path.read_bytes()), PHOTOGRAPH), PHOTOGRAPH) for path in paths
    ]
    columns: dict[str, Any] = {
        rows.IMAGE_ID: [f"image-{number:06d}" for number in range(len(paths))],
        rows.IMAGE: [{"bytes": data, "path": None} for data in encoded],
        rows.label_column("kind"): [path.parent.name for path in paths],
        rows.SPLIT: ["train"] * len(paths),
    }
    schema = rows.images_schema(TASKS)
    return pa.table(
        [pa.array(columns.get(field.name, [None] * len(paths)), field.type) for field in schema],
        schema=schema,
    )


def bare_embed(table: pa.Table, shard_rows: int, batch_size: int) -> Callable[[], np.ndarray]:
    """transformers' own model over the same bytes, and a Parquet buffer for each shard."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(WEIGHTS).eval()
    ids = table[rows.IMAGE_ID].to_pylist()
    encoded = pc.struct_field(table[rows.IMAGE].combine_chunks(), "bytes").to_pylist()

    def run() -> np.ndarray:
        shards = []
        for start in range(0, len(ids), shard_rows):
            stop = min(start + shard_rows, len(ids))
            vectors = []
            for first in range(start, stop, batch_size):
                held = encoded[first : min(first + batch_size, stop)]
                pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in held])
                with torch.inference_mode():
                    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
                    images = ((images - 0.5) / 0.5).to(memory_format=torch.channels_last)
                    vectors.append(model(images).pooler_output.flatten(1).numpy())
            shards.append(np.concatenate(vectors))
            flat = pa.array(shards[-1].ravel())
            column = pa.FixedSizeListArray.from_arrays(flat, shards[-1].shape[1])
            columns = {rows.IMAGE_ID: ids[start:stop], rows.EMBEDDING: column}
            pq.write_table(pa.table(columns), pa.BufferOutputStream(), compression="zstd")
        return np.concatenate(shards)

    return run


# Generate ----------------------------------------------------------------------------------------


def generate_workload(
    store: Store, shard_count: int, shard_rows: int, batch_size: int, steps: int
) -> Workload:
    """Requests planned by the request step, and an untrained UNet of 16 px."""
    generator = DdpmSpec(
        block_out_channels=(32, 64, 64), layers_per_block=1, num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
    )  # fmt: skip
    common: dict[str, Any] = {
        "generator": generator, "generator_key": KEY, "preprocess": PICTURE, "task": "kind",
        "tasks": TASKS,
    }  # fmt: skip
    per_class = shard_count * shard_rows // len(CLASSES)
    request_spec = RequestSpec(
        request=RequestSettings(per_class=per_class, shard_size=shard_rows), seed=0, **common
    )
    ingest = ingest_of_labels(store, request_spec)
    request = Request().run(make_context(store, {"ingest": ingest}, request_spec))
    planned = {"request": make_manifest("request", request.parts, {"counts": {}, "outside": {}})}
    context = make_context(store, planned, request_spec)
    shards = list(planned_shards(context))
    spec = GenerateSpec(**common)
    parts = random_weights(context, generator)
    stages = [Sample(store, spec, parts), Encode(spec, Ddpm.digital_source_type)]
    worker = ShardWorker(
        ShardSet(store, "generate"), parquet_rows, stages, rows.synthetic_schema(TASKS),
        Place("cpu", 1, batch_size),
    )  # fmt: skip
    requests = pa.concat_tables(parquet_rows(store, shard.task) for shard in shards)
    return Workload(
        "generate",
        worker,
        shards,
        bare_generate(store, parts, requests, batch_size, steps),
        read_pixels,
        np.array_equal,
    )


def ingest_of_labels(store: Store, spec: Spec) -> Manifest:
    """The manifest of an ingest step with a train split of ids and labels, as requests need it."""
    index = pa.table(
        {
            rows.IMAGE_ID: [f"real-{row}" for row in range(20)],
            rows.label_column("kind"): [CLASSES[row % 2] for row in range(20)],
            rows.GROUP_ID: [str(row) for row in range(20)],
        }
    )
    part = make_context(store, {}, spec).table("index", index, split="train")
    return make_manifest("ingest", [part], {"counts": {"train": dict.fromkeys(CLASSES, 10)}})


def random_weights(context: Context, spec: DdpmSpec) -> list[Part]:
    """The files that `Ddpm.fit` publishes, without the fit."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=PICTURE.size, in_channels=3, out_channels=3,
        block_out_channels=spec.block_out_channels, layers_per_block=spec.layers_per_block,
        down_block_types=["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
        num_class_embeds=len(CLASSES) + 1, norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unet.save_pretrained(folder / "unet", safe_serialization=True)
        schedule = DDPMScheduler(spec.num_train_timesteps, beta_schedule=spec.beta_schedule)
        schedule.save_pretrained(folder / "scheduler")
        conditions = [[label, 0] for label in CLASSES]
        (folder / "conditions.json").write_text(json.dumps(conditions))
        return [
            context.file(path.stem, path.suffix[1:], path.read_bytes(),
                         file=str(path.relative_to(folder)))
            for path in sorted(folder.rglob("*")) if path.is_file()
        ]  # fmt: skip


def bare_generate(
    store: Store, parts: Sequence[Part], requests: pa.Table, batch_size: int, steps: int
) -> Callable[[], np.ndarray]:
    """DDIM with guidance of the clean image (`engine.nets.ddpm.guided_step`), written plainly with
    diffusers' model and scheduler; then a PNG."""
    from diffusers import DDIMScheduler, UNet2DModel

    with tempfile.TemporaryDirectory() as name:
        for part in parts:
            target = Path(name, part.tags["file"])
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(store.read(part.key))
        unet = UNet2DModel.from_pretrained(Path(name, "unet")).eval()
        scheduler = DDIMScheduler.from_pretrained(
            Path(name, "scheduler"), clip_sample=True, set_alpha_to_one=True,
            timestep_spacing="trailing",
        )  # fmt: skip
    seeds = requests[rows.SEED].to_pylist()
    classes = [CLASSES.index(label) for label in requests[rows.label_column("kind")].to_pylist()]
    shape, alphas = (3, PICTURE.size, PICTURE.size), scheduler.alphas_cumprod

    def batches() -> Iterator[np.ndarray]:
        for start in range(0, len(seeds), batch_size):
            noise = [
                torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                for seed in seeds[start : start + batch_size]
            ]
            images = torch.stack(noise)
            wanted = torch.tensor(classes[start : start + batch_size])
            both = torch.cat([wanted, torch.full_like(wanted, len(CLASSES))])
            scheduler.set_timesteps(steps)
            for timestep in scheduler.timesteps:
                predicted = unet(torch.cat([images, images]), timestep, both).sample
                with_class, without = predicted.chunk(2)
                guided = without + GUIDANCE_SCALE * (with_class - without)
                plain = scheduler.step(with_class, timestep, images)
                clean = scheduler.step(guided, timestep, images).pred_original_sample
                before = timestep - scheduler.config.num_train_timesteps // steps
                kept = alphas[timestep]
                kept_before = alphas[before] if before >= 0 else scheduler.final_alpha_cumprod
                share = kept_before.sqrt() - ((1 - kept_before) * kept / (1 - kept)).sqrt()
                images = plain.prev_sample + share * (clean - plain.pred_original_sample)
            pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            yield pixels.permute(0, 2, 3, 1).numpy()

    def run() -> np.ndarray:
        made = []
        with torch.inference_mode():
            for pixels in batches():
                for image in pixels:
                    Image.fromarray(image).save(io.BytesIO(), "PNG", compress_level=6)
                made.append(pixels)
        return np.concatenate(made)

    return run


def read_pixels(table: pa.Table) -> np.ndarray:
    encoded = pc.struct_field(table[rows.IMAGE].combine_chunks(), "bytes").to_pylist()
    return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in encoded])


# Measuring ---------------------------------------------------------------------------------------


def measure(workload: Workload, pairs: int) -> dict[str, list[Cost]]:
    """The worker in this process against the bare loop."""
    workload.worker.load()
    committed = outputs(workload, compute(workload.worker, workload.shards))
    check(workload, committed)
    return in_turn(
        {
            "bare": in_thread(workload.bare),
            "engine": lambda: compute(workload.worker, workload.shards),
        },
        pairs,
    )


def measure_actor(workload: Workload, pairs: int, threads: int) -> dict[str, list[Cost]]:
    """A worker that was never loaded here, in a warm Ray actor, against the bare loop here."""
    import ray

    actor = ray.remote(num_cpus=threads)(Actor).remote(workload.worker, threads)
    check(workload, outputs(workload, ray.get(actor.compute.remote(workload.shards))))
    seen = [0.0]

    def cpu_clock() -> float:
        # The question costs a call, but outside of what is timed on the wall.
        seen[0] = time.process_time() + ray.get(actor.cpu.remote())
        return seen[0]

    costs = in_turn(
        {
            "bare": in_thread(workload.bare),
            "engine": lambda: ray.get(actor.compute.remote(workload.shards)),
        },
        pairs,
        cpu_clock,
    )
    ray.kill(actor)
    return costs


def in_thread(work: Callable[[], Any]) -> Callable[[], None]:
    """Run in a separate thread like the engine's stages, so that OpenMP works the same way."""

    def run() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    return run


def quieten() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def sleep_in_openmp() -> None:
    """Start this program again with OpenMP's idle threads asleep.

    Each thread that computes has a pool of OpenMP threads, and libgomp lets the first pool spin and
    puts later ones to sleep where there are more threads than cores: up to 2.5 times the CPU time
    for the same work, by who came first [measured on 2 cores that others used].
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gen_overhead", *sys.argv[1:]])


def check(workload: Workload, committed: np.ndarray) -> None:
    expected = workload.bare()
    if committed.shape != expected.shape or not workload.equal(committed, expected):
        raise SystemExit(f"{workload.name}: engine and bare loop differ; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description="engine around a warm model / bare loop")
    parser.add_argument("--quick", action="store_true", help="fewer images and steps, no Ray")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of runs")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads on both sides")
    parser.add_argument("--only", nargs="+", choices=["embed", "generate"], help="not all of them")
    arguments = parser.parse_args()
    sleep_in_openmp()
    # Ray starts its workers at nice 15. Whatever else the machine does would then take from the
    # engine in the actor and hardly from the bare loop in this process: 0.82 where 1.0 was true.
    os.environ["RAY_worker_niceness"] = "0"
    keep_freed_memory()  # of which the engine's workers have the good too
    quieten()
    torch.set_num_threads(arguments.threads)
    # Shards are smaller than by default (512 and 256 rows), so that there is time for many pairs; a
    # commit costs the same and weighs more.
    shards, rows_each, steps = (2, 16, 4) if arguments.quick else (2, 128, 10)
    batch_size = min(rows_each, 32)
    makers = {
        "embed": partial(
            embed_workload, shard_count=shards, shard_rows=rows_each, batch_size=batch_size
        ),
        "generate": partial(
            generate_workload, shard_count=shards, shard_rows=rows_each, batch_size=batch_size,
            steps=steps,
        ),
    }  # fmt: skip
    if not (WEIGHTS.is_dir() and PHOTOGRAPHS.is_dir()):
        print(f"embed: skipped, for {WEIGHTS} or {PHOTOGRAPHS} is not there")
        del makers["embed"]
    chosen = [makers[name] for name in arguments.only or makers if name in makers]
    print(machine("torch", "transformers", "diffusers"))
    print(f"PyTorch threads: {arguments.threads}, pairs: {arguments.pairs}", flush=True)
    with tempfile.TemporaryDirectory(prefix="engine-overhead-") as name:
        store = Store(name)
        report("worker", [(made, measure(made, arguments.pairs)) for made in make(store, chosen)])
        if arguments.quick:
            return
        # Connected by hand, for its settings of a private Ray: a stream would start a pool.
        runtime = RayRuntime("local", 4, warn=print)
        try:
            runtime._connect()
            report(
                "actor",
                [
                    (made, measure_actor(made, arguments.pairs, arguments.threads))
                    for made in make(store, chosen)
                ],
            )
        finally:
            runtime.close()


def make(store: Store, makers: Sequence[Callable[[Store], Workload]]) -> Iterator[Workload]:
    return (maker(store) for maker in makers)


def report(where: str, measured: Sequence[tuple[Workload, dict[str, list[Cost]]]]) -> None:
    header = [
        "bare / engine", "images", "bare image/s", "engine image/s", "wall", "CPU", "target",
    ]  # fmt: skip
    lines = [line_of(workload, where, costs) for workload, costs in measured]
    print_table("Warm, pairs in turn (median [quartiles])", header, lines)


def line_of(workload: Workload, where: str, costs: dict[str, list[Cost]]) -> list[str]:
    wall, cpu = ratios(costs["bare"], costs["engine"])
    rates = [rate(workload, costs[name]).show(0) for name in ("bare", "engine")]
    return [
        f"{workload.name}, {where}", str(workload.images), *rates, wall.show(), cpu.show(),
        "≥ 0.97 (0.99)",
    ]  # fmt: skip


def rate(workload: Workload, costs: Sequence[Cost]) -> Quartiles:
    return quartiles([workload.images / cost.wall for cost in costs])


if __name__ == "__main__":
    main()
