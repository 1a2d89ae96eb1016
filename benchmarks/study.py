"""70,000 images through ingest, embed, cluster, select and match, as a user runs them.

`jobs/cluster.py STUDY --until match` in a separate process, over all digits of mnist at 128 px: a
Parquet file, MobileNetV2 at that size, k-means within each class, representatives, and the most
similar images of train for each of val. Ray starts its pools with the default profile. The 60,000
images of one file are train and the 10,000 of the other val, because `embed` reads no other split;
test, which a study needs, is the negative of one digit of each class. Near duplicates between
splits go to the later one (`audit.on_leak: move`), so that all are embedded.

Ten times a second, a thread reads the resident memory of the driver (the process that the user
started) and of its child processes. A tenth of the images runs first: the last two columns compare
the same step at both sizes, and show what grows in the driver with the images. They include the
driver's unshared memory, because pages of mapped files count as resident until the memory is
needed elsewhere.

The share of the plain loop is the embed step's images/s, including the start of the pool, divided
by those of DataLoader + transformers (`benchmarks.embed`) on some of the images before and after
the run.

`python -m benchmarks.study [--quick] [--images N] [--save-vectors FILE.npy] [--set A.B=C …]`
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks.embed import MNIST, PREPROCESS, WEIGHTS, make_images, plain, quickest
from benchmarks.gen_overhead import in_thread, quieten
from benchmarks.timing import machine, print_table, timed
from engine.core import rows
from engine.core.manifest import Manifest, parse_manifest
from engine.core.store import Store
from engine.data.arrays import vectors_of
from engine.data.decoding import decode
from engine.data.images import encode

ROOT = Path(__file__).parents[1]
ALL = 70_000
STEPS = ("ingest", "embed", "cluster", "select", "match.val")
_MIB = 2**20
_BEGINS = re.compile(r"^(\S+)\s+[0-9a-f]{16}  ")


@dataclass
class Memory:
    """Resident MiB at one time: of the driver, its unshared part, and the largest child process."""

    at: float
    driver: float
    own: float
    worker: float


@dataclass
class Run:
    """One run of the study: the start of each step, and the memory samples."""

    images: int
    store: Store
    began: dict[str, float] = field(default_factory=dict)
    ended: float = 0.0
    seen: list[Memory] = field(default_factory=list)

    def of_step(self, name: str) -> list[Memory]:
        """The memory samples during a step."""
        start, others = self.began[name], [*self.began.values(), self.ended]
        stop = min(at for at in others if at > start)
        return [memory for memory in self.seen if start <= memory.at < stop]

    def manifests(self) -> dict[str, Manifest]:
        found = (
            parse_manifest(self.store, key, self.store.read(key))
            for key in self.store.listing("steps") if key.endswith("/manifest.json")
        )  # fmt: skip
        return {manifest.label: manifest for manifest in found}


# The study ---------------------------------------------------------------------------------------


def write_images(folder: Path, count: int) -> None:
    """`count` digits, evenly from both files of mnist, as train and val, and a few as test."""
    folder.mkdir(parents=True)
    schema = None
    for name, split, share in (("train", "train", 6 / 7), ("test", "val", 1 / 7)):
        table = pq.read_table(MNIST / f"{name}.parquet")
        chosen = np.linspace(0, table.num_rows - 1, min(round(count * share), table.num_rows))
        table = table.take(pa.array(chosen.astype(np.int64)))
        table = table.append_column("split", pa.array([split] * table.num_rows))
        if split == "val":
            table = pa.concat_tables([table, negatives(table)])
        schema = schema or table.schema
        pq.write_table(table.cast(schema), folder / f"{split}.parquet", row_group_size=2_000)


def negatives(table: pa.Table) -> pa.Table:
    """The negative of the first image of each class, as test."""
    labels = table["label"].to_pylist()
    first = table.take(pa.array(sorted({label: row for row, label in
                                        reversed(list(enumerate(labels)))}.values())))  # fmt: skip
    turned = [
        encode(255 - np.asarray(decode(data))[..., None], PREPROCESS)
        for data in pc.struct_field(first["image"].combine_chunks(), "bytes").to_pylist()
    ]
    images = pa.array([{"bytes": data, "path": None} for data in turned], table["image"].type)
    first = first.set_column(first.schema.get_field_index("image"), "image", images)
    split = pa.array(["test"] * first.num_rows)
    return first.set_column(first.schema.get_field_index("split"), "split", split)


def study_of(folder: Path) -> dict[str, Any]:
    return {
        "name": "digits",
        "reader": {"name": "parquet", "root": str(folder), "split": "split"},
        "preprocess": PREPROCESS.model_dump(exclude_defaults=True),
        "split": {"group": "none"},
        "audit": {"on_leak": "move"},
        "embedder": {"name": "cnn", "model": str(WEIGHTS), "input_size": PREPROCESS.size},
        "match": {"val": {"queries": "val", "among": "train"}},
    }


def run_study(folder: Path, count: int, sets: list[str]) -> Run:
    """Run the study over `count` images in `folder`, sampling its memory. Raises `SystemExit` if it
    fails."""
    write_images(folder / "images", count)
    (folder / "study.yaml").write_text(yaml.safe_dump(study_of(folder / "images")))
    profile = {"storage": str(folder / "runs"), "mlflow": "none"}
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile))
    run = Run(count, Store(str(folder / "runs")))
    command = [
        sys.executable, str(ROOT / "jobs" / "cluster.py"), str(folder / "study.yaml"),
        "--profile", str(folder / "profile.yaml"), "--until", "match",
        *(word for value in sets for word in ("--set", value)),
    ]  # fmt: skip
    # Ray starts its workers at nice 15: what else the machine does would take from them, and hardly
    # from the plain loop.
    environment = {"RAY_worker_niceness": "0", **os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as driver:
        watcher = threading.Thread(target=watch, args=(driver.pid, run), daemon=True)
        watcher.start()
        assert driver.stderr is not None
        for line in driver.stderr:
            print(f"  | {line.rstrip()}", flush=True)
            if begins := _BEGINS.match(line):
                run.began[begins[1]] = time.monotonic()
            elif line.startswith("done in"):
                run.ended = time.monotonic()
        code = driver.wait()
    watcher.join()
    if code or not run.ended:
        raise SystemExit(f"the study of {count:,} images ended with {code}")
    return run


def watch(pid: int, run: Run, interval: float = 0.1) -> None:
    """Record the memory of a process and of its child processes until it ends."""
    driver = psutil.Process(pid)
    while not run.ended:
        try:
            resident, own = statm(pid)
            workers = [child.memory_info().rss for child in driver.children(recursive=True)]
        except (psutil.Error, OSError):
            workers = []
            if not psutil.pid_exists(pid) or driver.status() == psutil.STATUS_ZOMBIE:
                return
        run.seen.append(
            Memory(time.monotonic(), resident, own, max(workers, default=0) / _MIB)
        )  # fmt: skip
        time.sleep(interval)


def statm(pid: int) -> tuple[float, float]:
    """Resident MiB of a process: in total, and without file pages and shared memory (Linux)."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    size = os.sysconf("SC_PAGE_SIZE") / _MIB
    return int(pages[1]) * size, (int(pages[1]) - int(pages[2])) * size


