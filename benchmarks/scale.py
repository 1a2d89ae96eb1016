"""Scale: the cost of the engine without a model.

A generator that does nothing returns pre-encoded images of 64 x 64 through the production path: the
real request step, `Context.compute`, a pool of one Ray Data actor, a `ShardWorker`, commits on
local disk. What remains is orchestration: reading requests, digests, Arrow, commit records, Ray.
In turn with it run

    bare          a loop in this process that reads the same requests and writes the same Parquet
                  files: no digest, no fsync, no commit
    pixels        Ray Data in its usual form: an actor puts the decoded images (uint8, 64 x 64 x 3)
                  into the object store, and `Dataset.write_parquet` writes them. The target refers
                  to this rival
    encoded       the same with encoded images, an eighth of the bytes: the best that the object
                  store and `write_parquet` can reach (also without fsync)

How to read it. The marginal cost is (t100k - t10k) / 90k, so that the start of Ray and of the pool
cancels out if it took equally long both times: it is printed, and one second more raises the
marginal cost by 11 µs. `in the stream` is the same from the first summary to the last, without any
start. CPU time covers all processes of the private Ray. Every size runs in a separate process, so
that the driver's resident memory is that of one run; the requests are planned in yet another. The
images are small drawings (about 1 kB), as hashing and the disk are not orchestration; `--photo`
uses images of about 7 kB, where SHA-256 and fsync dominate on a machine without SHA instructions:
the line `hash floor` says by how much.

`python -m benchmarks.scale [--quick] [--photo] [--rounds N]`
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from benchmarks.gen_overhead import make_manifest
from benchmarks.timing import (
    Cost,
    CpuOfTree,
    Quartiles,
    forget_peak,
    machine,
    memory_mib,
    print_table,
    quartiles,
    ratios,
    sha256_rate,
    timed,
)
from engine.context import Context
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.shards import Shard, ShardSet, image_column, parquet_rows
from engine.core.spec import Spec
from engine.core.step import Step, Subject
from engine.core.store import Store
from engine.data.images import Preprocess, decode_own, encode
from engine.generators.ddpm import DdpmSpec
from engine.profile import Profile
from engine.runtime.base import Worker
from engine.runtime.cluster import RayRuntime
from engine.settings import Request as RequestSettings
from engine.steps.request import Request, RequestSpec, planned_shards
from engine.work.resources import StageResources
from engine.work.stage import Batch, Device, Place, Stage

SIZES = (1_000, 10_000, 100_000)
QUICK_SIZES = (1_000, 10_000)
WARM_UP = 1_000
SHARD_SIZE = 512
CLASSES = ("left", "right")
TASKS: dict[str, Any] = {"side": "single"}
PREPROCESS = Preprocess(size=64)
KEY = "0" * 16
WAYS = ("engine", "pixels", "encoded", "bare")
RESOURCES: StageResources = Profile().stage("generate")


# What is run -------------------------------------------------------------------------------------


def encoded_images(photo: bool, count: int = 64) -> list[bytes]:
    """A few encoded images: a filled ellipse, or an image as detailed as a photograph."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        if photo:
            coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32)
            noisy = smooth + random.normal(0, 2, smooth.shape)
            pixels = noisy.clip(0, 255).astype(np.uint8)
        else:
            image = Image.new("RGB", (64, 64), "white")
            left, top, right, bottom = (int(value) for value in random.integers(0, 28, 4))
            box = (left, top, 63 - right, 63 - bottom)
            ImageDraw.Draw(image).ellipse(box, "navy")
            small = image.resize((48, 48), Image.Resampling.BICUBIC)
            pixels = np.asarray(small.resize((64, 64), Image.Resampling.NEAREST))
        images.append(encode(pixels, PREPROCESS))
    return images


def add_images(table: pa.Table, encoded: Sequence[bytes]) -> pa.Table:
    """Requests with the columns that generation adds."""
    ids = table[rows.IMAGE_ID].to_pylist()
    added = {name: table[name] for name in table.column_names}
    added[rows.IMAGE] = image_column(chosen(encoded, ids), ids, ".png")
    added[rows.SOURCE] = pa.array(["noop"] * len(ids))
    added[rows.GENERATOR_KEY] = pa.array([KEY] * len(ids))
    schema = rows.synthetic_schema(TASKS)
    return pa.table([added[field.name] for field in schema], schema=schema)


def chosen(encoded: Sequence[Any], ids: Sequence[str]) -> list[Any]:
    """An image for each id, independent of its batch."""
    return [encoded[int(image_id[:2], 16) % len(encoded)] for image_id in ids]


