"""Embedding: the engine's worker against DataLoader + transformers.

Digits of mnist at 128 px, MobileNetV2 at that size. The engine's side is the `ShardWorker` that a
Ray actor runs: it reads image parts from Parquet, decodes, hashes, prepares, computes, and commits
every shard to local disk. `plain` is a well-written loop: a `Dataset` that decodes with Pillow, a
`DataLoader` whose batches pass the checkpoint's own image processor, and transformers' model under
`inference_mode`, with the fastest batch size and number of loading processes. It neither hashes nor
stores. Two lower bounds also run: decoding alone, and the forward pass alone over prepared images
in memory, as the engine's embedder computes it. All use the same bytes, weights and number of
PyTorch threads, and alternate; the vectors are compared before anything is timed.

How to read it. `engine / plain` is images/s over images/s. `engine / floor` compares with the
slower of the two bounds: 1 means that decoding, hashing and storing add nothing to the network. The
last table shows CPU time stage by stage, each run separately.

`python -m benchmarks.embed [--quick] [--images N] [--rounds N] [--threads N] [--batch N]`
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.gen_overhead import compute, in_thread, make_context, make_manifest, quieten
from benchmarks.timing import Cost, in_turn, machine, print_table, quartiles, ratios, timed
from engine.core import rows
from engine.core.shards import Shard, ShardSet, parquet_rows
from engine.core.spec import Spec
from engine.core.store import Store
from engine.data.arrays import vectors_of
from engine.data.decoding import decode
from engine.data.images import Preprocess, decode_own, encode, preprocess
from engine.embedders.cnn import CnnSpec
from engine.stages.images import EmbedImages, image_shards
from engine.steps.ingest import ROW_GROUP
from engine.work.memory import keep_freed_memory
from engine.work.shard_worker import ShardWorker
from engine.work.stage import Place

SHARED = Path(__file__).parents[2] / "shared"
WEIGHTS = SHARED / "weights" / "mobilenet_v2"
MNIST = SHARED / "data" / "mnist"
PREPROCESS = Preprocess(size=128, channels="L")
SPEC = CnnSpec(model=str(WEIGHTS), input_size=PREPROCESS.size)
# What the rival chooses from: (batch size, loading processes).
WAYS = ((16, 0), (64, 0), (16, 1), (16, 2))


@dataclass
class Images:
    """Images as ingest writes them, and the shards of the embed step."""

    store: Store
    encoded: list[bytes]
    shards: list[Shard]


def make_images(store: Store, count: int) -> Images:
    """`count` digits, evenly from all classes, preprocessed and encoded by the engine."""
    taken = digits("train", count)
    pictures = [encode(preprocess(decode(data), PREPROCESS), PREPROCESS) for data in taken]
    schema = rows.images_schema({"class": "single"})
    columns: dict[str, Any] = {
        rows.IMAGE_ID: [f"image-{number:06d}" for number in range(count)],
        rows.IMAGE: [{"bytes": data, "path": None} for data in pictures],
        rows.SPLIT: ["train"] * count,
    }
    table = pa.table(
        [pa.array(columns.get(field.name, [None] * count), field.type) for field in schema],
        schema=schema,
    )
    part = make_context(store, {}, Spec()).table(
        "images-train", table, row_group_size=ROW_GROUP, split="train"
    )
    context = make_context(store, {"ingest": make_manifest("ingest", [part])}, Spec())
    return Images(store, pictures, image_shards(context, ("train",)))


def digits(name: str, count: int) -> list[bytes]:
    """Encoded images, evenly from a file of mnist, which is ordered by class."""
    column = pq.read_table(MNIST / f"{name}.parquet", columns=["image"])["image"]
    chosen = np.linspace(0, len(column) - 1, count).astype(np.int64)
    held = pc.struct_field(column.take(pa.array(chosen)).combine_chunks(), "bytes")
    return [bytes(data) for data in held.to_pylist()]


# The two sides -----------------------------------------------------------------------------------


def make_worker(images: Images, threads: int, batch_size: int) -> ShardWorker:
    stages, schema = EmbedImages.stages(SPEC)
    return ShardWorker(
        ShardSet(images.store, "embed"), parquet_rows, stages, schema,
        Place("cpu", 1, batch_size),
    )  # fmt: skip


def engine_vectors(worker: ShardWorker, shards: list[Shard]) -> np.ndarray:
    found = []
    for summary in compute(worker, shards):
        commit = worker.shards.read(summary["shard"], 0)
        assert commit.data is not None
        with worker.shards.store.parquet(commit.data.key) as file:
            found.append(vectors_of(file.read(columns=[rows.EMBEDDING])))
    return np.concatenate(found)


class Pictures(torch.utils.data.Dataset[Image.Image]):
    """Encoded images, decoded to RGB on access."""

    def __init__(self, encoded: list[bytes]) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> Image.Image:
        return Image.open(io.BytesIO(self.encoded[row])).convert("RGB")


class Collate:
    """Images to a batch by the checkpoint's own processor."""

    def __init__(self) -> None:
        from transformers import AutoImageProcessor

        self.processor = AutoImageProcessor.from_pretrained(WEIGHTS, backend="pil")
        side = PREPROCESS.size
        self.size = {"height": side, "width": side}

    def __call__(self, pictures: list[Image.Image]) -> torch.Tensor:
        made: torch.Tensor = self.processor(
            pictures, size=self.size, do_center_crop=False, return_tensors="pt"
        )["pixel_values"]
        return made