# The tables --------------------------------------------------------------------------------------


def report_times(small: Run, large: Run, plain_rates: list[float]) -> None:
    before, after = small.manifests(), large.manifests()
    lines, total = [], [0.0, 0.0]
    for name in STEPS:
        seconds = [held[name].provenance["seconds"] for held in (before, after)]
        total = [sum(pair) for pair in zip(total, seconds, strict=True)]
        lines.append([name, *columns(small, large, seconds), after[name].metrics["headline"]])
    lines.append(["all", *columns(small, large, total), ""])
    header = [
        "step", f"s at {small.images:,}", f"s at {large.images:,}", "image/s", "marginal", "made",
    ]  # fmt: skip
    print_table("Time; the marginal image/s leave out what starts once", header, lines)
    embedded = after["embed"].rows / after["embed"].provenance["seconds"]
    rates = " and ".join(f"{rate:,.0f}" for rate in plain_rates)
    print(
        f"embed step / plain loop: {embedded / np.mean(plain_rates):.2f}"
        f" ({rates} image/s before and after; target ≥ 1.3)"
    )


def columns(small: Run, large: Run, seconds: list[float]) -> list[str]:
    more = seconds[1] - seconds[0]
    marginal = f"{(large.images - small.images) / more:,.0f}" if more > 0 else ""
    return [*(f"{value:,.1f}" for value in seconds), f"{large.images / seconds[1]:,.0f}", marginal]


