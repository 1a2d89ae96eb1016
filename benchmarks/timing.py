"""Shared by all benchmarks: running things in turn, ratios with quartiles, tables, the machine.

The time of identical work varies several-fold on a shared machine, so no absolute time is a claim.
Two things run in turn (A B A B …) in one process and the ratio is taken pair by pair: a slow minute
affects both. CPU time varies less than wall time and is printed next to it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil


class Cost(NamedTuple):
    """Seconds of wall time and of CPU time (of all threads; `CpuOfTree`: of all processes)."""

    wall: float
    cpu: float


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float

    def show(self, digits: int = 3) -> str:
        """`median [low, high]`; only the median if there is one value."""
        if self.low == self.high:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} [{self.low:,.{digits}f}, {self.high:,.{digits}f}]"


def quartiles(values: Sequence[float]) -> Quartiles:
    """First quartile, median and third quartile; three times the same for one value."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(low, median, high)


def timed(work: Callable[[], Any], cpu_clock: Callable[[], float] = time.process_time) -> Cost:
    """Run `work` once."""
    cpu, wall = cpu_clock(), time.perf_counter()
    work()
    return Cost(time.perf_counter() - wall, cpu_clock() - cpu)


def in_turn(
    works: Mapping[str, Callable[[], Any]],
    rounds: int,
    cpu_clock: Callable[[], float] = time.process_time,
) -> dict[str, list[Cost]]:
    """Run all works once per round, in order: A B A B …"""
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            costs[name].append(timed(work, cpu_clock))
    return costs


def ratios(above: Sequence[Cost], below: Sequence[Cost]) -> tuple[Quartiles, Quartiles]:
    """Quartiles of `above / below`, pair by pair, of wall time and of CPU time."""
    pairs = list(zip(above, below, strict=True))
    return (
        quartiles([first.wall / second.wall for first, second in pairs]),
        quartiles([first.cpu / second.cpu for first, second in pairs]),
    )


class CpuOfTree:
    """CPU time of this process and all its descendants, including a private Ray. Processes come and
    go (each pool of actors has its own), and the usage of a dead one can no longer be read. So a
    thread samples every `interval` seconds, and at most that much of each is lost. Call it to read
    the clock."""

    def __init__(self, interval: float = 0.25) -> None:
        self.interval, self.seen = interval, dict[tuple[int, float], float]()
        self.root = psutil.Process()
        self.ended, self.lock = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="cpu of tree")

    def __enter__(self) -> CpuOfTree:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.ended.set()
        self.thread.join()

    def __call__(self) -> float:
        with self.lock:
            for process in [self.root, *self.root.children(recursive=True)]:
                try:
                    times = process.cpu_times()
                    # The time of creation tells two processes apart that bore the same number.
                    key = (process.pid, process.create_time())
                    self.seen[key] = times.user + times.system
                except psutil.Error:
                    continue
            return sum(self.seen.values())

    def _watch(self) -> None:
        while not self.ended.wait(self.interval):
            self()


def memory_mib() -> dict[str, float]:
    """Resident memory of this process in MiB, now and at its peak since `forget_peak`."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(rest.split()[0]) / 1024
    return {"now": found["VmRSS"], "peak": found["VmHWM"]}


def forget_peak() -> None:
    """Reset the peak of resident memory to the present value (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def print_table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Print a table with a left-aligned first column and right-aligned others."""
    table = [list(header), *[list(line) for line in lines]]
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    print(f"\n{title}")
    for number, line in enumerate(table):
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))
    sys.stdout.flush()


def machine(*packages: str) -> str:
    """One paragraph on the machine and date, with the limits of the figures: hashing and disk
    speed."""
    names = ("ray", "pyarrow", "numpy", "pillow", *packages)
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}, {_cpu_name()}, {os.cpu_count()} cores,"
        f" {memory:.0f} GiB, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()},"
        f" {', '.join(f'{name} {version(name)}' for name in names)};"
        f" SHA-256 {sha256_rate():,.0f} MB/s, write + fsync {fsync_rate():,.0f} MB/s"
        f" in {tempfile.gettempdir()}"
    )


def sha256_rate(size: int = 2**20, repeats: int = 8) -> float:
    """MB/s of SHA-256 in one thread, the median of a few runs."""
    data = os.urandom(size)
    seconds = [timed(lambda: hashlib.sha256(data).digest()).wall for _ in range(repeats)]
    return size / statistics.median(seconds) / 1e6


def fsync_rate(size: int = 4 * 2**20, repeats: int = 5) -> float:
    """MB/s of writing a file of `size` bytes, including fsync."""
    data = os.urandom(size)

    def write() -> None:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return size / statistics.median(timed(write).wall for _ in range(repeats)) / 1e6


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
