"""k-means of `engine/vectors/kmeans.py` against scikit-learn's.

    engine         as called by the step `cluster`
    engine, sample centroids learned from a sample (`cluster.sample`), all rows assigned
    lloyd          scikit-learn's KMeans: k-means++, n_init=1
    mini batch     scikit-learn's MiniBatchKMeans with its defaults; it stops when ten batches in a
                   row bring no improvement
    mini batch, 10 passes   the same without early stopping, ten times over the rows

All use the same rows, k, seeds and threads, in turn, and outputs are compared before anything is
timed. Inertia is the sum of squared distances of all rows to the nearest centroid, computed in the
same way for all.

`python -m benchmarks.kmeans [--vectors FILE.npy …] [--rows N] [--width N] [--k N] [--rounds N]
[--threads N] [--without NAME …] [--quick]`

Without `--vectors`: two random mixtures of 200,000 x 512 and 70,000 x 1,280.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from benchmarks.timing import (
    Cost,
    forget_peak,
    machine,
    memory_mib,
    print_table,
    quartiles,
    ratios,
    timed,
)
from engine.core.progress import say
from engine.vectors.kmeans import k_means

ENGINE, SAMPLED = "engine", "engine, sample"
LLOYD, MINI, LONG = "lloyd", "mini batch", "mini batch, 10 passes"
SAMPLE = 20_000
_CENTRES = 1_000
_BLOCK = 8_192


def mixture(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows, float32, around 1,000 centres of very unequal size."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((_CENTRES, width), dtype=np.float32)
    weights = 1 / np.arange(1, _CENTRES + 1)
    of = random.choice(_CENTRES, count, p=weights / weights.sum())
    rows = random.standard_normal((count, width), dtype=np.float32)
    for start in range(0, count, _BLOCK):
        rows[start : start + _BLOCK] += centres[of[start : start + _BLOCK]]
    return rows


def inertia(vectors: np.ndarray, centroids: np.ndarray) -> float:
    """Inertia in float64, independent of either side's code."""
    middle = centroids.astype(np.float64)
    squares, total = np.square(middle).sum(1), 0.0
    for start in range(0, len(vectors), _BLOCK):
        rows = vectors[start : start + _BLOCK].astype(np.float64)
        nearest = (squares - 2 * rows @ middle.T).min(1) + np.square(rows).sum(1)
        total += float(nearest.sum())
    return total


def works(k: int, passes: int) -> dict[str, Callable[[np.ndarray, int], np.ndarray]]:
    """The methods: from rows and a seed to centroids; each also assigns all rows."""

    def mini(**fields: Any) -> Callable[[np.ndarray, int], np.ndarray]:
        def fit(vectors: np.ndarray, seed: int) -> np.ndarray:
            model = MiniBatchKMeans(k, n_init=1, random_state=seed, **fields)
            return np.asarray(model.fit(vectors).cluster_centers_)

        return fit

    return {
        ENGINE: lambda vectors, seed: k_means(vectors, k, seed).centroids,
        SAMPLED: lambda vectors, seed: k_means(vectors, k, seed, sample=SAMPLE).centroids,
        MINI: mini(),
        LONG: mini(max_no_improvement=None, max_iter=passes),
        LLOYD: lambda vectors, seed: KMeans(
            k, n_init=1, random_state=seed).fit(vectors).cluster_centers_,
    }  # fmt: skip


def compare(name: str, vectors: np.ndarray, arguments: argparse.Namespace) -> None:
    costs: dict[str, list[Cost]] = {}
    inertias: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    chosen = {work: run for work, run in works(arguments.k, arguments.passes).items()
              if work not in arguments.without}  # fmt: skip
    for seed in range(arguments.rounds):
        for work, run in chosen.items():
            found: list[np.ndarray] = []
            forget_peak()
            before = memory_mib()["now"]
            cost = timed(lambda run=run, found=found, seed=seed: found.append(run(vectors, seed)))
            memory[work] = max(memory.get(work, 0.0), memory_mib()["peak"] - before)
            costs.setdefault(work, []).append(cost)
            inertias.setdefault(work, []).append(inertia(vectors, found[0]))
            say(f"{name}, seed {seed}: {work}, {cost.wall:,.1f} s")
    show(name, vectors, costs, inertias, memory)


def show(
    name: str, vectors: np.ndarray, costs: dict[str, list[Cost]],
    inertias: dict[str, list[float]], memory: dict[str, float],
) -> None:  # fmt: skip
    held = vectors.nbytes / 2**20
    lines = []
    for work, spent in costs.items():
        relative = [
            quartiles([a / b for a, b in zip(inertias[work], inertias[other], strict=True)]).show(4)
            if other in inertias else ""
            for other in (LLOYD, MINI)
        ]  # fmt: skip
        lines.append(
            [
                work,
                *(f"{quartiles([getattr(cost, clock) for cost in spent]).median:,.2f}"
                  for clock in ("wall", "cpu")),
                *relative, f"{memory[work]:,.0f}", f"{memory[work] / held:.2f}",
            ]
        )  # fmt: skip
    print_table(
        f"{name}: {len(vectors):,} x {vectors.shape[1]:,} ({held:,.0f} MiB)",
        ["", "wall s", "CPU s", "inertia / lloyd", "inertia / mini batch", "peak MiB", "of rows"],
        lines,
    )
    lines = []
    for ours in (ENGINE, SAMPLED):
        for other in (LLOYD, MINI, LONG):
            if ours in costs and other in costs:
                wall, cpu = ratios(costs[other], costs[ours])
                lines.append([f"{other} / {ours}", wall.show(2), cpu.show(2)])
    print_table("ratios, pair by pair", ["", "wall", "CPU"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--vectors", type=Path, nargs="*", default=[])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--without", nargs="*", default=[], help=f"of {', '.join(works(2, 1))}")
    parser.add_argument("--quick", action="store_true", help="20,000 x 128, k = 64")
    arguments = parser.parse_args(argv)
    shapes = [(200_000, 512), (70_000, 1280)]
    if arguments.rows:
        shapes = [(arguments.rows, arguments.width)]
    if arguments.quick:
        shapes, arguments.k, arguments.rounds = [(20_000, 128)], 64, 2
    print(machine("scikit-learn", "faiss-cpu"))
    print(f"k = {arguments.k}, {arguments.threads} threads, seeds 0 to {arguments.rounds - 1};"
          " median [quartiles]")  # fmt: skip
    faiss.omp_set_num_threads(arguments.threads)
    with threadpool_limits(arguments.threads):
        for file in arguments.vectors:
            vectors = np.ascontiguousarray(np.load(file), dtype=np.float32)
            compare(file.stem, vectors, arguments)
        if not arguments.vectors:
            for rows, width in shapes:
                compare("mixture", mixture(rows, width), arguments)


if __name__ == "__main__":
    main()