class Noop:
    """A stage that replaces `Sample` and `Encode`."""

    reads: ClassVar[tuple[str, ...]] = (rows.IMAGE_ID,)
    writes: ClassVar[tuple[str, ...]] = (rows.IMAGE, rows.SOURCE, rows.GENERATOR_KEY)
    device: ClassVar[Device] = "cpu"

    def __init__(self, encoded: Sequence[bytes]) -> None:
        self.encoded = list(encoded)

    def load(self, place: Place) -> None:
        return

    def __call__(self, batch: Batch) -> Batch:
        ids = batch[rows.IMAGE_ID].to_pylist()
        return {
            **batch,
            rows.IMAGE: image_column(chosen(self.encoded, ids), ids, ".png"),
            rows.SOURCE: ["noop"] * len(ids),
            rows.GENERATOR_KEY: [KEY] * len(ids),
        }


class Emit:
    """An actor of `write_parquet`: the image rows leave it through the object store."""

    def __init__(self, store: Store, encoded: Sequence[bytes], pixels: bool) -> None:
        self.store, self.encoded = store, list(encoded)
        self.decoded = [decode_own(image) for image in encoded] if pixels else None

    def __call__(self, batch: pa.Table) -> Iterator[Any]:
        for call in batch["item"].to_pylist():
            for text in json.loads(call):
                requests = parquet_rows(self.store, Shard.from_json(text).task)
                if self.decoded is None:
                    yield add_images(requests, self.encoded)
                else:
                    columns = {name: requests[name].to_numpy() for name in requests.column_names}
                    columns["pixels"] = np.stack(chosen(self.decoded, columns[rows.IMAGE_ID]))
                    yield columns


class Watched:
    """The runtime, which records the number of shards and the time of each report."""

    def __init__(self, runtime: RayRuntime) -> None:
        self.runtime, self.shards, self.began = runtime, 0, 0.0
        self.times: list[tuple[float, int]] = []

    def stream(
        self, worker: Worker, shards: Sequence[Shard], resources: StageResources
    ) -> Iterator[dict[str, Any]]:
        self.shards, self.times, self.began = len(shards), [], time.perf_counter()
        for summary in self.runtime.stream(worker, shards, resources):
            self.times.append((time.perf_counter(), summary["rows"]))
            yield summary

    def start(self) -> float:
        """Seconds until the first summary: the pool starts and computes the first shards."""
        return self.times[0][0] - self.began

    def in_stream(self) -> float | None:
        """Seconds per image from the first summary to the last."""
        if len(self.times) < 4:
            return None
        images = sum(count for _, count in self.times[1:])
        return (self.times[-1][0] - self.times[0][0]) / images


def make_context(store: Store, runtime: Any, inputs: dict[str, Manifest], spec: Spec) -> Context:
    return Context(
        step=Step("generate", Subject(), spec, {}),
        inputs=inputs,
        store=store,
        runtime=runtime,
        stage_resources=lambda _: RESOURCES,
        fit_resources=Profile().fit,
        device="cpu",
        interval=1e9,
    )


def plan_requests(store: Store, count: int) -> Manifest:
    """Run the real request step for `count` images over a train split of a hundred."""
    spec = RequestSpec(
        request=RequestSettings(per_class=count // len(CLASSES), shard_size=SHARD_SIZE),
        generator=DdpmSpec(), generator_key=KEY, preprocess=PREPROCESS,
        task="side", tasks=TASKS, seed=0,
    )  # fmt: skip
    context = make_context(store, None, {}, spec)
    index = pa.table(
        {
            rows.IMAGE_ID: [f"real-{row}" for row in range(100)],
            rows.label_column("side"): [CLASSES[row % 2] for row in range(100)],
            rows.GROUP_ID: [str(row) for row in range(100)],
        }
    )
    part = context.table("index", index, split="train")
    ingest = make_manifest("ingest", [part], {"counts": {"train": dict.fromkeys(CLASSES, 50)}})
    result = Request().run(make_context(store, None, {"ingest": ingest}, spec))
    return make_manifest("request", result.parts)


def run_engine(context: Context, shards: Sequence[Shard], stages: list[Stage], to: str) -> Any:
    """The work of `Generate.run` up to its commits."""
    return context.compute(
        "generate", shards, rows_of=parquet_rows, stages=stages,
        schema=rows.synthetic_schema(TASKS), fingerprint={}, prefix=to,
    )  # fmt: skip


def run_write_parquet(
    store: Store, shards: Sequence[Shard], encoded: Sequence[bytes], pixels: bool, to: str
) -> None:
    """Image rows from a pool of the same size through the object store into Parquet files."""
    import ray
    from ray.data import ActorPoolStrategy

    size = RESOURCES.shards_per_call
    calls = [
        json.dumps([shard.to_json() for shard in shards[start : start + size]])
        for start in range(0, len(shards), size)
    ]
    ray.data.from_items(calls, override_num_blocks=len(calls)).map_batches(
        Emit,
        fn_constructor_args=(store, encoded, pixels),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=RESOURCES.actors, max_tasks_in_flight_per_actor=2),
        num_cpus=RESOURCES.cpus,
    ).write_parquet(store.location(to))


