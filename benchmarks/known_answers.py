"""Does the engine give the right verdict for studies with a known answer?

Whole studies of digits (`../shared/data/mnist`, 16 px, a `probe` with one hidden layer on pixels),
each from ingest to the verdict. The generator `folder` supplies the "generated" images, without
filters:

    reserve    real images of the rare classes that the study does not have: adding them helps
    noise      images under a wrong class: adding them harms
    copies     each image of the rare classes as often as `oversampled` draws it: equivalent to it
    repeated   each image of the rare classes once, twice, three times more: equivalent to the arm
               `repeated` of the same ratio
    subgroup   three of ten images are negatives, as of a second device, and negatives among the
               images of the folder have a wrong class: worse than real images for this device
               alone; with right classes for none
    two_tasks  digits (with four times the weight) and tone (half of the images are negatives),
               learned together: images of the folder have the right digit and the wrong tone:
               better for the one task, worse for the other; with the right tone worse for none
    null       two folders of images from one distribution, each at the ratio that is best on val,
               compared with each other; train, val, test and folders are drawn again each time

Simulated decisions by the engine's own functions, from image-level predictions
(`benchmarks.simulated`): four designs without a true difference, a difference that another study
calls detectable, and the coverage of the intervals of single arms.

`python -m benchmarks.known_answers [--only NAME …] [--first N] [--studies N] [--simulated N]
[--processes N] [--quick]`
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from scipy import stats

from benchmarks.simulated import DESIGNS, covered, noticed
from benchmarks.timing import machine, print_table
from engine.comparison.predictions import score
from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.progress import Bar
from engine.core.rng import generator
from engine.core.store import Store
from engine.execute import execute
from engine.plan import named, plan
from engine.profile import Profile
from engine.report.sections.subgroups import losing_arms
from engine.results.comparison import Contrast, Effect, EvaluateResult, Subgroup, TaskResult
from engine.runtime.inline import InlineRuntime
from engine.study import Study

DATA = Path(__file__).parents[2] / "shared" / "data" / "mnist"
RARE = ("7", "8", "9")
TONES = ("plain", "negative")
COMMON, FEW = 60, 15  # training images of a class
WANTED = {"reserve": "helps", "noise": "harms", "copies": "equivalent"}
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


def write_split(
    root: Path, split: str, images: Mapping[str, Sequence[bytes]],
    devices: Mapping[str, Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """A Parquet file of the images of each class, and the device of each where given."""
    root.mkdir(parents=True, exist_ok=True)
    pairs = [(data, label) for label, members in images.items() for data in members]
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": data, "path": None} for data, _ in pairs],
        "label": [label for _, label in pairs],
    }
    if devices is not None:
        columns["device"] = [device for label in images for device in devices[label]]
    pq.write_table(pa.table(columns), root / f"{split}.parquet")


def write_folder(root: Path, images: Mapping[str, Sequence[bytes]]) -> None:
    for label, held in images.items():
        folder = root / label
        folder.mkdir(parents=True)
        for number, data in enumerate(held):
            (folder / f"{number:05d}.png").write_bytes(data)


def negative(data: bytes) -> bytes:
    """The image with black and white exchanged."""
    target = io.BytesIO()
    ImageOps.invert(Image.open(io.BytesIO(data)).convert("L")).save(target, "PNG")
    return target.getvalue()


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


def evaluated_manifests(study: Study, root: Path) -> tuple[Manifest, Manifest]:
    """Run a study up to its verdict; the manifests of `ingest` and `evaluate`."""
    steps = plan(study)
    last = steps.index(named(steps, "evaluate")[0])
    store, profile = Store(str(root / "runs")), Profile.model_validate({"runtime": "inline"})
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        made = execute(steps[: last + 1], store, InlineRuntime(), profile)
    return made[named(steps, "ingest")[0].key], made[steps[last].key]


def judged(study: Study, root: Path, arm: str = "", against: str = "") -> Contrast:
    """The study's contrast, or that of two families, each at the ratio chosen on val."""
    ingest, manifest = evaluated_manifests(study, root)
    evaluated = EvaluateResult.of(manifest)
    if not arm:
        return evaluated.contrasts[0]
    store = Store(str(root / "runs"))
    path = root / "predictions.parquet"
    table = pa.concat_tables(store.tables(manifest.keys(table="predictions")))
    chosen = {result.family: name for name, result in evaluated.arms.items()}
    # These two alone: a correction for contrasts that nobody asks about would hide false ones.
    two = pa.array([chosen[arm], chosen[against]])
    pq.write_table(table.filter(pc.is_in(table[rows.ARM], two)), path)
    scored = score(study, store, ingest, "class", path, chosen[against])
    return next(one for one in scored.contrasts if one.arm == chosen[arm])