def plain(encoded: list[bytes], batch_size: int, loaders: int) -> Callable[[], np.ndarray]:
    """DataLoader + transformers with `loaders` loading processes; 0 decodes in this one."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(WEIGHTS).eval()
    batches = torch.utils.data.DataLoader(
        Pictures(encoded), batch_size=batch_size, num_workers=loaders, collate_fn=Collate(),
        persistent_workers=loaders > 0,
    )  # fmt: skip

    def run() -> np.ndarray:
        with torch.inference_mode():
            return np.concatenate([model(batch).pooler_output.flatten(1) for batch in batches])

    return run


def floors(
    worker: ShardWorker, encoded: list[bytes], threads: int, batch_size: int
) -> dict[str, Callable[[], Any]]:
    """Decoding alone, and the forward pass alone over prepared images."""
    prepare, forward = worker.stages[-2:]
    batches = []
    for start in range(0, len(encoded), batch_size):
        pixels = np.stack([decode_own(data) for data in encoded[start : start + batch_size]])
        batches.append({"prepared": prepare({"pixels": pixels})["prepared"]})
    pool = ThreadPoolExecutor(threads)

    def decoding() -> None:
        for _ in pool.map(decode_own, encoded, chunksize=32):
            pass

    def computing() -> None:
        for batch in batches:
            forward(batch)

    return {"decode": decoding, "forward": computing}


# Where the time goes -----------------------------------------------------------------------------


def stage_costs(worker: ShardWorker, images: Images, batch_size: int) -> dict[str, Cost]:
    """Seconds of each stage over all images, one after the other."""
    tables = [parquet_rows(images.store, shard.task) for shard in images.shards]
    batches = [
        {name: table[name].slice(start, batch_size) for name in table.column_names}
        for table in tables for start in range(0, table.num_rows, batch_size)
    ]  # fmt: skip
    found = {}
    for stage in worker.stages:
        made: list[Any] = []
        work = stage.__call__

        def run(work: Any = work, made: list[Any] = made, batches: Any = batches) -> None:
            made += map(work, batches)

        found[type(stage).__name__] = timed(in_thread(run))
        batches = made
    found["read, write and commit"] = timed(lambda: commit_all(worker, images, batches))
    return found


def commit_all(worker: ShardWorker, images: Images, batches: list[Any]) -> None:
    """The worker's own work around its stages, on their output."""
    held: Iterator[Any] = iter(batches)
    quick = ShardWorker(
        ShardSet(images.store, "commit"), worker.rows_of, [Replay(held)], worker.schema,
        worker.place,
    )  # fmt: skip
    quick.load()
    compute(quick, images.shards)