def run_bare(store: Store, shards: Sequence[Shard], encoded: Sequence[bytes], to: str) -> None:
    folder = Path(store.location(to))
    folder.mkdir(parents=True)
    for shard in shards:
        table = add_images(parquet_rows(store, shard.task), encoded)
        pq.write_table(table, folder / f"{shard.name}.parquet", compression="none")


# One size, in a process of its own ---------------------------------------------------------------


def measure_requests(store: Store, sizes: Sequence[int], photo: bool, rounds: int) -> Any:
    """In a child process: plan the requests of one size."""
    plan_requests(store, 10)
    forget_peak()
    before = memory_mib()
    manifests = []
    cost = timed(lambda: manifests.append(plan_requests(store, sizes[0])))
    after = memory_mib()
    return {
        "manifest": manifests[0].model_dump_json(),
        "cost": cost,
        "grown": after["peak"] - before["now"],
    }


def measure_size(
    store: Store, sizes: Sequence[int], photo: bool, rounds: int, manifests: dict[str, str]
) -> Any:
    """In a child process: all three ways in turn at each of `sizes`, then resume, on one Ray."""
    encoded = encoded_images(photo)
    runtime = RayRuntime("local", 4, warn=print)
    watched = Watched(runtime)

    def prepare(size: int) -> tuple[list[Shard], dict[str, Callable[[str], Any]]]:
        request = Manifest.model_validate_json(manifests[str(size)])
        context = make_context(store, watched, {"request": request}, Spec())
        shards = list(planned_shards(context))
        return shards, {
            "engine": partial(run_engine, context, shards, [Noop(encoded)]),
            "pixels": partial(run_write_parquet, store, shards, encoded, True),
            "encoded": partial(run_write_parquet, store, shards, encoded, False),
            "bare": partial(run_bare, store, shards, encoded),
        }

    found = {}
    with CpuOfTree() as clock:
        try:
            for name, way in prepare(WARM_UP)[1].items():
                way(f"warm-{name}")
            compare_outputs(store)
            for size in sizes:
                found[str(size)] = measure_ways(store, *prepare(size), watched, clock, rounds)
        finally:
            runtime.close()
            for name in WAYS:
                shutil.rmtree(store.location(f"warm-{name}"), ignore_errors=True)
    return found


def compare_outputs(store: Store) -> None:
    """Check that every way wrote the same images for the same requests."""
    tables = {}
    for name in WAYS:
        image = "pixels" if name == "pixels" else rows.IMAGE
        written = [
            pq.read_table(path, columns=[rows.IMAGE_ID, rows.SEED, image])
            for path in sorted(Path(store.location(f"warm-{name}")).rglob("*.parquet"))
        ]
        # Files of another writer lack nothing but the mark for Hugging Face.
        table = pa.concat_tables([table.replace_schema_metadata() for table in written])
        tables[name] = table.sort_by(rows.IMAGE_ID)
    engine, pixels = tables["engine"], tables.pop("pixels")
    decoded = [decode_own(image["bytes"]) for image in engine[rows.IMAGE].to_pylist()]
    shown = np.stack([np.asarray(image) for image in pixels["pixels"].to_numpy()])
    if (
        engine.num_rows != WARM_UP
        or not all(engine.equals(table) for table in tables.values())
        or not np.array_equal(shown.reshape(-1, 64, 64, 3), np.stack(decoded))
    ):
        raise SystemExit(f"the ways wrote different images: {list(tables)}")