def repeated(ratio: int, seed: int) -> Contrast:
    """`ratio` copies of each image of the rare classes, against as many drawn by the engine."""
    with tempfile.TemporaryDirectory() as name:
        root, draw, test = Path(name), Draw("train", seed), Draw("test", seed)
        counts = {str(number): FEW if str(number) in RARE else COMMON for number in range(10)}
        train = {label: draw.take(label, count) for label, count in counts.items()}
        write_split(root / "data", "train", train)
        write_split(root / "data", "val", {label: draw.take(label, 60) for label in counts})
        write_split(root / "data", "test", {label: test.take(label, 800) for label in counts})
        write_folder(root / "made", {label: train[label] * ratio for label in RARE})
        study = study_of(
            root, ["made"], seed, request={"ratio": ratio, "classes": list(RARE)},
            search={"ratios": [ratio], "seeds": 20, "confirm_fits": 1, "arms": ["repeated"]},
        )  # fmt: skip
        return judged(study, root, "made", "repeated")


def subgroup(wrong: bool, seed: int) -> list[Subgroup]:
    """The comparison for each device. wrong: added images of the device `negative` have the next
    class."""
    with tempfile.TemporaryDirectory() as name:
        root, draw, test = Path(name), Draw("train", seed), Draw("test", seed)
        labels = [str(number) for number in range(10)]
        for split, source, count in (("train", draw, 60), ("val", draw, 60), ("test", test, 800)):
            write_split(
                root / "data", split,
                {label: [negative(data) if row < 0.3 * count else data
                         for row, data in enumerate(source.take(label, count))]
                 for label in labels},
                {label: ["negative" if row < 0.3 * count else "plain" for row in range(count)]
                 for label in labels},
            )  # fmt: skip
        made = {label: draw.take(label, 60) for label in labels}
        for number, label in enumerate(labels):
            of = labels[(number + 1) % 10] if wrong else label
            made[label] += [negative(data) for data in draw.take(of, 60)]
        write_folder(root / "made", made)
        values = study_of(
            root, ["made"], seed, request={"ratio": 1},
            search={"ratios": [1], "seeds": 2, "confirm_fits": 5},
            evaluate={"subgroups": ["device"]},
            task="class",
        ).model_dump(mode="json")  # fmt: skip
        values["reader"]["labels"] = {"class": "label", "device": "device"}
        _, manifest = evaluated_manifests(Study.model_validate(values), root)
        return EvaluateResult.of(manifest).subgroups


def two_tasks(wrong: bool, seed: int) -> dict[str, TaskResult]:
    """The comparison in each task. wrong: added images have the other tone."""
    with tempfile.TemporaryDirectory() as name:
        root, draw, test = Path(name), Draw("train", seed), Draw("test", seed)
        cells = [(str(number), tone) for number in range(10) for tone in TONES]
        for split, source, count in (("train", draw, FEW), ("val", draw, 30), ("test", test, 400)):
            images, digit, tone = [], [], []
            for label, kind in cells:
                images += [toned(data, kind) for data in source.take(label, count)]
                digit += [label] * count
                tone += [kind] * count
            (root / "data").mkdir(exist_ok=True)
            pq.write_table(
                pa.table({"image": [{"bytes": data, "path": None} for data in images],
                          "digit": digit, "tone": tone}),
                root / "data" / f"{split}.parquet",
            )  # fmt: skip
        # Folders are named as combinations of labels.
        write_folder(root / "made", {
            f"{label}, {kind}": [
                toned(data, TONES[TONES.index(kind) - 1] if wrong else kind)
                for data in draw.take(label, 3 * FEW)
            ]
            for label, kind in cells
        })  # fmt: skip
        values = study_of(
            root, ["made"], seed, request={"ratio": 2}, tasks={"digit": {"weight": 4}, "tone": {}},
            search={"ratios": [2], "seeds": 2, "confirm_fits": 5, "arms": []},
        ).model_dump(mode="json")  # fmt: skip
        values["reader"]["labels"] = {"digit": "digit", "tone": "tone"}
        _, manifest = evaluated_manifests(Study.model_validate(values), root)
        return EvaluateResult.of(manifest).tasks


