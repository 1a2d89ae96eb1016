"""Does the engine give the right verdict for studies with a known answer?

Whole studies of digits (`../shared/data/mnist`, 16 px, a `probe` with one hidden layer on pixels),
each from ingest to the verdict. The generator `folder` supplies the "generated" images, without
filters:

    reserve    real images of the rare classes that the study does not have: adding them helps
    noise      images under a wrong class: adding them harms
    copies     each image of the rare classes as often as `oversampled` draws it: equivalent to it
    null       two folders of images from one distribution, each at the ratio that is best on val,
               compared with each other: at most 15 of 200 studies may be significant
    planted    predictions of two arms that differ by as much as a similar study calls detectable:
               found in at least 70 of 100

`null` draws train, val, test and both folders again for each study. `planted` needs no training:
images differ in difficulty, and generator fits and images have random effects (see `simulated`).

`python -m benchmarks.known_answers [--only NAME …] [--first N] [--studies N] [--processes N]
[--quick]`
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.timing import machine, print_table
from engine.comparison.predictions import score
from engine.comparison.verdict import DeclaredContrast, Predictions, compare
from engine.core import rows
from engine.core.progress import Bar
from engine.core.rng import generator
from engine.core.store import Store
from engine.execute import execute
from engine.plan import named, plan
from engine.profile import Profile
from engine.results.comparison import Contrast, EvaluateResult
from engine.runtime.inline import InlineRuntime
from engine.settings import Evaluate
from engine.study import Study

DATA = Path(__file__).parents[2] / "shared" / "data" / "mnist"
RARE = ("7", "8", "9")
COMMON, FEW = 60, 15  # training images of a class
NULL_TRAIN, NULL_VAL, NULL_TEST, NULL_POOL = 20, 20, 40, 80  # of each class


@cache
def digits(split: str) -> tuple[list[bytes], np.ndarray]:
    """Encoded digits of mnist and their classes."""
    table = pq.read_table(DATA / f"{split}.parquet")
    images = [entry["bytes"] for entry in table["image"].to_pylist()]
    return images, table["label"].to_numpy()


class Draw:
    """Digits without replacement, class by class, in an order given by the seed."""

    def __init__(self, split: str, seed: int) -> None:
        self.images, labels = digits(split)
        self.left = {
            str(number): list(
                generator(seed, "draw", split, number).permutation(np.flatnonzero(labels == number))
            )
            for number in range(10)
        }

    def take(self, label: str, count: int) -> list[bytes]:
        return [self.images[self.left[label].pop()] for _ in range(count)]


def write_split(root: Path, split: str, images: Mapping[str, Sequence[bytes]]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    pairs = [(data, label) for label, held in images.items() for data in held]
    pq.write_table(
        pa.table(
            {
                "image": [{"bytes": data, "path": None} for data, _ in pairs],
                "label": [label for _, label in pairs],
            }
        ),
        root / f"{split}.parquet",
    )


def write_folder(root: Path, images: Mapping[str, Sequence[bytes]]) -> None:
    for label, held in images.items():
        folder = root / label
        folder.mkdir(parents=True)
        for number, data in enumerate(held):
            (folder / f"{number:05d}.png").write_bytes(data)


def study_of(root: Path, folders: Sequence[str], seed: int, **fields: Any) -> Study:
    values: dict[str, Any] = {
        "name": "known", "seed": seed,
        "reader": {"name": "parquet", "root": str(root / "data")},
        "preprocess": {"size": 16, "channels": "L"},
        "split": {"group": "none"}, "audit": {"on_leak": "drop"},
        "generators": {
            name: {"name": "folder", "reader": {"name": "imagefolder", "root": str(root / name)}}
            for name in folders
        },
        "curate": {"filters": [], "max_rounds": 1}, "cluster": {"k": 1},
        "fidelity": {"enabled": False},
        "classifier": {"name": "probe", "hidden": 64},
        "training": {"steps": 150, "batch_size": 32, "learning_rate": 3e-3, "evaluate_every": 50},
        **fields,
    }  # fmt: skip
    return Study.model_validate(values)


def judged(study: Study, root: Path, arm: str = "", against: str = "") -> Contrast:
    """The study's contrast, or that of two families, each at the ratio chosen on val."""
    steps = plan(study)
    last = steps.index(named(steps, "evaluate")[0])
    store, profile = Store(str(root / "runs")), Profile.model_validate({"runtime": "inline"})
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        made = execute(steps[: last + 1], store, InlineRuntime(), profile)
    manifest = made[steps[last].key]
    evaluated = EvaluateResult.of(manifest)
    if not arm:
        return evaluated.contrasts[0]
    path = root / "predictions.parquet"
    table = pa.concat_tables(store.tables(manifest.keys(table="predictions")))
    chosen = {result.family: name for name, result in evaluated.arms.items()}
    # These two alone: a correction for contrasts that nobody asks about would hide false ones.
    two = pa.array([chosen[arm], chosen[against]])
    pq.write_table(table.filter(pc.is_in(table[rows.ARM], two)), path)
    ingest = made[named(steps, "ingest")[0].key]
    scored = score(study, store, ingest, "class", path, chosen[against])
    return next(one for one in scored.contrasts if one.arm == chosen[arm])