def measure_ways(
    store: Store,
    shards: list[Shard],
    ways: dict[str, Callable[[str], Any]],
    watched: Watched,
    clock: CpuOfTree,
    rounds: int,
) -> dict[str, Any]:
    """Costs of each way, the driver's memory in the first run of the engine, and resume."""
    result: dict[str, Any] = {name: [] for name in WAYS} | {"in_stream": [], "start": []}
    for number in range(rounds):
        for name, way in ways.items():
            kept: list[Any] = []
            first = name == "engine" and number == 0
            if first:
                forget_peak()
                result["memory_before"] = memory_mib()["now"]
            # Nothing of the run before may still wait for the disk.
            os.sync()
            to = f"{name}-{number}"
            cost = timed(lambda way=way, to=to, kept=kept: kept.append(way(to)), clock)
            result[name].append(cost)
            if name == "engine":
                result["in_stream"].append(watched.in_stream())
                result["start"].append(watched.start())
            if first:
                result["memory"] = memory_mib()
            if name != "engine" or number + 1 < rounds:
                shutil.rmtree(store.location(to))
    last = f"engine-{rounds - 1}"
    result |= measure_resume(store, shards, ways["engine"], watched, last)
    shutil.rmtree(store.location(last))
    return result


def measure_resume(
    store: Store, shards: list[Shard], engine: Callable[[str], Any], watched: Watched, to: str
) -> dict[str, Any]:
    """The same call when everything is committed, and when every tenth commit is missing."""
    watched.shards = 0
    nothing = timed(lambda: engine(to)).wall
    regenerated_for_nothing = watched.shards
    lost = shards[::10]
    for shard in lost:
        store.delete(store.join(to, "commits", f"{shard.name}.0.json"))
    some = timed(lambda: engine(to)).wall
    standing = ShardSet(store, to).committed()
    return {
        "nothing": nothing, "nothing_regenerated": regenerated_for_nothing,
        "some": some, "missing": len(lost), "regenerated": len(watched.times),
        "whole": set(standing) == {shard.name for shard in shards},
    }  # fmt: skip


def child(function: Callable[..., Any], folder: Path, *arguments: Any) -> Any:
    """Call a function of this module in a separate process; the result is returned as JSON."""
    call, answer = folder / "call.json", folder / "answer.json"
    call.write_text(json.dumps([function.__name__, str(folder / "store"), *arguments]))
    command = [sys.executable, "-m", "benchmarks.scale", "--child", str(call), str(answer)]
    if subprocess.run(command, cwd=Path(__file__).parents[1]).returncode:
        raise SystemExit(f"{function.__name__} failed, see above")
    return json.loads(answer.read_text())


def answer_as_child(call: Path, answer: Path) -> None:
    name, url, *arguments = json.loads(call.read_text())
    function = {"measure_requests": measure_requests, "measure_size": measure_size}[name]
    answer.write_text(json.dumps(function(Store(url), *arguments)))


# What is printed ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="what the engine costs beside the model")
    parser.add_argument("--quick", action="store_true", help="1k and 10k, one round, one Ray")
    parser.add_argument("--photo", action="store_true", help="images of 7 kB rather than 1 kB")
    parser.add_argument("--rounds", type=int, help="how often each way runs at each size")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        answer_as_child(*arguments.child)
        return
    sizes = QUICK_SIZES if arguments.quick else SIZES
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    encoded = encoded_images(arguments.photo)
    image_bytes = sum(map(len, encoded)) / len(encoded)
    print(machine())
    print(
        f"no-op generator, 64 x 64, {image_bytes:,.0f} bytes per image, shards of {SHARD_SIZE},"
        f" batches of {RESOURCES.batch_size}, {RESOURCES.actors} actor, rounds: {rounds}",
        flush=True,
    )
    planned, found = {}, {}
    with tempfile.TemporaryDirectory(prefix="engine-scale-") as name:
        folder = Path(name)
        for size in sizes:
            planned[size] = child(measure_requests, folder, [size], arguments.photo, 1)
        manifests = {str(size): entry["manifest"] for size, entry in planned.items()}
        for group in [sizes] if arguments.quick else [(size,) for size in sizes]:
            answer = child(measure_size, folder, list(group), arguments.photo, rounds, manifests)
            found |= {size: answer[str(size)] for size in group}
    report_costs(found, planned, image_bytes)
    report_marginal(found, planned, image_bytes)
    report_memory(found, planned)
    report_resume(found)


def report_costs(found: dict[int, Any], planned: dict[int, Any], image_bytes: float) -> None:
    lines = []
    for size, entry in found.items():
        for name in WAYS:
            costs = [Cost(*cost) for cost in entry[name]]
            wall = quartiles([cost.wall for cost in costs])
            each = quartiles([cost.wall / size * 1e6 for cost in costs])
            cpu = quartiles([cost.cpu / size * 1e6 for cost in costs])
            against = "" if name == "engine" else ratio_to_engine(entry, name)
            lines.append([f"{size:,} {name}", wall.show(2), each.show(1), cpu.show(1), against])
        cost = Cost(*planned[size]["cost"])
        lines.append(
            [f"{size:,} request step", f"{cost.wall:.2f}", f"{cost.wall / size * 1e6:.1f}",
             f"{cost.cpu / size * 1e6:.1f}", ""]
        )  # fmt: skip
    header = ["images, way", "seconds", "µs per image", "CPU µs per image", "wall / engine"]
    print_table("SetSums runs, start of the pool included (median [quartiles])", header, lines)