def toned(data: bytes, tone: str) -> bytes:
    return negative(data) if tone == "negative" else data


def single(kind: str, seed: int, test_images: int = 800) -> Contrast:
    """One of the studies with a known verdict, with `test_images` of each class."""
    with tempfile.TemporaryDirectory() as name:
        root, draw = Path(name), Draw("train", seed)
        counts = {str(number): FEW if str(number) in RARE else COMMON for number in range(10)}
        train = {label: draw.take(label, count) for label, count in counts.items()}
        write_split(root / "data", "train", train)
        write_split(root / "data", "val", {label: draw.take(label, 60) for label in counts})
        test = Draw("test", seed)
        write_split(
            root / "data", "test", {label: test.take(label, test_images) for label in counts}
        )
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


def main() -> None:
    parser = argparse.ArgumentParser()
    every = [*WANTED, "repeated", "subgroup", "two_tasks", "null", *DESIGNS, "noticed", "covered"]
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    parser.add_argument("--studies", type=int, default=40, help="of null")
    parser.add_argument("--first", type=int, default=0, help="number of null's first study")
    parser.add_argument("--simulated", type=int, default=2000, help="of each design")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="a small reserve, and 12 of each design"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.only, arguments.simulated = ["reserve", *DESIGNS, "noticed", "covered"], 12
    print(machine("torch", "scipy"))
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        whole_studies(pool, arguments)
        false_claims(pool, arguments)
        if "subgroup" in arguments.only:
            devices(pool)
        if "two_tasks" in arguments.only:
            by_task(pool)
        if "noticed" in arguments.only:
            power(pool, arguments.simulated // 4)
        if "covered" in arguments.only:
            coverage(pool, arguments.simulated // 2)


def whole_studies(pool: ProcessPoolExecutor, arguments: argparse.Namespace) -> None:
    """Studies of real images, from ingest to the verdict."""
    lines = []
    for kind, want in WANTED.items():
        if kind not in arguments.only:
            continue
        found = pool.submit(single, kind, 1, 200 if arguments.quick else 800).result()
        lines.append([kind, f"{found.arm} against {found.against}", points(found.effect),
                      found.word, want])  # fmt: skip
        print(*lines[-1], flush=True)
    if "repeated" in arguments.only:
        for found in pool.map(partial(repeated, seed=1), (1, 2, 3)):
            lines.append(["repeated", f"{found.arm} against {found.against}",
                          points(found.effect), found.word, "equivalent"])  # fmt: skip
            print(*lines[-1], flush=True)
    if "null" in arguments.only:
        words: Counter[str] = Counter()
        numbers = range(arguments.first, arguments.first + arguments.studies)
        for found in counted("null", pool.map(null, numbers), len(numbers)):
            words[found.word] += 1
        shown = ", ".join(f"{number} {word}" for word, number in words.most_common())
        claims = words["helps"] + words["harms"]
        lines.append(["null", f"{len(numbers)} studies", shown, str(claims), "about 5%"])
    if lines:
        print_table(
            "Studies of real images",
            ["study", "contrast", "result", "verdict or number", "expected"], lines,
        )  # fmt: skip


def points(effect: Effect) -> str:
    interval = f"{100 * effect.low:+.1f} to {100 * effect.high:+.1f}"
    return f"{100 * effect.estimate:+.1f} ({interval}) points"


def devices(pool: ProcessPoolExecutor) -> None:
    """Whether images that harm one device are found, and whether others are accused."""
    lines = []
    kinds = (True, False)
    for wrong, parts in zip(kinds, pool.map(partial(subgroup, seed=1), kinds), strict=True):
        for part in parts:
            (effect,) = part.to_real.values()
            lines.append([
                "wrong class" if wrong else "right class", part.value, f"{part.images:,}",
                points(effect), "loses" if losing_arms(part, 5) else "",
                "loses" if wrong and part.value == "negative" else "",
            ])  # fmt: skip
            print(*lines[-1], flush=True)
    print_table(
        "Added negatives, and the comparison with real images for each device",
        ["negatives of", "device", "test images", "to real", "named", "expected"], lines,
    )  # fmt: skip


def by_task(pool: ProcessPoolExecutor) -> None:
    """Whether images that help one task and harm another are seen to do both."""
    lines, kinds = [], (True, False)
    for wrong, tasks in zip(kinds, pool.map(partial(two_tasks, seed=1), kinds), strict=True):
        for name, task in tasks.items():
            (effect,) = task.to_against.values()
            word = "gains" if effect.low > 0 else "loses" if effect.high < 0 else ""
            expected = "gains" if name == "digit" else "loses" if wrong else ""
            lines.append([
                "wrong tone" if wrong else "right tone", name, f"{task.images:,}", points(effect),
                word, expected,
            ])  # fmt: skip
            print(*lines[-1], flush=True)
    print_table(
        "Two tasks learned together, against real images", ["added", "task", "test images",
        "difference", "said", "expected"], lines,
    )  # fmt: skip


def false_claims(pool: ProcessPoolExecutor, arguments: argparse.Namespace) -> None:
    """How often each design, in which no arm is better, is said to help or to harm."""
    lines = []
    for name, design in DESIGNS.items():
        if name not in arguments.only:
            continue
        count = arguments.simulated
        made = list(counted(name, pool.map(design, range(count), chunksize=10), count))
        decided = [study for study in made if study.decided]
        false = [study for study in made if study.word in ("helps", "harms")]
        helps = sum(study.word == "helps" for study in made)
        equivalent = sum(study.word == "equivalent" for study in made)
        effects = np.asarray([study.effect for study in made])
        # Of a t distribution with few replicates the median has far less spread than the mean.
        bias = f"{np.median(effects):+.2f}"
        lines.append([
            name, f"{count:,}", share(helps, count), share(len(false), count),
            share(len(decided), count), share(len(false), len(decided)),
            share(equivalent, count), bias,
        ])  # fmt: skip
        print(*lines[-1], flush=True)
    if lines:
        print_table(
            "False claims, in % with Wilson's 95% interval",
            ["design", "studies", "helps", "helps or harms", "can be decided", "of these",
             "equivalent", "bias (standard errors)"],
            lines,
        )  # fmt: skip


def power(pool: ProcessPoolExecutor, count: int) -> None:
    """How often a study finds what another of its kind calls detectable."""
    lines = []
    for name in ("two folders", "40 patients"):
        run = partial(noticed, name)
        found = sum(counted(name, pool.map(run, range(count), chunksize=10), count))
        lines.append([name, f"{count:,}", share(found, count), "70 to 90"])
        print(*lines[-1], flush=True)
    print_table(
        "A difference that another study calls detectable, found in %",
        ["design", "studies", "found", "expected"], lines,
    )  # fmt: skip


def coverage(pool: ProcessPoolExecutor, count: int) -> None:
    """How often the interval of an arm contains the expected score of a new fit."""
    lines = []
    for images in (100, 300, 1000):
        run = partial(covered, images)
        made = list(counted(f"{images} images", pool.map(run, range(count), chunksize=10), count))
        lines.append([f"{images:,}", f"{count:,}",
                      *(share(sum(study[metric] for study in made), count)
                        for metric in ("accuracy", "macro_f1"))])  # fmt: skip
        print(*lines[-1], flush=True)
    print_table(
        "Coverage of 95% intervals of single arms, in %",
        ["test images", "studies", "accuracy", "macro-F1"], lines,
    )  # fmt: skip


def counted(name: str, results: Iterable[Any], count: int) -> Iterator[Any]:
    """The results, with a progress bar."""
    with Bar(name, count, "studies") as bar:
        for result in results:
            yield result
            bar.advance(1)


def share(part: int, whole: int) -> str:
    """A share in percent with Wilson's 95% interval."""
    if not whole:
        return "none"
    interval = stats.binomtest(part, whole).proportion_ci(method="wilson")
    return f"{100 * part / whole:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


if __name__ == "__main__":
    main()