def report_memory(small: Run, large: Run) -> None:
    lines = []
    for name in STEPS:
        first, second = small.of_step(name), large.of_step(name)
        if not first or not second:
            lines.append([name, *[""] * 8])  # over between two looks
            continue
        tenth = second[len(second) // 10]
        shown = [second[0].driver, tenth.driver, second[-1].driver, peak(second, "driver"),
                 peak(second, "own"), peak(second, "worker")]  # fmt: skip
        ratios = (peak(second, which) / peak(first, which) for which in ("driver", "own"))
        lines.append(
            [name, *(f"{value:,.0f}" for value in shown), *(f"{ratio:.2f}" for ratio in ratios)]
        )
    print_table(
        f"Memory of the driver in MiB, {large.images:,} images",
        ["step", "start", "at 10%", "end", "peak", "own peak", "largest worker",
         f"peak / at {small.images:,}", "own peak / same"],
        lines,
    )  # fmt: skip
    whole = peak(large.seen, "driver") / peak(small.seen, "driver")
    own = peak(large.seen, "own") / peak(small.seen, "own")
    print(f"peak of the whole run / at {small.images:,}: {whole:.3f}, own {own:.3f} (≤ 1.1)")


def peak(seen: list[Memory], which: str) -> float:
    return float(max(getattr(memory, which) for memory in seen))


def save_vectors(run: Run, target: Path) -> None:
    """All vectors of the run, train before val, float32 (n, width), as a .npy file."""
    embed = run.manifests()["embed"]
    shape = (embed.rows, embed.metrics["width"])
    made = np.lib.format.open_memmap(target, "w+", np.float32, shape)
    start = 0
    for table in run.store.tables([part.key for part in embed.parts], [rows.EMBEDDING]):
        made[start : start + table.num_rows] = vectors_of(table)
        start += table.num_rows
    made.flush()
    print(f"{shape[0]:,} x {shape[1]:,} vectors: {target}")


def plain_rate(images: list[bytes], way: tuple[int, int]) -> float:
    """Images per second of DataLoader + transformers."""
    work = plain(images, *way)
    work()
    return len(images) / timed(in_thread(work)).wall


def main() -> None:
    parser = argparse.ArgumentParser(description="a whole study over the digits of mnist")
    parser.add_argument("--images", type=int, default=ALL, help=f"at most {ALL:,}")
    parser.add_argument("--quick", action="store_true", help="300 images")
    parser.add_argument("--save-vectors", type=Path, metavar="FILE.npy")
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="A.B=C",
        help="change a field of the study, or of the profile by profile.a=b; repeatable",
    )  # fmt: skip
    arguments = parser.parse_args()
    if not (WEIGHTS.is_dir() and MNIST.is_dir()):
        raise SystemExit(f"{WEIGHTS} and {MNIST} are needed")
    count = 300 if arguments.quick else min(arguments.images, ALL)
    quieten()
    print(machine("torch", "transformers", "faiss-cpu"), flush=True)
    with tempfile.TemporaryDirectory(prefix="engine-study-") as name:
        folder = Path(name)
        sample = make_images(Store(str(folder / "plain")), 64 if arguments.quick else 512).encoded
        way = quickest(sample[:128])
        small = run_study(folder / "small", max(count // 10, 100), arguments.sets)
        rates = [plain_rate(sample, way)]
        large = run_study(folder / "large", count, arguments.sets)
        rates.append(plain_rate(sample, way))
        report_times(small, large, rates)
        report_memory(small, large)
        if arguments.save_vectors:
            save_vectors(large, arguments.save_vectors)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