def single(kind: str, seed: int) -> Contrast:
    """One of the studies with a known verdict."""
    with tempfile.TemporaryDirectory() as name:
        root, draw = Path(name), Draw("train", seed)
        counts = {str(number): FEW if str(number) in RARE else COMMON for number in range(10)}
        train = {label: draw.take(label, count) for label, count in counts.items()}
        write_split(root / "data", "train", train)
        write_split(root / "data", "val", {label: draw.take(label, 60) for label in counts})
        test = Draw("test", seed)
        write_split(root / "data", "test", {label: test.take(label, 800) for label in counts})
        request: dict[str, Any] = {"ratio": 3, "classes": list(RARE)}
        search: dict[str, Any] = {"ratios": [3], "seeds": 2, "confirm_fits": 5}
        against = ""
        if kind == "reserve":
            made = {label: draw.take(label, 10 * FEW) for label in RARE}
        elif kind == "noise":
            request, search["ratios"] = {"ratio": 1}, [1]
            made = {
                label: draw.take(str((int(label) + 1) % 10), 2 * count)
                for label, count in counts.items()
            }
        else:
            # As often as `oversampled` draws them: every class as the common ones.
            made = {label: train[label] * (COMMON // FEW - 1) for label in RARE}
            search |= {"seeds": 20, "confirm_fits": 1}
            against = "oversampled"
        write_folder(root / "made", made)
        study = study_of(root, ["made"], seed, request=request, search=search)
        return judged(study, root, "made" if against else "", against)


def null(seed: int) -> Contrast:
    """Two folders from one distribution, compared with each other."""
    with tempfile.TemporaryDirectory() as name:
        root, draw, test = Path(name), Draw("train", seed), Draw("test", seed)
        labels = [str(number) for number in range(10)]
        for split, count in (("train", NULL_TRAIN), ("val", NULL_VAL)):
            write_split(root / "data", split, {one: draw.take(one, count) for one in labels})
        write_split(root / "data", "test", {one: test.take(one, NULL_TEST) for one in labels})
        for folder in ("one", "other"):
            write_folder(root / folder, {label: draw.take(label, NULL_POOL) for label in labels})
        study = study_of(
            root, ["one", "other"], seed, request={"ratio": 2},
            search={"ratios": [0.5, 1, 2], "seeds": 5, "confirm_fits": 5, "arms": []},
        )  # fmt: skip
        return judged(study, root, "one", "other")


def simulated(gain: float, seed: int) -> Predictions:
    """Predictions of two arms with five fits each, for 372 images in four classes. Each image has a
    difficulty and each fit a random effect. The second arm's logit of a correct prediction is
    higher, so that its accuracy rises by `gain` on average."""
    random = np.random.default_rng(seed)
    labels = np.arange(372) % 4
    hard = random.normal(1.5, 2.0, len(labels))

    def right(shift: float) -> float:
        return float((1 / (1 + np.exp(-(_MANY + shift)))).mean())

    low, high = 0.0, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if right(middle) - right(0) < gain else (low, middle)
    probabilities = {}
    for arm, shift in (("real", 0.0), ("made", low)):
        found = []
        for _ in range(5):
            chance = 1 / (1 + np.exp(-(hard + shift + random.normal(0, 0.1))))
            wrong = (labels + random.integers(1, 4, len(labels))) % 4
            said = np.where(random.random(len(labels)) < chance, labels, wrong)
            found.append(np.eye(4, dtype=np.float32)[said])
        probabilities[arm] = np.stack(found)
    groups = np.arange(len(labels)).astype(str)
    return Predictions(("a", "b", "c", "d"), labels, groups, probabilities, 5)


_MANY = np.random.default_rng(0).normal(1.5, 2.0, 100_000)


def planted(seed: int) -> Contrast:
    """One study without a difference gives the detectable difference; another has a difference of
    that size."""

    def contrast(gain: float, seed: int) -> Contrast:
        (found,) = compare(
            simulated(gain, seed),
            [DeclaredContrast("made", ("real",), "real", "real")],
            "accuracy",
            Evaluate(),
            seed,
        )
        return found

    detectable = contrast(0.0, 2 * seed).detectable
    assert detectable is not None, "five fits suffice"
    return contrast(detectable, 2 * seed + 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    every = ["reserve", "noise", "copies", "null", "planted"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--studies", type=int, default=200, help="of null")
    parser.add_argument("--first", type=int, default=0, help="number of null's first study")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="reserve, and planted twice")
    arguments = parser.parse_args()
    planted_studies = 100
    if arguments.quick:
        arguments.only, planted_studies = ["reserve", "planted"], 2
    print(machine("torch", "scipy"))
    os.environ["OMP_NUM_THREADS"] = "1"
    lines = []
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        for kind in ("reserve", "noise", "copies"):
            if kind not in arguments.only:
                continue
            found = pool.submit(single, kind, 1).result()
            interval = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
            want = {"reserve": "helps", "noise": "harms", "copies": "equivalent"}[kind]
            effect = f"{100 * found.effect.estimate:+.1f} ({interval}) points"
            lines.append([kind, f"{found.arm} against {found.against}", effect,
                          found.word, want])  # fmt: skip
            print(*lines[-1], flush=True)
        for kind, run, first, count in (
            ("null", null, arguments.first, arguments.studies),
            ("planted", planted, 0, planted_studies),
        ):  # fmt: skip
            if kind not in arguments.only:
                continue
            words: Counter[str] = Counter()
            with Bar(kind, count, "studies") as bar:
                for found in pool.map(run, range(first, first + count)):
                    words[found.word] += 1
                    bar.advance(1, ", ".join(f"{n} {word}" for word, n in words.items()))
            significant = words["helps"] + words["harms"]
            told = ", ".join(f"{number} {word}" for word, number in words.most_common())
            found_ones = significant if kind == "null" else words["helps"]
            want = f"≤ {0.075 * count:g}" if kind == "null" else "≥ 70"
            lines.append([kind, f"{count} studies", told, str(found_ones), want])
    print_table(
        "Known answers", ["study", "contrast", "result", "verdict or number", "expected"], lines
    )


if __name__ == "__main__":
    main()