class Replay:
    """A stage that returns earlier results."""

    reads = ()
    writes = (rows.EMBEDDING, rows.PHASH, rows.STATUS)
    device = "cpu"

    def __init__(self, held: Iterator[Any]) -> None:
        self.held = held

    def load(self, place: Place) -> None:
        return

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, **{name: value for name, value in next(self.held).items()
                            if name in self.writes}}  # fmt: skip


# Measuring ---------------------------------------------------------------------------------------


def measure(images: Images, rounds: int, threads: int, batch_size: int) -> None:
    count = len(images.encoded)
    worker = make_worker(images, threads, batch_size)
    worker.load()
    rival_batch, loaders = quickest(images.encoded[: min(count, 256)])
    rival = plain(images.encoded, rival_batch, loaders)
    cosine = cosines(engine_vectors(worker, images.shards), rival())
    print(f"cosine of the vectors, engine and plain: at least {cosine.min():.6f} (≥ 0.999)")
    if cosine.min() < 0.999:
        raise SystemExit("engine and plain differ; nothing was timed")
    alone = floors(worker, images.encoded, threads, batch_size)
    costs = in_turn(
        {
            "plain": in_thread(rival),
            "engine": lambda: compute(worker, images.shards),
            **{name: in_thread(work) for name, work in alone.items()},
        },
        rounds,
    )
    rates = {
        name: quartiles([count / cost.wall for cost in held]).show(0)
        for name, held in costs.items()
    }
    print_table(
        f"{count:,} images; the engine's batches {batch_size}, plain's {rival_batch} by {loaders}"
        " loading processes",
        ["image/s", *rates], [["median [quartiles]", *rates.values()]],
    )  # fmt: skip
    slower = max(alone, key=lambda name: quartiles([cost.wall for cost in costs[name]]).median)
    lines = []
    for name, goal in (("plain", "≥ 1.3"), (slower, "≥ 0.95")):
        wall, cpu = ratios(costs[name], costs["engine"])
        # Processes of the loader are not in this one's clock.
        seen = "" if name == "plain" and loaders else cpu.show()
        lines.append([f"engine / {name}", wall.show(), seen, goal])
    print_table("Images/s, engine over others", ["", "wall", "CPU", "target"], lines)
    spent = stage_costs(worker, images, batch_size)
    total = sum(cost.cpu for cost in spent.values())
    print_table(
        "Where a processor's time goes, each stage by itself",
        ["", "µs per image", "share"],
        [[name, f"{cost.cpu / count * 1e6:,.0f}", f"{cost.cpu / total:.1%}"]
         for name, cost in spent.items()],
    )  # fmt: skip


def quickest(encoded: list[bytes]) -> tuple[int, int]:
    """The rival's fastest batch size and number of loading processes on this machine."""
    seconds = {}
    for way in WAYS:
        work = plain(encoded, *way)
        work()
        seconds[way] = timed(in_thread(work)).wall
    return min(seconds, key=lambda way: seconds[way])


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    found: np.ndarray = (first * second).sum(1) / lengths
    return found


def sleep_in_openmp() -> None:
    """Restart with OpenMP's idle threads asleep: see `gen_overhead.sleep_in_openmp`."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.embed", *sys.argv[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description="embedding against DataLoader + transformers")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads on all sides")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="few images and rounds")
    arguments = parser.parse_args()
    if not (WEIGHTS.is_dir() and MNIST.is_dir()):
        raise SystemExit(f"{WEIGHTS} and {MNIST} are needed")
    if arguments.quick:
        arguments.images, arguments.rounds = 256, 2
    sleep_in_openmp()
    keep_freed_memory()  # of which the engine's workers have the good too
    quieten()
    torch.set_num_threads(arguments.threads)
    print(machine("torch", "transformers"))
    print(f"PyTorch threads: {arguments.threads}, rounds: {arguments.rounds}", flush=True)
    with tempfile.TemporaryDirectory(prefix="engine-embed-") as name:
        images = make_images(Store(name), arguments.images)
        measure(images, arguments.rounds, arguments.threads, arguments.batch)


if __name__ == "__main__":
    main()