def ratio_to_engine(entry: dict[str, Any], name: str) -> str:
    wall, _ = ratios(
        [Cost(*cost) for cost in entry[name]], [Cost(*cost) for cost in entry["engine"]]
    )
    return wall.show(2)


def report_marginal(found: dict[int, Any], planned: dict[int, Any], image_bytes: float) -> None:
    small, large = sorted(found)[-2:]
    wall = {name: marginal(found, name, 0) for name in WAYS}
    cpu = {name: marginal(found, name, 1) for name in WAYS}
    lines = []
    for name in WAYS:
        to_reach = {"engine": "≤ 35"}.get(name, "")
        lines.append([f"{name}, wall", wall[name].show(1), to_reach])
        lines.append([f"{name}, CPU of all processes", cpu[name].show(1), ""])
    inside = [value * 1e6 for value in found[large]["in_stream"] if value is not None]
    if inside:
        lines.append([f"engine, in the stream of {large:,}", quartiles(inside).show(1), ""])
    for size in (small, large):
        starts = quartiles(found[size]["start"])
        lines.append([f"(start of the pool, {size:,}: {starts.show(2)} s)", "", ""])
    floor = 2 * image_bytes / sha256_rate()
    lines.append(["hash floor: SHA-256 of every byte, twice", f"{floor:.1f}", ""])
    requests = [planned[size]["cost"][0] for size in (small, large)]
    lines.append(
        ["request step, wall", f"{(requests[1] - requests[0]) / (large - small) * 1e6:.1f}", ""]
    )
    header = ["marginal cost", "µs per image", "target"]
    print_table(f"From {small:,} to {large:,} images", header, lines)
    for label, costs in (("wall", wall), ("CPU", cpu)):
        for name, goal in (("pixels", " (target: ≥ 4)"), ("encoded", "")):
            shown = costs[name].median / costs["engine"].median
            print(f"write_parquet of {name} / engine, marginal {label}: {shown:.2f}{goal}")


def marginal(found: dict[int, Any], name: str, clock: int) -> Quartiles:
    """Marginal µs per image between the two largest sizes, over all pairs of their rounds."""
    small, large = sorted(found)[-2:]
    return quartiles(
        [
            (more[clock] - less[clock]) / (large - small) * 1e6
            for more in found[large][name]
            for less in found[small][name]
        ]
    )


def report_memory(found: dict[int, Any], planned: dict[int, Any]) -> None:
    lines = []
    for size, entry in found.items():
        memory, before = entry["memory"], entry["memory_before"]
        lines.append(
            [f"{size:,}", f"{before:.0f}", f"{memory['now']:.0f}", f"{memory['peak']:.0f}",
             f"{planned[size]['grown']:.0f}"]
        )  # fmt: skip
    header = ["images", "warm", "after", "peak", "request step grows by"]
    print_table("Memory of the driver in the first run of the engine, MiB", header, lines)
    small, large = sorted(found)[-2:]
    shown = [
        found[large]["memory"][name] / found[small]["memory"][name] for name in ("now", "peak")
    ]
    print(
        f"{large:,} / {small:,}: after {shown[0]:.3f}, peak {shown[1]:.3f}"
        " (target, 100k / 10k: ≤ 1.1)"
    )


def report_resume(found: dict[int, Any]) -> None:
    lines = []
    for size, entry in found.items():
        full = quartiles([cost[0] for cost in entry["engine"]]).median
        lines.append(
            [f"{size:,}", f"{full:.2f}", f"{entry['nothing']:.3f}",
             f"{entry['nothing'] / full:.3f}", f"{entry['some']:.2f}",
             f"{entry['missing']} → {entry['regenerated']}", "yes" if entry["whole"] else "NO"]
        )  # fmt: skip
        if entry["nothing_regenerated"]:
            print(f"{size:,}: {entry['nothing_regenerated']} shards made again for nothing")
    header = [
        "images", "full, s", "nothing to do, s", "/ full (≤ 0.1)", "10% missing, s",
        "missing → regenerated", "whole",
    ]  # fmt: skip
    print_table("Resume", header, lines)


if __name__ == "__main__":
    main()
